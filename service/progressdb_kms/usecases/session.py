"""What one connection may do, under the policy of this moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.errors import CertificateExpired
from progressdb_kms.domain.policy import Grants, Policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from progressdb_kms.domain.identity import Identity

NOBODY: Final = Policy(())


class PolicyBook:
    """Holds the policy in force; replacing it changes what every open connection may do from then on.

    Attributes:
        policy: The rules in force; at first nobody may do anything.
        generation: Name of the rules in force, for heartbeats and metrics.
    """

    __slots__ = ("generation", "policy")

    def __init__(self, policy: Policy = NOBODY, generation: str = "none") -> None:
        self.policy = policy
        self.generation = generation

    def replace(self, policy: Policy, generation: str) -> None:
        """Put another policy in force."""
        self.policy = policy
        self.generation = generation


class Session:
    """A caller: its identity, and its permissions compiled once per policy.

    Args:
        identity: What the connection proved.
        book: Where the policy in force is found.
        clock: Gives Unix seconds.
    """

    __slots__ = ("_book", "_clock", "_compiled_from", "_grants", "identity", "name")

    def __init__(self, identity: Identity, book: PolicyBook, clock: Callable[[], float]) -> None:
        self.identity = identity
        self.name = str(identity)
        self._book = book
        self._clock = clock
        self._compiled_from = book.policy
        self._grants = book.policy.grants(identity)

    def grants(self) -> Grants:
        """Return what the caller may do now.

        Raises:
            CertificateExpired: A connection outlives its certificate's handshake, its rights don't.
        """
        not_after = self.identity.not_after
        if not_after is not None and self._clock() > not_after:
            raise CertificateExpired
        if self._compiled_from is not self._book.policy:
            self._compiled_from = self._book.policy
            self._grants = self._compiled_from.grants(self.identity)
        return self._grants
