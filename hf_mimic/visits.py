"""All visits of a score table, piece by piece: means per sample and per epoch without all rows in memory.

Read `Visits.cells` (each visit once, in order of steps), then `Visits.means` and `Visits.matrix`. For N samples, a few
arrays (N,) and the ids of the visits of one epoch are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from hf_mimic.parts import VALUES, Part, SampleIndex, by_epoch, cells, counted, loaded, parts_of_rows, parts_of_shard

_SMALL = 4  # a cell with fewer than 1/4 of N rows is not worth an array (N,)


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
        counts: Name to numbers of values (N,), integers, for the same names.
    """

    sample_id: np.ndarray
    values: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]


class Cell(NamedTuple):
    """Parts of an epoch, or whose steps overlap, and the places of their samples in arrays (N,).

    Args:
        parts: In their order.
        places: For each part, of the rows that count.
        there: Which samples are in the cell (N,), if none has two rows in it; None if one has, or the cell is small.
        columns: Of the values that were asked for, for each part: name to what it has of them, one value per place.
    """

    parts: list[Part]
    places: list[np.ndarray]
    there: np.ndarray | None
    columns: Iterator[dict[str, np.ndarray]]


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
        return sum(len(places) for cell in self.cells() for places in cell.places)

    def cells(self, names: Sequence[str] = ()) -> Iterator[Cell]:
        """Return all visits, in order of steps, with the columns that are asked for; take these before the next cell."""
        order = self._order()
        with closing(loaded(_plan(order, names))) as arrays:
            for parts in order:
                places = [self.index.places(next(arrays)[0]) for _ in parts]
                which: list[np.ndarray | None] = [None] * len(parts)
                there = self._there(places)
                if there is None:
                    which = counted(parts, places)
                    places = [p if w is None else p[w] for p, w in zip(places, which, strict=True)]
                    there = self._there(places)
                yield Cell(parts, places, there, _columns(parts, which, names, arrays))

    def means(self, names: Sequence[str] = VALUES) -> Means:
        """Return the means of columns over the visits of each sample; NaN and infinity are no values."""
        names = self.known(names)
        sums = {name: _Sums(self.index.size) for name in names}
        visits = np.zeros(self.index.size, np.int32)
        for cell in self.cells(names):
            _count(visits, cell)
            for places, columns in zip(cell.places, cell.columns, strict=True):
                for name, total in sums.items():
                    total.add(places, columns.get(name), once=cell.there is not None)
            for total in sums.values():
                total.close()
        there = visits > 0
        rows = slice(None) if there.all() else there
        counts = {name: total.count(visits)[rows] for name, total in sums.items()}
        values = {name: sums.pop(name).mean(visits)[rows] for name in names}
        return Means(self.index.ids(there), values, counts)

    def known(self, names: Sequence[str]) -> list[str]:
        """Return those of the columns that have a value."""
        return [name for name in names if any(name in part.known for part in self.parts)]

    def epoch_of_cells(self) -> np.ndarray | None:
        """Return the epoch of each cell, int32, if each has one of its own; else None. No rows are read."""
        spans = [{epoch for part in parts for epoch in part.spans["epoch"]} for parts in self._order()]
        found = [epoch for span in spans for epoch in span]
        return np.array(found, np.int32) if len({*found}) == len(spans) == len(found) else None

    def matrix(self, name: str) -> ScoreMatrix:
        """Return the means of a column over the visits of each sample in each epoch."""
        epochs, size = self._epochs(), self.index.size
        values = np.full((len(epochs), size), np.nan, np.float32).T  # one epoch after the other in memory
        there = np.zeros(size, bool)
        to_come = _covered(self.parts, epochs)
        sums: dict[int, tuple[_Sums, np.ndarray]] = {}  # of the epochs that go on in later cells
        for cell in self.cells([name]):
            to_come -= _covered(cell.parts, epochs)
            _mark(there, cell)
            for number, places, column in _by_epoch(cell, name, epochs):
                if cell.there is not None and number not in sums and not to_come[number]:
                    known = np.isfinite(column)
                    values[:, number][places] = column if known.all() else np.where(known, column, np.nan)
                    continue
                total, visits = sums.setdefault(number, (_Sums(size), np.zeros(size, np.int32)))
                np.add.at(visits, places, np.int32(1))
                total.add(places, column)
            for number in [n for n in sums if not to_come[n]]:
                total, visits = sums.pop(number)
                values[:, number] = total.mean(visits)
        values = values if there.all() else values[there]
        values.flags.writeable = False  # it is kept, and given to several
        return ScoreMatrix(self.index.ids(there), epochs, values)

    def _order(self) -> list[list[Part]]:
        return list(by_epoch(cells(self.parts), self.index.size))

    def _there(self, places: Sequence[np.ndarray]) -> np.ndarray | None:
        rows = sum(map(len, places))
        if rows * _SMALL < self.index.size:
            return None
        there = np.zeros(self.index.size, bool)
        for part in places:
            there[part] = True
        return there if np.count_nonzero(there) == rows else None

    def _epochs(self) -> np.ndarray:
        found = set()
        for part in self.parts:
            first, last = part.spans["epoch"]
            found |= {first} if first == last else {*np.unique(part.load(["epoch"])[0]).tolist()}
        return np.array(sorted(found), np.int32)


