"""Which rows a page holds, and of which it shows a picture: a page has to open at once, however large the data set."""

from __future__ import annotations

import numpy as np

GALLERY = 24  # best and worst, each
_NEAREST = 0.2  # of the pictures, on each side of the cut


def choose_rows(score: np.ndarray, labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Return the rows that a page holds, sorted: all, or a seeded sample with each class, and each level of the score.

    Every (N / most)-th row is taken, in the order of class and score, from a random start: every class and every part
    of its scores has its share.

    Args:
        score: (N,), NaN where there is none.
        labels: (N,), -1 for none.
        most: At most so many.
        seed: Of the start.
    """
    if most < 1:
        raise ValueError(f"`max_rows` must be at least 1, got {most}. Use 25000 for a page that opens at once.")
    if len(score) <= most:
        return np.arange(len(score))
    order = np.lexsort((score, labels))
    start = np.random.default_rng(seed).random()
    return np.sort(order[((np.arange(most) + start) * len(score) / most).astype(np.int64)])


def best_and_worst(score: np.ndarray, most: int = GALLERY) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows with the highest scores, best first, and with the lowest, worst first; no row is in both."""
    order = np.argsort(score, kind="stable")[: np.isfinite(score).sum()]
    size = min(most, max(len(order) // 2, 1))
    return order[::-1][:size], order[: min(size, len(order) - size)]


def choose_pictures(score: np.ndarray, rows: np.ndarray, cut: float, most: int, seed: int) -> np.ndarray:
    """Return the rows to show a picture of, sorted: best, worst, nearest the cut, the rest spread over all scores.

    Args:
        score: (N,), NaN where there is none.
        rows: Those that the page holds.
        cut: Of the score.
        most: At most so many.
        seed: Of the spread.
    """
    if most < 0:
        raise ValueError(f"`max_images` must be at least 0, got {most}. Use 0 for a page without pictures.")
    if not most:
        return np.zeros(0, dtype=np.int64)
    best, worst = best_and_worst(score)
    order = rows[np.argsort(score[rows], kind="stable")]  # those without a score are the last
    scored = int(np.isfinite(score[rows]).sum())
    place = int(np.searchsorted(score[order[:scored]], cut))
    side = int(_NEAREST * most)
    near = order[max(place - side, 0) : min(place + side, scored)]
    both = np.ravel(np.column_stack([best[: len(worst)], worst])) if len(worst) else best
    first = list(dict.fromkeys([*both.tolist(), *best.tolist(), *near.tolist()]))[:most]
    rest = order[~np.isin(order, first)]
    left = min(most - len(first), len(rest))
    start = np.random.default_rng(seed).random()
    spread = rest[((np.arange(left) + start) * len(rest) / left).astype(np.int64)] if left else rest[:0]
    return np.unique(np.concatenate([np.asarray(first, dtype=np.int64), spread]))
