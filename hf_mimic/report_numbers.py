"""The numbers of a report: pure functions of arrays; what cannot be computed is None, never 0.

`by_epoch`, `distributions` and `drift` look at visits, the others at one value per row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from hf_mimic.visits import ScoreMatrix

_MOST_EPOCHS = 12
_RANKED = 100_000  # rows that a rank correlation looks at
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def number(value: Any) -> float | None:
    """Return a float as JSON has it: None for what is not finite."""
    return float(value) if math.isfinite(value) else None


def summary(score: np.ndarray) -> dict[str, Any]:
    """Return counts, mean, spread, extremes and quantiles of a score (N,), NaN where there is none."""
    known = score[np.isfinite(score)].astype(float)
    levels = np.quantile(known, _QUANTILES) if len(known) else np.full(len(_QUANTILES), math.nan)
    extremes = (known.mean(), known.std(), known.min(), known.max()) if len(known) else (math.nan,) * 4
    named = dict(zip(("mean", "std", "min", "max"), map(number, extremes), strict=True))
    quantiles = {f"{q:g}": number(value) for q, value in zip(_QUANTILES, levels, strict=True)}
    return {"rows": len(score), "scored": len(known), **named, "quantiles": quantiles}


def by_epoch(matrix: ScoreMatrix) -> tuple[np.ndarray, np.ndarray]:
    """Return the epochs (T,), at most 12 of those with a score, evenly spaced, and the scores (S, T) of who has one.

    Args:
        matrix: Of a `ScoreTable`.
    """
    known = np.isfinite(matrix.values)
    epochs = np.flatnonzero(known.any(0))
    shown = epochs[np.unique(np.linspace(0, len(epochs) - 1, min(len(epochs), _MOST_EPOCHS)).round().astype(int))]
    return matrix.epochs[shown], matrix.values[np.ix_(known.any(1), shown)].astype(float)


def distributions(epochs: np.ndarray, values: np.ndarray, bins: int = 60) -> dict[str, Any]:
    """Return histograms of each epoch over the same bins; the last bins hold what lies beyond the 0.1 % tails.

    Args:
        epochs: (T,).
        values: (S, T), NaN where there is none.
        bins: How many.
    """
    known = values[np.isfinite(values)]
    low, high = np.quantile(known, [0.001, 0.999])
    if high <= low:
        low, high = low - max(abs(low), 1e-6) * 1e-3, high + max(abs(high), 1e-6) * 1e-3
    edges = np.linspace(low, high, bins + 1)
    rows = []
    for epoch, column in zip(epochs.tolist(), values.T, strict=True):
        here = column[np.isfinite(column)]
        counts, _ = np.histogram(here.clip(low, high), edges)
        middle = number(np.median(here))
        rows.append({"epoch": epoch, **summary(column), "median": middle, "counts": counts.tolist()})
    return {"edges": edges.tolist(), "epochs": rows}


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's correlation over what both have; NaN for fewer than 3 samples or equal values."""
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both][:_RANKED], b[both][:_RANKED]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def drift(epochs: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """Return the rank correlations of the scores of every two epochs (T, T): how far they stay the same.

    Args:
        epochs: (T,).
        values: (S, T), NaN where there is none.
    """
    order = np.random.default_rng(0).permutation(len(values))[:_RANKED]
    columns = values[order].T
    matrix = [[number(rank_correlation(a, b)) for b in columns] for a in columns]
    return {"epochs": epochs.tolist(), "rank_correlation": matrix}


def per_class(
    labels: np.ndarray, classes: list[str], score: np.ndarray, keep: np.ndarray, trust: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Return a row for each class that has one: `count`, `kept`, `kept_share`, `mean_score`, `mean_trust`.

    Args:
        labels: (N,), -1 for none.
        classes: Names (C,).
        score: (N,), NaN where there is none.
        keep: (N,).
        trust: (N,), NaN where there is none; None leaves it out.
    """
    there = labels >= 0
    codes = labels[there]
    count = np.bincount(codes, minlength=len(classes))
    kept = np.bincount(codes, keep[there], minlength=len(classes))
    means = _class_means(codes, score[there], len(classes))
    trusts = None if trust is None else _class_means(codes, trust[there], len(classes))
    return [
        {
            "class": classes[c],
            "code": c,
            "count": int(count[c]),
            "kept": int(kept[c]),
            "kept_share": float(kept[c] / count[c]),
            "mean_score": number(means[c]),
            "mean_trust": None if trusts is None else number(trusts[c]),
        }
        for c in np.flatnonzero(count).tolist()
    ]


def _class_means(codes: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    known = np.isfinite(values)
    count = np.bincount(codes[known], minlength=size)
    total = np.bincount(codes[known], values[known].astype(float), minlength=size)
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)


def agreement(keeps: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return how far filters decide alike: the share of equal decisions and Cohen's kappa of every two (F, F).

    Kappa is 1 for equal decisions and 0 for what chance gives; None where both keep all, or both nothing.

    Args:
        keeps: Name to decisions (N,).
    """
    masks = [np.asarray(keep, dtype=bool) for keep in keeps.values()]
    equal = [[float((a == b).mean()) for b in masks] for a in masks]
    kappa = [[number(_kappa(a, b)) for b in masks] for a in masks]
    kept = [{"kept": int(mask.sum()), "kept_share": float(mask.mean())} for mask in masks]
    return {"filters": [*keeps], "kept": kept, "equal": equal, "kappa": kappa}


def _kappa(a: np.ndarray, b: np.ndarray) -> float:
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return float(((a == b).mean() - chance) / (1 - chance)) if chance < 1 else math.nan


def by_length(lengths: np.ndarray, score: np.ndarray, bins: int = 20) -> dict[str, Any] | None:
    """Return the score by caption length, in bins of about as many samples; None where no caption has a score.

    Args:
        lengths: Characters (N,); captions of length 0 are left out.
        score: (N,), NaN where there is none.
        bins: At most so many.
    """
    there = np.isfinite(score) & (lengths > 0)
    if not there.any():
        return None
    lengths, score = lengths[there], score[there].astype(float)
    place, rows = _even_bins(lengths, bins), []
    for i in np.unique(place).tolist():
        here, values = lengths[place == i], score[place == i]
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        mean = {"length": float(here.mean()), "mean": float(values.mean())}
        quartiles = {"low": low, "median": middle, "high": high}
        rows.append({"from": int(here.min()), "to": int(here.max()), "count": len(here), **mean, **quartiles})
    return {"captions": len(score), "rank_correlation": number(rank_correlation(lengths, score)), "bins": rows}


def _even_bins(lengths: np.ndarray, bins: int) -> np.ndarray:
    """Return a bin for each length: a bin takes whole lengths until it has its share of the samples."""
    values, inverse, counts = np.unique(lengths, return_inverse=True, return_counts=True)
    share, bin_of, current, filled = len(lengths) / bins, np.zeros(len(values), dtype=np.int64), 0, 0
    for i, count in enumerate(counts.tolist()):
        if filled >= share:
            current, filled = current + 1, 0
        bin_of[i], filled = current, filled + count
    if current and filled < share / 2:  # what is left is too little for a bin of its own
        bin_of[bin_of == current] -= 1
    return bin_of[inverse]


def length_curve(bins: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Return the mean score, and its quartiles as a band, against caption length, as `report_charts.plot` takes them."""
    low, high = [b["low"] for b in bins], [b["high"] for b in bins]
    x, y = [b["length"] for b in bins], [b["mean"] for b in bins]
    return {"x": x, "y": y, "names": ("characters", name), "band": (low, high)}


def quality_curves(compared: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what is drawn of data sets: their quality against noise, as `report_charts.plot` takes it.

    Against `noise` where every data set has it, else against the estimated `noise_rate`; nothing where one is missing.

    Args:
        compared: Name to numbers.
    """
    everywhere = [k for k in next(iter(compared.values()), {}) if all(_known(row.get(k)) for row in compared.values())]
    x = next((name for name in ("noise", "noise_rate") if name in everywhere), None)
    curves = []
    for name in ("noise_rate", "retained", "mean_score") if x is not None and len(compared) > 1 else ():
        if name == x or name not in everywhere:
            continue
        band = None
        if name == "noise_rate" and {"noise_low", "noise_high"} <= {*everywhere}:
            band = tuple([float(row[end]) for row in compared.values()] for end in ("noise_low", "noise_high"))
        values = {key: [float(row[key]) for row in compared.values()] for key in (str(x), name)}
        axes = (str(x).replace("_", " "), name.replace("_", " "))
        curves.append({"x": values[str(x)], "y": values[name], "names": axes, "band": band, "points": [*compared]})
    return curves


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
