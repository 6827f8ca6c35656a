"""What a command prints: lines of names and values, which a later step can read, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Table(str):
    """Lines as text; `lines` has them by name.

    Args:
        lines: Name to value.
        then: Text after them.
    """

    lines: dict[str, Any]

    def __new__(cls, lines: Mapping[str, Any], then: str = "") -> Table:
        """Return the text, the values below each other."""
        width = max(map(len, lines))
        made = super().__new__(cls, "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items()) + then)
        made.lines = dict(lines)
        return made
