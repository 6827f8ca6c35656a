"""All visits of a score table, piece by piece: means per sample and per epoch without all rows in memory.

Read `Visits.pieces` (each visit once, in order of steps), then `Visits.means` and `Visits.matrix`. For N samples, a few
arrays (N,) and the ids of the visits of one epoch are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from hf_mimic.parts import VALUES, Part, SampleIndex, cells, counted, parts_of_rows, parts_of_shard

_EVIDENCE = (("mimic_score", 1), ("loss", -1))


class ScoreMatrix(NamedTuple):
    """One value of N samples in T epochs, in the order of `ScoreTable.aggregate`.

    Args:
        sample_id: (N,), int64, sorted.
        epochs: (T,), int32, sorted.
        values: (N, T), float32: the mean over a sample's visits in an epoch, NaN where it has no value.
    """

    sample_id: np.ndarray
    epochs: np.ndarray
    values: np.ndarray


class Means(NamedTuple):
    """Means of N samples over their visits.

    Args:
        sample_id: (N,), int64, sorted.
        values: Name to means (N,), float32, NaN where there is no value; no entry for a column without any.
        counts: Name to numbers of values (N,), int32, for the same names.
    """

    sample_id: np.ndarray
    values: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]


class Piece(NamedTuple):
    """The rows of a part that count, (n,), and the places of their samples in arrays (N,)."""

    part: Part
    places: np.ndarray
    counted: np.ndarray | None

    def load(self, names: Sequence[str]) -> list[np.ndarray]:
        """Return columns (n,)."""
        columns = self.part.load(names) if names else []
        return columns if self.counted is None else [column[self.counted] for column in columns]


class Visits:
    """All visits of a score table, each once: of rows with the same sample and step, the last one counts.

    Args:
        paths: Shards; a later one wins over an earlier one.
        tables: Rows in memory, of `SCHEMA`; they win over the shards.

    Raises:
        ValueError: If a shard is not a whole Parquet file; also later, when its rows are read.
    """

    def __init__(self, paths: Sequence[Path] = (), tables: Sequence[pa.Table] = ()) -> None:
        self.parts = [part for path in paths for part in parts_of_shard(path)]
        self.parts += [part for table in tables for part in parts_of_rows(table)]
        self.index = SampleIndex(self.parts)

    def __len__(self) -> int:
        return sum(len(piece.places) for piece in self.pieces())

    def pieces(self) -> Iterator[Piece]:
        """Return all visits, part by part, in order of steps."""
        for cell in cells(self.parts):
            places = [self.index.places(part.load(["sample_id"])[0]) for part in cell]
            for part, found, which in zip(cell, places, counted(cell, places), strict=True):
                yield Piece(part, found if which is None else found[which], which)

    def means(self, names: Sequence[str] = VALUES) -> Means:
        """Return the means of columns over the visits of each sample; NaN and infinity are no values."""
        sums = {name: _Sums(self.index.size) for name in names if any(name in part.known for part in self.parts)}
        visits = np.zeros(self.index.size, np.int32)
        for piece in self.pieces():
            np.add.at(visits, piece.places, np.int32(1))
            here = [name for name in sums if name in piece.part.known]
            for name, column in zip(here, piece.load(here), strict=True):
                sums[name].add(piece.places, column)
            for name in sums.keys() - set(here):
                sums[name].skip(piece.places)
        there = visits > 0
        rows = slice(None) if there.all() else there
        counts = {name: total.count(visits)[rows] for name, total in sums.items()}
        values = {name: sums.pop(name).mean(visits)[rows] for name in [*sums]}
        return Means(self.index.ids(there), values, counts)

    def matrix(self, name: str) -> ScoreMatrix:
        """Return the means of a column over the visits of each sample in each epoch."""
        epochs, size = self._epochs(), self.index.size
        values, there = np.full((size, len(epochs)), np.nan, np.float32), np.zeros(size, bool)
        to_come = sum((_covers(part, epochs).astype(int) for part in self.parts), np.zeros(len(epochs), int))
        sums: dict[int, tuple[_Sums, np.ndarray]] = {}  # of the epochs that parts to come belong to
        for piece in self.pieces():
            there[piece.places] = True
            for number, places, column in _by_epoch(piece, name, epochs):
                total, visits = sums.setdefault(number, (_Sums(size), np.zeros(size, np.int32)))
                np.add.at(visits, places, np.int32(1))
                total.add(places, column)
            to_come -= _covers(piece.part, epochs)
            for number in [n for n in sums if not to_come[n]]:
                total, visits = sums.pop(number)
                values[:, number] = total.mean(visits)
        return ScoreMatrix(self.index.ids(there), epochs, values if there.all() else values[there])

    def _epochs(self) -> np.ndarray:
        found = set()
        for part in self.parts:
            first, last = part.spans["epoch"]
            found |= {first} if first == last else {*np.unique(part.load(["epoch"])[0]).tolist()}
        return np.array(sorted(found), np.int32)


def aggregate(visits: Visits) -> pa.Table:
    """Return the table that `ScoreTable.aggregate` describes."""
    means = visits.means()
    size = len(means.sample_id)
    trust = means.values.get("ref_trust")
    if trust is not None:
        from hf_mimic.trust import combine

        evidence = [means.values[name] * sign for name, sign in _EVIDENCE if name in means.values]
        trust = combine(trust, np.stack(evidence, 1)).astype(np.float32) if evidence else trust
    counts = [means.counts[name] for name in ("mimic_score", "clip_score") if name in means.counts]
    n_visits = np.max(counts, 0).astype(np.int64) if counts else np.zeros(size, np.int64)
    nulls = pa.nulls(size, pa.float32())
    known = {
        name: pa.array(values, from_pandas=True)
        for name, values in {"trust": trust, **means.values}.items()
        if values is not None
    }
    columns = {name: known.get(name, nulls) for name in ("trust", *VALUES)}
    return pa.table({"sample_id": means.sample_id, **columns, "n_visits": n_visits})


def _covers(part: Part, epochs: np.ndarray) -> np.ndarray:
    first, last = part.spans["epoch"]
    return (first <= epochs) & (epochs <= last)


def _by_epoch(piece: Piece, name: str, epochs: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Return the places and the values of each epoch in a piece, and where the epoch is among `epochs`."""
    if name not in piece.part.known:
        return
    here = np.flatnonzero(_covers(piece.part, epochs))
    if len(here) == 1:
        yield int(here[0]), piece.places, piece.load([name])[0]
        return
    column, of = piece.load([name, "epoch"])
    for number in here.tolist():
        which = of == epochs[number]
        yield number, piece.places[which], column[which]


class _Sums:
    """Sums of the values at places (N,), in float64, and how many rows had none."""

    def __init__(self, size: int) -> None:
        self.sums = np.zeros(size)
        self.missing: np.ndarray | None = None

    def add(self, places: np.ndarray, values: np.ndarray) -> None:
        known = np.isfinite(values)
        if not known.all():
            self.skip(places[~known])
            places, values = places[known], values[known]
        np.add.at(self.sums, places, values.astype(np.float64))

    def skip(self, places: np.ndarray) -> None:
        if self.missing is None:
            self.missing = np.zeros(len(self.sums), np.int32)
        np.add.at(self.missing, places, np.int32(1))

    def count(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.missing is None else rows - self.missing

    def mean(self, rows: np.ndarray) -> np.ndarray:
        """Return the means (N,), float32, given how many rows there were; the sums are used up."""
        count = self.count(rows)
        with np.errstate(invalid="ignore"):
            return np.divide(self.sums, count, out=self.sums).astype(np.float32)  # 0 / 0 is NaN
