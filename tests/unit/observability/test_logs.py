"""Nothing secret reaches a log line, however it gets there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.observability.logs import redact

SECRET = "5EC2E7"
NAMES = [
    "kek",
    "dek",
    "key",
    "keys",
    "raw_key",
    "master_key",
    "master_key_hex",
    "key_hex",
    "wrapped",
    "wrapped_dek",
    "plaintext",
    "plaintexts",
    "ciphertext",
    "aad",
    "password",
    "store_password",
    "secret",
    "secrets",
    "token",
    "tokens",
    "authorization",
    "Authorization",
    "body",
    "dek_b64",
    "key_bytes",
    "PASSWORD",
    "passphrase",
    "credentials",
    "private_key_pem",
]


def redacted(**fields: Any) -> str:
    """Return an event as it would be rendered."""
    return json.dumps(redact(None, "info", fields))


@pytest.mark.parametrize("name", NAMES)
def test_fields_named_like_secrets_are_hidden(name: str) -> None:
    """At the top, in a mapping, in a list of mappings; whatever form the value has."""
    for value in (SECRET, [SECRET], {"x": SECRET}, None):
        shown = redacted(event="e", **{name: value, "more": [{"deep": ({name: value},)}]})
        assert SECRET not in shown
        assert shown.count("<redacted>") == 2


@pytest.mark.parametrize("value", [b"5EC2E7", bytearray(b"5EC2E7"), memoryview(b"5EC2E7")])
def test_bytes_are_hidden_wherever_they_are(value: Any) -> None:
    """Raw bytes have no place in a log, under any name and at any depth."""
    shown = redacted(event="e", blob=value, nested={"list": [(value, {"x": value, b"5EC2E7": 1})]})
    assert SECRET not in shown
    assert shown.count("<redacted>") == 4


@pytest.mark.parametrize(
    "name",
    ["key_id", "kek_version", "kek_id", "thread_id", "source_key", "idempotency_key", "detail", "keyboard"],
)
def test_names_and_numbers_stay(name: str) -> None:
    """What operators need to find a key is no secret."""
    assert "shown" in redacted(event="e", **{name: "shown"})
    assert "7" in redacted(event="e", keys=7)


nested = st.recursive(
    st.binary(min_size=4).map(lambda raw: b"5EC2E7" + raw),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(nested)
def test_no_depth_hides_bytes(value: Any) -> None:
    """Lists, tuples and mappings in any order."""
    assert SECRET not in redacted(event="e", value=value)


PROGRAM = """
import logging, structlog
from progressdb_kms.observability.logs import configure_logs
configure_logs("debug", "{style}")
log = structlog.get_logger("kms")
structlog.contextvars.bind_contextvars(request_id="r1")
log.info("hello", key_id="k_1", plaintext="5EC2E7", nested=[dict(dek=b"5EC2E7")])
logging.getLogger("library").warning("from a library")
logging.getLogger("redis").debug("5EC2E7")
def inner(secret_argument):
    local = "5EC2E7" + secret_argument
    raise ValueError("broken")
secret = "5EC2E7"
try:
    inner(secret)
except ValueError:
    log.exception("failed", route="/x")
    logging.getLogger("library").exception("failed there")
"""


@pytest.mark.parametrize("style", ["json", "text"])
def test_lines_are_structured_and_tracebacks_show_no_values(style: str) -> None:
    """On standard error; with the request id; libraries too; what is debugged on the wire is off."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{style}", style)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == ""
    # Source lines belong to a traceback, as Python 3.13 shows them of this program too; values do not.
    shown = re.sub(r'local = \\?"5EC2E7\\?" \+', "", done.stderr)
    assert SECRET not in shown
    assert "ValueError: broken" in done.stderr
    if style == "json":
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        assert [line["event"] for line in lines] == ["hello", "from a library", "failed", "failed there"]
        assert all(line["request_id"] == "r1" for line in lines)
        assert all({"level", "timestamp"} <= set(line) for line in lines)
        assert lines[0]["plaintext"] == "<redacted>"
        assert lines[0]["key_id"] == "k_1"
