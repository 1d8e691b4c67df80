"""A stand-in for the Kubernetes API server: Secrets with resourceVersions and their conflicts."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "token-of-the-job"


class SecretsApi:
    """Holds one Secret and answers GET and PATCH of it.

    Attributes:
        secret: The Secret as it is now.
        requests: Methods that came, in order.
        before_patch: Called before a patch is looked at: another writer.
        refuse: Status to answer with instead, by method.
    """

    def __init__(self, data: dict[str, bytes], **metadata: Any) -> None:
        self.secret: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "kek", "namespace": "kms", "resourceVersion": "1", **metadata},
            "data": {name: base64.b64encode(value).decode() for name, value in data.items()},
        }
        self.requests: list[str] = []
        self.before_patch: Callable[[], None] = lambda: None
        self.refuse: dict[str, int] = {}
        self.patched: Callable[[], None] = lambda: None
        api = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def do_GET(self) -> None:
                api.answer(self, "GET")

            def do_PATCH(self) -> None:
                api.answer(self, "PATCH")

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def write(self, data: dict[str, bytes]) -> None:
        """Change the Secret as anyone may."""
        self.secret["data"] |= {name: base64.b64encode(value).decode() for name, value in data.items()}
        version = int(self.secret["metadata"]["resourceVersion"]) + 1
        self.secret["metadata"]["resourceVersion"] = str(version)

    def content(self, name: str = "kek.yaml") -> bytes:
        """Return a key's content."""
        return base64.b64decode(self.secret["data"][name])

    def answer(self, request: BaseHTTPRequestHandler, method: str) -> None:
        """Answer one request as an API server does."""
        self.requests.append(method)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._status(request, 401, "Unauthorized")
        elif method in self.refuse:
            # Real servers quote what was sent.
            self._status(request, self.refuse[method], f"refused: {body.decode()}")
        elif request.path.partition("?")[0] != "/api/v1/namespaces/kms/secrets/kek":
            self._status(request, 404, "NotFound")
        elif method == "GET":
            self._send(request, 200, self.secret)
        else:
            self.before_patch()
            patch = json.loads(body)
            if patch["metadata"]["resourceVersion"] != self.secret["metadata"]["resourceVersion"]:
                self._status(request, 409, "Conflict")
                return
            self.write({name: base64.b64decode(value) for name, value in patch["data"].items()})
            self.patched()
            self._send(request, 200, self.secret)

    def _status(self, request: BaseHTTPRequestHandler, code: int, reason: str) -> None:
        self._send(request, code, {"kind": "Status", "status": "Failure", "reason": reason, "code": code})

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, code: int, value: object) -> None:
        data = json.dumps(value).encode()
        request.send_response(code)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def write_kubeconfig(self, path: Path) -> None:
        """Write how to get here."""
        port = self._server.server_address[1]
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "c",
                    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                    "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
                    "users": [{"name": "u", "user": {"token": TOKEN}}],
                }
            )
        )

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
