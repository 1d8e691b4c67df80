"""Addresses, from arguments and from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from progressdb_kms.client import AdminClient, EndpointInvalid, open_provider, open_sync_provider
from progressdb_kms.client.endpoint import Endpoint, TlsFiles, resolve

FILES = TlsFiles(Path("ca"), Path("cert"), Path("key"))


@pytest.mark.parametrize(
    "url,expected",
    [
        ("https://kms:8443", Endpoint("https://kms:8443", tls=FILES)),
        ("https://kms/", Endpoint("https://kms", tls=FILES)),
        ("https://[::1]:8443", Endpoint("https://[::1]:8443", tls=FILES)),
        ("kms.default.svc:8443", Endpoint("https://kms.default.svc:8443", tls=FILES)),
        ("localhost:1", Endpoint("https://localhost:1", tls=FILES)),
        ("unix:///run/kms.sock", Endpoint("http://localhost", uds="/run/kms.sock")),
        ("unix:/run/kms.sock", Endpoint("http://localhost", uds="/run/kms.sock")),
        ("/run/kms.sock", Endpoint("http://localhost", uds="/run/kms.sock")),
        ("embedded:", Endpoint(embedded=True)),
    ],
)
def test_addresses(url: str, expected: Endpoint) -> None:
    """Each form, given as an argument or by the environment."""
    assert resolve(url, FILES, {}) == expected
    assert resolve(None, FILES, {"PROGRESSDB_KMS_ENDPOINT": url}) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://kms:8443",
        "ftp://kms",
        "unix://relative/path",
        "unix:",
        "https://",
        "https://kms:notaport",
        "https://user:SECRET@kms",
        "https://kms/SECRET",
        "https://kms?SECRET",
        "https://kms#SECRET",
        "https://[::1",
    ],
)
def test_addresses_that_are_refused(url: str) -> None:
    """With what to do, and without repeating what may hold a password."""
    with pytest.raises(EndpointInvalid) as caught:
        resolve(url, FILES, {})
    assert "SECRET" not in str(caught.value)


def test_plain_http_is_allowed_by_name() -> None:
    """It has no certificates then."""
    assert resolve("http://127.0.0.1:1", FILES, {}, allow_plain_http=True) == Endpoint("http://127.0.0.1:1")


def test_nothing_set() -> None:
    """The error names the variable to set."""
    with pytest.raises(EndpointInvalid, match="PROGRESSDB_KMS_ENDPOINT"):
        resolve(None, TlsFiles(), {})
    with pytest.raises(EndpointInvalid, match="PROGRESSDB_KMS_ENDPOINT"):
        resolve(None, TlsFiles(), {"PROGRESSDB_KMS_MODE": "external"})


def test_the_mode_decides() -> None:
    """Embedded needs no endpoint, and an unknown mode is refused."""
    environ = {"PROGRESSDB_KMS_MODE": "embedded", "PROGRESSDB_KMS_ENDPOINT": "https://kms"}
    assert resolve(None, TlsFiles(), environ).embedded
    assert not resolve("https://other", TlsFiles(), environ).embedded
    with pytest.raises(EndpointInvalid, match="external or embedded"):
        resolve(None, TlsFiles(), {"PROGRESSDB_KMS_MODE": "Embedded"})


def test_certificates_from_the_environment() -> None:
    """Each file that is not given is taken from its variable."""
    environ = {"PROGRESSDB_KMS_CA": "a", "PROGRESSDB_KMS_CERT": "b", "PROGRESSDB_KMS_KEY": "c"}
    found = resolve("https://kms", TlsFiles(cert=Path("mine")), environ)
    assert found.tls == TlsFiles(Path("a"), Path("mine"), Path("c"))


def test_a_key_needs_its_certificate() -> None:
    """A key alone is a forgotten variable."""
    with pytest.raises(EndpointInvalid, match="PROGRESSDB_KMS_CERT"):
        resolve("https://kms", TlsFiles(key=Path("key")), {})


@pytest.mark.parametrize("opener", [open_provider, open_sync_provider, AdminClient])
def test_opening_checks_the_files(opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that could never work is refused when it is made."""
    monkeypatch.setenv("PROGRESSDB_KMS_ENDPOINT", "https://kms:1")
    with pytest.raises(EndpointInvalid, match="can't be read"):
        opener(ca="/nowhere/ca.crt")


@pytest.mark.parametrize("opener", [open_provider, open_sync_provider, AdminClient])
def test_misspelt_options_are_refused(opener) -> None:
    """An option that nobody knows is never ignored."""
    with pytest.raises(TypeError, match="unknown option cert_file"):
        opener("unix:///s", cert_file="x")
    with pytest.raises(ValueError, match="json or msgpack"):
        opener("unix:///s", encoding="yaml")


def test_administration_is_not_embedded() -> None:
    """It has a service or nothing."""
    with pytest.raises(EndpointInvalid, match="running service"):
        AdminClient("embedded:")


def test_shown_as_written() -> None:
    """Errors name the endpoint as people write it."""
    assert str(Endpoint("http://localhost", uds="/run/s")) == "unix:///run/s"
    assert str(Endpoint("https://kms:1")) == "https://kms:1"
    assert str(Endpoint(embedded=True)) == "embedded:"
