"""The provisioning file: what it holds, and each mistake with what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from progressdb_kms.domain.errors import SettingsInvalid
from progressdb_kms.provision.config import load_config, parse_config

BASE = Path("/etc/kms")
KEK = {"secret": "r-kek", "management": "create"}
STORE = {"config": "config.yaml"}
CA = {"name": "ca", "secret": "r-ca", "common_name": "CA"}
SERVER = {"secret": "r-tls", "authority": "ca", "usage": "server", "dns": ["r.kms.svc"]}
CLIENT = {"secret": "chat", "authority": "ca", "usage": "client", "dns": ["chat.default.svc"]}


def document(**more: Any) -> dict[str, Any]:
    """Return the least document, changed as asked."""
    return {"namespace": "kms", **more}


def certificates(*leaves: Any, **more: Any) -> dict[str, Any]:
    """Return a document with these certificates."""
    return document(certificates={"authorities": [CA], "certificates": list(leaves), **more})


def test_least_and_paths(tmp_path: Path) -> None:
    """A renewal needs neither store nor KEK; paths are relative to the file."""
    assert parse_config(document(), BASE).kek is None
    file = tmp_path / "provision.yaml"
    file.write_text(yaml.safe_dump(document(kek=KEK, store=STORE)))
    config = load_config(file)
    assert config.store is not None
    assert config.store.config == tmp_path / "config.yaml"
    assert config.kek is not None
    assert (config.kek.key, config.kek.store_id_key) == ("kek.yaml", "store-id")
    made = parse_config(certificates(SERVER, CLIENT), BASE).certificates
    assert (made.renew_before, made.certificates[0].days, made.authorities[0].days) == (30, 90, 3650)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({}, "namespace"),
        ([], "Expected `object`"),
        (document(namespace="Kms"), r"\$\.namespace"),
        (document(name="x"), "unknown field `name`"),
        (document(kek=KEK), "kek.management create needs store"),
        (document(kek={**KEK, "management": "require", "escrow": True}), "kek.escrow needs store"),
        (document(kek={**KEK, "management": "maybe"}, store=STORE), r"\$\.kek\.management"),
        (document(kek={**KEK, "store_id_key": "kek.yaml"}, store=STORE), "are the same"),
        (document(kek=KEK, store={"config": 7}), "must be a path"),
        (document(kek=KEK, store={**STORE, "wait": -1}), r"\$\.store\.wait"),
        (document(store={**STORE, "cert": {"secret": "x", "key": "tls.crt"}}), "cert and key together"),
        (document(passwords={"secret": "x", "users": []}), r"\$\.passwords\.users"),
        (document(passwords={"secret": "x", "users": ["a/b"]}), r"\$\.passwords\.users"),
        (
            document(passwords={"secret": "x", "users": ["kms"], "acl": "user a on #{aa}"}),
            "names the user aa",
        ),
        (certificates({**SERVER, "authority": "other"}), "names the authority other"),
        (certificates({**SERVER, "trust": ["other"]}), "names the authority other"),
        (certificates(SERVER, bundles=[{"secret": "b", "authorities": ["x"]}]), "names the authority x"),
        (certificates(SERVER, bundles=[{"secret": "b"}]), "trusts nobody"),
        (certificates(SERVER, SERVER), "two things are to be written to the Secret kms/r-tls"),
        (certificates({**SERVER, "secret": "r-ca"}), "two things"),
        (certificates(authorities=[CA, {**CA, "secret": "x"}]), "two authorities have one name"),
        (certificates({**SERVER, "days": 30}), "days must be more than renew_before"),
        (certificates({**SERVER, "dns": []}), "neither a DNS name nor an IP address"),
        (certificates({**SERVER, "ip": ["1.2.3"]}), "1.2.3 is not an IP address"),
        (certificates({**SERVER, "dns": ["a b"]}), "dns"),
        (certificates({**CLIENT, "dns": []}), "has no name"),
        (certificates({**CLIENT, "dns": ["a", "b"]}), "one DNS name"),
        (certificates({**CLIENT, "uri": ["spiffe://a/b", "spiffe://a/c"]}), "that one and no other"),
        (certificates({**CLIENT, "uri": ["no uri"]}), "uri"),
        (certificates({**CLIENT, "common_name": "x" * 65}), "common_name"),
        (certificates({**CLIENT, "usage": "both"}), "usage"),
        (certificates(copies=[{"from": "a", "secret": "r-ca", "namespace": "kms"}]), "two things"),
    ],
)
def test_mistakes(wrong: Any, says: str) -> None:
    """Each is refused before anything is made, and the message says where."""
    with pytest.raises(SettingsInvalid, match=says):
        parse_config(wrong, BASE)


def test_names_that_are_allowed() -> None:
    """One Secret's name in two namespaces; a client by SPIFFE URI with further DNS names; a client by CN."""
    parse_config(
        certificates(
            {**CLIENT, "namespace": "a"},
            {**CLIENT, "namespace": "b"},
            {**CLIENT, "secret": "c", "uri": ["spiffe://a/b"], "dns": ["a", "b"]},
            {**CLIENT, "secret": "d", "dns": [], "common_name": "operator"},
        ),
        BASE,
    )
