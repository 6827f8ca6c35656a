"""All columns of a score table by sample and epoch in one pass over its rows, and the means that follow from them.

Read `aggregate`. Where a sample has one visit per epoch at most, as in training, a value only has to be written to its
place: no sum is kept, and the filters that ask for these columns by epoch need not read the table again.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
import pyarrow as pa

from hf_mimic.blocks import blocks, mean_and_count
from hf_mimic.parts import VALUES
from hf_mimic.visits import Means, ScoreMatrix, Visits

_EVIDENCE = (("mimic_score", 1), ("loss", -1))
Matrices = dict[str, ScoreMatrix]


def aggregate(visits: Visits, most: int) -> tuple[pa.Table, Matrices]:
    """Return the table that `ScoreTable.aggregate` describes, and the matrices that were made for it, if any.

    Args:
        visits: All of a table.
        most: Bytes of matrices; without room for all columns none is made.
    """
    matrices = read_matrices(visits, most)
    means = means_of(matrices) if matrices else visits.means()
    return _table(means), matrices


def read_matrices(visits: Visits, most: int) -> Matrices:
    """Return what `Visits.matrix` does of every column that has values; none if a sample has two visits in an epoch.

    Args:
        visits: All of a table.
        most: Bytes; none is returned if they take more.
    """
    names = visits.known(VALUES)
    epochs, size = visits.epoch_of_cells(), visits.index.size
    if not names or epochs is None or len(names) * len(epochs) * size * 4 > most:
        return {}
    made = {name: np.empty((len(epochs), size), np.float32) for name in names}
    there = np.zeros(size, bool)
    order = np.argsort(epochs)
    for number, cell in zip(np.argsort(order), visits.cells(names), strict=True):
        if cell.there is None:
            return {}
        there |= cell.there
        for name in names:
            made[name][number].fill(np.nan)
        for places, columns in zip(cell.places, cell.columns, strict=True):
            for name, column in columns.items():
                known = np.isfinite(column)
                made[name][number][places] = column if known.all() else np.where(known, column, np.nan)
    ids, rows = visits.index.ids(there), slice(None) if there.all() else there
    return {name: _matrix(ids, epochs[order], made.pop(name)[:, rows]) for name in names}


def _matrix(ids: np.ndarray, epochs: np.ndarray, values: np.ndarray) -> ScoreMatrix:
    values.flags.writeable = False  # it is kept, and given to several
    return ScoreMatrix(ids, epochs, values.T)  # one epoch after the other in memory


def means_of(matrices: Matrices) -> Means:
    """Return the means over the epochs of N samples that have one visit in each at most."""
    ids = next(iter(matrices.values())).sample_id
    means = {name: np.empty(len(ids), np.float32) for name in matrices}
    most = next(iter(matrices.values())).values.shape[1]
    counts = {name: np.empty(len(ids), np.min_scalar_type(most)) for name in matrices}  # a byte for each, mostly
    for name, matrix in matrices.items():
        for rows in blocks(len(ids)):
            means[name][rows], counts[name][rows] = mean_and_count(matrix.values[rows])
    return Means(ids, means, counts)


def _table(means: Means) -> pa.Table:
    size = len(means.sample_id)
    trust = means.values.get("ref_trust")
    if trust is not None:
        from hf_mimic.trust import combine

        evidence = [means.values[name] * sign for name, sign in _EVIDENCE if name in means.values]
        trust = combine(trust, np.stack(evidence, 1)).astype(np.float32) if evidence else trust
    counts = [means.counts[name] for name in ("mimic_score", "clip_score") if name in means.counts]
    n_visits = reduce(np.maximum, counts).astype(np.int64) if counts else np.zeros(size, np.int64)
    nulls = pa.nulls(size, pa.float32())
    known = {
        name: pa.array(values, from_pandas=True)
        for name, values in {"trust": trust, **means.values}.items()
        if values is not None
    }
    columns = {name: known.get(name, nulls) for name in ("trust", *VALUES)}
    return pa.table({"sample_id": means.sample_id, **columns, "n_visits": n_visits})
