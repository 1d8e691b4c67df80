"""What ``doctor`` checks of keys that are kept elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator

from progressdb_kms.cli.check import Check, Result
from progressdb_kms.domain.errors import KekUnavailable, KekUnreachable
from progressdb_kms.domain.keyring import KEPT_ELSEWHERE
from progressdb_kms.ports import KekSource


async def check_kept_keys(source: KekSource) -> AsyncIterator[Check]:
    """Wrap and unwrap under each key that the KEK file only names.

    Args:
        source: The KEK source.

    Yields:
        One result a key.
    """
    for version in sorted(source.versions()):
        kind = source.kind(version)
        if kind not in KEPT_ELSEWHERE:
            continue
        name = f"kek version {version}"
        try:
            good = await source.matches(version, await source.check_value(version))
        except (KekUnavailable, KekUnreachable) as error:
            yield Check(name, Result.FAIL, error.detail, f"see kek.{kind} of the configuration")
            continue
        if good:
            yield Check(
                name, Result.OK, f"{kind}:{source.source_key(version)} wraps and unwraps, and binds its AAD"
            )
        else:
            yield Check(
                name,
                Result.FAIL,
                f"{kind}:{source.source_key(version)} does not unwrap what it has wrapped",
                "may this service both encrypt and decrypt with it?",
            )
