"""A stand-in for the Kubernetes API server over TLS: takes Events, and refuses what a real one refuses."""

from __future__ import annotations

import json
import re
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from tests.transport.pki import Ca

TOKEN: Final = "token-of-the-job"
PATH: Final = "/apis/events.k8s.io/v1/namespaces/kms/events"
POD: Final = {"POD_NAME": "rotate-29-x7k2p", "POD_NAMESPACE": "kms", "POD_UID": "0d3b-11"}


class EventsApi:
    """Keeps the Events that it accepted.

    Attributes:
        events: Bodies, in order.
        refuse: Status to answer with instead, 0 for none.
    """

    def __init__(self, folder: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self.refuse = 0
        self.requests = 0
        api = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def do_POST(self) -> None:
                api.answer(self)

        ca = Ca("API CA")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*ca.server().write(folder, "api"))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        (folder / "api-ca.crt").write_bytes(ca.pem)
        self.kubeconfig = folder / "kubeconfig"
        server = f"https://127.0.0.1:{self._server.server_address[1]}"
        cluster = {"server": server, "certificate-authority": str(folder / "api-ca.crt")}
        self.kubeconfig.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "c",
                    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                    "clusters": [{"name": "c", "cluster": cluster}],
                    "users": [{"name": "u", "user": {"token": TOKEN}}],
                }
            )
        )

    @property
    def reasons(self) -> list[str]:
        """The reasons of the events, in order."""
        return [event["reason"] for event in self.events]

    def environment(self) -> dict[str, str]:
        """Return the environment of a pod whose API this is."""
        return {**POD, "KUBECONFIG": str(self.kubeconfig), "KUBERNETES_SERVICE_HOST": ""}

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        self.requests += 1
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(request, 401, {"reason": "Unauthorized"})
        elif self.refuse:
            self._send(request, self.refuse, {"reason": f"refused: {body}"})
        elif request.path.partition("?")[0] != PATH:
            self._send(request, 404, {"reason": "NotFound"})
        elif wrong := self._wrong(body):
            self._send(request, 422, {"reason": f"Invalid: {wrong}"})
        else:
            self.events.append(body)
            self._send(request, 201, body)

    @staticmethod
    def _wrong(body: dict[str, Any]) -> str:
        """Return what the API server's validation of a new Event finds (events.k8s.io/v1)."""
        wanted = ["reportingController", "reportingInstance", "action", "reason", "regarding", "metadata"]
        missing = [name for name in wanted if not body.get(name)]
        if missing:
            return f"missing {missing}"
        labels = str(body["metadata"].get("name", "")).split(".")
        time = re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|\+00:00)", body["eventTime"])
        rules = {
            "name": all(re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", label) for label in labels),
            "eventTime": time is not None,
            "type": body["type"] in {"Normal", "Warning"},
            "length": len(body["note"]) <= 1024 and max(len(body[name]) for name in wanted[1:4]) <= 128,
            "namespace": body["regarding"]["namespace"] == body["metadata"]["namespace"],
            "reportingController": "/" in body["reportingController"],
        }
        return ", ".join(name for name, kept in rules.items() if not kept)

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, code: int, value: object) -> None:
        data = json.dumps(value).encode()
        request.send_response(code)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
