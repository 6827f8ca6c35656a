"""Where things come from: the command line that runs, and the Hub data set that rows were loaded from."""

from __future__ import annotations

import re
from contextvars import ContextVar
from pathlib import Path
from typing import Any

COMMAND: ContextVar[str | None] = ContextVar("command", default=None)  # the command line that runs, if one does
_CACHED = re.compile(r"/([^/]+)___([^/]+)/[^/]+/[^/]+/([0-9a-f]{40})(?:/|$)")  # of a data set that came from the Hub


def origin(rows: Any) -> tuple[str | None, str | None]:
    """Return repo and commit of the Hub data set that rows were loaded from, as far as their cache files tell."""
    found = {_CACHED.search(Path(file["filename"]).as_posix()) for file in getattr(rows, "cache_files", ())}
    names = {(f"{match[1]}/{match[2]}", match[3]) for match in found if match}
    return next(iter(names)) if len(names) == 1 else (None, None)
