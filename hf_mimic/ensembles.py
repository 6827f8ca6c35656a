"""Many filters, one decision: they vote, over epochs and layers, and the ensemble learns whom to believe.

Read `EnsembleFilter.fit`, then `votes` and `predict_proba`; votes.py counts them, table_odds.py learns from a trust.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

from hf_mimic.blocks import Beside, any_known, blocks
from hf_mimic.checks import check_choice
from hf_mimic.cuts import FilterResult, ScoreFilter, Votes, tallied
from hf_mimic.filters import MixtureFilter, TwoMeansFilter
from hf_mimic.joined import Tables, all_ids, has, means_of, named, rows_of, trust_of
from hf_mimic.scores import ScoreTable
from hf_mimic.table_odds import TableOdds
from hf_mimic.trust import most_f1, with_odds
from hf_mimic.two_groups import sampled, sampled_rows
from hf_mimic.votes import ABSTAINS, FEWEST, DawidSkene, count_votes, majority, voting

WAYS = ("auto", "trust", "correlated", "dawid_skene", "majority")


class Heard(NamedTuple):
    """What `Votes` says, the votes not yet copied into one array."""

    sample_id: np.ndarray
    votes: Beside
    score: np.ndarray


class EnsembleFilter(ScoreFilter):
    """Let filters vote, each in each epoch of each table; keep what is probably good by their votes.

    A filter abstains where a sample has no score, and everywhere where it sees no two groups; if all do, everything is
    kept. Whom to believe is learned without a clean label:

    - "trust": from what the reference predicts. Its trust is where each sample starts. What the votes of a table and the
      mean scores behind them add is learned from the trust by one logistic regression, as what they share counts once;
      over tables the mean is taken, not the sum: they judge by the same reference.
    - "correlated": from the votes alone, by EM; all epochs and filters of one column of one table share one voice.
    - "dawid_skene": the same, every voter taken for independent. "majority": all voters alike, a tie to the mean score.

    Args:
        filters: (name, filter) pairs; None takes two means and a mixture on mimic score, CLIPScore and loss; where there
            is no trust, with a check for two groups.
        vote: One of these; "auto" takes the trust if there is one, else "correlated" if three columns vote, else majority.
        least: Keep from this P(good) on; "f1" takes the one with the highest expected F1 of finding the bad samples.

    References:
        Mimic Score, arXiv 2501.06708, stage 2 ("ensemble filter"); Dawid and Skene, Applied Statistics 28 (1979).
    """

    def __init__(
        self,
        filters: Sequence[tuple[str, ScoreFilter]] | None = None,
        *,
        vote: str = "auto",
        least: float | str = "f1",
    ) -> None:
        self.filters, self.vote, self.least = filters, vote, least

    def fit(self, scores: Tables, y: Any = None) -> EnsembleFilter:
        """Fit the filters to every table, then learn whom to believe: `filters_`, `voters_`, `vote_`, `threshold_`.

        Args:
            scores: A `ScoreTable`, or several of the same samples by name (of other layers, seeds or references).
            y: Not used.

        Raises:
            ValueError: If a parameter is wrong, no filter finds a score, or vote="trust" and the reference was not run.
        """
        self._fit(scores)
        return self

    def fit_predict(self, scores: Tables, y: Any = None) -> np.ndarray:
        """Return `fit(scores).predict(scores)`; the votes are counted once."""
        return self._keep(self._fit(scores), scores)

    def predict(self, scores: Tables) -> np.ndarray:
        """Return what to keep, booleans (N,)."""
        return self._keep(self._hear(scores), scores)

    def _fit(self, scores: Tables) -> Heard:
        check_choice("vote", self.vote, WAYS)
        if self.least != "f1" and not (isinstance(self.least, (int, float)) and 0 < self.least < 1):
            raise ValueError(f'`least` must be in (0, 1) or "f1", got {self.least!r}. Use 0.5 for more likely good.')
        trust = trust_of(scores, all_ids(scores))
        by_trust = self.vote in ("auto", "trust") and any_known(trust)
        self.filters_: list[tuple[str, str, ScoreFilter]] = []
        for place, table in named(scores).items():
            for name, model in self.filters if self.filters is not None else default_voters(table, check=not by_trust):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # who sees no two groups abstains; if all do, it is said below
                    self.filters_.append((place, name, clone(model).fit(table)))
        if not self.filters_:
            raise ValueError(
                "an ensemble must have a filter, got none: the tables have no scores. Train or score first."
            )
        heard = self._hear(scores)
        voices = len(np.unique(self._groups()[voting(heard.votes)]))
        self.vote_ = self._way(voices, trust)
        means = means_of(scores, heard.sample_id, self._columns())
        self._odds: dict[str, TableOdds] = {}
        self._model: DawidSkene | None = None
        if self.vote_ == "trust":
            self._learn(heard.votes, trust, means)
        elif self.vote_ not in ("majority", "nobody"):
            self._model = DawidSkene(self.vote_ == "correlated").fit(heard.votes, groups=self._groups())
        self.threshold_ = self.least
        if self.least == "f1":
            some = sampled_rows(len(trust), 0)
            good = self._proba(heard.votes.at(some), trust[some], means.at(some))
            self.threshold_ = most_f1(good[~np.isnan(good)]) if np.isfinite(good).any() else 0.5
        return heard

    def votes(self, scores: Tables) -> Votes:
        """Return the votes of all filters (N, V), in the order of `voters_`.

        Args:
            scores: What `fit` takes, with the same names.
        """
        ids, votes, score = self._hear(scores)
        return Votes(ids, votes[:], score)

    def _hear(self, scores: Tables) -> Heard:
        check_is_fitted(self)
        tables, ids = named(scores), all_ids(scores)
        wanted = {place: None for place, _, _ in self.filters_}
        if not wanted.keys() <= tables.keys():
            raise ValueError(
                f"the tables must have the names of the fit, {[*wanted]}, got {[*tables]}. Name them alike."
            )
        columns, score, self.voters_ = [], np.zeros(len(ids)), []
        self._owner: list[int] = []  # the filter of each voter
        for place, name, model in self.filters_:
            heard = model.votes(tables[place])
            rows = rows_of(ids, heard.sample_id)
            votes = heard.votes
            if len(votes) < len(ids):
                votes = np.full((len(ids), heard.votes.shape[1]), ABSTAINS, dtype=np.int8)
                votes[rows] = heard.votes
            columns.append(votes)
            score[rows] += heard.score / max(float(np.std(sampled(heard.score, 0))), 1e-12)
            prefix = f"{place}/{name}" if place else name
            voters = votes.shape[1]
            self.voters_ += [prefix] if voters == 1 else [f"{prefix}/{epoch}" for epoch in range(voters)]
            self._owner += [len(columns) - 1] * voters
        return Heard(ids, Beside(columns), score)

    def predict_proba(self, scores: Tables) -> np.ndarray:
        """Return P(good) (N,); by majority the share of the votes to keep. NaN where nothing is known."""
        return self._good(self._hear(scores), scores)

    def filter(self, scores: Tables) -> FilterResult:
        """Return what is kept, what is dropped, and why.

        Args:
            scores: What `fit` takes, with the same names.
        """
        heard = self._hear(scores)
        keep = self._keep(heard, scores)
        return FilterResult(heard.sample_id, keep, *tallied(heard.votes, keep, self._reason))

    def _keep(self, heard: Heard, scores: Tables) -> np.ndarray:
        if self.vote_ in ("majority", "nobody"):
            return majority(heard.votes, heard.score)
        return ~(self._good(heard, scores) < self.threshold_)

    def _good(self, heard: Heard, scores: Tables) -> np.ndarray:
        ids = heard.sample_id
        return self._proba(heard.votes, trust_of(scores, ids), means_of(scores, ids, self._columns()))

    def _reason(self, against: int, count: int, keep: bool) -> str:
        said = f"{against} of {count} votes against" if count else "no votes"
        learned = self._odds or (self._model is not None and count)
        return f"{said}; probably {'good' if keep else 'bad'}" if learned else said

    def _groups(self) -> np.ndarray:
        """Return which voters judge by the same column of the same table (V,)."""
        seen = [f"{place}/{getattr(model, 'column_', name)}" for place, name, model in self.filters_]
        return np.unique(seen, return_inverse=True)[1][self._owner]

    def _way(self, voices: int, trust: np.ndarray) -> str:
        """Return how this ensemble decides, given what there is."""
        known = any_known(trust)
        if self.vote == "trust" and not known:
            raise ValueError(
                'vote="trust" must have a trust, got none: the reference was not run on the samples. Train with '
                'strategy="trust", or use vote="correlated".'
            )
        if known and self.vote in ("auto", "trust"):
            return "trust"
        if not voices:
            warnings.warn("no filter of the ensemble sees evidence of two groups: everything is kept.")
            return "nobody"
        if self.vote == "auto":
            return "correlated" if voices >= FEWEST else "majority"
        return self.vote

    def _columns(self) -> list[tuple[str, str]]:
        """Return by which columns of which tables the filters judge, each once; only a trust is asked what they say."""
        if self.vote_ != "trust":
            return []
        found = [(place, model.column_) for place, _, model in self.filters_ if hasattr(model, "column_")]
        return list(dict.fromkeys(found))

    def _parts(self) -> dict[str, tuple[list[int], list[int]]]:
        """Return of each table which of `_columns` and which filters are its own."""
        columns, filters = [place for place, _ in self._columns()], [place for place, _, _ in self.filters_]
        return {place: (_where(columns, place), _where(filters, place)) for place in dict.fromkeys(filters)}

    def _learn(self, votes: Beside, trust: np.ndarray, means: Beside) -> None:
        """Learn what each table says beside the trust; nothing where there is little to learn from."""
        for place, (columns, filters) in self._parts().items():
            owner = [k for k in self._owner if k in filters]
            found = TableOdds(np.array(owner)).fit(trust, means.of(columns), votes.of(filters))
            if found is not None:
                self._odds[place] = found

    def _said(self, votes: Beside, means: Beside) -> np.ndarray:
        """Return the mean log-odds (B,) of the tables that say something of a sample; 0 where none does."""
        total, count = np.zeros(len(votes)), np.zeros(len(votes))
        for place, (columns, filters) in self._parts().items():
            if place in self._odds:
                odds = self._odds[place].odds(means.of(columns)[:], votes.of(filters)[:])
                total += np.nan_to_num(odds)
                count += ~np.isnan(odds)
        return total / np.maximum(count, 1)

    def _proba(self, votes: Beside, trust: np.ndarray, means: Beside) -> np.ndarray:
        count, against = count_votes(votes)
        if self._model is not None:
            good = np.concatenate([self._model.predict_proba(votes[rows]) for rows in blocks(len(votes))])
        elif self.vote_ == "trust":
            if not np.isfinite(trust).any():
                raise ValueError(
                    "an ensemble that learned from a trust must have one to decide, got none: the reference was not run on "
                    'these samples. Run it, or fit with vote="correlated".'
                )
            good = np.where(np.isnan(trust) & (count > 0), np.nanmean(trust), trust)
            for rows in blocks(len(votes)):
                good[rows] = with_odds(good[rows], self._said(votes.at(rows), means.at(rows)))
            return good
        else:
            good = (count - against) / np.maximum(count, 1)
        return np.where(count > 0, good, np.nan)


def default_voters(table: ScoreTable, *, check: bool) -> list[tuple[str, ScoreFilter]]:
    """Return the filters of an ensemble, as far as the table has their columns.

    The papers' threshold is not among them: it finds no cut of its own, and a softmax makes two groups of weights where
    there is one of scores.

    Args:
        table: Whose columns.
        check: Whether they abstain where they see no two groups. If not, what they say is worth must be learned.
    """
    found: list[tuple[str, ScoreFilter]] = []
    for column in ("mimic_score", "clip_score", "loss"):
        if has(table, column):
            found.append((f"two_means({column})", TwoMeansFilter(column, check=check)))
            found.append((f"mixture({column})", MixtureFilter(column, check=check)))
    return found


def _where(names: Sequence[str], name: str) -> list[int]:
    return [k for k, other in enumerate(names) if other == name]
