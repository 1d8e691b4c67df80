"""Looks for secrets where they must not be, in every form in which text could show them."""

from __future__ import annotations

import base64
from collections.abc import Mapping


def forms(secret: bytes) -> dict[str, bytes]:
    """Return how a secret could show in text: raw, hex, and base64 wherever in a longer string it stands."""
    found = {
        "raw": secret,
        "repr": repr(secret)[2:-1].encode(),
        "hex": secret.hex().encode(),
        "HEX": secret.hex().upper().encode(),
        "hex with colons": secret.hex(":").encode(),
        "list of numbers": str(list(secret))[1:-1].encode(),
    }
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + secret)
        # The first and last characters depend on the neighbours.
        inner = encoded[4:-4]
        found[f"base64+{shift}"] = inner
        found[f"base64url+{shift}"] = inner.replace(b"+", b"-").replace(b"/", b"_")
    return found


def leaks(secrets: Mapping[str, bytes], places: Mapping[str, bytes]) -> list[str]:
    """Return what was found where, by name and form; never the secret itself: a failed test prints it."""
    return [
        f"{name} as {form} in {place}"
        for name, secret in secrets.items()
        for form, text in forms(secret).items()
        for place, content in places.items()
        if text in content
    ]
