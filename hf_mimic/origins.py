"""Where things come from: the command line that runs, and the Hub data set that rows were loaded from."""

from __future__ import annotations

import re
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

COMMAND: ContextVar[str | None] = ContextVar("command", default=None)  # the command line that runs, if one does
# <namespace>___<name>/<configuration>/<version>/<commit> of a data set that came from the Hub
_CACHED = re.compile(r"/([^/]+)___([^/]+)/([^/]+)/[^/]+/([0-9a-f]{40})(?:/|$)")
_MADE = re.compile(r"default|.*-[0-9a-f]{16}")  # configurations that nobody named


class Origin(NamedTuple):
    """A Hub data set that rows were loaded from; None for what is not known.

    Args:
        dataset: Repo id.
        revision: Commit sha.
        config: Name of the configuration, None for the default one.
    """

    dataset: str | None = None
    revision: str | None = None
    config: str | None = None


def origin(rows: Any) -> Origin:
    """Return the Hub data set that rows were loaded from, as far as their cache files tell."""
    found = {_CACHED.search(Path(file["filename"]).as_posix()) for file in getattr(rows, "cache_files", ())}
    names = {
        Origin(f"{match[1]}/{match[2]}", match[4], None if _MADE.fullmatch(match[3]) else match[3])
        for match in found
        if match
    }
    return next(iter(names)) if len(names) == 1 else Origin()
