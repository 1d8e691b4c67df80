"""The section ``kek``: the KEK file, and where the keys are kept that it only names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from msgspec import Meta

from progressdb_kms.domain.errors import SettingsInvalid
from progressdb_kms.settings.section import Seconds, Section

PathName = Annotated[str, Meta(pattern="^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$", max_length=256)]
"""A mount of Vault: the part of a path between two others."""


class Pkcs11(Section, frozen=True, kw_only=True):
    """The token of the keys that the KEK file names ``pkcs11:LABEL``. Needs the extra ``pkcs11``.

    Attributes:
        module: The token's PKCS#11 library.
        token: The token's label.
        pin_file: File with the user's PIN, which only the service may read.
        timeout: For one call, which wraps or unwraps up to 64 keys.
    """

    module: Path
    token: Annotated[str, Meta(min_length=1, max_length=32)]
    pin_file: Path
    timeout: Seconds = 5


class VaultKubernetes(Section, frozen=True, kw_only=True):
    """Log in by the token of the pod's service account.

    Attributes:
        role: The role to log in as.
        mount: Where the auth method is mounted.
        jwt_file: The service account's token, which only the service may read.
    """

    role: Annotated[str, Meta(min_length=1, max_length=256)]
    mount: PathName = "kubernetes"
    jwt_file: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


class Vault(Section, frozen=True, kw_only=True):
    """The transit engine, of Vault or OpenBao, of the keys that the KEK file names ``vault:KEY@VERSION``.

    Attributes:
        address: ``https://host:port``; plain ``http`` to an agent on the same machine only.
        mount: Where the engine is mounted.
        namespace: Sent along as ``X-Vault-Namespace``.
        ca: CA bundle for its certificate; without it the system's.
        token_file: File with a token, read for each call, so that an agent may renew it.
        kubernetes: Or this login.
        timeout: For one call, which wraps or unwraps up to 256 keys.
    """

    address: str
    mount: PathName = "transit"
    namespace: Annotated[str, Meta(pattern="^[!-~]*$", max_length=256)] = ""
    ca: Path | None = None
    token_file: Path | None = None
    kubernetes: VaultKubernetes | None = None
    timeout: Seconds = 5


class Aws(Section, frozen=True, kw_only=True):
    """AWS KMS, for the keys that the KEK file names ``aws:ARN``. Needs the extra ``aws``.

    ``kek: {aws: {}}`` is enough. Credentials come from where the AWS SDK looks for them: environment, shared
    files, IRSA, pod identity.

    Attributes:
        endpoint: Address to call instead of that of the key's region.
        timeout: For one call, which wraps or unwraps up to 16 keys, one request each.
    """

    endpoint: str = ""
    timeout: Seconds = 5


class Kek(Section, frozen=True, kw_only=True):
    """Where key-encryption keys come from.

    Attributes:
        source: The one kind that there is.
        path: The KEK file.
        management: Who a rotation gives a new version to: the file itself, or the Kubernetes Secret (named in
            ``rotation.kubernetes``) that it is mounted from.
        pkcs11: Where keys are that the file names ``pkcs11:...``.
        vault: And those named ``vault:...``.
        aws: And those named ``aws:...``.
    """

    source: Literal["file"] = "file"
    path: Path
    management: Literal["file", "kubernetes"] = "file"
    pkcs11: Pkcs11 | None = None
    vault: Vault | None = None
    aws: Aws | None = None


def check_kek(kek: Kek) -> None:
    """Check what no type says.

    Raises:
        SettingsInvalid: Says what to change.
    """
    if kek.vault is not None:
        _check_address("kek.vault.address", kek.vault.address)
        if (kek.vault.token_file is None) == (kek.vault.kubernetes is None):
            raise SettingsInvalid("configuration: kek.vault needs one of token_file and kubernetes")
    if kek.aws is not None and kek.aws.endpoint:
        _check_address("kek.aws.endpoint", kek.aws.endpoint)


def _check_address(name: str, address: str) -> None:
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError:
        host = None
    # The address is not repeated: somebody may have put a password into it.
    if (
        not host
        or parts.scheme not in {"http", "https"}
        or parts.username is not None
        or parts.query
        or parts.fragment
        or not address.isascii()
    ):
        raise SettingsInvalid(f"configuration: {name} must be https://HOST[:PORT], without name and password")
    if parts.scheme == "http" and host not in {"localhost", "127.0.0.1", "::1"}:
        raise SettingsInvalid(
            f"configuration: {name} must be https: raw keys travel there; http is for an agent on the same"
            " machine"
        )
