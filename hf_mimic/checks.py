"""One grammar for a bad choice: what is allowed, what came, the closest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise a `ValueError` that lists the allowed values and the closest one, unless `value` is one of them."""
    allowed = tuple(allowed)
    if value in allowed:
        return
    close = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.{hint}")
