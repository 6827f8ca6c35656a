"""Strategies: the signals of some samples in, their log-weights (B,) out; the softmax over `weight_scope` is the caller's.

Read the dictionaries at the end: `STRATEGIES` weigh what is trained on; below a `selection_rate` of 1 `RANKINGS` say what
is kept of a batch, and `SUBSETS` (subsets.py) of an epoch. Every function can be read against its paper in one screen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchSignals:
    """What is known about samples when their weights are chosen: tensors (B,), without graph.

    `ref_losses` (the reference's own loss) and `ref_trust` (P(label is right) by the reference's predictions) are there
    for strategies that run the reference; NaN for a sample that it has not seen. `clip_scores` are those of pairs by the
    model itself. `importance` is 1 over the probability with which a sample was kept in its epoch.
    """

    losses: Tensor
    mimic_scores: Tensor
    ref_losses: Tensor | None = None
    ref_trust: Tensor | None = None
    clip_scores: Tensor | None = None
    importance: Tensor | None = None


def mimic(signals: BatchSignals, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Weight by the mimic score: w = softmax(m / tau).

    Args:
        signals: Of one batch.
        temperature: tau, in units of the score.

    Returns:
        Log-weights m / tau (B,).

    References:
        Mimic Score, arXiv 2501.06708, stage 1.
    """
    return signals.mimic_scores / temperature


