"""Stage 2: scores in, keep mask out, with scikit-learn's contract: `fit`, `predict`, `fit_predict`, `get_params`.

`TrustFilter` keeps what is probably labelled right; `ThresholdFilter` is the papers' `1/b` rule, voted over the epochs,
`TwoMeansFilter` and `MixtureFilter` find the cut themselves. Each has `filter`, too: who is dropped, and why.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from hf_mimic.blocks import row_means
from hf_mimic.cuts import CutFilter, FilterResult, ScoreFilter, Votes, read_scores
from hf_mimic.scores import ScoreTable
from hf_mimic.trust import most_f1
from hf_mimic.two_groups import Mixture, two_means
from hf_mimic.votes import ABSTAINS

_SLACK = 1e-6  # a uniform weight times b may be an ulp of float32 below 1


class TrustFilter(ScoreFilter):
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
        """Choose `threshold_`.

        Args:
            scores: A `ScoreTable`, or trust (N,), NaN where there is none.
            y: Not used.
        """
        if self.min_trust == "f1":
            trust = _trust(scores)[1]
            self.threshold_ = most_f1(trust[~np.isnan(trust)])
            return self
        if not isinstance(self.min_trust, (int, float)) or not 0 <= self.min_trust <= 1:
            raise ValueError(
                f'`min_trust` must be in [0, 1] or "f1", got {self.min_trust!r}. Use 0.5 for more likely right.'
            )
        self.threshold_ = float(self.min_trust)
        return self

    def votes(self, scores: ScoreTable | np.ndarray) -> Votes:
        """Return one vote of each sample (N, 1); those without a trust abstain."""
        check_is_fitted(self)
        ids, trust = _trust(scores)
        margin = trust - self.threshold_
        vote = np.where(np.isnan(trust), ABSTAINS, margin >= 0).astype(np.int8)
        return Votes(ids, vote[:, None], np.where(np.isnan(trust), 0, margin))

    def filter(self, scores: ScoreTable | np.ndarray) -> FilterResult:
        """Return what is kept, what is dropped, and why."""
        ids, votes, _ = self.votes(scores)
        vote = votes[:, 0]
        code = np.where(vote == ABSTAINS, 2, vote).astype(np.int32)
        cut = f"{self.threshold_:.3g}"
        return FilterResult(ids, vote != 0, code, (f"trust below {cut}", f"trust of {cut} or more", "no trust"))


def _trust(scores: ScoreTable | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and trust (N,)."""
    if isinstance(scores, ScoreTable):
        table = scores.aggregate()
        ids, values = table["sample_id"].to_numpy(), table["trust"].to_numpy()
    else:
        ids, values = np.arange(len(scores)), scores
    trust = np.asarray(values, dtype=float)
    if not np.isfinite(trust).any():
        raise ValueError(
            "the trust filter must have a trust, got none: the reference was not run on the samples. Train with "
            'strategy="trust", or use `ThresholdFilter`.'
        )
    least, highest = np.nanmin(trust), np.nanmax(trust)
    if trust.ndim != 1 or least < -_SLACK or highest > 1 + _SLACK:
        raise ValueError(
            f"trust must be probabilities (N,), NaN where there is none, got {trust.shape} from {least:g} to {highest:g}. "
            "Cut other scores by `ThresholdFilter`."
        )
    return ids, trust


