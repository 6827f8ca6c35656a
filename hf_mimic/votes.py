"""Votes in, one decision out: by majority, or by EM that learns how good every voter is.

A vote is 1 (keep), 0 (drop) or -1 (abstains). Read `majority`, then `DawidSkene`. Rows with the same votes are handled
once: there are few kinds of them, however many samples there are.
"""

from __future__ import annotations

import numpy as np
from sklearn.base import BaseEstimator

from hf_mimic.blocks import Beside, blocks
from hf_mimic.two_groups import sampled_rows

ABSTAINS = -1
FEWEST = 3
_LEARNED = 20_000  # samples
_WEAK = 0.2  # correlation
_LARGEST = 2**60
_COUNTED = 2_000_000  # kinds: up to so many are counted without a sort
_LIMITS = (0.02, 0.98)  # of what is learned about a voter: nobody is taken for infallible


def count_votes(votes: np.ndarray | Beside) -> tuple[np.ndarray, np.ndarray]:
    """Return how many vote on each sample, and how many of them to drop it, (N,) each."""
    count, against = np.empty((2, len(votes)), dtype=np.int32)
    for rows in blocks(len(votes)):
        count[rows], against[rows] = _counted(votes[rows])
    return count, against


def _counted(votes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    small = np.int8 if votes.shape[1] < 128 else np.int32  # several times as fast
    return (votes != ABSTAINS).sum(1, dtype=small), (votes == 0).sum(1, dtype=small)


def voting(votes: Beside) -> np.ndarray:
    """Return which voters do not always abstain, booleans (V,)."""
    return np.concatenate([part.max(0, initial=ABSTAINS) for part in votes.parts]) != ABSTAINS


def majority(votes: np.ndarray | Beside, score: np.ndarray | None = None) -> np.ndarray:
    """Return what most votes keep; a tie goes to the score, and a sample without votes is kept.

    Args:
        votes: (N, V), of 1, 0 and -1.
        score: (N,): a tie is kept if it is not below 0; without a score, always.

    Returns:
        Booleans (N,).
    """
    keep = np.empty(len(votes), dtype=bool)
    for rows in blocks(len(votes)):
        count, against = _counted(votes[rows])
        others = count - against
        keep[rows] = against <= others
        if score is not None:
            keep[rows] &= (against != others) | (count == 0) | ~(score[rows] < 0)
    return keep


class DawidSkene(BaseEstimator):
    """Learn from the votes alone how often each voter keeps good and bad samples; weigh the voters by it.

    EM for two classes with a sensitivity and a specificity per voter; who abstains says nothing. It starts from the
    majority.

    Voters that look at the same score make the same mistakes. With `correlated=True` those of a group (`fit(votes,
    groups=...)`) have one voice together, whatever their number. Without groups a voter's evidence counts `1 / sum_u r_uv`
    (at most 1), r being the correlation of two voters' errors under the current posterior: k copies of a voter count as
    one, independent voters as Dawid and Skene's.

    NOTE: give the groups where they are known. Of voters that only resemble each other EM may believe the largest group, and
    then sees no mistakes that its members share.

    Of more than 20,000 samples it learns from as many.

    Args:
        correlated: Whether voters may make the same mistakes; False takes them for independent.
        iterations: At most so many steps of EM.
        seed: Chooses the samples.

    References:
        Dawid and Skene, Applied Statistics 28 (1979). The weights are Kish's design effect, 1965.
    """

    def __init__(self, correlated: bool = True, iterations: int = 100, seed: int = 0) -> None:
        self.correlated, self.iterations, self.seed = correlated, iterations, seed

    def fit(self, votes: np.ndarray | Beside, y: object = None, *, groups: np.ndarray | None = None) -> DawidSkene:
        """Learn `prior_` (share of good samples), `keeps_` (2, V; of bad and of good samples) and `weights_` (V,).

        Args:
            votes: (N, V), of 1, 0 and -1.
            y: Not used.
            groups: Of voters that judge by the same thing, integers from 0 (V,); used with `correlated=True`.

        Raises:
            ValueError: If fewer than three (or groups) vote: from two one cannot tell who is right; or groups are not (V,).
        """
        votes = votes if isinstance(votes, Beside) else np.asarray(votes)
        kinds, _, counts = patterns(votes[sampled_rows(len(votes), self.seed, _LEARNED)])
        present = ~np.isnan(kinds)
        if groups is not None and np.shape(groups) != (kinds.shape[1],):
            raise ValueError(f"`groups` must have one per voter, {kinds.shape[1]}, got {np.shape(groups)}.")
        estimated = self.correlated and groups is None
        own = np.arange(kinds.shape[1]) if groups is None or not self.correlated else np.asarray(groups)
        voices = len(np.unique(own[present.any(0)]))
        if voices < FEWEST:
            raise ValueError(f"at least {FEWEST} voters must vote, got {voices} that do not abstain. Use `majority`.")
        self.weights_ = 1 / np.bincount(own)[own]
        if estimated:  # copies must not decide where EM starts; only they correlate by almost 1
            share = np.nansum(counts[:, None] * kinds, 0) / np.maximum(counts @ present, 1)
            self.weights_ = _own(_correlation(kinds, [(counts, share)]) ** 4)
        heard = present @ self.weights_
        good = np.where(heard > 0, np.nan_to_num(kinds) @ self.weights_ / np.maximum(heard, 1e-12), 0.5)
        for _ in range(self.iterations):
            self._learn(kinds, counts, good, estimated)
            before, good = good, self._posterior(kinds)
            if np.abs(good - before).max() < 1e-6:
                break
        return self

    def predict_proba(self, votes: np.ndarray) -> np.ndarray:
        """Return P(good | votes) (N,); the prior for a sample without votes."""
        if np.ndim(votes) != 2 or np.shape(votes)[1] != len(self.weights_):
            raise ValueError(
                f"votes must be (N, {len(self.weights_)}), as in the fit, got {np.shape(votes)}. Fit again."
            )
        found = np.empty(len(votes))
        dropped, kept = self._odds()
        for rows in blocks(len(votes)):
            part = np.asarray(votes[rows])
            odds = (part == 0) @ dropped + (part == 1) @ kept + np.log(self.prior_ / (1 - self.prior_))
            found[rows] = 1 / (1 + np.exp(-odds))
        return found

    def _learn(self, kinds: np.ndarray, counts: np.ndarray, good: np.ndarray, estimated: bool) -> None:
        present = ~np.isnan(kinds)
        heard = counts * present.any(1)
        self.prior_ = float(np.clip((heard * good).sum() / heard.sum(), *_LIMITS))
        keep = np.nan_to_num(kinds)
        rates = []
        for belief in (1 - good, good):
            mass = (counts * belief)[:, None] * present  # (P, V)
            rates.append(((mass * keep).sum(0) + 0.5) / (mass.sum(0) + 1))
        self.keeps_ = np.clip(rates, *_LIMITS)  # (2, V)
        if estimated:
            masses = [counts * belief for belief in (1 - good, good)]
            self.weights_ = _own(_correlation(kinds, list(zip(masses, self.keeps_, strict=True))))

    def _odds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the log-odds that a vote of each voter to drop, and one to keep, adds, (V,) each."""
        bad, right = self.keeps_
        return np.log((1 - right) / (1 - bad)) * self.weights_, np.log(right / bad) * self.weights_

    def _posterior(self, kinds: np.ndarray) -> np.ndarray:
        return self.predict_proba(np.nan_to_num(kinds, nan=ABSTAINS))


def _correlation(kinds: np.ndarray, classes: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the correlation (V, V) of what the voters say beyond their rates, over the samples on which both vote.

    Args:
        kinds: Votes (P, V).
        classes: Of each class the mass (P,) of every kind, and how often the voters keep (V,).
    """
    present = (~np.isnan(kinds)).astype(float)
    cross, square = np.zeros((kinds.shape[1],) * 2), np.zeros((kinds.shape[1],) * 2)
    for mass, rate in classes:
        error = np.nan_to_num(kinds - rate)
        cross += (mass[:, None] * error).T @ error
        square += (mass[:, None] * error**2).T @ present
    found = cross / np.sqrt(np.maximum(square * square.T, 1e-12))
    np.fill_diagonal(found, 1.0)
    return found


def _own(correlation: np.ndarray) -> np.ndarray:
    """Return how much of each voter is its own (V,): 1 over the number of voters that it stands for.

    A weak correlation is not told from what an uncertain posterior leaves unexplained: from many voters it would add up.
    """
    return 1 / np.where(correlation > _WEAK, correlation, 0.0).sum(0)


def patterns(votes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the kinds of rows (P, V), NaN for who abstains; the kind of each row (N,); the rows of each kind (P,)."""
    votes = np.asarray(votes)
    if votes.ndim != 2 or not votes.size:
        raise ValueError(f"votes must be (N, V) with N, V > 0, got {votes.shape}.")
    if votes.dtype.kind != "i" or votes.min() < ABSTAINS or votes.max() > 1:
        raise ValueError("votes must be integers, 1 (keep), 0 (drop) or -1 (abstains), got others.")
    code, bound = np.zeros(len(votes), dtype=np.int64), 1  # a number with a digit per voter, in base 3
    for column in votes.T:
        if bound > _LARGEST:  # number the kinds so far anew
            code = np.unique(code, return_inverse=True)[1]
            bound = int(code.max()) + 1
        code *= 3
        code += column
        code += 1
        bound *= 3
    if bound <= _COUNTED:
        every = np.bincount(code, minlength=bound)
        found = every > 0
        code, counts = (np.cumsum(found) - 1)[code], every[found]
    else:
        code, counts = np.unique(code, return_inverse=True, return_counts=True)[1:]
    first = np.zeros(len(counts), dtype=np.int64)
    first[code] = np.arange(len(code))  # any row of the kind
    kinds = votes[first].astype(float)
    return np.where(kinds == ABSTAINS, np.nan, kinds), code, counts.astype(float)
