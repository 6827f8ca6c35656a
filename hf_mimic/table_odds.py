"""What one table says beside a trust: the mean scores of its samples and the votes of its filters, learned together.

Read `TableOdds.fit`, then `TableOdds.odds`; trust.py has the regression.
"""

from __future__ import annotations

import numpy as np

from hf_mimic.blocks import Beside
from hf_mimic.trust import learned_odds, to_normal_scores
from hf_mimic.votes import ABSTAINS, count_votes

_ENOUGH = 100  # samples to learn from
_FITTED = 20_000


class TableOdds:
    """The log-odds that the scores and votes of one table add to a trust, learned from that trust.

    Votes and the scores by which they are cast say much the same. One logistic regression of both, with the trust as soft
    label, counts what they share once: of the mean scores and the share of each filter's votes that keep a sample, by their
    normal scores, as `hf_mimic.trust.combine` has it for other evidence.

    Args:
        owner: The filter of each voter (V,), 0 .. F - 1.
    """

    def __init__(self, owner: np.ndarray) -> None:
        self.owner = owner

    def fit(self, trust: np.ndarray, means: np.ndarray | Beside, votes: np.ndarray | Beside) -> TableOdds | None:
        """Learn from up to 20,000 samples that have a trust and a vote; None if there are less than 100.

        Args:
            trust: P(the label is right) (N,), NaN where it is not known.
            means: Mean scores (N, K) of any scale and sign, NaN where there is none; K may be 0.
            votes: (N, V), of 1, 0 and -1.
        """
        known = np.flatnonzero(np.isfinite(trust) & (count_votes(votes)[0] > 0))
        if len(known) < _ENOUGH:
            return None
        rows = np.random.default_rng(0).permutation(known)[:_FITTED]
        shown = self._shown(means[rows], votes[rows])  # (n, K + F)
        there = ~np.isnan(shown)
        self._usual = np.where(there, shown, 0).sum(0) / np.maximum(there.sum(0), 1)
        filled = np.where(there, shown, self._usual)
        self._normal = to_normal_scores(filled)
        self._odds = learned_odds(trust[rows], self._normal(filled))
        return self

    def odds(self, means: np.ndarray, votes: np.ndarray) -> np.ndarray:
        """Return the log-odds (B,) to add; NaN where no filter votes: then the table says nothing.

        Args:
            means: (B, K), as in `fit`.
            votes: (B, V).
        """
        shown = self._shown(means, votes)
        odds = self._odds(self._normal(np.where(np.isnan(shown), self._usual, shown)))
        return np.where((votes != ABSTAINS).any(1), odds, np.nan)

    def _shown(self, means: np.ndarray, votes: np.ndarray) -> np.ndarray:
        """Return scores and of each filter the share of its votes that keep a sample (B, K + F), NaN where it abstains."""
        shares = []
        for filter_ in np.unique(self.owner):
            count, against = count_votes(votes[:, self.owner == filter_])
            shares.append(np.divide(count - against, count, out=np.full(len(votes), np.nan), where=count > 0))
        return np.column_stack([means.astype(float), *shares])
