"""Strategies: the signals of one batch in, weights (B,) out; non-negative, summing to one, uniform being 1/B.

Read `STRATEGIES` at the end for what there is. Every function can be read against its paper in one screen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

AUTO_SHARE = 0.5


@dataclass(frozen=True)
class BatchSignals:
    """What is known about the samples of a batch when their weights are chosen: tensors (B,), without graph."""

    losses: Tensor
    mimic_scores: Tensor


def mimic(signals: BatchSignals, *, temperature: float | str = 1.0) -> Tensor:
    """Weight by the mimic score: w = softmax(m / tau).

    Args:
        signals: Of one batch.
        temperature: tau, in units of the score; `"auto"` chooses it from the batch (`auto_temperature`).

    Returns:
        Weights (B,).

    References:
        Mimic Score, arXiv 2501.06708, stage 1.
    """
    scores = signals.mimic_scores
    tau = auto_temperature(scores) if temperature == "auto" else float(temperature)
    return torch.softmax(scores / tau, 0)


def uniform(signals: BatchSignals, *, temperature: float | str = 1.0) -> Tensor:
    """Weight every sample alike: plain training that still records scores.

    Args:
        signals: Of one batch.
        temperature: Not used.

    Returns:
        Weights (B,).
    """
    return torch.full_like(signals.mimic_scores, 1 / len(signals.mimic_scores))


def effective_sample_size(weights: Tensor) -> Tensor:
    """Return 1 / sum w^2 of weights (..., B) that sum to one: B if uniform, 1 if one sample has all."""
    return 1 / weights.square().sum(-1)


def auto_temperature(scores: Tensor, share: float = AUTO_SHARE) -> Tensor:
    """Choose tau so that the effective sample size of softmax(m / tau) is `share` of the batch.

    It scales with the scores, so the weights do not change when the loss or the score is multiplied by a constant.
    Two grids of 64 temperatures find it to 1 % without waiting for the device.

    Args:
        scores: Mimic scores (B,).
        share: Of the batch, in (0, 1).

    Returns:
        tau, a 0-d tensor; infinite where all scores are equal.
    """
    spread = scores.std(correction=0)
    logits = (scores - scores.max()) / spread.clamp_min(torch.finfo(scores.dtype).tiny)
    low, high = logits.new_tensor(-4.0), logits.new_tensor(4.0)  # log10 of tau in units of the spread
    steps = torch.linspace(0, 1, 64, device=scores.device, dtype=scores.dtype)
    for _ in range(2):
        grid = low + (high - low) * steps
        sizes = effective_sample_size(torch.softmax(logits / 10 ** grid[:, None], -1))  # (64,)
        first = (sizes < share * len(scores)).sum().clamp(1, 63)  # sizes grow with tau
        low, high = grid[first - 1], grid[first]
    return torch.where(spread > 0, spread * 10**high, torch.inf)


STRATEGIES: dict[str, Callable[..., Tensor]] = {
    "mimic": mimic,
    "uniform": uniform,
}
