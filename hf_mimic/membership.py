"""Membership: on which samples was the reference probably trained?

Read `membership` (how well a score tells members from others), then `discovered` (which samples, without knowing any).

NOTE: a high score says that a sample is like what the reference learned; it is no proof that it was there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import rankdata

_PERMUTATIONS = 1_000


@dataclass(frozen=True)
class Membership:
    """How a score tells M members from the other of N samples.

    Args:
        auroc: Chance that a member scores higher than another sample.
        null_mean: Of the AUROC when members are drawn at random.
        null_deviation: The same.
        p_value: Share of random draws with an AUROC at least as high.
        jaccard: Of the M highest scores with the members: |both| / |either|.
        null_jaccard: The same of random draws, in the mean.
    """

    auroc: float
    null_mean: float
    null_deviation: float
    p_value: float
    jaccard: float
    null_jaccard: float

    def as_dict(self) -> dict[str, float]:
        """Return the fields, as JSON takes them."""
        return asdict(self)


def membership(
    score: np.ndarray, member: np.ndarray, *, permutations: int = _PERMUTATIONS, seed: int = 0
) -> Membership:
    """Return how well a score tells the samples that the reference was trained on, with its null distribution.

    Args:
        score: (N,), higher is likelier; NaN is left out.
        member: Booleans (N,), true for samples that are known to be members.
        permutations: How many random draws of as many members make the null distribution.
        seed: Of these draws.

    Raises:
        ValueError: If lengths differ, or all samples or none are members.

    References:
        Mimic Score, arXiv 2501.06708 (data set discovery).
    """
    score, member = np.asarray(score, float), np.asarray(member, bool)
    if score.shape != member.shape or score.ndim != 1:
        raise ValueError(f"`score` and `member` must be (N,), got {score.shape} and {member.shape}.")
    if permutations < 1:
        raise ValueError(f"`permutations` must be at least 1, got {permutations}. Use 1000.")
    known = ~np.isnan(score)
    score, member = score[known], member[known]
    many, size = int(member.sum()), len(member)
    if not 0 < many < size:
        raise ValueError(f"membership needs members and others with a score, got {many} members of {size}.")
    ranks = rankdata(score)  # equal scores share a rank
    generator = np.random.default_rng(seed)
    mixed = generator.permutation(size)  # members often come first: a tie must not go to them for that
    highest = np.zeros(size, dtype=bool)
    highest[mixed[np.argsort(-score[mixed], kind="stable")[:many]]] = True
    null, overlap = [], []
    for _ in range(permutations):
        drawn = generator.choice(size, many, replace=False)
        null.append(_auroc(ranks[drawn], size))
        overlap.append(_jaccard(int(highest[drawn].sum()), many))
    auroc = _auroc(ranks[member], size)
    return Membership(
        auroc=auroc,
        null_mean=float(np.mean(null)),
        null_deviation=float(np.std(null)),
        p_value=float((1 + np.sum(np.array(null) >= auroc)) / (1 + permutations)),
        jaccard=_jaccard(int((highest & member).sum()), many),
        null_jaccard=float(np.mean(overlap)),
    )


def discovered(score: np.ndarray, outsider_score: np.ndarray, *, rate: float = 0.1) -> np.ndarray:
    """Return which samples the reference was probably trained on, by the scores of samples that it certainly was not.

    Of those returned, at most `rate` are expected to be outsiders (Benjamini and Hochberg, on conformal p-values).

    Args:
        score: Of the candidates (N,); NaN is never returned.
        outsider_score: Of samples of the same kind that the reference cannot have seen (K,), newer ones for instance.
        rate: Expected share of false discoveries.

    Returns:
        Booleans (N,).

    References:
        Bates et al., arXiv 2104.08279 (conformal p-values); Benjamini and Hochberg, JRSS B 57 (1995).
    """
    if not 0 < rate < 1:
        raise ValueError(f"`rate` must be in (0, 1), got {rate}. Use 0.1 for one false discovery in ten.")
    score, others = np.asarray(score, float), np.sort(np.asarray(outsider_score, float))
    others = others[~np.isnan(others)]
    if not len(others):
        raise ValueError(
            "`outsider_score` must have a score, got none. Score samples that the reference cannot have seen."
        )
    found = np.zeros(len(score), dtype=bool)
    rows = np.flatnonzero(~np.isnan(score))
    higher = len(others) - np.searchsorted(others, score[rows], side="left")
    p = (1 + higher) / (1 + len(others))
    order = np.argsort(p, kind="stable")
    enough = np.flatnonzero(p[order] <= rate * np.arange(1, len(p) + 1) / max(len(p), 1))
    if len(enough):
        found[rows[order[: enough[-1] + 1]]] = True
    return found


def _auroc(ranks: np.ndarray, size: int) -> float:
    """Return the AUROC of members with these ranks among `size` samples (Mann and Whitney)."""
    many = len(ranks)
    return float((ranks.sum() - many * (many + 1) / 2) / (many * (size - many)))


def _jaccard(both: int, many: int) -> float:
    return both / (2 * many - both)
