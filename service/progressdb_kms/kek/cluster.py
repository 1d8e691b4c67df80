"""Access to the Kubernetes API: who is asked, and what its errors may show.

Bodies of requests and answers hold keys. The client's own log of them is never on, and of an error only the
status and its reason are passed on: what the server says beside them quotes the request.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from urllib3.exceptions import HTTPError

NOT_FOUND: Final = 404
CONFLICT: Final = 409
TIMEOUT: Final = 10
"""Seconds for one request."""


class ApiRefused(Exception):
    """Kubernetes refused a request, or gave no answer.

    Attributes:
        status: The HTTP status, 0 without an answer.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


def connect() -> client.ApiClient:
    """Return the client of the cluster that this runs in, or else of the kubeconfig; to be closed.

    Raises:
        ApiRefused: There is neither.
    """
    configuration = client.Configuration()
    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST"):
            config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
        else:
            config.load_kube_config(  # type: ignore[no-untyped-call]
                os.environ.get("KUBECONFIG"), client_configuration=configuration
            )
    except ConfigException as error:
        raise ApiRefused(0, f"no access to Kubernetes: {error}") from None
    configuration.debug = False
    configuration.retries = False
    return client.ApiClient(configuration)


def called(what: str, verb: str, call: Callable[[], Any]) -> Any:  # noqa: ANN401 - the client has no types
    """Call the API.

    Args:
        what: What is asked for, for the message.
        verb: The verb that a role has to have.
        call: Does it.

    Raises:
        ApiRefused: Names the verb, the object, status and reason, and nothing that was sent.
    """
    status = 0
    try:
        return call()
    except ApiException as error:
        status, reason = error.status or 0, error.reason
    except (HTTPError, OSError) as error:
        reason = type(error).__name__
    # Outside the handler, so that the client's error, which quotes bodies, is not this one's context.
    raise ApiRefused(status, f"Kubernetes does not let us {verb} {what}: {status or ''} {reason}")
