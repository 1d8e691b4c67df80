"""Structured logs on standard error.

A redacting processor stands last before the renderer: whatever a field is called like a secret, or holds
bytes, is replaced. It is a net, not the rule; the rule is that nothing secret is handed to a logger.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import TYPE_CHECKING, Any, Final

import structlog

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from structlog.typing import Processor

_SECRET: Final = re.compile(
    r"(^|_)(kek|dek|key|plaintext|ciphertext|wrapped|secret|password|passphrase|credential|token|aad"
    r"|authorization|master_key|key_hex|body)(s|_hex|_bytes|_b64|_pem)?$",
    re.IGNORECASE,
)
_HARMLESS: Final = frozenset({"source_key", "idempotency_key"})
_HIDDEN: Final = "<redacted>"


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:  # noqa: ANN401 - structlog's processor signature
    """Replace the values of fields that are named like secrets, and all bytes, however deep."""
    for name in list(event):
        event[name] = _clean(name, event[name])
    return event


def _clean(name: str, value: Any) -> Any:  # noqa: ANN401 - whatever is logged
    if isinstance(value, bytes | bytearray | memoryview):
        return _HIDDEN
    if name not in _HARMLESS and _SECRET.search(name) and not isinstance(value, bool | int | float):
        return _HIDDEN
    if isinstance(value, dict):
        return {
            _HIDDEN if isinstance(key, bytes) else key: _clean(str(key), item) for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean("", item) for item in value]
    return value


def configure_logs(level: str, style: str) -> None:
    """Set up logging of this process, of libraries too.

    Args:
        level: ``debug`` to ``error``.
        style: ``json`` for machines, ``text`` for people.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # Exceptions are rendered without the values of local variables: those may be keys.
        structlog.processors.format_exc_info,
    ]
    renderer: Processor
    if style == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, redact, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    # At debug these print what travels, and what travels is secret.
    for chatty in ("asyncio", "hpack", "httpx", "httpcore", "redis"):
        logging.getLogger(chatty).setLevel(max(logging.INFO, root.level))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
