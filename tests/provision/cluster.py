"""A stand-in for the Kubernetes API server: Secrets over HTTPS, with resourceVersions and their conflicts."""

from __future__ import annotations

import base64
import json
import ssl
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.transport.pki import Ca

TOKEN = "token-of-the-job"
Name = tuple[str, str]
"""Namespace and name."""


class Cluster:
    """Holds Secrets and answers GET, POST and PATCH of them.

    Args:
        folder: For its certificate and the kubeconfig.

    Attributes:
        secrets: The Secrets as they are now.
        requests: Method, namespace and name of what came, in order.
        writes: How many writes were taken.
        writes_left: Taken before the server stops answering; None for no end. Once it is 0, every
            request hangs up.
        before: Called before a request is looked at: another writer.
        refuse: Status to answer with instead, by method.
    """

    def __init__(self, folder: Path) -> None:
        self.secrets: dict[Name, dict[str, Any]] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.writes = 0
        self.writes_left: int | None = None
        self.before: Callable[[str, Name], None] = lambda _method, _name: None
        self.refuse: dict[str, int] = {}
        self._revision = 0
        self._lock = threading.RLock()
        self._ca = Ca("cluster CA")
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def do_GET(self) -> None:
                cluster._answer(self)

            do_POST = do_PATCH = do_GET  # noqa: N815 - names that http.server looks for

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self._ca.server().write(folder, "apiserver"))
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.kubeconfig = folder / "kubeconfig"
        self._write_kubeconfig()

    def put(self, name: str, data: dict[str, bytes], namespace: str = "kms", **metadata: Any) -> None:
        """Make or replace a Secret as anyone may."""
        with self._lock:
            self._revision += 1
            self.secrets[namespace, name] = {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {
                    "name": name,
                    "namespace": namespace,
                    "uid": str(uuid.uuid4()),
                    "annotations": {},
                    **metadata,
                    "resourceVersion": str(self._revision),
                },
                "type": "Opaque",
                "data": {key: base64.b64encode(value).decode() for key, value in data.items()},
            }

    def data(self, name: str, namespace: str = "kms") -> dict[str, bytes]:
        """Return what a Secret holds."""
        data = self.secrets[namespace, name]["data"]
        return {key: base64.b64decode(value) for key, value in data.items()}

    def set(self, name: str, namespace: str = "kms", **data: bytes) -> None:
        """Change a Secret's data as anyone may; ``_`` in a key stands for ``.``."""
        with self._lock:
            secret = self.secrets[namespace, name]
            for key, value in data.items():
                secret["data"][key.replace("_", ".")] = base64.b64encode(value).decode()
            self._revision += 1
            secret["metadata"]["resourceVersion"] = str(self._revision)

    def metadata(self, name: str, namespace: str = "kms") -> dict[str, Any]:
        """Return a Secret's metadata."""
        found: dict[str, Any] = self.secrets[namespace, name]["metadata"]
        return found

    def revisions(self) -> dict[Name, str]:
        """Return the resourceVersion of each Secret."""
        return {name: secret["metadata"]["resourceVersion"] for name, secret in self.secrets.items()}

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        method = request.command
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        parts = request.path.partition("?")[0].split("/")
        # /api/v1/namespaces/NAMESPACE/secrets[/NAME]
        assert parts[:4] == ["", "api", "v1", "namespaces"], request.path
        sent = json.loads(body) if body else {}
        name = (parts[4], parts[6] if len(parts) > 6 else sent.get("metadata", {}).get("name", ""))
        self.requests.append((method, *name))
        self.before(method, name)
        with self._lock:
            if self.writes_left == 0:
                request.close_connection = True
                return
            if request.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._status(request, 401, "Unauthorized")
            elif method in self.refuse:
                # Real servers quote what was sent.
                self._status(request, self.refuse[method], f"refused: {body.decode()}")
            elif method == "GET":
                if name in self.secrets:
                    _send(request, 200, self.secrets[name])
                else:
                    self._status(request, 404, "NotFound")
            else:
                self._write(request, method, name, sent)

    def _write(self, request: BaseHTTPRequestHandler, method: str, name: Name, sent: dict[str, Any]) -> None:
        if method == "POST" and name in self.secrets:
            self._status(request, 409, "AlreadyExists")
            return
        if method == "PATCH" and name not in self.secrets:
            self._status(request, 404, "NotFound")
            return
        if method == "PATCH":
            secret = self.secrets[name]
            if sent["metadata"]["resourceVersion"] != secret["metadata"]["resourceVersion"]:
                self._status(request, 409, "Conflict")
                return
            secret["data"] |= sent.get("data", {})
            secret["metadata"]["annotations"] |= sent["metadata"].get("annotations", {})
        else:
            secret = sent
            secret["metadata"]["uid"] = str(uuid.uuid4())
            self.secrets[name] = secret
        self._revision += 1
        secret["metadata"]["resourceVersion"] = str(self._revision)
        self.writes += 1
        if self.writes_left is not None:
            self.writes_left -= 1
        _send(request, 200 if method == "PATCH" else 201, secret)

    def _status(self, request: BaseHTTPRequestHandler, code: int, reason: str) -> None:
        _send(request, code, {"kind": "Status", "status": "Failure", "reason": reason, "code": code})

    def _write_kubeconfig(self) -> None:
        port = self._server.server_address[1]
        authority = base64.b64encode(self._ca.pem).decode()
        cluster = {"server": f"https://127.0.0.1:{port}", "certificate-authority-data": authority}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": {"token": TOKEN}}],
        }
        self.kubeconfig.write_text(json.dumps(config))

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _send(request: BaseHTTPRequestHandler, code: int, value: object) -> None:
    data = json.dumps(value).encode()
    request.send_response(code)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)
