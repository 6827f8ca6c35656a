"""At which commits a run reads its reference and the reference's base: found once, the same in every process.

A branch may move while a run lasts, and before it is resumed; what was read at first is read to the end.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_mimic.base_model import find_base_model, pin_base
from hf_mimic.hub_files import pin
from hf_mimic.processes import Processes
from hf_mimic.reference import Reference

logger = logging.getLogger(__name__)


class PinnedReference:
    """A reference and its base, with the commits (40 hexadecimal digits; None for what is not on the Hub).

    Args:
        reference: A Hub repo id, a folder, a model or a state dict; None for a run without.
        args: The `MimicTrainingArguments`.

    Raises:
        HubError: If there is no such repo or revision, it is closed to this login, or the Hub cannot be asked.
        ValueError: If direction="task_vector" and no base is named, or it cannot be read.
    """

    def __init__(self, reference: Reference | None, args: Any) -> None:
        self.reference, self.args = reference, args
        self.sha, self.base, self.base_sha = Processes().once(self._look_up)

    def _look_up(self) -> tuple[str | None, Reference | None, str | None]:
        """Return the reference's commit, its base and the base's commit."""
        sha, base = pin(self.reference, self.args.reference_revision), None
        if self.reference is not None and self.args.direction == "task_vector":
            base = self.args.reference_base_model or find_base_model(self.reference, revision=sha)
        return sha, base, pin_base(base)

    def settings(self) -> dict[str, Any]:
        """Return what scores depend on: the names and the commits."""
        found = {"reference_model": self._named(), "reference_revision": self.sha}
        if self.args.direction == "task_vector":
            found |= {"reference_base_model": _name(self.base), "reference_base_revision": self.base_sha}
        return found

    def _named(self) -> str | None:
        return _name(self.reference) or _name(self.args.reference_model)  # a model may come with the name it has there

    def resume(self, before: Mapping[str, Any], asked: str | None) -> bool:
        """Take the commits at which an interrupted run read, unless others are asked for now.

        Args:
            before: Its `settings`.
            asked: The revision that it was started with: a branch, for instance.

        Returns:
            Whether these are other commits than before this call.
        """
        earlier, now = before.get("reference_revision"), (self.sha, self.base, self.base_sha)
        same = before.get("reference_model") == self._named() and asked == self.args.reference_revision
        if earlier is None or not same:
            return False
        self.sha, base = earlier, before.get("reference_base_model")
        if base is not None and self.base is not None and self.args.reference_base_model in (None, base):
            self.base, self.base_sha = base, before.get("reference_base_revision")
        if (self.sha, self.base, self.base_sha) == now:
            return False
        logger.warning(
            "%s has moved since the run began: it goes on with %s. Name another `reference_revision` to leave it.",
            self.reference,
            self.sha,
        )
        return True


def _name(model: Reference | None) -> str | None:
    return str(model) if isinstance(model, (str, Path)) else None