class ThresholdFilter(CutFilter):
    """Keep a sample whose score reaches a threshold at most of its visits; or the top share of all samples.

    NOTE: the papers' threshold w >= 1/b is the batch's mean, so about half of a clean data set falls below it. It
    separates two groups where there are two; it does not find out whether there are, unless `check=True`.

    Args:
        threshold: In the column's units; of `relative_weight`, 1.0 is the papers' 1/b.
        column: Of the score table; None takes `relative_weight`, for a top share `mimic_score`.
        top: Keep this share of the samples, by the mean over their visits, instead; a few more where scores are equal.
        over: What `CutFilter` says; a top share takes the mean.
        check: What `CutFilter` says.

    References:
        Mimic Score, arXiv 2501.06708, stage 2.
    """

    def __init__(
        self,
        threshold: float = 1.0,
        *,
        column: str | None = None,
        top: float | None = None,
        over: str = "epochs",
        check: bool = False,
    ) -> None:
        super().__init__(column, over, check)
        self.threshold, self.top = threshold, top

    def fit(self, scores: ScoreTable | np.ndarray, y: Any = None) -> ThresholdFilter:
        """Check the parameters; find the cut of a top share.

        Args:
            scores: A `ScoreTable`, or scores (N,) or (N, T) for T visits, NaN where a visit has none.
            y: Not used.
        """
        if not isinstance(self.threshold, Real) or not np.isfinite(self.threshold):
            raise ValueError(
                f"`threshold` must be a finite number, got {self.threshold!r}. Use 1.0 for the papers' 1/b."
            )
        if self.top is not None and not (isinstance(self.top, Real) and 0 < self.top <= 1):
            raise ValueError(f"`top` must be in (0, 1], got {self.top!r}. Use 0.3 to keep the best 30 %.")
        super().fit(scores, y)
        return self

    def _cut(self, values: np.ndarray) -> float:
        if self.top is None:
            cut = self._sign * self.threshold
            return cut - _SLACK * abs(cut)
        place = len(values) - max(round(self.top * len(values)), 1)
        return float(np.partition(values, place)[place])

    def _read(self, scores: ScoreTable | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.column is None and self.top is None and isinstance(scores, ScoreTable):
            ids, values, self.column_ = read_scores(scores, "relative_weight")
            self._sign = 1
        else:
            ids, values = super()._read(scores)
        return ids, values if self.top is None else row_means(values)[:, None]


class TwoMeansFilter(CutFilter):
    """Cut where two means split the scores best, found exactly: by a sort, not by restarts.

    Args:
        column: What `CutFilter` says, as `over` and `check`.

    References:
        Mimic Score, arXiv 2501.06708, stage 2 ("1-D k-means").
    """

    def _cut(self, values: np.ndarray) -> float | None:
        return two_means(values)


class MixtureFilter(CutFilter):
    """Cut between two Gaussians, where the upper one becomes likely enough.

    Args:
        column: What `CutFilter` says, as `over` and `check`.
        posterior: Keep from this P(upper Gaussian | score) on.
        seed: Chooses the 20,000 values that are fitted where there are more.

    References:
        Mimic Score, arXiv 2501.06708, stage 2 ("GMM").
    """

    def __init__(
        self,
        column: str | None = None,
        *,
        over: str = "epochs",
        check: bool = True,
        posterior: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(column, over, check)
        self.posterior, self.seed = posterior, seed

    def _cut(self, values: np.ndarray) -> float | None:
        if not 0 < self.posterior < 1:
            raise ValueError(f"`posterior` must be in (0, 1), got {self.posterior}. Use 0.5 for the likelier group.")
        mixture = Mixture.fit(values, self.seed)
        return None if mixture is None else mixture.cut(self.posterior)


def top_p(values: np.ndarray, share: float, *, labels: np.ndarray | None = None) -> np.ndarray:
    """Return the top share of the samples by a score, as the paper's subsets; exactly so many, the earlier row at a tie.

    It is one sample at least, of each class if labels are given.

    Args:
        values: Scores (N,), higher is better; NaN comes last.
        share: In (0, 1].
        labels: (N,): take the share of each class, so that the balance of the classes stays.

    Returns:
        Booleans (N,).

    References:
        Mimic Score, arXiv 2501.06708, subset training.
    """
    if not 0 < share <= 1:
        raise ValueError(f"`share` must be in (0, 1], got {share}. Use 0.8 for the best 80 %.")
    values = np.asarray(values)
    values = values if values.dtype == np.float32 else values.astype(float)  # no copy of millions
    if labels is None:
        return _best(values, max(round(share * len(values)), 1))
    if len(labels) != len(values):
        raise ValueError(f"`labels` must have one value per score, {len(values)}, got {len(labels)}.")
    keep = np.zeros(len(values), dtype=bool)
    groups = np.unique(labels, return_inverse=True)[1]
    rows = np.argsort(groups, kind="stable")
    for group in np.split(rows, np.cumsum(np.bincount(groups))[:-1]):
        keep[group] = _best(values[group], max(round(share * len(group)), 1))
    return keep


def _best(values: np.ndarray, count: int) -> np.ndarray:
    """Return whether each is of the `count` highest values, the earlier one at a tie, NaN last; without a sort."""
    if not len(values):
        return np.zeros(0, dtype=bool)
    missing = np.isnan(values)
    ranked = np.where(missing, -np.inf, values) if missing.any() else values
    least = np.partition(ranked, len(ranked) - count)[len(ranked) - count]
    found = ranked > least
    found[np.flatnonzero(ranked == least)[: count - np.count_nonzero(found)]] = True
    return found


def default_filter(scores: ScoreTable) -> TrustFilter | ThresholdFilter:
    """Return a `TrustFilter` where the reference was run on any of the samples, else a `ThresholdFilter`."""
    trust = scores.aggregate()["ref_trust"]  # where NaN is null, too
    return TrustFilter() if trust.null_count < len(trust) else ThresholdFilter()
