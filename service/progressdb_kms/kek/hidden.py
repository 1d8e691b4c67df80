"""KEKs that are never seen: a token or another service wraps and unwraps under them.

Their check value is a canary: a random secret, wrapped under the key when it was registered. Whoever can
unwrap it has that key. The secret itself, which is held in memory then, seals exports: only who may unwrap
knows it.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import structlog

from progressdb_kms.domain.errors import KekUnavailable, KekUnreachable, KmsError, WrappedKeyInvalid
from progressdb_kms.domain.keyring import seal_under, sealing_key
from progressdb_kms.domain.keys import DEK_BYTES
from progressdb_kms.kek.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from progressdb_kms.kek.keyfile import KeyName

log = structlog.get_logger(__name__)

RECHECK: Final = 60.0
"""Seconds after which it is asked again whether a key is still the one that was registered."""
PAUSE: Final = 10.0
"""Seconds for which a key that could not be asked for its canary is not asked again."""
_ID_BYTES: Final = 8
_CANARY_LABEL: Final = b"progressdb-kms/kek-canary/v1"

_T = TypeVar("_T")


class Keeper(Protocol):
    """Where keys are kept that it never shows. Its methods block, and are called in threads.

    A body is what stands for a DEK in the store, behind the blob's header; its form is the keeper's own.
    """

    @property
    def kind(self) -> str:
        """What a ``KeyName`` calls it."""

    @property
    def threads(self) -> int:
        """How many calls may be made at once."""

    @property
    def chunk(self) -> int:
        """How many keys are for one call, so that none takes long or waits behind a rotation's thousands."""

    def wrap(self, key: str, deks: Sequence[bytes], aads: Sequence[bytes]) -> list[bytes]:
        """Wrap DEKs under a key, each with its AAD, and return the bodies.

        Raises:
            KekUnavailable: There is no such key, or it may not be used for this.
            KekUnreachable: No answer, or none that says anything about the key.
        """

    def unwrap(self, key: str, bodies: Sequence[bytes], aads: Sequence[bytes]) -> list[bytes | None]:
        """Return the DEKs, with None in the place of one that does not unwrap under this key and AAD.

        Raises:
            KekUnavailable, KekUnreachable: As ``wrap``.
        """


@dataclass(slots=True)
class _Verdict:
    """What is known of a key by its canary.

    Attributes:
        sealing: The key for seals that the canary's secret gives; empty where it is another key.
        at: When it was found out.
        checking: Finds it out again.
    """

    sealing: bytes
    at: float
    checking: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"_Verdict(good={bool(self.sealing)}, at={self.at})"


