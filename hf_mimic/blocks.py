"""Sums over the rows of long arrays, block by block: what is made on the way stays in the processor's cache.

Arrays as long as a data set cost more to allocate than to fill.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

_BLOCK = 1 << 15  # rows


def blocks(size: int) -> Iterator[slice]:
    """Yield slices of rows whose arrays stay in the processor's cache: there may be millions of samples."""
    return (slice(start, start + _BLOCK) for start in range(0, size, _BLOCK))


def row_means(values: np.ndarray) -> np.ndarray:
    """Return the mean over the known values of each row of (N, T), float64 (N,), NaN where there is none."""
    found = np.empty(len(values))
    for rows in blocks(len(values)):
        found[rows] = mean_and_count(values[rows])[0]
    return found


def mean_and_count(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over the known values of each row of (N, T), float64 (N,), and how many there are, int32 (N,)."""
    missing = np.isnan(values)
    if not missing.any():
        return values.sum(1, dtype=float) / values.shape[1], np.full(len(values), values.shape[1], np.int32)
    count = values.shape[1] - missing.sum(1, dtype=np.int32)
    with np.errstate(invalid="ignore"):
        return np.where(missing, 0, values).sum(1, dtype=float) / count, count  # 0 / 0 is NaN


def any_known(values: np.ndarray) -> bool:
    """Return whether any of (N, ...) is not NaN; it looks no further than the first."""
    return any(not np.isnan(values[rows]).all() for rows in blocks(len(values)))


class Beside:
    """Arrays (N, V_k) beside each other, (N, V); rows are put together only when they are asked for.

    Args:
        parts: At least one.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = parts
        self.shape = (len(parts[0]), sum(part.shape[1] for part in parts))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return np.concatenate([part[rows].T for part in self.parts]).T  # a column after the other in memory

    def at(self, rows: slice | np.ndarray) -> Beside:
        """Return some of the rows, not yet put together."""
        return Beside([part[rows] for part in self.parts])

    def of(self, which: Sequence[int]) -> Beside:
        """Return all rows of some of the arrays; of none, (N, 0)."""
        return Beside([self.parts[k] for k in which] or [self.parts[0][:, :0]])
