"""Can this server lose a write that it has acknowledged? Pure: judges what it was told.

Redis acknowledges from memory. What it promises depends on its settings, so they are asked, not assumed;
https://redis.io/docs/latest/operate/oss_and_stack/management/persistence/ describes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from progressdb_kms.store.settings import StoreSettings

CONFIG_NAMES: Final = (
    "appendonly",
    "appendfsync",
    "no-appendfsync-on-rewrite",
    "maxmemory-policy",
    "min-replicas-to-write",
)
FSYNC_PERIOD: Final = 1.0
"""Seconds between fsyncs under ``appendfsync everysec``."""
_OLDEST: Final = (7, 0)
_WAITAOF_SINCE: Final = (7, 2)
_WAITAOF_TRUE_SINCE: Final = (8, 0)
"""Before, and in every Valkey so far, WAITAOF under ``everysec`` answers as soon as the write is in the page
cache (redis/redis#13793). ``tests/fault`` cuts the power of such a store and finds acknowledged keys gone."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a server says of itself.

    Attributes:
        info: INFO, by name.
        config: CONFIG GET of ``CONFIG_NAMES``; None where it is forbidden.
    """

    info: Mapping[str, str]
    config: Mapping[str, str] | None

    @property
    def run_id(self) -> str:
        """Random name of the server process."""
        return self.info.get("run_id", "")

    @property
    def aof_complete(self) -> bool:
        """Whether no rewrite is under way or due, and the last one was finished."""
        info = self.info
        under_way = "1" in {info.get("aof_rewrite_in_progress"), info.get("aof_rewrite_scheduled")}
        return not under_way and info.get("aof_last_bgrewrite_status", "ok") == "ok"

    @property
    def aof_first(self) -> bool:
        """Whether the append-only file has never been rewritten nor loaded in this process's life."""
        return self.info.get("aof_base_size", "0") == "0"

    @property
    def appendonly(self) -> str:
        """``yes``, ``no``, or empty where it is hidden."""
        if self.config and "appendonly" in self.config:
            return self.config["appendonly"]
        return _yes(self.info.get("aof_enabled"))

    @property
    def primary(self) -> bool:
        """Whether it takes writes."""
        return self.info.get("role", "master") == "master"

    @property
    def version(self) -> tuple[int, ...]:
        """The version of Redis that it is compatible with."""
        return tuple(int(part) for part in self.info.get("redis_version", "").split(".") if part.isdigit())

    @property
    def confirms_fsync(self) -> bool:
        """Whether it has WAITAOF."""
        return self.version >= _WAITAOF_SINCE

    @property
    def confirms_every_second(self) -> bool:
        """Whether its WAITAOF tells the truth where it fsyncs once a second."""
        return self.version >= _WAITAOF_TRUE_SINCE and "valkey_version" not in self.info


@dataclass(frozen=True, slots=True)
class Finding:
    """The judgement of one server.

    Attributes:
        run_id: Which process was asked.
        confirms: Each batch of writes can be confirmed by WAITAOF, and so it is: also where appendfsync is
            ``always``, for a CONFIG SET may come between two checks. It costs tens of microseconds a batch.
        slow: That confirmation can take as long as the period of fsyncs, here or on replicas.
        problems: Why acknowledged keys could be lost and what to change.
        warnings: What an operator should know.
        facts: Findings for people.
    """

    run_id: str
    confirms: bool
    slow: bool
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def assess(
    facts: NodeFacts, settings: StoreSettings, *, promotable: bool, aof_begun: bool = False
) -> Finding:
    """Judge a server.

    Args:
        facts: What it said.
        settings: What was asked of it.
        promotable: A replica can take its place (Sentinel, Cluster).
        aof_begun: Its append-only file may have been switched on while it ran, and is not whole yet: until
            its first rewrite ends nothing that it holds can be loaded again, whatever it says of fsync.
    """
    info, config = facts.info, facts.config
    appendonly = facts.appendonly
    policy = info.get("maxmemory_policy") or (config or {}).get("maxmemory-policy", "")
    problems = [
        *_server_problems(facts, settings),
        *_aof_problems(facts, appendonly, settings),
        *_replica_problems(facts, settings, promotable=promotable),
    ]
    if policy and policy != "noeviction":
        problems.append(
            f"maxmemory-policy is {policy}, so Redis would delete keys when memory is short: "
            "set maxmemory-policy noeviction"
        )
    if appendonly == "yes" and aof_begun:
        problems.append(
            "the append-only file is being made and would not bring the keys back yet: wait for its rewrite"
        )
    warnings = []
    if info.get("aof_last_bgrewrite_status") == "err":
        warnings.append(
            "the last rewrite of the append-only file failed: see the store's log, free disk space"
        )
    if settings.min_replicas > int(info.get("connected_slaves", "0")):
        warnings.append(
            f"{info.get('connected_slaves', '0')} replicas are connected, fewer than min_replicas "
            f"{settings.min_replicas}: writes fail until they are back"
        )
    if settings.durability == "attested" and settings.attested_reason:
        warnings.append(
            f"durability is attested, not checked, where the store hides it: {settings.attested_reason}"
        )
    confirms = facts.confirms_fsync and appendonly == "yes"
    always = config is not None and config.get("appendfsync") == "always"
    return Finding(
        run_id=facts.run_id,
        confirms=confirms,
        slow=confirms and (not always or settings.min_replicas > 0),
        problems=tuple(problems),
        warnings=tuple(warnings),
        facts={
            "server": _server_name(info),
            "role": info.get("role", "unknown"),
            "appendonly": appendonly or "hidden",
            "appendfsync": config.get("appendfsync", "hidden") if config else "hidden",
            "maxmemory-policy": policy or "hidden",
            "replicas": info.get("connected_slaves", "unknown"),
        },
    )


def _server_problems(facts: NodeFacts, settings: StoreSettings) -> list[str]:
    problems = []
    if not facts.info and settings.durability != "attested":
        problems.append(
            "the store hides INFO, so neither its version nor its role is known: allow INFO, or set "
            "store.durability attested with a reason"
        )
    if facts.version and facts.version < _OLDEST:
        problems.append(
            f"the server speaks Redis {facts.info['redis_version']}: use Redis 7.0 or Valkey 7.2 or later"
        )
    if not facts.primary:
        problems.append(
            "store.url points at a replica, which a failover would silently replace: point it at the "
            "primary, or use redis+sentinel:// to have it found"
        )
    return problems


def _aof_problems(facts: NodeFacts, appendonly: str, settings: StoreSettings) -> list[str]:
    problems = []
    attested = settings.durability == "attested"
    if attested and not settings.attested_reason.strip():
        problems.append(
            "store.durability is attested without a reason: say in store.attested_reason who promises it"
        )
    if appendonly == "no":
        problems.append(
            "appendonly is no, so a restart loses keys: set appendonly yes and appendfsync always"
        )
    if facts.info.get("aof_last_write_status") == "err":
        problems.append("the last write to the append-only file failed: free disk space or mend the disk")
    if facts.config is None or "appendfsync" not in facts.config:
        hidden = not appendonly or not facts.confirms_every_second
        if hidden and not attested:
            problems.append(
                "the store hides CONFIG and can't be trusted to confirm an fsync (WAITAOF, since Redis 8.0): "
                "allow CONFIG GET, or set store.durability attested with a reason"
            )
        return problems
    appendfsync = facts.config["appendfsync"]
    if appendfsync == "no":
        problems.append(
            "appendfsync is no, so a power cut loses half a minute of keys: set appendfsync always"
        )
    elif appendfsync != "always" and not facts.confirms_every_second:
        problems.append(
            f"appendfsync is {appendfsync} on a server that can't confirm an fsync or does so too early, so "
            "a power cut loses the last second's keys: set appendfsync always (or use Redis 8.0 or later)"
        )
    if facts.config.get("no-appendfsync-on-rewrite") == "yes":
        problems.append(
            "no-appendfsync-on-rewrite is yes, so nothing is fsynced during a rewrite: set it to no"
        )
    return problems


def _replica_problems(facts: NodeFacts, settings: StoreSettings, *, promotable: bool) -> list[str]:
    if not promotable:
        return []
    problems = []
    if settings.min_replicas < 1:
        problems.append(
            "a replica can be promoted but need not have the last keys: set store.min_replicas to 1 or more"
        )
    asked = facts.config.get("min-replicas-to-write") if facts.config else None
    # INFO names the replicas in step only where min-replicas-to-write is set.
    least = int(asked) if asked is not None else int("min_slaves_good_slaves" in facts.info)
    hidden = asked is None and not facts.info
    if least < 1 and not (hidden and settings.durability == "attested"):
        problems.append(
            "min-replicas-to-write is 0, so a primary that was cut off goes on taking keys that its "
            "successor never sees: set it to 1 or more on every node"
        )
    return problems


def _yes(flag: str | None) -> str:
    return {"1": "yes", "0": "no"}.get(flag or "", "")


def _server_name(info: Mapping[str, str]) -> str:
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info.get('redis_version', 'unknown')}"
