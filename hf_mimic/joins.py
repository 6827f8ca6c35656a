"""Rows are joined by their ids, wherever two tables of the same samples meet."""

from __future__ import annotations

import numpy as np


def find_ids(known: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each id is among those that are known, and whether it is there.

    Args:
        known: Unique integers (N,), in any order.
        ids: Integers (M,).

    Returns:
        Places in `known` (M,), any where an id is not there; booleans (M,).
    """
    if not len(known):
        return np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=bool)
    in_order = bool((known[:-1] < known[1:]).all())
    order = None if in_order else np.argsort(known)
    place = np.searchsorted(known, ids, sorter=order).clip(max=len(known) - 1)
    place = place if order is None else order[place]
    return place, known[place] == ids
