"""What was done of a recipe, and which commits it reads: a file that lets a run go on, on the same data.

Sample ids may be row numbers: every step must read the same commit, though the branch moves while a run lasts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode

from hf_mimic.files import write_atomically
from hf_mimic.hub_files import pin
from hf_mimic.run_record import hub_id

NOTES = "mimic_recipe.json"


class Notes:
    """Step to `done`, `values` of its flags and `lines` of its table; and data set to commit.

    A step that is done has a name for this doing of it, `made`, and those of the steps that it read, `read`.

    Args:
        path: Of the file; it need not be there.

    Raises:
        ValueError: If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: dict[str, dict[str, Any]] = {}
        self.commits: dict[str, str] = {}
        try:
            if path.exists():
                known = json.loads(path.read_text(encoding="utf-8"))
                self.steps, self.commits = known["steps"], known["commits"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must hold the notes of a run, it does not ({error}). Remove it.") from error

    def of(self, step: str) -> dict[str, Any] | None:
        """Return what is known of a step."""
        return self.steps.get(step)

    def write(self, step: str, note: dict[str, Any]) -> None:
        """Note what became of a step."""
        self.steps[step] = note
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"commits": self.commits, "steps": self.steps}, indent=1) + "\n"
        write_atomically(self.path, lambda file: file.write(text.encode()))

    def commit(self, dataset: str, revision: str | None) -> str | None:
        """Return the commit that a data set's branch had when it was first asked for; of a folder or file what is given.

        Args:
            dataset: Hub data set, folder or file.
            revision: Branch, tag or commit.

        Raises:
            HubError: If there is no such data set or revision, it is closed to this login, or the Hub cannot be asked.
        """
        if hub_id(dataset) is None or Path(dataset).exists():
            return revision
        name = f"{dataset}@{revision or 'main'}"
        if name not in self.commits and is_offline_mode():
            return revision
        if name not in self.commits:
            self.commits[name] = str(pin(dataset, revision, repo_type="dataset"))
        return self.commits[name]


def state_of(path: Path) -> str:
    """Return what tells whether a data file, or those of a folder, were changed: how many, bytes, and the newest time."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    found = [
        each.stat() for each in files if not each.name.startswith(("cache-", "."))
    ]  # `datasets` puts caches there
    newest = max((each.st_mtime_ns for each in found), default=0)
    return f"{len(found)} files, {sum(each.st_size for each in found)} bytes, newest {newest}"
