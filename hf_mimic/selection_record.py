"""What was kept of a data set, and why: `selection.json` of a publication, and what its card is made of.

Read `Counts`, then `SelectionRecord`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass
from typing import Any

from hf_mimic.run_record import RunRecord, as_json, known_fields, public_command

MOST_REASONS = 20
OTHER, NO_VALUE = "other reasons", "no value"


@dataclass(frozen=True)
class Counts:
    """How many samples there were and how many are left.

    Args:
        before: None where it is not known.
        after: At most `before`.
    """

    before: int | None
    after: int

    def __post_init__(self) -> None:
        _check_count("after", self.after)
        if self.before is not None:
            _check_count("before", self.before)
            if self.after > self.before:
                raise ValueError(f"what is left must not be more than there was, got {self.after} of {self.before}.")

    @property
    def share(self) -> float | None:
        """What share is left, in [0, 1]; None where it is not known, or nothing was there."""
        return self.after / self.before if self.before else None


@dataclass(frozen=True)
class SelectionRecord:
    """What was kept of one split of a data set, and why.

    Args:
        run: How the scores were made.
        rule: In words, such as "trust >= 0.412".
        threshold: Of the rule, or one for each epoch; None where it has none.
        rows: Of the split.
        unscored: How many rows have no score.
        unscored_kept: Whether those were kept.
        reasons: Sentence to number of samples, of kept and dropped ones; the most frequent first, at most 20, what is
            beyond them as "other reasons".
        classes: Name to counts, in the order of the labels; {} where there are no labels.
        groups: Column to value to counts, of columns that the user named.
        quality: `QualityReport.as_dict()`; None where it is not known.
        splits: Rows of every split that is published.
        split: The one that was filtered.
        original_dataset: What was filtered.
        original_revision: Commit sha.
        sample_id_column: Name of the id column.
        command: What made the selection, if it was a command.
        original_config: Name of the original's configuration; None for the default one.
    """

    run: RunRecord
    rule: str
    threshold: float | list[float] | None
    rows: Counts
    unscored: int
    unscored_kept: bool
    reasons: dict[str, int]
    classes: dict[str, Counts]
    groups: dict[str, dict[str, Counts]]
    quality: dict[str, Any] | None
    splits: dict[str, int]
    split: str
    original_dataset: str | None
    original_revision: str | None
    sample_id_column: str
    command: str | None
    original_config: str | None = None

    def __post_init__(self) -> None:
        for name in ("rule", "split", "sample_id_column"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"`{name}` must be a string that says something, got {getattr(self, name)!r}.")
        _check_count("unscored", self.unscored)
        for name in ("reasons", "splits"):
            for key, count in _mapping(name, getattr(self, name)).items():
                _check_count(f"{name}[{key!r}]", count)
        put = object.__setattr__
        put(self, "reasons", _most_frequent(self.reasons))
        put(self, "classes", _named(self.classes))
        put(self, "groups", {str(column): _named(values) for column, values in self.groups.items()})
        put(self, "threshold", as_json(self.threshold, "threshold"))
        put(self, "quality", as_json(self.quality, "quality"))
        if self.original_dataset is not None and not self.original_dataset.strip():
            raise ValueError("`original_dataset` must be a name or None, got an empty one. Use None for not known.")
        if self.command is not None:
            put(self, "command", public_command(self.command))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, as JSON takes them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> SelectionRecord:
        """Return the record in a dict; keys that are not known are left out.

        Raises:
            ValueError: If a field is missing or has another type.
        """
        found = known_fields(cls, given)
        missing = [
            name for name, entry in cls.__dataclass_fields__.items() if name not in found and entry.default is MISSING
        ]
        if missing:
            raise ValueError(f"a selection must have every field, {', '.join(missing)} missing. Publish it again.")
        found["run"] = RunRecord.from_dict(found["run"])
        found["rows"] = _counts("rows", found["rows"])
        found["classes"] = _all_counts("classes", found["classes"])
        groups = _mapping("groups", found["groups"])
        found["groups"] = {column: _all_counts(column, values) for column, values in groups.items()}
        return cls(**found)


def count_by(values: Iterable[Any], keep: Iterable[Any]) -> dict[str, Counts]:
    """Return value to counts, in the order in which values first come.

    Args:
        values: Of N rows; None is a value, "no value".
        keep: Booleans (N,).
    """
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    for value, kept in zip(values, keep, strict=True):
        name = NO_VALUE if value is None else str(value)
        before[name] = before.get(name, 0) + 1
        after[name] = after.get(name, 0) + bool(kept)
    return {name: Counts(before[name], after[name]) for name in before}


def _most_frequent(reasons: Mapping[str, int]) -> dict[str, int]:
    ranked = sorted(reasons.items(), key=lambda item: (item[0] == OTHER, -item[1], item[0]))
    if len(ranked) <= MOST_REASONS:
        return dict(ranked)
    first = ranked[: MOST_REASONS - 1]
    return {**dict(first), OTHER: sum(count for _, count in ranked[len(first) :])}


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"`{name}` must be a whole number of samples, got {value!r}. Use int(...) of a numpy number.")


def _named(given: Any) -> dict[str, Counts]:
    return {str(name): counts for name, counts in _mapping("classes", given).items()}


def _mapping(name: str, given: Any) -> Mapping[Any, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"`{name}` must be a dict, got {given!r}.")
    return given


def _counts(name: str, given: Any) -> Counts:
    if not isinstance(given, Mapping) or not {"before", "after"} <= given.keys():
        raise ValueError(f"`{name}` must have `before` and `after`, got {given!r}.")
    return Counts(given["before"], given["after"])


def _all_counts(name: str, given: Any) -> dict[str, Counts]:
    return {str(key): _counts(f"{name}[{key!r}]", value) for key, value in _mapping(name, given).items()}