def uniform(signals: BatchSignals, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Weight every sample alike: plain training that still records scores.

    Args:
        signals: Of one batch.
        temperature: Not used.

    Returns:
        Log-weights (B,), all 0.
    """
    return torch.zeros_like(signals.mimic_scores)


def trust(signals: BatchSignals, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Weight by the probability that the label is right: w = sigmoid(logit p + m / tau).

    p is `LabelNoiseModel`'s, from the reference's predictions on the whole data set; the mimic score multiplies its odds
    by exp(m / tau). So a label that is surely right keeps its weight whatever the score says: where few labels are
    wrong, all weights are about the same. A sample that the reference has not seen counts as right.

    Args:
        signals: Of one batch, with `ref_trust`.
        temperature: tau, in units of the score; infinity leaves the mimic score out.

    Returns:
        Log-weights (B,), no less than -8.
    """
    known = torch.nan_to_num(_needed(signals.ref_trust, "trust"), nan=1.0)
    odds = torch.logit(known, eps=1e-4)  # finer ones would be rounding in float32
    return torch.nn.functional.logsigmoid(odds + signals.mimic_scores / temperature).clamp_min(-8.0)


def ref_loss(signals: BatchSignals, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Prefer what the reference finds easy: log-weights -l_ref / tau (B,); the model's own loss where that is not known.

    Args:
        signals: Of one batch, with `ref_losses`.
        temperature: tau, in units of the loss.
    """
    return -_reference_losses(signals, "ref_loss") / temperature


def rho_loss(signals: BatchSignals, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Prefer what can still be learned: log-weights (l - l_ref) / tau (B,), the reducible holdout loss; 0 if not known.

    Args:
        signals: Of one batch, with `ref_losses`.
        temperature: tau, in units of the loss.

    References:
        RHO-loss, arXiv 2206.07137 (which keeps the top of a batch instead of weighting it).
    """
    return (signals.losses - _reference_losses(signals, "rho_loss")) / temperature


def small_loss(signals: BatchSignals, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Prefer what the model itself finds easy: log-weights -l / tau (B,).

    Args:
        signals: Of one batch.
        temperature: tau, in units of the loss.

    References:
        Co-teaching, arXiv 1804.06872 (which keeps the smallest losses instead of weighting them).
    """
    return -signals.losses / temperature


def info_batch(signals: BatchSignals, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Weight by 1 / P(kept): the gradient then is, in expectation, that of the whole data set.

    Args:
        signals: Of one batch, with `importance`.
        temperature: Not used.

    Returns:
        Log-weights (B,).

    References:
        InfoBatch, arXiv 2303.04947, equation 6; `subsets.info_batch` says what is kept.
    """
    return torch.zeros_like(signals.losses) if signals.importance is None else signals.importance.log()


# ---- what is kept of a batch: the largest of these -----------------------------------------------------------------


def random(signals: BatchSignals) -> Tensor:
    """Rank all alike: a seeded hash of the id settles ties."""
    return torch.zeros_like(signals.losses)


def by_small_loss(signals: BatchSignals) -> Tensor:
    """Keep what the model finds easy: -l (B,). Co-teaching, arXiv 1804.06872."""
    return -signals.losses


def by_big_loss(signals: BatchSignals) -> Tensor:
    """Keep what the model finds hard: l (B,). Selective-Backprop, arXiv 1910.00762 (which draws instead of ranking)."""
    return signals.losses


def by_clip_score(signals: BatchSignals) -> Tensor:
    """Keep the pairs that the model itself finds similar (B,). CLIPScore, arXiv 2104.08718."""
    return _needed(signals.clip_scores, "clip_score", "CLIPScores of pairs")


def by_rho_loss(signals: BatchSignals) -> Tensor:
    """Keep what can still be learned: l - l_ref (B,), the reducible holdout loss. RHO-loss, arXiv 2206.07137."""
    return rho_loss(signals)


def by_mimic_score(signals: BatchSignals) -> Tensor:
    """Keep what pulls most toward the reference: m (B,). Mimic Score, arXiv 2501.06708."""
    return signals.mimic_scores


def by_trust(signals: BatchSignals) -> Tensor:
    """Keep the labels that are most probably right by the reference's predictions (B,); see `trust`."""
    return torch.nan_to_num(_needed(signals.ref_trust, "trust"), nan=1.0)


def by_ref_loss(signals: BatchSignals) -> Tensor:
    """Keep what the reference finds easy: -l_ref (B,)."""
    return ref_loss(signals)


def _needed(values: Tensor | None, strategy: str, what: str = "what the reference says of the samples") -> Tensor:
    if values is None:
        raise ValueError(f'strategy="{strategy}" needs {what}, got none.')
    return values


def _reference_losses(signals: BatchSignals, strategy: str) -> Tensor:
    found = _needed(signals.ref_losses, strategy)
    return torch.where(found.isfinite(), found, signals.losses)


STRATEGIES: dict[str, Callable[..., Tensor]] = {
    "mimic": mimic,
    "trust": trust,
    "ref_loss": ref_loss,
    "rho_loss": rho_loss,
    "small_loss": small_loss,
    "uniform": uniform,
    # those that only choose: equal weights for what they keep
    "random": uniform,
    "big_loss": uniform,
    "clip_score": uniform,
    "dissect": uniform,
    "dissect_mimic": mimic,
    "scan": uniform,
    "info_batch": info_batch,
    "ref_clip_score": uniform,
    "ref_clip_loss": uniform,
}
RANKINGS: dict[str, Callable[[BatchSignals], Tensor]] = {
    "random": random,
    "small_loss": by_small_loss,
    "big_loss": by_big_loss,
    "clip_score": by_clip_score,
    "rho_loss": by_rho_loss,
    "ref_loss": by_ref_loss,
    "mimic": by_mimic_score,
    "trust": by_trust,
}
DISSECT = ("dissect", "dissect_mimic")  # whose rule has a memory: dissect.py
SUBSETS = ("scan", "info_batch", "ref_clip_score", "ref_clip_loss")  # chosen once an epoch, or once: subsets.py
ONLY_SELECT = ("random", "big_loss", "clip_score", *DISSECT, *SUBSETS)
USE_THE_SCORE = ("mimic", "trust")
RUN_THE_REFERENCE = ("trust", "ref_loss", "rho_loss", "ref_clip_score", "ref_clip_loss")
NEED_A_REFERENCE = ("auto", "mimic", "dissect_mimic", *RUN_THE_REFERENCE)


def weighting(strategy: str, selection_rate: float) -> str:
    """Return the strategy that weighs what is trained on: equal weights for what a ranking kept."""
    return "uniform" if selection_rate < 1 and strategy in RANKINGS else _WEIGHTS.get(strategy, strategy)


_WEIGHTS = {name: "uniform" for name, weigh in STRATEGIES.items() if weigh is uniform} | {"dissect_mimic": "mimic"}


def scaled_part(strategy: str, signals: BatchSignals) -> Tensor:
    """Return what a strategy divides by the temperature (B,): its log-weights at tau = 1 less those at infinity."""
    if strategy in USE_THE_SCORE:  # exactly: a difference would lose small scores to rounding
        return signals.mimic_scores
    weigh = STRATEGIES[strategy]
    return weigh(signals, temperature=1.0) - weigh(signals, temperature=torch.inf)
