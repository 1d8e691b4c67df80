"""AWS KMS over HTTP: moto's server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "the-key-id",
    "AWS_SECRET_ACCESS_KEY": "the-secret-access-key-of-the-tests",
    "AWS_EC2_METADATA_DISABLED": "true",
}
REGION = "eu-central-1"


class _Quiet(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        """Say nothing."""


@dataclass
class AwsKms:
    """A region's KMS.

    Attributes:
        address: Where it answers.
        away: Answers 503 while set.
        refuse: Answers with this error code while set; moto itself refuses little.
    """

    address: str = ""
    away: bool = False
    refuse: str = ""

    @property
    def client(self) -> Any:
        """The SDK's client."""
        return boto3.client(
            "kms",
            endpoint_url=self.address,
            region_name=REGION,
            aws_access_key_id="x",
            aws_secret_access_key="x",
        )

    def make_key(self) -> str:
        """Make a key; return its ARN."""
        arn: str = self.client.create_key()["KeyMetadata"]["Arn"]
        return arn


@contextmanager
def serving_aws() -> Iterator[AwsKms]:
    """Serve KMS on a loopback port."""
    kms = AwsKms()
    app = DomainDispatcherApplication(create_backend_app)

    def door(environment: dict[str, Any], start_response: Any) -> Any:
        if kms.away:
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        if kms.refuse:
            body = json.dumps({"__type": kms.refuse}).encode()
            start_response("400 Bad Request", [("Content-Length", str(len(body)))])
            return [body]
        return app(environment, start_response)

    server = make_server("127.0.0.1", 0, door, threaded=True, request_handler=_Quiet)
    kms.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield kms
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
