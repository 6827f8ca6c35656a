"""What a fitted filter says of itself: its rule in words, and its cut."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_mimic.ensembles import EnsembleFilter
from hf_mimic.expressions import CombinedFilter
from hf_mimic.filters import MixtureFilter, ThresholdFilter, TrustFilter, TwoMeansFilter


def in_words(rule: Any) -> str:
    """Return what a fitted filter keeps, in a few words; the name of the class for one of your own."""
    if isinstance(rule, TrustFilter):
        return f"trust >= {rule.threshold_:.3f}"
    if isinstance(rule, CombinedFilter):
        return rule.expression
    if isinstance(rule, EnsembleFilter):
        return f"{len(rule.voters_)} votes ({rule.vote_}), P(good) >= {rule.threshold_:.3f}"
    if isinstance(rule, ThresholdFilter) and rule.top is not None:
        return f"the best {rule.top:.1%} by {rule.column_} (>= {float(np.ravel(rule.threshold_)[0]):.4g})"
    if isinstance(rule, ThresholdFilter):
        return f"relative weight >= {rule.threshold:g} in most epochs"
    if not isinstance(rule, (TwoMeansFilter, MixtureFilter)):
        return type(rule).__name__
    cuts = ", ".join(f"{cut:.4g}" for cut in np.atleast_1d(rule.threshold_))
    return f"{rule.column_}, cut at {cuts} by epoch" if rule.two_groups_ else f"{rule.column_} has no two groups"


def threshold_of(rule: Any) -> float | list[float] | None:
    """Return the cut of a fitted filter, or one for each epoch; None where it has none."""
    threshold = getattr(rule, "threshold_", None)
    if threshold is None or isinstance(threshold, str) or not np.isfinite(threshold).all():
        return None
    return np.asarray(threshold, dtype=float).tolist()
