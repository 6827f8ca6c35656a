"""The parts of a score table: up to a row group of visits each, read column by column, and which of their rows count.

Read `Part`, `parts_of_shard`, then `cells` (parts that may repeat each other's rows) and `counted`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

VALUES = ("mimic_score", "relative_weight", "loss", "ref_loss", "ref_trust", "clip_score", "kept")
_KEYS = [("sample_id", pa.int64()), ("epoch", pa.int32()), ("step", pa.int64())]
KEYS = tuple(name for name, _ in _KEYS)
SCHEMA = pa.schema(_KEYS + [(name, pa.float32()) for name in VALUES])
_ROWS = 1 << 20  # of a part in memory; as many as pyarrow writes into a row group
_FEW = 1 << 16  # ids that need not lie close together
_AHEAD = 4  # parts
_NO_STEP = -(2**63)
_ANY = (_NO_STEP, 2**63 - 1)


@dataclass
class Part:
    """Some visits in the order in which they were recorded: a row group of a shard, or rows in memory.

    Args:
        rows: How many.
        spans: Least and greatest `sample_id`, `epoch` and `step`; wider where the shard does not tell.
        known: The value columns that hold at least one value.
        load: Names of columns -> their arrays (rows,); null is NaN.
    """

    rows: int
    spans: dict[str, tuple[int, int]]
    known: frozenset[str]
    load: Callable[[Sequence[str]], list[np.ndarray]]


def parts_of_shard(path: Path) -> list[Part]:
    """Return the row groups of a shard; only its head is read.

    Raises:
        ValueError: If it is not a whole Parquet file with ids, epochs and steps.
    """
    head = read_shard(path, pq.read_metadata)
    if missing := [name for name in KEYS if name not in head.schema.names]:
        raise ValueError(
            f"a score shard must have the columns {', '.join(KEYS)}, {path} has no {', '.join(missing)}. Is it one?"
        )
    return [_row_group(path, head, number) for number in range(head.num_row_groups) if head.row_group(number).num_rows]


def parts_of_rows(table: pa.Table) -> list[Part]:
    """Return rows in memory, of `SCHEMA`, as parts."""
    return [_slice(table.slice(start, _ROWS)) for start in range(0, len(table), _ROWS)]


def read_shard(path: Path, read: Callable[[Path], Any]) -> Any:
    """Return what `read` finds in a shard.

    Raises:
        ValueError: If it is not a whole Parquet file.
    """
    try:
        return read(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"a score shard must be a whole Parquet file, {path} is not ({error}). It was cut off or changed after it "
            "was written; delete it to go on without its visits."
        ) from error


def read_rows(path: Path) -> pa.Table:
    """Return all rows of a shard, of `SCHEMA`."""
    return read_shard(path, partial(pq.read_table, schema=SCHEMA))


def rows_of_visit(visit: Mapping[str, Any]) -> pa.Table:
    """Return what `ScoreTable.record` was given as rows of `SCHEMA`."""
    ids = _numpy(visit["sample_id"]).reshape(-1)
    columns = []
    for name in SCHEMA.names:
        value = visit.get(name)
        if value is None:
            column = pa.nulls(len(ids), SCHEMA.field(name).type)
        else:
            known = np.broadcast_to(_numpy(value), ids.shape)
            column = pa.array(known, mask=~np.isfinite(known))
        columns.append(column.cast(SCHEMA.field(name).type))
    return pa.table(columns, schema=SCHEMA)


def _numpy(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
    return np.asarray(value)


def loaded(plan: Iterable[tuple[Part, Sequence[str]]]) -> Generator[list[np.ndarray], None, None]:
    """Return the columns of parts, reading ahead while they are used."""
    with ThreadPoolExecutor(2) as reader:
        ahead: deque[Future[list[np.ndarray]]] = deque()
        try:
            for part, names in plan:
                ahead.append(reader.submit(part.load, names) if names else reader.submit(list))
                if len(ahead) > _AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def cells(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Return the parts in order of steps, those together whose steps overlap; within a cell they keep their order."""
    order = sorted(range(len(parts)), key=lambda i: parts[i].spans["step"])
    cell: list[int] = []
    end = 0
    for i in order:
        first, last = parts[i].spans["step"]
        if cell and first > end:
            yield [parts[j] for j in sorted(cell)]
            cell = []
        end = max(end, last) if cell else last
        cell.append(i)
    if cell:
        yield [parts[j] for j in sorted(cell)]


def by_epoch(found: Iterable[list[Part]], most: int) -> Iterator[list[Part]]:
    """Join cells that follow each other in an epoch, up to so many rows."""
    joined: list[Part] = []
    for cell in found:
        together = joined + cell
        epochs = {part.spans["epoch"] for part in together}
        if joined and (len(epochs) > 1 or sum(part.rows for part in together) > most):
            yield joined
            together = cell
        joined = together
    if joined:
        yield joined