class HiddenKeks:
    """The keys of one keeper, as ``ports.KekSource`` wants them.

    Args:
        keeper: Where they are.
        timeout: Seconds for one call of it.
    """

    def __init__(self, keeper: Keeper, timeout: float) -> None:
        self._keeper = keeper
        self._timeout = timeout
        self._threads = Threads(f"kek-{keeper.kind}", keeper.threads)
        self._verdicts: dict[tuple[KeyName, str], _Verdict] = {}
        self._canaries: dict[KeyName, str] = {}
        self._good: dict[KeyName, str] = {}
        self._failed: dict[KeyName, tuple[float, KekUnavailable | KekUnreachable]] = {}

    async def check_value(self, name: KeyName) -> str:
        """Return a check value for a key: the same one for as long as this object lives.

        Raises:
            KekUnavailable, KekUnreachable: As ``Keeper.wrap``.
        """
        if name not in self._canaries:
            identity, secret = os.urandom(_ID_BYTES), os.urandom(DEK_BYTES)
            (body,) = await self.wrap(name, [secret], [_canary_aad(identity)])
            # First in it, since names of KEKs are made of how a check value begins.
            self._canaries[name] = identity.hex() + body.hex()
        return self._canaries[name]

    async def matches(self, name: KeyName, check_value: str) -> bool:
        """Say whether a key is the one that this check value was made with.

        What has been found out stands until something else is: while the keeper is away, a key that was the
        right one is still taken for it. It is looked at again in the background.

        Raises:
            KekUnavailable, KekUnreachable: As ``Keeper.wrap``, and nothing is known yet.
        """
        return bool(await self._sealing_key(name, check_value))

    async def seal(self, name: KeyName, check_value: str, label: bytes, digest: bytes) -> bytes:
        """Return ``domain.keyring.seal_under`` the secret of a check value.

        Raises:
            KekUnavailable: It was not made with this key; or as ``Keeper.wrap``.
        """
        key = await self._sealing_key(name, check_value)
        if not key:
            raise KekUnavailable(f"{name} is not the key that was registered")
        return seal_under(key, label, digest)

    async def wrap(self, name: KeyName, deks: Sequence[bytes], aads: Sequence[bytes]) -> list[bytes]:
        """Wrap raw DEKs and return the bodies.

        Bodies are given out only if the key still opens its canary afterwards: under one that was put in its
        place since the last look they would be lost once the right one is back.

        Raises:
            KekUnavailable: As ``Keeper.wrap``.
            KekUnreachable: As ``Keeper.wrap``; or it is another key by now.
        """
        bodies = await self._in_chunks(partial(self._keeper.wrap, name.name), deks, aads)
        if bodies:
            await self._require_still(name)
        return bodies

    async def unwrap(
        self, name: KeyName, bodies: Sequence[bytes], aads: Sequence[bytes]
    ) -> list[bytes | KmsError]:
        """Return raw DEKs, with WrappedKeyInvalid in the place of one that does not unwrap.

        Raises:
            KekUnavailable: As ``Keeper.wrap``.
            KekUnreachable: As ``Keeper.wrap``; or the key does not open its canary any more, and so says
                nothing of a body that it does not open.
        """
        found = await self._unwrap(name, bodies, aads)
        if None in found:
            await self._require_still(name)
        return [WrappedKeyInvalid() if key is None else key for key in found]

    async def _unwrap(
        self, name: KeyName, bodies: Sequence[bytes], aads: Sequence[bytes]
    ) -> list[bytes | None]:
        return await self._in_chunks(partial(self._keeper.unwrap, name.name), bodies, aads)

    async def _require_still(self, name: KeyName) -> None:
        """Return if a key still opens the canary that it has opened before.

        A key can be replaced under its name, or its old version be forbidden (``min_decryption_version``),
        between two looks; all that it has wrapped would count as forged then.
        """
        check_value = self._good.get(name)
        if check_value is None:
            return
        raw = bytes.fromhex(check_value)
        if await self._unwrap(name, [raw[_ID_BYTES:]], [_canary_aad(raw[:_ID_BYTES])]) == [None]:
            self._verdicts[name, check_value] = _Verdict(b"", time.monotonic())
            raise KekUnreachable(
                f"{name} does not open any more what it has wrapped: was it replaced, or its use forbidden?"
            )

    async def _in_chunks(
        self,
        work: Callable[[Sequence[bytes], Sequence[bytes]], list[_T]],
        items: Sequence[bytes],
        aads: Sequence[bytes],
    ) -> list[_T]:
        results: list[_T] = []
        chunk = self._keeper.chunk
        share = self._keeper.threads * chunk
        # Only as many calls at once as there are threads: one that waits for a thread uses up its time limit.
        for begin in range(0, len(items), share):
            starts = range(begin, min(begin + share, len(items)), chunk)
            calls = [
                self._call(partial(work, items[start : start + chunk], aads[start : start + chunk]))
                for start in starts
            ]
            for part in await asyncio.gather(*calls):
                results += part
        return results

    async def _call(self, work: Callable[[], list[_T]]) -> list[_T]:
        try:
            return await self._threads.call(work, self._timeout)
        except TimeoutError:
            raise KekUnreachable(f"{self._keeper.kind} has not answered for {self._timeout:g} s") from None

    async def _sealing_key(self, name: KeyName, check_value: str) -> bytes:
        verdict = self._verdicts.get((name, check_value))
        if verdict is None:
            return (await self._find_out(name, check_value)).sealing
        if time.monotonic() - verdict.at > RECHECK and (verdict.checking is None or verdict.checking.done()):
            verdict.checking = asyncio.create_task(self._look_again(name, check_value))
        return verdict.sealing

    async def _look_again(self, name: KeyName, check_value: str) -> None:
        try:
            await self._find_out(name, check_value)
        except (KekUnavailable, KekUnreachable) as error:
            log.warning("kek_not_checked", key=str(name), detail=error.detail)

    async def _find_out(self, name: KeyName, check_value: str) -> _Verdict:
        failed_at, failure = self._failed.get(name, (float("-inf"), KekUnreachable()))
        if time.monotonic() - failed_at < PAUSE:
            raise type(failure)(failure.detail)
        try:
            secret = await self._open_canary(name, check_value)
        except (KekUnavailable, KekUnreachable) as error:
            self._failed[name] = time.monotonic(), error
            raise
        verdict = _Verdict(sealing_key(secret) if secret else b"", time.monotonic())
        # Check values come from the store: what it may hold from time to time must not pile up here.
        for known in [key for key, old in self._verdicts.items() if key[0] == name and not old.sealing]:
            del self._verdicts[known]
        if secret:
            self._good[name] = check_value
        self._verdicts[name, check_value] = verdict
        return verdict

    async def _open_canary(self, name: KeyName, check_value: str) -> bytes:
        """Return the canary's secret, or nothing if it is not one of this key.

        Raises:
            KekUnavailable: The keeper does not bind the AAD: a record moved onto another key would unwrap.
        """
        try:
            raw = bytes.fromhex(check_value)
        except ValueError:
            return b""
        identity, body = raw[:_ID_BYTES], raw[_ID_BYTES:]
        right, wrong = _canary_aad(identity), _canary_aad(identity[::-1] + b"?")
        secret, other = await self._unwrap(name, [body, body], [right, wrong])
        if secret is None:
            return b""
        if other is not None:
            raise KekUnavailable(
                f"{name.kind} does not bind additional authenticated data (AAD), which keys need: use a newer"
                " release of it"
            )
        return secret


def _canary_aad(identity: bytes) -> bytes:
    return len(_CANARY_LABEL).to_bytes(4, "big") + _CANARY_LABEL + identity
