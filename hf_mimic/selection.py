"""Strategies: the signals of some samples in, their log-weights (B,) out; the softmax over `weight_scope` is the caller's.

Read `STRATEGIES` at the end for what there is. Every function can be read against its paper in one screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

AUTO_SHARE = 0.5
_LARGEST_JUMP = 25.0  # of the scores' variance from one step to the next


@dataclass(frozen=True)
class BatchSignals:
    """What is known about samples when their weights are chosen: tensors (B,), without graph."""

    losses: Tensor
    mimic_scores: Tensor


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


class RunningTemperature:
    """tau from the scores of earlier steps: scale-free, and the same however a step is split.

    tau = k sigma. sigma^2 is the moving average of the scores' variance within a step; k follows the effective
    sample sizes that the weights really had, so that they stay at `share` of the samples. For normal scores that size
    is exp(-1 / k^2) of them, and each step k^2 moves toward the value that this would ask for.

    Args:
        share: Of the samples, in (0, 1).
        rate: Weight of the newest step in the averages.
    """

    def __init__(self, share: float = AUTO_SHARE, rate: float = 0.1) -> None:
        self.share, self.rate = share, rate
        self.variance: Tensor | None = None  # sigma^2
        self.shape: Tensor | None = None  # k^2

    @property
    def value(self) -> Tensor:
        """tau, 0-d; infinite (equal weights) as long as all scores of a step were equal."""
        if self.variance is None or self.shape is None:
            raise RuntimeError("the running temperature must have seen the scores of a step, got none.")
        return torch.where(self.variance > 0, (self.variance * self.shape).sqrt(), torch.inf)

    def start(self, scores: Tensor) -> None:
        """Begin with the temperature that suits the scores (N,) of the first step."""
        size = torch.tensor(float(len(scores)))
        tau = auto_temperature(scores, float(_share_of(size, self.share))) if len(scores) > 1 else torch.inf
        variance = scores.var() if len(scores) > 1 else scores.new_zeros(())
        shape = torch.as_tensor(tau, device=scores.device, dtype=scores.dtype).square() / variance
        self.variance = variance
        self.shape = torch.where(shape.isfinite(), shape, -1 / math.log(self.share))

    def update(self, variance: Tensor, effective_share: Tensor, count: Tensor) -> None:
        """Take in one step: its scores' variance, their effective sample size as a share, their number; 0-d each.

        A step of one sample, or of equal scores, says nothing and changes nothing.
        """
        if self.variance is None or self.shape is None:
            return
        told = variance.isfinite() & (variance > 0) & (count > 1)
        # A step with one sample far away must not set the temperature of the next hundred.
        capped = torch.minimum(variance, _LARGEST_JUMP * self.variance)
        average = torch.where(self.variance > 0, self.variance.lerp(capped, self.rate), variance)
        ratio = effective_share.log() / _share_of(count, self.share).log()
        moved = torch.where(self.variance > 0, self.shape * (1 + self.rate * (ratio - 1)), self.shape)
        self.variance = torch.where(told, average, self.variance)
        self.shape = torch.where(told, moved, self.shape).clamp(1e-4, 1e4)


def _share_of(count: Tensor, share: float) -> Tensor:
    """Return what an effective sample size of `share` becomes among few samples: they spread less than many."""
    return share ** ((count - 1) / (count + 1))


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
