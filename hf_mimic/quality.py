"""The quality of a data set by its scores: what is kept, how good it is on average, how many labels are wrong.

Read `QualityReport.from_scores`, then `compare_datasets`. No clean label is used anywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hf_mimic.checks import check_choice
from hf_mimic.corpus_folder import read_settings
from hf_mimic.ensembles import EnsembleFilter
from hf_mimic.filters import TrustFilter
from hf_mimic.scores import ScoreTable

# By what data sets are ranked: better first when the value is high (1) or low (-1).
RANKED = {"noise_rate": -1, "retained": 1, "mean_score": 1}
_BINS, _REPEATS = 2_000, 1_000


@dataclass(frozen=True)
class QualityReport:
    """What the scores of a data set say about it.

    Args:
        n_samples: How many samples have a row.
        n_scored: How many of them have a score.
        retained: Share that the filter keeps.
        mean_score: Mean mimic score; None where there is none. Comparable between data sets that one and the same model
            scored against the same reference, not between runs of training.
        noise_rate: Estimated share of wrong labels; None where nothing tells.
        noise_low: Lower end of its interval.
        noise_high: Upper end.
        evidence: What the rate comes from: "trust" (the reference's predictions), "votes" (an ensemble of filters that see
            two groups of scores), "none".
    """

    n_samples: int
    n_scored: int
    retained: float
    mean_score: float | None
    noise_rate: float | None
    noise_low: float | None
    noise_high: float | None
    evidence: str

    @classmethod
    def from_scores(
        cls, table: ScoreTable, *, keep: np.ndarray | None = None, level: float = 0.95, seed: int = 0
    ) -> QualityReport:
        """Measure a data set.

        The noise rate is the mean of 1 - P(the label is right). Its interval is a bootstrap over the samples, widened by
        the mean of P (1 - P): as much hangs on samples that could be either, and no resampling shows that.

        NOTE: without a run of the reference the rate needs scores in two groups; up to a fifth of wrong labels often
        leave no dent, so "none" is not "clean".

        Args:
            table: Scores; best from `hf-mimic score` with the reference run.
            keep: What a filter keeps, in the order of `table.aggregate()`; by default the trust's, or an ensemble's.
            level: Of the bootstrap.
            seed: Of the bootstrap.

        Raises:
            ValueError: If the table is empty, or `keep` has another length.
        """
        scores = table.aggregate()
        if not len(scores):
            raise ValueError("a quality report must have scores, got an empty table. Train or score first.")
        if keep is not None and len(keep) != len(scores):
            raise ValueError(f"`keep` must have one value per scored sample, {len(scores)}, got {len(keep)}.")
        if keep is not None and np.asarray(keep).dtype != bool:
            raise ValueError(
                f"`keep` must be booleans, got {np.asarray(keep).dtype}. Give what `predict` returned, not ids."
            )
        right, evidence, found = _judged(table)
        mimic = scores["mimic_score"].to_numpy().astype(float)
        return cls(
            n_samples=len(scores),
            n_scored=int((scores["n_visits"].to_numpy() > 0).sum()),
            retained=float(np.mean(found if keep is None else keep)),
            mean_score=float(np.nanmean(mimic)) if np.isfinite(mimic).any() else None,
            **dict(
                zip(("noise_rate", "noise_low", "noise_high"), noise_rate(right, level=level, seed=seed), strict=True)
            ),
            evidence=evidence,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, as JSON takes them."""
        return asdict(self)


def noise_rate(
    right: np.ndarray, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float] | tuple[None, None, None]:
    """Return the share of wrong labels with its interval, None where no probability is known.

    Args:
        right: P(the label is right) (N,), NaN where it is not known.
        level: Of the bootstrap.
        seed: Of the bootstrap.
    """
    if not 0 < level < 1:
        raise ValueError(f"`level` must be in (0, 1), got {level}. Use 0.95.")
    wrong = 1 - right[np.isfinite(right)]
    if not len(wrong):
        return None, None, None
    counts, edges = np.histogram(wrong, _BINS, (0, 1))  # means of resampled samples, by how often each bin is drawn
    middle = (edges[1:] + edges[:-1]) / 2
    drawn = np.random.default_rng(seed).multinomial(len(wrong), counts / len(wrong), _REPEATS) @ middle / len(wrong)
    rate, unsure = float(wrong.mean()), float((wrong * (1 - wrong)).mean())
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return rate, max(float(low) - unsure, 0.0), min(float(high) + unsure, 1.0)


def _judged(table: ScoreTable) -> tuple[np.ndarray, str, np.ndarray]:
    """Return P(right) (N,), where it comes from, and what the filter that belongs to it keeps (N,)."""
    trust = table.aggregate()["ref_trust"].to_numpy().astype(float)
    if np.isfinite(trust).any():
        return trust, "trust", TrustFilter().fit_predict(table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nobody sees two groups is said by "none"
        votes = EnsembleFilter()
        keep = votes.fit_predict(table)
        right = votes.predict_proba(table)
    return right, "votes" if np.isfinite(right).any() else "none", keep


def compare_datasets(
    tables: Mapping[str, ScoreTable], *, by: str = "noise_rate", level: float = 0.95
) -> dict[str, QualityReport]:
    """Rank data sets before training on any of them: name to report, the best first, the unknown last.

    Args:
        tables: Scores of each by name, against the same reference; for `mean_score` by the same model, too.
        by: "noise_rate", "retained" or "mean_score".
        level: What `QualityReport.from_scores` says.

    Raises:
        ValueError: If a table is missing, or two were scored against different references.

    References:
        Mimic Score, arXiv 2501.06708, figure 4.
    """
    check_choice("by", by, RANKED)
    if not tables:
        raise ValueError("at least one data set must be given to compare, got none.")
    _check_same_pass(tables, by)
    reports = {}
    for name, table in tables.items():
        try:
            reports[name] = QualityReport.from_scores(table, level=level)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def place(item: tuple[str, QualityReport]) -> tuple[bool, float]:
        value = getattr(item[1], by)
        return (value is None, 0.0 if value is None else -RANKED[by] * value)

    return dict(sorted(reports.items(), key=place))


def _check_same_pass(tables: Mapping[str, ScoreTable], by: str) -> None:
    """Refuse to compare scores against different references; what is not known cannot be checked."""
    wanted = {"reference": "reference", "revision of the reference": "revision"}
    if by == "mean_score":
        wanted |= {"model": "model", "layers": "layers"}
    first: dict[str, tuple[str, Any]] = {}
    for name, table in tables.items():
        settings = None if table.folder is None else read_settings(table.folder)
        if settings is None:
            continue
        for word, key in wanted.items():
            if key not in settings:
                continue
            other, value = first.setdefault(key, (name, settings[key]))
            if value != settings[key]:
                raise ValueError(
                    f"data sets must be scored alike to be compared, got the {word} {value!r} for {other} and "
                    f"{settings[key]!r} for {name}. Score both against the same one."
                )