def _plan(order: Sequence[list[Part]], names: Sequence[str]) -> Iterator[tuple[Part, list[str]]]:
    for parts in order:
        yield from ((part, ["sample_id"]) for part in parts)
        yield from ((part, _wanted(part, names)) for part in parts if names)


def _wanted(part: Part, names: Sequence[str]) -> list[str]:
    """Return the columns that a part has, and its epochs if only they tell which of its rows belong to one."""
    found = [name for name in names if name in part.known]
    return [*found, "epoch"] if len(names) == 1 and found and len({*part.spans["epoch"]}) > 1 else found


def _columns(
    parts: Sequence[Part],
    counted: Sequence[np.ndarray | None],
    names: Sequence[str],
    arrays: Iterator[list[np.ndarray]],
) -> Iterator[dict[str, np.ndarray]]:
    for part, which in zip(parts, counted, strict=True):
        found = next(arrays) if names else []
        found = found if which is None else [column[which] for column in found]
        yield dict(zip(_wanted(part, names), found, strict=True))


def _count(visits: np.ndarray, cell: Cell) -> None:
    if cell.there is not None:
        visits += cell.there
        return
    for places in cell.places:
        np.add.at(visits, places, np.int32(1))


def _mark(there: np.ndarray, cell: Cell) -> None:
    if cell.there is not None:
        there |= cell.there
        return
    for places in cell.places:
        there[places] = True


def _covered(parts: Sequence[Part], epochs: np.ndarray) -> np.ndarray:
    """Return how many parts may have rows of each epoch."""
    return sum((_covers(part, epochs).astype(int) for part in parts), np.zeros(len(epochs), int))


def _covers(part: Part, epochs: np.ndarray) -> np.ndarray:
    first, last = part.spans["epoch"]
    return (first <= epochs) & (epochs <= last)


def _by_epoch(cell: Cell, name: str, epochs: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Return the places and the values of each epoch in each part, and where the epoch is among `epochs`."""
    for part, places, columns in zip(cell.parts, cell.places, cell.columns, strict=True):
        if name not in columns:
            continue
        here = np.flatnonzero(_covers(part, epochs)).tolist()
        if "epoch" not in columns:
            yield here[0], places, columns[name]
            continue
        for number in here:
            which = columns["epoch"] == epochs[number]
            yield number, places[which], columns[name][which]


class _Sums:
    """Sums of the values at places (N,), in float64, and how many rows had none.

    Rows of a cell in which no sample has two are written to places first, then added: twice as fast as adding one by one.
    """

    def __init__(self, size: int) -> None:
        self.sums = np.zeros(size)
        self.missing: np.ndarray | None = None
        self.once: np.ndarray | None = None

    def add(self, places: np.ndarray, values: np.ndarray | None, *, once: bool = False) -> None:
        """Add values (n,), None for none, at places (n,)."""
        known = np.zeros(len(places), bool) if values is None else np.isfinite(values)
        if not known.all():
            if self.missing is None:
                self.missing = np.zeros(len(self.sums), np.int32)
            np.add.at(self.missing, places[~known], np.int32(1))
        if values is None:
            return
        if not known.all():
            places, values = places[known], values[known]
        if not once:
            np.add.at(self.sums, places, values.astype(np.float64))
            return
        if self.once is None:
            self.once = np.zeros(len(self.sums), np.float32)
        self.once[places] = values

    def close(self) -> None:
        """Add what was written since the last call."""
        if self.once is not None:
            self.sums += self.once
            self.once.fill(0)

    def count(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of values (N,), given how many rows there were."""
        return rows if self.missing is None else rows - self.missing

    def mean(self, rows: np.ndarray) -> np.ndarray:
        """Return the means (N,), float32, given how many rows there were; the sums are used up."""
        count = self.count(rows)
        with np.errstate(invalid="ignore"):
            return np.divide(self.sums, count, out=self.sums).astype(np.float32)  # 0 / 0 is NaN
