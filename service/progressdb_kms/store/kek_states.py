"""What the registry becomes by staging, activating and retiring a KEK version. Pure; both stores use it."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from progressdb_kms.domain.errors import KekMismatch, RotationRefused
from progressdb_kms.domain.keyring import KekInfo, KekState
from progressdb_kms.ports import RegistryView


@dataclass(frozen=True, slots=True)
class RegistryChange:
    """What to write.

    Attributes:
        keks: Versions to put, by number; none where nothing is to be done.
        active: The active version after it.
    """

    active: int
    keks: Mapping[int, KekInfo] = field(default_factory=dict)


def staged(view: RegistryView, kek: KekInfo) -> RegistryChange:
    """Return the change that registers ``kek`` as staged.

    Raises:
        KekMismatch: The version is registered with another check value.
    """
    known = view.keks.get(kek.version)
    if known is None:
        return RegistryChange(
            view.active, {kek.version: replace(kek, state=KekState.STAGED, activated_at=None)}
        )
    if not hmac.compare_digest(known.check_value.encode(), kek.check_value.encode()):
        raise KekMismatch(
            f"KEK version {kek.version} is registered as {known.kek_id} and not as {kek.kek_id}: put the"
            " right key back at the source, or give the new one another number"
        )
    return RegistryChange(view.active)


def activated(view: RegistryView, version: int, now: int) -> RegistryChange:
    """Return the change that makes ``version`` the active one, and the active one decrypt-only.

    Raises:
        KekMismatch: The version is not registered, or retired.
    """
    kek = view.keks.get(version)
    if kek is None:
        raise KekMismatch(f"KEK version {version} is not registered, so it can't be made active")
    if kek.state is KekState.RETIRED:
        raise KekMismatch(f"KEK version {version} is retired, so it can't be made active")
    if view.active == version:
        return RegistryChange(version)
    changed = {version: replace(kek, state=KekState.ACTIVE, activated_at=now)}
    if (before := view.keks.get(view.active)) is not None:
        changed[view.active] = replace(before, state=KekState.DECRYPT_ONLY)
    return RegistryChange(version, changed)


def retired(view: RegistryView, version: int) -> RegistryChange:
    """Return the change that marks ``version`` as retired.

    Raises:
        RotationRefused: It is the active one, staged, or not registered.
    """
    kek = view.keks.get(version)
    state = "not registered" if kek is None else kek.state
    if kek is None or kek.state in {KekState.ACTIVE, KekState.STAGED}:
        raise RotationRefused(
            f"KEK version {version} is {state}: only a version that is decrypt-only can be retired"
        )
    if kek.state is KekState.RETIRED:
        return RegistryChange(view.active)
    return RegistryChange(view.active, {version: replace(kek, state=KekState.RETIRED)})
