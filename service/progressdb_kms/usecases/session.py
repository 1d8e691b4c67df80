"""What one connection may do, under the policy of this moment."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.errors import CertificateExpired
from progressdb_kms.domain.policy import Grants, Policy
from progressdb_kms.domain.quota import WHOLE, Quota

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from progressdb_kms.domain.identity import Identity
    from progressdb_kms.domain.quota import Limit, Part

NOBODY: Final = Policy(())
_QUOTAS_KEPT: Final = 4096
"""Quotas of identities, above which those are dropped that a fresh one would not differ from."""


class PolicyBook:
    """Holds the policy in force; replacing it changes what every open connection may do from then on.

    Attributes:
        policy: The rules in force; at first nobody may do anything.
        generation: Name of the rules in force, for heartbeats and metrics.

    Args:
        policy: At first.
        generation: Its name.
        clock: Gives seconds that never go back.
        part: This process's part of the limits of identities.
    """

    __slots__ = ("_clock", "_part", "_quotas", "generation", "policy")

    def __init__(
        self,
        policy: Policy = NOBODY,
        generation: str = "none",
        clock: Callable[[], float] = time.monotonic,
        part: Part = WHOLE,
    ) -> None:
        self._part = part
        self.policy = policy
        self.generation = generation
        self._clock = clock
        self._quotas: dict[tuple[str, Limit], Quota] = {}

    def replace(self, policy: Policy, generation: str) -> None:
        """Put another policy in force."""
        self.policy = policy
        self.generation = generation

    def quota(self, identity: Identity) -> Quota | None:
        """Return what ``identity`` has used of its limit, the same for all its connections."""
        limit = self.policy.limit(identity)
        if limit is None:
            return None
        name = (str(identity), limit)
        quota = self._quotas.get(name)
        if quota is None:
            now = self._clock()
            if len(self._quotas) >= _QUOTAS_KEPT:
                self._quotas = {key: kept for key, kept in self._quotas.items() if not kept.unused(now)}
            quota = self._quotas[name] = Quota(limit, now, self._part)
        return quota

    def now(self) -> float:
        """Return the time by which quotas are kept."""
        return self._clock()


class Session:
    """A caller: its identity, and its permissions compiled once per policy.

    Args:
        identity: What the connection proved.
        book: Where the policy in force is found.
        clock: Gives Unix seconds.
    """

    __slots__ = ("_book", "_clock", "_compiled_from", "_grants", "_quota", "identity", "kind", "name")

    def __init__(self, identity: Identity, book: PolicyBook, clock: Callable[[], float]) -> None:
        self.identity = identity
        self.name = str(identity)
        self.kind = str(identity.kind)
        self._book = book
        self._clock = clock
        self._compiled_from = book.policy
        self._grants = book.policy.grants(identity)
        self._quota = book.quota(identity)

    @property
    def limited(self) -> bool:
        """Whether the caller has limits, so that its requests must be held by ``request``."""
        self._compile()
        return self._quota is not None

    def grants(self) -> Grants:
        """Return what the caller may do now.

        Raises:
            CertificateExpired: A connection outlives its certificate's handshake, its rights don't.
        """
        not_after = self.identity.not_after
        if not_after is not None and self._clock() > not_after:
            raise CertificateExpired
        self._compile()
        return self._grants

    @contextmanager
    def request(self) -> Iterator[None]:
        """Hold the caller's limits for one request.

        Raises:
            TooManyRequests: They are reached.
        """
        self._compile()
        quota = self._quota
        if quota is None:
            yield
            return
        quota.enter(self._book.now())
        try:
            yield
        finally:
            quota.leave()

    def charge(self, operations: int) -> None:
        """Count operations of the present request beyond its first."""
        if self._quota is not None:
            self._quota.charge(operations)

    def _compile(self) -> None:
        if self._compiled_from is not self._book.policy:
            self._compiled_from = self._book.policy
            self._grants = self._compiled_from.grants(self.identity)
            self._quota = self._book.quota(self.identity)
