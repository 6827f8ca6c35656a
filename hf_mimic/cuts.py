"""One cut through a score: what every filter does and returns, and how a column is cut and the visits vote.

Read `FilterResult`, `ScoreFilter` (the contract), then `CutFilter`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from hf_mimic.blocks import Beside, any_known, blocks, row_means
from hf_mimic.checks import check_choice
from hf_mimic.scores import VALUES, ScoreTable
from hf_mimic.two_groups import has_two_groups, sampled
from hf_mimic.votes import ABSTAINS, count_votes, majority

FALLING = ("loss", "ref_loss")  # of these the lower is the better
OVER = ("epochs", "pooled", "mean")
_SLACK = 1e-6
_MISSING = {
    "relative_weight": "Relative weights are recorded in training; a frozen scoring pass has only `mimic_score`, and a batch "
    "of one has no weights to compare. Filter by the score instead (`s > 0`, or --min_score 0).",
    "score": "Give scores that are known.",
}


@dataclass(frozen=True)
class FilterResult:
    """What a filter decided about N samples.

    Args:
        sample_id: (N,), in the order of `ScoreTable.aggregate()`; row numbers where an array was filtered.
        keep: Booleans (N,).
        code: For each sample the place of its reason in `reasons` (N,).
        reasons: Sentences.
        rule: What decided, in words; empty if nobody said.
    """

    sample_id: np.ndarray
    keep: np.ndarray
    code: np.ndarray
    reasons: tuple[str, ...]
    rule: str = ""

    @property
    def reason(self) -> np.ndarray:
        """Why each sample was kept or dropped, (N,) strings."""
        return np.array(self.reasons, dtype=object)[self.code]

    @property
    def kept(self) -> np.ndarray:
        """Ids of the samples to keep."""
        return self.sample_id[self.keep]

    @property
    def dropped(self) -> np.ndarray:
        """Ids of the samples to drop."""
        return self.sample_id[~self.keep]

    def to_arrow(self) -> pa.Table:
        """Return columns `sample_id`, `keep` and `reason`."""
        reason = pa.DictionaryArray.from_arrays(self.code.astype(np.int32), pa.array(self.reasons))
        return pa.table({"sample_id": self.sample_id, "keep": self.keep, "reason": reason})

    def __len__(self) -> int:
        return len(self.keep)


class Votes(NamedTuple):
    """Votes (N, V), of 1, 0 and -1; and how far the score is above the cuts in the mean (N,), which settles ties."""

    sample_id: np.ndarray
    votes: np.ndarray
    score: np.ndarray


class ScoreFilter(BaseEstimator):
    """The contract of a filter: `fit` learns, `votes` and `filter` tell; the rest follows from them."""

    def fit(self, scores: Any, y: Any = None) -> ScoreFilter:
        """Learn what to keep."""
        raise NotImplementedError

    def predict(self, scores: Any) -> np.ndarray:
        """Return what to keep, booleans (N,)."""
        return self.filter(scores).keep

    def fit_predict(self, scores: Any, y: Any = None) -> np.ndarray:
        """Return `fit(scores, y).predict(scores)`."""
        return self.fit(scores, y).predict(scores)

    def votes(self, scores: Any) -> Votes:
        """Return the votes behind the decision, (N, V)."""
        raise NotImplementedError

    def filter(self, scores: Any) -> FilterResult:
        """Return what is kept, what is dropped, and why."""
        raise NotImplementedError


class CutFilter(ScoreFilter):
    """Cut a column in two, and let the visits vote: a visit votes to keep if its score reaches the cut.

    Most votes win, a tie goes to the mean score, and a sample without a score is kept: there is no evidence against it.

    Args:
        column: Of the score table; None takes `mimic_score`, else `clip_score`. Of losses the lower is the better.
        over: "epochs" learns a cut for each epoch, "pooled" one for all visits together; "mean" cuts the mean over
            the visits, without votes.
        check: Whether to keep everything where the mean over the visits gives no evidence of two groups.
    """

    def __init__(self, column: str | None = None, over: str = "epochs", check: bool = True) -> None:
        self.column, self.over, self.check = column, over, check

    def fit(self, scores: ScoreTable | np.ndarray, y: Any = None) -> CutFilter:
        """Learn `threshold_`, a number or one for each epoch (T,), and `two_groups_`.

        Args:
            scores: A `ScoreTable`, or scores (N,) or (N, T) for T visits, NaN where a visit has none.
            y: Not used.

        Raises:
            ValueError: If no sample has a score.
        """
        check_choice("over", self.over, OVER)
        _, values = self._read(scores)
        some = self._sign * sampled(values, 0)
        means, known = row_means(some), some[~np.isnan(some)]
        self.two_groups_ = not self.check or has_two_groups(means[~np.isnan(means)])
        if isinstance(scores, ScoreTable) and len(known) and np.ptp(known) <= _SLACK * np.abs(known).max():
            warnings.warn(
                f"a filter must have scores that differ, got equal ones only in `{self.column_}`: the run chose its samples "
                "(see `clip_score`, `loss` and `kept`) or trained plainly. Filter by one of these columns, or score with a "
                "reference."
            )
        elif not self.two_groups_:
            warnings.warn(
                f"there is no evidence of two groups in `{self.column_}`: everything is kept. With `check=False` the filter "
                "cuts all the same; it then drops a share of clean data, too."
            )
        columns = values.T if self.over == "epochs" else [values.ravel()]
        found = [self._found(column) for column in columns]
        self._least = np.array(found)  # (T,) or (1,), higher is better
        self.threshold_ = self._sign * (self._least if self.over == "epochs" else float(found[0]))
        return self

    def votes(self, scores: ScoreTable | np.ndarray) -> Votes:
        """Return the vote of every epoch, (N, T); (N, 1) for `over="mean"`. All abstain where there are no two groups.

        Args:
            scores: What `fit` takes; with over="epochs" as many epochs as were fitted.
        """
        ids, values = self._read_fitted(scores)
        found = np.empty(values.shape[::-1], dtype=np.int8).T  # one epoch after the other in memory
        score = np.empty(len(values), dtype=np.float32)
        for rows in blocks(len(values)):
            found[rows], score[rows] = self._vote(values[rows])
        return Votes(ids, found, score)

    def predict(self, scores: ScoreTable | np.ndarray) -> np.ndarray:
        """Return what to keep, booleans (N,)."""
        _, values = self._read_fitted(scores)
        keep = np.empty(len(values), dtype=bool)
        for rows in blocks(len(values)):
            keep[rows] = majority(*self._vote(values[rows]))
        return keep

    def filter(self, scores: ScoreTable | np.ndarray) -> FilterResult:
        """Return what is kept, what is dropped, and why.

        Args:
            scores: What `fit` takes; with over="epochs" as many epochs as were fitted.
        """
        ids, votes, score = self.votes(scores)
        keep = majority(votes, score)
        return FilterResult(ids, keep, *tallied(votes, keep, self._reason))

    def _reason(self, against: int, count: int, keep: bool) -> str:
        if not count:
            cuts = np.isfinite(self._least)
            if not cuts.any():
                return f"`{self.column_}` has no two groups"
            return f"no `{self.column_}`" if cuts.all() else f"no `{self.column_}` at a visit that has a cut"
        word = "above" if self._sign < 0 else "below"
        text = f"`{self.column_}` is {word} its cut at {against} of {count} visits"
        return text if 2 * against != count else f"{text}, and {'not ' if keep else ''}in the mean"

    def _vote(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the votes (n, T) on some samples, and how far they are above the cuts in the mean (n,)."""
        values = values if self._sign > 0 else -values
        least = np.broadcast_to(self._least, values.shape[1]).astype(values.dtype)
        votes, above = (values >= least).view(np.int8), values - least
        total = above.sum(1)
        if np.isfinite(total).all():  # the usual case
            return votes, total / values.shape[1]
        # an epoch without a cut says nothing, least of all that a sample is good
        unknown = np.isnan(values) | np.isinf(least)
        votes[unknown], above[unknown] = ABSTAINS, 0
        return votes, above.sum(1) / np.maximum(values.shape[1] - unknown.sum(1), 1)

    def _found(self, values: np.ndarray) -> float:
        """Return the cut of one column, -inf where there is none."""
        if not self.two_groups_:
            return -np.inf
        known = values[~np.isnan(values)] if np.isnan(values.min()) else values  # no copy of millions
        known = known if self._sign > 0 else -known
        cut = self._cut(known) if len(known) else None
        return -np.inf if cut is None else cut

    def _cut(self, values: np.ndarray) -> float | None:
        raise NotImplementedError

    def _read_fitted(self, scores: ScoreTable | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what `_read` does, if it fits the cuts."""
        check_is_fitted(self)
        ids, values = self._read(scores)
        if self.over == "epochs" and values.shape[1] != len(self._least):
            raise ValueError(
                f"the scores must have the {len(self._least)} epochs of the fit, got {values.shape[1]}. Fit again, or use "
                'over="pooled".'
            )
        return ids, values

    def _read(self, scores: ScoreTable | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return ids (N,) and scores (N, T), or their mean (N, 1) if that is what is cut; times `_sign`, higher is better."""
        ids, values, self.column_ = read_scores(scores, self.column)
        self._sign = -1 if self.column_ in FALLING else 1
        return ids, row_means(values)[:, None] if self.over == "mean" else values


def tallied(
    votes: np.ndarray | Beside, keep: np.ndarray, reason: Callable[[int, int, bool], str]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the code (N,) and the sentences of a `FilterResult`.

    Args:
        votes: (N, V).
        keep: Booleans (N,).
        reason: (votes to drop, votes, kept) -> sentence.
    """
    count, against = count_votes(votes)
    voters = votes.shape[1] + 1
    kind = (against * voters + count) * 2 + keep
    found = np.flatnonzero(np.bincount(kind))
    place = np.zeros(int(found.max(initial=0)) + 1, dtype=np.int32)
    place[found] = np.arange(len(found))
    reasons = [reason(int(k // 2 // voters), int(k // 2 % voters), bool(k % 2)) for k in found]
    return place[kind], tuple(reasons)


def read_scores(scores: ScoreTable | np.ndarray, column: str | None) -> tuple[np.ndarray, np.ndarray, str]:
    """Return ids (N,), scores (N, T) and the column's name; of an array the ids are row numbers.

    Raises:
        ValueError: If a table does not have the column, or an array no score.
    """
    if isinstance(scores, ScoreTable):
        ids, values, column = _column(scores, column)
    else:
        values = np.asarray(scores)
        values = values.astype(np.float32 if values.dtype == np.float32 else float)
        if values.ndim not in (1, 2) or not values.size:
            raise ValueError(f"scores must be (N,) or (N, T) with N, T > 0, got {values.shape}.")
        values, column = values.reshape(len(values), -1), column or "score"
        ids = np.arange(len(values))
        if any(np.isinf(values[rows]).any() for rows in blocks(len(values))):
            raise ValueError(f"`{column}` must be finite or NaN (no score), got infinity. Replace it by NaN.")
    if not any_known(values):
        raise ValueError(f"at least one sample must have a `{column}`, got none. {_MISSING.get(column, '')}".rstrip())
    return ids, values, column


def _column(table: ScoreTable, column: str | None) -> tuple[np.ndarray, np.ndarray, str]:
    names: Sequence[str] = (column,) if column else ("mimic_score", "clip_score")
    for name in names:
        check_choice("column", name, VALUES)
        found = table.matrix(name)
        if name == names[-1] or any_known(found.values):
            break
    return found.sample_id, found.values, name
