"""The store's fitness to be trusted with keys: the port ``StoreHealth``."""

from __future__ import annotations

import asyncio
from typing import Final

from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.ports import StoreStatus
from progressdb_kms.store.redis.address import Address, Mode
from progressdb_kms.store.redis.durability import Finding
from progressdb_kms.store.redis.failures import Failure
from progressdb_kms.store.redis.node import Node
from progressdb_kms.store.redis.topology import Topology
from progressdb_kms.store.settings import StoreSettings

_UNASKED: Final = StoreStatus(reachable=False, warnings=("the store has not been asked yet",))


class RedisHealth:
    """Implements ``StoreHealth``: asks every primary, and passes on the worst that any of them says."""

    def __init__(self, topology: Topology, address: Address, settings: StoreSettings) -> None:
        self._topology = topology
        self._address = address
        self._settings = settings
        self._status = _UNASKED

    @property
    def status(self) -> StoreStatus:
        """The last finding."""
        return self._status

    async def check(self) -> StoreStatus:
        """Ask the store now. Never raises: not reachable is an answer."""
        try:
            async with asyncio.timeout(self._settings.connect_timeout + self._settings.command_timeout):
                self._status = await self._ask()
        except StoreUnavailable as error:
            self._status = self._unreachable(error.detail)
        except TimeoutError:
            self._status = self._unreachable("the store did not answer in time")
        return self._status

    async def _ask(self) -> StoreStatus:
        # Looked for anew each time: a primary that was cut off may answer, but Sentinels name another by now.
        await self._topology.ready(anew=self._address.mode is not Mode.STANDALONE)
        nodes = self._topology.primaries()
        found = await asyncio.gather(*[node.examine() for node in nodes])
        findings = []
        for node, finding in zip(nodes, found, strict=True):
            if isinstance(finding, Failure):
                self._topology.invalidate()
                raise finding.error
            findings.append((node, finding))
        return self._summary(findings)

    def _summary(self, findings: list[tuple[Node, Finding]]) -> StoreStatus:
        several = len(findings) > 1
        problems: dict[str, str] = {}
        warnings: dict[str, str] = {}
        for node, finding in findings:
            for kind, lines in ((problems, finding.problems), (warnings, finding.warnings)):
                for line in lines:
                    kind.setdefault(line, f"{node.endpoint}: {line}" if several else line)
        facts = dict(findings[0][1].facts) | {
            "mode": str(self._address.mode),
            "primaries": str(len(findings)),
        }
        if self._settings.allow_data_loss and problems:
            accepted = [
                f"store.allow_data_loss accepts that keys can be lost: {line}" for line in problems.values()
            ]
            return StoreStatus(reachable=True, warnings=(*accepted, *warnings.values()), facts=facts)
        return StoreStatus(
            reachable=True,
            problems=tuple(problems.values()),
            warnings=tuple(warnings.values()),
            facts=facts,
        )

    def _unreachable(self, why: str) -> StoreStatus:
        return StoreStatus(reachable=False, warnings=(why,), facts={"mode": str(self._address.mode)})
