"""Numbers, names and tables as the Markdown of a card has them; what comes from data is no Markdown and no HTML.

Read `escape`, then `table`.
"""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

from hf_mimic.run_record import hub_id

UNKNOWN = "not known"
HUB = "https://huggingface.co"
_LONGEST = 120  # characters of a name
_WIDTH = 90  # of code
_ACTIVE = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # they turn around what follows


def escape(text: Any) -> str:
    """Return a text of the data for a line or a cell of Markdown: shown as it is, on one line, and not too long."""
    words = _ACTIVE.sub(lambda found: "\\" + found[0], _one_line(text))
    words = "".join(_ENTITIES.get(sign, sign) for sign in words)
    return words.replace("://", ":\\//").replace("www.", "www\\.") or "(blank)"


def code(text: Any) -> str:
    """Return a text of the data as code in a line; not for tables, where "|" would end the cell."""
    words = _one_line(text) or "(blank)"
    fence = "`" * (max((len(found) for found in re.findall("`+", words)), default=0) + 1)
    space = " " if words.startswith("`") or words.endswith("`") else ""
    return f"{fence}{space}{words}{space}{fence}"


def _one_line(text: Any) -> str:
    words = " ".join("".join(map(_visible, str(text))).split())
    return words if len(words) <= _LONGEST else words[: _LONGEST - 3] + "..."


def _visible(sign: str) -> str:
    kind = unicodedata.category(sign)
    if kind == "Cs":  # half of a pair, which is no text
        return "\ufffd"
    return " " if kind in ("Cc", "Zl", "Zp") or sign in _DIRECTIONS else sign


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, align: str = "") -> str:
    """Return a table whose cells are Markdown.

    Args:
        head: Names of the columns.
        rows: Of as many cells each.
        align: A letter for each column, "l" or "r"; by default all are on the left.
    """
    rule = ["---:" if letter == "r" else "---" for letter in align.ljust(len(head), "l")]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def fenced(code: str, language: str) -> str:
    """Return a block of code, in a fence that the code does not end."""
    longest = max((len(found) for found in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def shell(command: str) -> str:
    """Return a command line, broken in front of flags where it is long."""
    lines, line = [], ""
    for word in map(shlex.quote, shlex.split(command)):
        if word.startswith("--") and len(line) > _WIDTH - 30:
            lines.append(line)
            line = "   "
        line += f" {word}" if line else word
    return " \\\n".join([*lines, line])


def python(value: str) -> str:
    """Return a string as Python has it, in double quotes."""
    return json.dumps(value, ensure_ascii=False)


def number(value: float) -> str:
    """Return a number in four digits, a whole one with commas."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def percent(share: float | None) -> str:
    """Return a share, and not 0 % or 100 % for what is only close to it."""
    if share is None:
        return UNKNOWN
    rounded = f"{share:.1%}"
    if rounded in ("0.0%", "100.0%") and 0 < share < 1:
        return "< 0.1 %" if share < 0.5 else "> 99.9 %"
    return rounded.removesuffix("%") + " %"


def value(given: Any) -> str:
    """Return a setting for a cell."""
    if given is None:
        return UNKNOWN
    if isinstance(given, bool):
        return "yes" if given else "no"
    if isinstance(given, (int, float)):
        return str(given) if isinstance(given, int) else f"{given:.6g}"
    if isinstance(given, list):
        return ", ".join(map(value, given)) or "none"
    return escape(json.dumps(given, ensure_ascii=False) if isinstance(given, dict) else given)


def named(items: Sequence[str], *, most: int = 5) -> str:
    """Return the first items of a list, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most:,} more" if len(items) > most else "")


def repo_link(name: str | None, revision: str | None = None, *, kind: str = "model") -> str:
    """Return the link to a repo at a commit, or a name that has none.

    Args:
        name: Of a record.
        revision: Commit sha.
        kind: "model" or "dataset".
    """
    if name is None:
        return UNKNOWN
    if hub_id(name) is None:
        return escape(name)
    prefix = "datasets/" if kind == "dataset" else ""
    at = f"/tree/{quote(revision, safe='')}" if revision else ""
    short = f"@{escape(revision[:7])}" if revision else ""
    return f"[{escape(name)}{short}]({HUB}/{prefix}{name}{at})"


def picture(caption: str, path: str) -> str:
    """Return a picture of the repo."""
    return f"![{escape(caption)}]({quote(path, safe='/')})"
