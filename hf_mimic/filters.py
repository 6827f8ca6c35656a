"""Stage 2: scores in, keep mask out, with scikit-learn's contract: `fit`, `predict`, `fit_predict`, `get_params`.

`TrustFilter` keeps what is probably labelled right; `ThresholdFilter` is the papers' `1/b` rule, voted over the epochs.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from hf_mimic.scores import ScoreTable
from hf_mimic.trust import most_f1

_BLOCK = 1 << 14  # samples that are voted on at once: their arrays stay in the processor's cache


class TrustFilter(BaseEstimator):
    """Keep a sample whose trust, P(the label is right), is high enough.

    A sample without a trust is kept: there is no evidence against it.

    Args:
        min_trust: The least trust; "f1" takes the one with the highest expected F1 of finding the wrong labels.

    References:
        Lipton et al., arXiv 1402.1892, for "f1".
    """

    def __init__(self, min_trust: float | str = "f1") -> None:
        self.min_trust = min_trust

    def fit(self, scores: ScoreTable | np.ndarray, y: Any = None) -> TrustFilter:
        """Choose `min_trust_`.

        Args:
            scores: What `predict` takes.
            y: Not used.
        """
        if self.min_trust == "f1":
            trust = _trust(scores)
            self.min_trust_ = most_f1(trust[~np.isnan(trust)])
            return self
        if not isinstance(self.min_trust, (int, float)) or not 0 <= self.min_trust <= 1:
            raise ValueError(
                f'`min_trust` must be in [0, 1] or "f1", got {self.min_trust!r}. Use 0.5 for more likely right.'
            )
        self.min_trust_ = float(self.min_trust)
        return self

    def predict(self, scores: ScoreTable | np.ndarray) -> np.ndarray:
        """Return what to keep.

        Args:
            scores: A `ScoreTable`, or trust (N,), NaN where there is none.

        Returns:
            Booleans (N,); for a table in the order of `scores.aggregate()`.
        """
        check_is_fitted(self)
        return ~(_trust(scores) < self.min_trust_)

    def fit_predict(self, scores: ScoreTable | np.ndarray, y: Any = None) -> np.ndarray:
        """Return `fit(scores).predict(scores)`."""
        return self.fit(scores).predict(scores)


def _trust(scores: ScoreTable | np.ndarray) -> np.ndarray:
    values = scores.aggregate()["trust"].to_numpy() if isinstance(scores, ScoreTable) else scores
    trust = np.asarray(values, dtype=float)
    if not np.isfinite(trust).any():
        raise ValueError(
            "the trust filter must have a trust, got none: the reference was not run on the samples. Train with "
            'strategy="trust", or use `ThresholdFilter`.'
        )
    return trust


class ThresholdFilter(BaseEstimator):
    """Keep a sample whose relative weight reaches a threshold in most epochs.

    An epoch votes to keep if w * b >= threshold (their mean, if it had several visits); one without a weight abstains. Most votes win, a tie goes to the
    mean weight, and a sample without any vote is kept: there is no evidence against it.

    NOTE: the papers' threshold w >= 1/b is the batch's mean, so about half of a clean data set falls below it. It
    separates two groups where there are two; it does not find out whether there are.

    Args:
        threshold: In units of the uniform weight; 1.0 is the papers' 1/b.

    References:
        Mimic Score, arXiv 2501.06708, stage 2.
    """

    def __init__(self, threshold: float = 1.0) -> None:
        self.threshold = threshold

    def fit(self, scores: ScoreTable | np.ndarray, y: Any = None) -> ThresholdFilter:
        """Check the parameters; nothing is learned.

        Args:
            scores: What `predict` takes.
            y: Not used.
        """
        if not np.isfinite(self.threshold) or self.threshold < 0:
            raise ValueError(f"`threshold` must be a number >= 0, got {self.threshold}. Use 1.0 for the papers' 1/b.")
        self.threshold_ = float(self.threshold)
        return self

    def predict(self, scores: ScoreTable | np.ndarray) -> np.ndarray:
        """Return what to keep.

        Args:
            scores: A `ScoreTable`, or relative weights (N,) or (N, T) for T visits, NaN where a visit has none.

        Returns:
            Booleans (N,); for a table in the order of `scores.aggregate()`.
        """
        weights = _weights(scores)
        least = self.threshold_ * (1 - 1e-6)  # a uniform weight times b may be an ulp of float32 below 1
        kept, lowest, highest = np.zeros(len(weights), bool), np.inf, -np.inf
        for start in range(0, len(weights), _BLOCK):
            part = weights[start : start + _BLOCK]  # (b, T)
            known = ~np.isnan(part)
            votes, keep = known.sum(1), (part >= least).sum(1)
            tie = (votes == 0) | (part.sum(1, where=known, dtype=float) >= least * votes)  # the mean decides
            kept[start : start + _BLOCK] = np.where(2 * keep == votes, tie, 2 * keep > votes)
            lowest = min(lowest, np.min(part, where=known, initial=np.inf))
            highest = max(highest, np.max(part, where=known, initial=-np.inf))
        if highest < lowest:
            raise ValueError(
                "the threshold filter must have relative weights, got none: they are recorded in training, a frozen scoring "
                "pass has only `mimic_score`, and a batch of one has no weights to compare. Filter by the score instead "
                "(`s > 0`, or --min_score 0)."
            )
        if isinstance(scores, ScoreTable) and highest - lowest <= 1e-6 * highest:
            warnings.warn(
                "the threshold filter must have weights that differ, got equal ones only: the run chose its samples (see "
                "`clip_score`, `loss` and `kept`) or trained plainly, and this filter tells them not apart. Filter by one "
                "of these columns, or score with a reference."
            )
        return kept

    def fit_predict(self, scores: ScoreTable | np.ndarray, y: Any = None) -> np.ndarray:
        """Return `fit(scores).predict(scores)`."""
        return self.fit(scores).predict(scores)


def default_filter(scores: ScoreTable) -> TrustFilter | ThresholdFilter:
    """Return a `TrustFilter` where the reference was run on any of the samples, else a `ThresholdFilter`."""
    trust = scores.aggregate()["ref_trust"]
    return TrustFilter() if trust.null_count < len(trust) else ThresholdFilter()


def _weights(scores: ScoreTable | np.ndarray) -> np.ndarray:
    """Return the relative weights (N, T), NaN where there is none."""
    if isinstance(scores, ScoreTable):
        return scores.matrix("relative_weight").values
    matrix = np.asarray(scores, dtype=float)
    return matrix[:, None] if matrix.ndim == 1 else matrix
