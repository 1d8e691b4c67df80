"""Where KEKs come from, and where a rotation puts a new one."""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import TYPE_CHECKING, Any

from progressdb_kms.bootstrap.storing import store_settings
from progressdb_kms.domain.errors import KekFileInvalid, KekUnavailable, RotationRefused, SettingsInvalid
from progressdb_kms.domain.keyring import KekState
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.kek.hidden import HiddenKeks, Keeper
from progressdb_kms.kek.keyfile import KeyName, read_entries
from progressdb_kms.kek.staging import ExternalKekStager, FileKekStager, add_version
from progressdb_kms.store.redis import open_store

if TYPE_CHECKING:
    from progressdb_kms.domain.errors import OperatorError
    from progressdb_kms.kek.escrow import Escrow
    from progressdb_kms.ports import KekStager, RegistryView
    from progressdb_kms.settings import KubernetesSecret, Settings
    from progressdb_kms.settings.kek import Kek, Pkcs11
    from progressdb_kms.usecases.keks import KekBook


def kek_source(settings: Settings) -> FileKekSource:
    """Return the configured KEK source.

    Raises:
        KekFileInvalid: It can't be used.
        SettingsInvalid: It needs a package that is not installed.
    """
    return FileKekSource(settings.kek.path, _keepers(settings.kek))


async def add_kek(settings: Settings, name: KeyName, *, generate: bool) -> int:
    """Add a key that is kept elsewhere as the next version, once it has been seen to wrap and unwrap.

    Args:
        settings: The service's configuration.
        name: The key.
        generate: Make it first; on a PKCS#11 token only.

    Returns:
        The version. It is used once a rotation has taken it.

    Raises:
        KekFileInvalid: The KEK file or the Secret can't be used, or names the key already.
        SettingsInvalid: The configuration does not say where such keys are.
        KekUnavailable, KekUnreachable: The key can't be used.
        RotationRefused: Someone else keeps the KEK file, or a version in it is not in use yet.
        RegistryLost, StoreUnavailable: Which versions there are can't be read from the store.
    """
    source = kek_source(settings)
    keepers = _keepers(settings.kek)
    if name.kind not in keepers:
        raise SettingsInvalid(f"the configuration does not say where that key is: add kek.{name.kind}")
    if settings.rotation.distribute == "external":
        raise RotationRefused(
            "rotation.distribute is external: add the version where the KEK file comes from"
        )
    entries = read_entries(settings.kek.path)
    if name in entries.values():
        raise KekFileInvalid(f"{settings.kek.path} names this key already")
    store = await open_store(store_settings(settings))
    try:
        version = next_version(source.versions(), await store.registry.load())
    finally:
        await store.close()
    if generate:
        if settings.kek.pkcs11 is None or name.kind != "pkcs11":
            raise SettingsInvalid("only a key on a PKCS#11 token can be made here: make it where it is kept")
        await asyncio.to_thread(_pkcs11_keeper(settings.kek.pkcs11).generate, name.name)
    keeper = keepers[name.kind]
    if not await keeper.matches(name, await keeper.check_value(name)):
        raise KekUnavailable(f"{name.kind} does not unwrap what it has just wrapped under this key")
    if settings.kek.management == "file" or settings.rotation.kubernetes is None:
        add_version(settings.kek.path, version, name)
    else:
        module, ref = _secret(settings.rotation.kubernetes)
        await asyncio.to_thread(module.add_to_secret, ref, version, entries, name)
    return version


def next_version(loaded: frozenset[int], view: RegistryView | None) -> int:
    """Return the number for a key that the next rotation is to take.

    A number that the registry knows is that of another key, also where the file no longer has it.

    Args:
        loaded: Versions of the KEK file.
        view: The registry; None where the store is empty.

    Raises:
        RotationRefused: The next rotation would take another version of the file.
    """
    if view is None:
        return max(loaded) + 1
    in_use = {version for version, kek in view.keks.items() if kek.state is not KekState.STAGED}
    waiting = sorted(version for version in loaded - in_use if version > view.active)
    if waiting:
        raise RotationRefused(
            f"KEK version {waiting[0]} is in the KEK file and not in use yet: run rotate first, or take it"
            " out"
        )
    return max(loaded | view.keks.keys()) + 1


def kek_stager(settings: Settings, source: FileKekSource, keks: KekBook, escrow: Escrow) -> KekStager:
    """Return what brings a rotation's new version to where it is to be.

    Raises:
        RotationRefused: It needs a package that is not installed.
    """
    rotation = settings.rotation
    if rotation.distribute == "external":
        return ExternalKekStager(source, keks.required, escrow, rotation.wait)
    if settings.kek.management == "file" or rotation.kubernetes is None:
        return FileKekStager(source, keks.required, escrow)
    module, ref = _secret(rotation.kubernetes)
    stager: KekStager = module.KubernetesKekStager(ref, source, keks.required, escrow, rotation.wait)
    return stager


def _keepers(kek: Kek) -> dict[str, HiddenKeks]:
    keepers: list[tuple[Keeper, float]] = []
    if kek.pkcs11 is not None:
        keepers.append((_pkcs11_keeper(kek.pkcs11), kek.pkcs11.timeout))
    if kek.vault is not None:
        module = import_module("progressdb_kms.kek.vault")
        keepers.append((module.VaultKeeper(kek.vault), kek.vault.timeout))
    if kek.aws is not None:
        module = _extra("aws", "kek.aws", SettingsInvalid)
        keepers.append((module.AwsKeeper(kek.aws.endpoint, kek.aws.timeout), kek.aws.timeout))
    return {keeper.kind: HiddenKeks(keeper, timeout) for keeper, timeout in keepers}


def _pkcs11_keeper(section: Pkcs11) -> Any:  # noqa: ANN401 - its module can only be imported with the extra
    module = _extra("pkcs11", "kek.pkcs11", SettingsInvalid)
    return module.Pkcs11Keeper(section.module, section.token, section.pin_file)


def _secret(section: KubernetesSecret) -> tuple[Any, Any]:
    """Return the module that changes Secrets, and the name of the KEK's."""
    module = _extra("kubernetes", "kek.management kubernetes", RotationRefused)
    return module, module.SecretRef(section.namespace, section.secret, section.key)


def _extra(name: str, setting: str, error: type[OperatorError]) -> Any:  # noqa: ANN401 - a module
    """Import the module of ``kek`` that needs the extra of the same name, which nothing else does.

    Raises:
        OperatorError: Of the given type; the extra is not installed.
    """
    try:
        return import_module(f"progressdb_kms.kek.{name}")
    except ModuleNotFoundError:
        raise error(f"{setting} needs another package: pip install 'progressdb-kms[{name}]'") from None
