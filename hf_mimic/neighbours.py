"""What the kept neighbours of a sample are labelled as: confusions between the given label and theirs."""

from __future__ import annotations

from typing import Any

import numpy as np

_VOTERS, _ASKED, _PART = 20_000, 5_000, 500
_MOST_CLASSES = 100  # of a matrix


def neighbour_votes(
    features: np.ndarray, labels: np.ndarray, keep: np.ndarray, *, neighbours: int = 10, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Let each sample's nearest kept neighbours vote on its label; a tie goes to the class of the nearer ones.

    Features are centred and brought to length 1. Of more than 20,000 kept samples a sample votes; at most 5,000 are asked.

    Args:
        features: (N, D), finite.
        labels: Given (N,), -1 for none: such a sample neither votes nor is asked.
        keep: Who may vote (N,).
        neighbours: How many vote; a sample is not its own neighbour.
        seed: Chooses who votes and who is asked where there are too many.

    Returns:
        The rows that were asked (Q,), and what their neighbours say (Q,).

    Raises:
        ValueError: If the features do not fit, or fewer than two kept samples have a label.
    """
    from sklearn.neighbors import NearestNeighbors

    points = _directions(features, len(labels))
    generator = np.random.default_rng(seed)
    labelled = np.flatnonzero(labels >= 0)
    voters = generator.permutation(labelled[keep[labelled]])[:_VOTERS]
    asked = np.sort(generator.permutation(labelled)[:_ASKED])
    if len(voters) < 2:
        raise ValueError(
            f"neighbours must be found among at least 2 kept and labelled samples, got {len(voters)}. Lower the cut."
        )
    size = min(neighbours, len(voters) - 1)
    index = NearestNeighbors(n_neighbors=size + 1).fit(points[voters])
    found = voters[index.kneighbors(points[asked], return_distance=False)]  # (Q, size + 1), nearest first
    others = found != asked[:, None]
    others[others.all(1), -1] = False  # who does not vote has one neighbour too many
    chosen = found[others].reshape(len(asked), size)
    parts = [_most_votes(labels[chosen[i : i + _PART]]) for i in range(0, len(asked), _PART)]
    return asked, np.concatenate(parts)


def _most_votes(votes: np.ndarray) -> np.ndarray:
    """Return the class with the most votes, of (Q, K) votes, nearest first."""
    size = votes.shape[1]
    weights = 1 + np.arange(size, 0, -1) / (4 * size * size)  # all of the small parts are less than one vote
    counts = np.zeros((len(votes), votes.max() + 1))
    np.add.at(counts, (np.arange(len(votes))[:, None], votes), weights)
    return counts.argmax(1)


def _directions(features: np.ndarray, size: int) -> np.ndarray:
    points = np.asarray(features, dtype=np.float32)
    if points.ndim != 2 or len(points) != size:
        raise ValueError(
            f"`features` must be (N, D) with one row per row of the data set, N = {size}, got {points.shape}."
        )
    bad = int((~np.isfinite(points)).any(1).sum())
    if bad:
        raise ValueError(f"every row of `features` must be finite, got {bad} of {size} that are not.")
    points = points - points.mean(0)
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)


def confusions(given: np.ndarray, said: np.ndarray, classes: list[str], most: int = 20) -> dict[str, Any]:
    """Return how often a given label and the neighbours' differ, by pair.

    Args:
        given: Labels (Q,).
        said: By the neighbours (Q,).
        classes: Names.
        most: How many pairs are listed, the most frequent first.

    Returns:
        `asked`, `agree` (a share), `pairs`, and `matrix` (C, C) of counts, given by said; None for more than 100 classes.
    """
    size = len(classes)
    codes, counts = np.unique(given.astype(np.int64) * size + said, return_counts=True)
    of_class = np.bincount(given, minlength=size)
    apart = np.flatnonzero(codes // size != codes % size)
    order = apart[np.argsort(-counts[apart], kind="stable")][:most]
    pairs = [
        {
            "given": classes[codes[i] // size],
            "neighbours": classes[codes[i] % size],
            "count": int(counts[i]),
            "share": float(counts[i] / of_class[codes[i] // size]),
        }
        for i in order
    ]
    matrix = None
    if size <= _MOST_CLASSES:
        matrix = np.bincount(given.astype(np.int64) * size + said, minlength=size * size).reshape(size, size).tolist()
    return {"asked": len(given), "agree": float((given == said).mean()), "matrix": matrix, "pairs": pairs}
