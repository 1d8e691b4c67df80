"""S3-compatible storage over TLS: moto's server, behind a door that can spoil or refuse."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from tests.transport.pki import Ca

BUCKET = "backups"
SECRET = "the-secret-access-key-of-the-tests"


class _Quiet(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        """Say nothing."""


class ObjectStorage:
    """A bucket on a port of this machine.

    Attributes:
        requests: Method and path with query of each request.
        spoil: Whether the objects that are read have a changed byte.
        refuse: Codes to answer with 403, by method.
        go_on: While it is not set, uploads get no answer.
    """

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        self.spoil = False
        self.refuse: dict[str, str] = {}
        self.go_on = threading.Event()
        self.go_on.set()
        ca = Ca("storage CA")
        self.ca = folder / "storage-ca.crt"
        self.ca.write_bytes(ca.pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*ca.server().write(folder, "storage"))
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server(
            "127.0.0.1", 0, self._door, threaded=True, request_handler=_Quiet, ssl_context=context
        )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"https://localhost:{self._server.server_port}"
        self.client = boto3.client(
            "s3",
            endpoint_url=self.url,
            verify=str(self.ca),
            aws_access_key_id="reset",
            aws_secret_access_key="reset",
            region_name="us-east-1",
        )
        # Its state is the process's: what an earlier one held is gone with this.
        for bucket in self.client.list_buckets()["Buckets"]:
            for name in self._names(bucket["Name"]):
                self.client.delete_object(Bucket=bucket["Name"], Key=name)
            self.client.delete_bucket(Bucket=bucket["Name"])
        self.client.create_bucket(Bucket=BUCKET)
        self.requests.clear()

    def environment(self) -> dict[str, str]:
        """Return what leads a job here."""
        return {
            "AWS_ACCESS_KEY_ID": "AKIATESTSONLY",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_CA_BUNDLE": str(self.ca),
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_CONFIG_FILE": "/nonexistent",
        }

    def names(self) -> list[str]:
        """Return the keys in the bucket."""
        return self._names(BUCKET)

    def put(self, name: str, content: bytes = b"x") -> None:
        """Put an object there as anybody may."""
        self.client.put_object(Bucket=BUCKET, Key=name, Body=content)

    def get(self, name: str) -> bytes:
        """Return an object's content."""
        content: bytes = self.client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
        return content

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _names(self, bucket: str) -> list[str]:
        return [item["Key"] for item in self.client.list_objects_v2(Bucket=bucket).get("Contents", [])]

    def _door(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        self.requests.append(f"{method} {environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}")
        if method in self.refuse:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            # Real servers quote what was sent.
            body = (
                f"<Error><Code>{self.refuse[method]}</Code><Message>key {SECRET}</Message></Error>".encode()
            )
            start_response("403 Forbidden", [("Content-Length", str(len(body)))])
            return [body]
        if method == "PUT":
            self.go_on.wait()
        answer = b"".join(self._app(environ, start_response))
        if self.spoil and method == "GET" and environ["PATH_INFO"].endswith(".export"):
            return [answer[:-1] + bytes([answer[-1] ^ 1])]
        return [answer]
