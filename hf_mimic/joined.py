"""Score tables of the same samples, joined by sample id: what an `EnsembleFilter` judges.

Read `named` and `all_ids`, then `trust_of` and `means_of`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hf_mimic.blocks import Beside
from hf_mimic.scores import ScoreTable

Tables = ScoreTable | Mapping[str, ScoreTable]


def named(scores: Tables) -> Mapping[str, ScoreTable]:
    """Return the tables by name; a single one has the name "".

    Raises:
        ValueError: If there is something else than tables, or none.
    """
    tables = {"": scores} if isinstance(scores, ScoreTable) else scores
    if not isinstance(tables, Mapping) or not tables or not all(isinstance(t, ScoreTable) for t in tables.values()):
        raise ValueError(
            f"an ensemble takes a `ScoreTable`, or several by name, got {type(scores).__name__}. It needs epochs and "
            "columns; `DawidSkene` in hf_mimic.votes takes votes."
        )
    return tables


def has(table: ScoreTable, column: str) -> bool:
    """Return whether any sample has a value of a column of `aggregate()`."""
    values = table.aggregate()[column]
    return values.null_count < len(values)


def all_ids(scores: Tables) -> np.ndarray:
    """Return the ids of all tables, ascending (N,).

    Raises:
        ValueError: If no two tables have one in common.
    """
    found = [own_ids(table) for table in named(scores).values()]
    if all(np.array_equal(ids, found[0]) for ids in found[1:]):
        return found[0]
    every = np.unique(np.concatenate(found))
    if len(every) == sum(map(len, found)):
        sizes = " and ".join(str(len(ids)) for ids in found)
        raise ValueError(
            f"the tables of an ensemble must be of the same samples, got {sizes} with no id in common. Give scores of the "
            "same data set."
        )
    return every


def own_ids(table: ScoreTable) -> np.ndarray:
    """Return the ids of one table, ascending (n,)."""
    return table.aggregate()["sample_id"].to_numpy()


def rows_of(ids: np.ndarray, own: np.ndarray) -> np.ndarray | slice:
    """Return where the samples of one table are among all."""
    return slice(None) if np.array_equal(ids, own) else np.searchsorted(ids, own)


def trust_of(scores: Tables, ids: np.ndarray) -> np.ndarray:
    """Return what the reference trusts each sample (N,), the mean over the tables that know it; not to be written to."""
    tables = [table for table in named(scores).values() if has(table, "ref_trust")]
    if not tables:
        return np.broadcast_to(np.nan, len(ids))  # no array: there may be ten million samples
    total, count = np.zeros(len(ids)), np.zeros(len(ids))
    for table in tables:
        column = table.aggregate()["ref_trust"].to_numpy().astype(float)
        rows, known = rows_of(ids, own_ids(table)), np.isfinite(column)
        total[rows] += np.where(known, column, 0)
        count[rows] += known
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def means_of(scores: Tables, ids: np.ndarray, columns: Sequence[tuple[str, str]]) -> Beside:
    """Return the mean scores (N, K), float32, NaN where there is none; a table of all ids is not copied.

    Args:
        scores: The tables.
        ids: As of `all_ids`.
        columns: K pairs of a table's name and a column of its `aggregate()`.
    """
    tables, found = named(scores), []
    for place, column in columns:
        values, rows = tables[place].aggregate()[column].to_numpy(), rows_of(ids, own_ids(tables[place]))
        if len(values) < len(ids):
            own, values = values, np.full(len(ids), np.nan, np.float32)
            values[rows] = own
        found.append(values[:, None])
    return Beside(found or [np.empty((len(ids), 0), np.float32)])