def counted(cell: Sequence[Part], places: Sequence[np.ndarray]) -> list[np.ndarray | None]:
    """Return which rows of each part count: of those with the same sample and step, the last; None for all.

    Most tables hold a sample once per cell, and its steps are then not read.

    Args:
        cell: Parts whose steps overlap.
        places: For each part, an integer >= 0 per row that stands for its sample.
    """
    together = np.concatenate(places) if len(places) > 1 else places[0]
    if not len(_repeated(together)):
        return [None] * len(cell)
    steps = np.concatenate([part.load(["step"])[0] for part in cell])
    unknown = np.flatnonzero(steps == _NO_STEP)  # no row repeats these
    steps[unknown] = steps.max() + 1 + np.arange(len(unknown))
    span = int(steps.max()) - int(steps.min()) + 1
    if (int(together.max()) + 1) * span < 2**62:
        steps = steps - steps.min()
    else:
        _, steps = np.unique(steps, return_inverse=True)
        span = len(steps)
    keys = together * span + steps  # one integer for each pair of sample and step
    twice = np.unique(_repeated(keys))
    if not len(twice):
        return [None] * len(cell)
    rows = np.flatnonzero(twice[np.searchsorted(twice, keys).clip(max=len(twice) - 1)] == keys)[::-1]
    _, last = np.unique(keys[rows], return_index=True)
    which = np.ones(len(keys), bool)
    which[rows] = False
    which[rows[last]] = True
    return list(np.split(which, np.cumsum([part.rows for part in cell])[:-1]))


def _repeated(values: np.ndarray) -> np.ndarray:
    ordered = np.sort(values)
    return ordered[1:][ordered[1:] == ordered[:-1]]


class SampleIndex:
    """Places of sample ids in arrays (size,), in the order of the ids.

    Ids that lie close together are their own places, less the first; others, 64-bit hashes for instance, are sorted,
    for which all of them are read.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        (first, last), (begin, end) = (_extremes(parts, name) for name in ("sample_id", "epoch"))
        rows = sum(part.rows for part in parts)
        self.first, self.size = first, last - first + 1
        self.known: np.ndarray | None = None
        if self.size > 2 * rows / max(end - begin + 1, 1) + _FEW:
            self.known = _distinct(parts)
            self.size = len(self.known)

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Return the places of ids (rows,)."""
        if self.known is None:
            return ids - self.first if self.first else ids
        order = np.argsort(ids)  # sorted ids are found much faster
        places = np.empty(len(ids), np.int64)
        places[order] = np.searchsorted(self.known, ids[order])
        return places

    def ids(self, there: np.ndarray) -> np.ndarray:
        """Return the ids at places (size,) that are true."""
        if self.known is not None:
            return self.known[there]
        found = np.flatnonzero(there)
        found += self.first
        return found


def _distinct(parts: Sequence[Part]) -> np.ndarray:
    known, more, waiting = np.zeros(0, np.int64), [], 0
    for number, part in enumerate(parts, start=1):
        more.append(part.load(["sample_id"])[0])
        waiting += part.rows
        if waiting >= max(len(known), 4 * _ROWS) or number == len(parts):
            known, more, waiting = np.unique(np.concatenate([known, *more])), [], 0
    return known


def _extremes(parts: Sequence[Part], name: str) -> tuple[int, int]:
    spans = [part.spans[name] for part in parts] or [(0, -1)]
    return min(first for first, _ in spans), max(last for _, last in spans)


def _row_group(path: Path, head: Any, number: int) -> Part:
    group = head.row_group(number)
    columns = (group.column(i) for i in range(group.num_columns))
    told = {column.path_in_schema: column.statistics for column in columns}
    spans = {
        name: (told[name].min, told[name].max) if told[name] is not None and told[name].has_min_max else _ANY
        for name in KEYS
    }
    empty = {name for name, s in told.items() if s is not None and s.has_null_count and s.null_count == group.num_rows}
    known = frozenset(told.keys() & set(VALUES)) - empty
    return Part(group.num_rows, spans, known, partial(_load, path, head, number))


def _load(path: Path, head: Any, number: int, names: Sequence[str]) -> list[np.ndarray]:
    def read(path: Path) -> pa.Table:
        with pq.ParquetFile(path, metadata=head) as file:
            return file.read_row_group(number, columns=list(names))

    return _arrays(read_shard(path, read), names)


def _slice(rows: pa.Table) -> Part:
    known = frozenset(name for name in VALUES if rows[name].null_count < len(rows))
    keys = dict(zip(KEYS, _arrays(rows, KEYS), strict=True))
    spans = {name: (int(column.min()), int(column.max())) for name, column in keys.items()}
    return Part(len(rows), spans, known, partial(_arrays, rows))


def _arrays(rows: pa.Table, names: Sequence[str]) -> list[np.ndarray]:
    columns = (rows[name].cast(SCHEMA.field(name).type) for name in names)
    absent = {"epoch": 0, "step": _NO_STEP}  # of rows that came from elsewhere: `ScoreTable.from_arrow`
    return [
        (column.fill_null(absent[name]) if name in absent and column.null_count else column).to_numpy()
        for name, column in zip(names, columns, strict=True)
    ]
