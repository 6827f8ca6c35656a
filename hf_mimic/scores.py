"""The score table: one row per visit of a sample, kept as Parquet shards; and scores as columns of a data set.

Read `ScoreTable` (record, flush, load, aggregate), then `attach_scores`. A value that is not known is null, never 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_mimic.data import read_sample_ids
from hf_mimic.files import write_atomically
from hf_mimic.joins import find_ids
from hf_mimic.matrices import aggregate
from hf_mimic.parts import SCHEMA, VALUES, read_rows, read_shard, rows_of_visit
from hf_mimic.visits import ScoreMatrix, Visits

if TYPE_CHECKING:
    from datasets import Dataset

ATTACHED = ("trust", *VALUES, "n_visits", "keep")
_OPTIONAL = ("trust", "ref_loss", "ref_trust", "clip_score", "kept")
_SHARDS = "steps-*-rank-*.parquet"
_KEPT_BYTES = 1 << 30  # of matrices: filters that vote ask for the same columns again
_OWN = (_SHARDS, "*.tmp", "mimic_record.json", "scoring.json", "scoring-labels.npz")  # what is written beside them


class ScoreTable:
    """Scores of samples, one row per visit.

    `relative_weight` is w * b, the weight in units of the uniform one: 1 is average, whatever the batch size.

    Args:
        folder: Where `flush` writes shards and from where earlier ones are read; without it, rows stay in memory.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._buffer: list[dict[str, Any]] = []
        self._tables: list[pa.Table] = []
        self._version = 0  # of the rows in memory
        self._aggregated: tuple[Any, pa.Table] | None = None
        self._matrices: dict[tuple[Any, ...], ScoreMatrix] = {}

    @classmethod
    def load(cls, folder: str | Path) -> ScoreTable:
        """Open the table in a folder of Parquet shards.

        Raises:
            FileNotFoundError: If the folder holds no shard.
        """
        table = cls(folder)
        if not table.shards():
            raise FileNotFoundError(
                f"{folder} must hold the score shards ({_SHARDS}) of a run, found none. "
                "Give <output_dir>/scores of a MimicTrainer, or what `hf-mimic score` wrote."
            )
        return table

    @classmethod
    def from_arrow(cls, table: pa.Table) -> ScoreTable:
        """Make a table of rows that are at hand; absent columns are null.

        Raises:
            ValueError: If a row has no `sample_id`.
        """
        ids = table["sample_id"] if "sample_id" in table.column_names else None
        if ids is None or ids.null_count or not (pa.types.is_integer(ids.type) or pa.types.is_floating(ids.type)):
            got = f"{ids.type} ids" if ids is not None and not ids.null_count else "rows without"
            raise ValueError(f"every row of a score table must have an integer `sample_id`, got {got}. Add them.")
        result = cls()
        columns = [
            table[n] if n in table.column_names else pa.nulls(len(table), SCHEMA.field(n).type) for n in SCHEMA.names
        ]
        result._tables.append(pa.table(columns, names=SCHEMA.names).cast(SCHEMA))
        return result

    def record(self, sample_id: Any, *, epoch: int, step: int, **values: Any) -> None:
        """Add one visit of each of B samples; tensors are not moved to the CPU before `flush` or a read.

        Args:
            sample_id: Integers (B,).
            epoch: Of the visit.
            step: Optimizer step of the visit.
            **values: Of `VALUES`, (B,) each or one for all; NaN and infinity are stored as null.
        """
        unknown = set(values) - set(VALUES)
        if unknown:
            raise ValueError(f"a score column must be one of {', '.join(VALUES)}, got {', '.join(sorted(unknown))}.")
        self._version += 1
        self._buffer.append({"sample_id": sample_id, "epoch": epoch, "step": step, **values})

    def extend(self, other: ScoreTable) -> None:
        """Add all rows of another table."""
        self._version += 1
        self._tables.append(other.to_arrow())

    def flush(self, rank: int = 0) -> Path | None:
        """Write the rows recorded since the last call as one shard; return its path, None if there were none."""
        self._collect()
        if self.folder is None or not self._tables:
            return None
        rows = pa.concat_tables(self._tables)
        if not len(rows):  # all rows of this process were repeated ones
            self._tables.clear()
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        steps = rows["step"].to_numpy()
        path = self.folder / f"steps-{steps.min():08d}-{steps.max():08d}-rank-{rank:05d}.parquet"
        if path.exists():  # other samples of the same steps
            rows = pa.concat_tables([read_rows(path), rows])
        self._write(path, rows)
        self._tables.clear()
        return path

    def forget(self) -> None:
        """Drop the rows that are in memory only."""
        self._version += 1
        self._buffer.clear()
        self._tables.clear()

    def count_stored(self) -> int:
        """Return the number of rows on the disk, without reading them."""
        return sum(read_shard(path, pq.read_metadata).num_rows for path in self.shards())

    def truncate(self, step: int) -> None:
        """Drop the stored rows at `step` and later (a resumed run makes them again), and what broken writes left."""
        for left in self.folder.glob("steps-*.tmp") if self.folder is not None else ():
            left.unlink()
        for path in self.shards():
            rows = read_rows(path)
            kept = rows.filter(pa.compute.field("step") < step)
            if not len(kept):
                path.unlink()
            elif len(kept) < len(rows):
                self._write(path, kept)

    def set_aside(self) -> Path | None:
        """Move the shards of an earlier run out of the way, to `<folder>-1`, `-2` ...; return where they went."""
        self.forget()
        if self.folder is None or not self.shards():
            return None
        others = [p.name for p in self.folder.iterdir() if not any(map(p.match, _OWN))]
        if others:
            raise ValueError(
                f"{self.folder} must hold nothing but scores to be set aside, got {', '.join(sorted(others)[:3])}. "
                "Choose another folder for the scores."
            )
        number = 1
        while (target := self.folder.with_name(f"{self.folder.name}-{number}")).exists():
            number += 1
        return self.folder.rename(target)

    def to_arrow(self) -> pa.Table:
        """Return all rows, ordered by step; a sample that was visited twice in one step has one row, the last."""
        self._collect()
        tables = [read_rows(path) for path in self.shards()] + self._tables
        rows = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        keys = np.stack([rows["step"].to_numpy(), rows["sample_id"].to_numpy()])
        order = np.lexsort(keys[::-1])  # stable
        same = (keys[:, order][:, 1:] == keys[:, order][:, :-1]).all(0)
        return rows.take(pa.array(order[np.append(~same, True)] if len(order) else order))

    def to_dataset(self) -> Dataset:
        """Return the rows as a `datasets.Dataset`."""
        from datasets import Dataset

        return Dataset(self.to_arrow())

    def aggregate(self) -> pa.Table:
        """Return one row per sample, ordered by id: `trust`, the mean of each value over its visits, and `n_visits`.

        `trust` is P(the label is right): the reference's, together with what mimic score and loss say; null where the
        reference was not run. `n_visits` counts the visits that gave a score; a mean over no value is null.
        """
        stamp = self._stamp()
        if self._aggregated is None or self._aggregated[0] != stamp:
            rows, found = aggregate(self._visits(), _KEPT_BYTES)
            self._aggregated = (stamp, rows)
            self._matrices |= {(name, stamp): matrix for name, matrix in found.items()}
        return self._aggregated[1]

    def matrix(self, column: str) -> ScoreMatrix:
        """Return one value of N samples in T epochs: the mean over a sample's visits in an epoch, NaN where there is none.

        Args:
            column: One of `VALUES`.

        Returns:
            (sample_id (N,) as in `aggregate`, epochs (T,), values (N, T), float32); not to be written to.
        """
        if column not in VALUES:
            raise ValueError(f"a score column must be one of {', '.join(VALUES)}, got {column!r}.")
        stamp = self._stamp()
        self._matrices = {key: found for key, found in self._matrices.items() if key[1] == stamp}
        if (column, stamp) not in self._matrices:
            while sum(found.values.nbytes for found in self._matrices.values()) > _KEPT_BYTES:
                del self._matrices[next(iter(self._matrices))]  # the oldest
            self._matrices[column, stamp] = self._visits().matrix(column)
        return self._matrices[column, stamp]

    def _visits(self) -> Visits:
        self._collect()
        return Visits(self.shards(), self._tables)

    def _stamp(self) -> tuple[Any, ...]:
        """Return what tells whether rows came or went, in memory or on the disk."""
        files = [(path.name, path.stat()) for path in self.shards()]
        return (self._version, *((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in files))

    def __len__(self) -> int:
        return len(self._visits())

    def shards(self) -> list[Path]:
        """Return the paths of the stored shards."""
        return sorted(self.folder.glob(_SHARDS)) if self.folder is not None else []

    def _write(self, path: Path, rows: pa.Table) -> None:
        try:
            write_atomically(path, lambda file: pq.write_table(rows, file, compression="zstd"))
        except OSError as error:
            raise OSError(
                f"the scores of {len(rows)} visits could not be written to {path.parent} ({error}). Earlier shards are "
                "whole. Make room, then resume from the last checkpoint."
            ) from error

    def _collect(self) -> None:
        if self._buffer:
            self._tables.append(pa.concat_tables([rows_of_visit(visit) for visit in self._buffer]))
            self._buffer = []


def attach_scores(
    dataset: Dataset,
    table: ScoreTable,
    *,
    keep: Sequence[bool] | np.ndarray | None = None,
    sample_id_column: str = "sample_id",
) -> Dataset:
    """Return the data set with the columns of `ScoreTable.aggregate`, and `keep` if given.

    `trust`, `ref_loss` and `ref_trust` are left out where the reference was not run, `clip_score` and `kept` (the share of
    visits at which a sample was chosen) where there were none.

    No image is decoded. Rows are joined by id; a row without a score gets null and `n_visits` 0.

    Args:
        dataset: N rows with an integer id column.
        table: Scores of some or all of these samples.
        keep: What a filter's `predict(table)` returned: one value per sample of `table.aggregate()`.
        sample_id_column: Name of the id column.

    Raises:
        ValueError: If a column of that name is already there, no id matches, or `keep` has another length.
    """
    scores = table.aggregate()
    absent = {name for name in _OPTIONAL if scores[name].null_count == len(scores)}
    names = [name for name in ATTACHED if name not in absent and (name != "keep" or keep is not None)]
    taken = [name for name in names if name in dataset.column_names]
    if taken:
        raise ValueError(
            f"the data set must not have the columns {', '.join(taken)} yet. "
            f"Remove them first: dataset.remove_columns({taken})."
        )
    if keep is not None:
        if len(keep) != len(scores):
            raise ValueError(f"`keep` must have one value per scored sample, {len(scores)}, got {len(keep)}.")
        scores = scores.append_column("keep", pa.array(np.asarray(keep, dtype=bool)))
    place = _places(dataset, scores, sample_id_column)
    for name in names:
        column = scores[name].combine_chunks().take(place)
        dataset = dataset.add_column(name, column.fill_null(0) if name == "n_visits" else column)
    return dataset


def _places(dataset: Dataset, scores: pa.Table, sample_id_column: str) -> pa.Array:
    """Return the row of `scores` that belongs to each row of the data set, null where there is none."""
    ids, known = read_sample_ids(dataset, sample_id_column), scores["sample_id"].to_numpy()
    place, there = find_ids(known, ids)
    missing = ~there
    unscored = int(missing.sum() + (scores["n_visits"].to_numpy()[place[there]] == 0).sum())
    if len(ids) and missing.all():
        raise ValueError(
            f"no `{sample_id_column}` of the data set is in the score table ({len(ids)} rows, {len(known)} scored "
            "samples). Use the data set that was trained on, with the ids it had then."
        )
    if unscored:
        warnings.warn(
            f"{unscored} of {len(ids)} rows have no score: null, not 0. A filter must say what becomes of them, "
            "for instance `lambda s: s is not None and s > 0`.",
            stacklevel=3,
        )
    return pa.array(place, mask=missing)
