"""The folder of a pass over a corpus: what belongs to which part and shard, what is there, and with which settings.

Read `Layout`, then `open_folder`. A part is some batches, written as one shard file of the score table; which part a row
belongs to depends on the settings alone, so any process, shard or later run may make it, with the same scores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from hf_mimic.files import write_atomically
from hf_mimic.scores import ScoreTable

SETTINGS, LABELS = "scoring.json", "scoring-labels.npz"
_PARTS = 256  # of a corpus, if a part has fewer than _MOST_BATCHES
_MOST_BATCHES = 1000


@dataclass(frozen=True)
class Layout:
    """How N rows are divided: batches at multiples of `batch_size`, parts at multiples of `part_batches` of those.

    Args:
        rows: N.
        batch_size: Rows per batch; the last one may have fewer.
        part_batches: Batches per part; the last one may have fewer.
    """

    rows: int
    batch_size: int
    part_batches: int

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return math.ceil(self.rows / self.batch_size)

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return math.ceil(self.batches / self.part_batches)

    def batches_of(self, part: int) -> range:
        """Return the batches of a part."""
        return range(part * self.part_batches, min((part + 1) * self.part_batches, self.batches))

    def rows_of(self, batch: int) -> range:
        """Return the rows of a batch."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.rows))

    def parts_of(self, shard: tuple[int, int]) -> range:
        """Return the parts of shard (index, count)."""
        index, count = shard
        return range(index * self.parts // count, (index + 1) * self.parts // count)

    def path(self, folder: Path, part: int) -> Path:
        """Return the file of a part: that of a `ScoreTable` whose steps are the batches."""
        batches = self.batches_of(part)
        return folder / f"steps-{batches[0]:08d}-{batches[-1]:08d}-rank-00000.parquet"

    def is_whole(self, folder: Path, part: int) -> bool:
        """Whether the file of a part has all of its rows; only its head is read."""
        batches = self.batches_of(part)
        rows = self.rows_of(batches[-1]).stop - self.rows_of(batches[0]).start
        try:
            return pq.read_metadata(self.path(folder, part)).num_rows == rows
        except (OSError, ValueError):  # pyarrow's ArrowInvalid is a ValueError
            return False

    def missing(self, folder: Path, parts: range | None = None) -> list[int]:
        """Return the parts, of all or of some, that are not there as a whole."""
        chosen = range(self.parts) if parts is None else parts
        return [part for part in chosen if not self.is_whole(folder, part)]


def default_part_batches(rows: int, batch_size: int) -> int:
    """Return how many batches a part has: 1/256 of all, at most 1000, whatever the number of shards."""
    return min(max(math.ceil(rows / batch_size / _PARTS), 1), _MOST_BATCHES)


class Opened(NamedTuple):
    """What a shard has to do: the parts that are missing, what was found broken, and where earlier scores went."""

    missing: list[int]
    broken: list[Path]
    moved: Path | None


def open_folder(
    folder: Path, settings: Mapping[str, Any], layout: Layout, shard: tuple[int, int], *, overwrite: bool
) -> Opened:
    """Make the folder ready for a shard: check or write its settings, and find what is missing.

    Scores of another run, and of a whole pass with other settings, are moved aside if there is one shard only; with
    `overwrite` also those of an unfinished pass.

    Raises:
        ValueError: If the folder holds what this shard must not be mixed with.
    """
    known, moved = read_settings(folder), None
    if known is None or _differences(known, settings):
        table = ScoreTable(folder)
        holds = table.count_stored() > 0
        if shard[1] > 1 and (holds or known is not None):  # other shards may be running
            raise ValueError(_refusal(folder, known, settings, shard))
        if holds and known is not None and not overwrite and not _is_finished(folder, known):
            raise ValueError(_refusal(folder, known, settings, shard))
        moved = table.set_aside() if holds else None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LABELS).unlink(missing_ok=True)
        text = json.dumps(dict(settings), indent=1).encode()
        write_atomically(folder / SETTINGS, lambda file: file.write(text))
    parts = layout.parts_of(shard)
    if overwrite:
        for part in parts:
            layout.path(folder, part).unlink(missing_ok=True)
    missing = layout.missing(folder, parts)
    broken = [path for path in (layout.path(folder, part) for part in missing) if path.exists()]
    for path in broken:
        path.unlink()
    return Opened(missing, broken, moved)


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings of the pass in a folder, None if there are none."""
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / SETTINGS} must hold the settings of a scoring pass, it does not ({error})."
        ) from error
    return found


def summary(folder: str | Path) -> dict[str, str]:
    """Return what the scores in a folder say, by name."""
    samples = ScoreTable(folder).aggregate()
    values, trust = (samples[name].to_numpy() for name in ("mimic_score", "trust"))
    values = values[np.isfinite(values)]
    lines = {"samples": str(len(samples))}
    if len(values):
        lines |= {"mean score": f"{values.mean():.4g}", "negative": f"{(values < 0).mean():.1%}"}
    if np.isfinite(trust).any():
        lines["labels probably wrong"] = f"{1 - np.nanmean(trust):.1%}"
    return lines


def _differences(known: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**known, **settings} if known.get(name) != settings.get(name)]
    return [f"`{name}` was {known.get(name)!r} and is {settings.get(name)!r}" for name in names]


def _is_finished(folder: Path, known: Mapping[str, Any]) -> bool:
    return not Layout(known["rows"], known["batch_size"], known["part_batches"]).missing(folder)


def _refusal(
    folder: Path, known: Mapping[str, Any] | None, settings: Mapping[str, Any], shard: tuple[int, int]
) -> str:
    found = "scores of another run" if known is None else f"a pass where {'; '.join(_differences(known, settings))}"
    others = "" if shard[1] > 1 else ", or overwrite=True (--overwrite) to move these scores aside"
    return (
        f"{folder} must be empty or hold scores of the same pass, got {found}. Use the same settings to go on, another "
        f"output folder{others}."
    )
