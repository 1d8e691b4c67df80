"""Schemathesis over the service's own OpenAPI document: what it promises is what it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.dev_service import DevService
from tests.contract.wire_client import Client, b64

CONFIG = """
# Half of the time a key that exists and a ciphertext that opens under it: without them nearly every
# answer would be 404 or 422, and little would be tested.
[dictionaries.keys]
values = {keys}

[dictionaries.ciphertexts]
values = {ciphertexts}

[parameters]
"path.key_id" = {{ dictionary = "keys", probability = 0.5 }}
"query.key_id" = {{ dictionary = "keys", probability = 0.5 }}
"body.key_id" = {{ dictionary = "keys", probability = 0.5 }}
"body.ciphertext" = {{ dictionary = "ciphertexts", probability = 0.5 }}
"body.items[*].key_id" = {{ dictionary = "keys", probability = 0.5 }}
"body.items[*].ciphertext" = {{ dictionary = "ciphertexts", probability = 0.5 }}

[checks]
# A 503 that may be tried again is an answer that the document promises, and a busy machine gives.
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 503]

[[operations]]
include-path-regex = "_batch$"
# By contract an item that breaks its schema is that item's error within a 200, so that one bad item
# doesn't undo the others; the tests of batches check each such error.
checks.negative_data_rejection.enabled = false

[[operations]]
include-name = "POST /decrypt"
# No schema can say which ciphertexts are authentic.
checks.positive_data_acceptance.expected-statuses = ["2xx", "404", "409", "422"]

[[operations]]
include-name = "GET /v1/keys"
# A cursor is opaque, so no schema can say which strings are one; the tests of lists page with real ones.
checks.positive_data_acceptance.expected-statuses = ["2xx", "400"]

[[operations]]
include-name = "GET /v1/audit"
# Likewise.
checks.positive_data_acceptance.expected-statuses = ["2xx", "400"]

[[operations]]
include-path-regex = "/schedule-destruction$"
# To JSON Schema 8.0 is an integer; the service reads numbers strictly and takes 8 alone.
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "404", "409"]
"""


@pytest.mark.parametrize("phases", ["examples,coverage", "fuzzing", "stateful"])
def test_every_route_keeps_its_promises(
    service: DevService, server: Client, tmp_path: Path, thread_id: str, phases: str
) -> None:
    """No check fails on any route: statuses, types, schemas, headers, refusal of bad data, never a 500."""
    keys = [server.create(thread_id)["key_id"] for _ in range(4)]
    ciphertexts = [b64(server.encrypt(key, b"m")) for key in keys]
    (tmp_path / "schemathesis.toml").write_text(
        CONFIG.format(keys=json.dumps(keys), ciphertexts=json.dumps(ciphertexts))
    )
    operator = service.ready["clients"]["operator"]
    command = [str(Path(sys.executable).with_name("schemathesis")), "run"]
    command += [service.ready["url"] + "/openapi.json", "--phases", phases, "--max-examples", "15"]
    command += ["--request-cert", operator["cert"], "--request-cert-key", operator["key"]]
    command += ["--tls-verify", service.ready["ca"], "--request-timeout", "20"]
    command += ["--generation-deterministic", "--no-color", "--warnings", "off"]
    # Coverage is the service's own matter: measuring Schemathesis, too, would only make it slow.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]
