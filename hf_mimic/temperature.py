"""The automatic temperature: how sharply weights follow what a strategy divides by tau.

Read `auto_temperature` (one batch), then `RunningTemperature` (a run) and the two that the strategies "mimic" and "trust"
have of their own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

AUTO_SHARE = 0.5  # of the samples: the effective size of the sharpest weights
_LARGEST_JUMP = 25.0  # of the signals' variance from one step to the next
_LEAST_BELIEF = 0.05
_SHAPES = (0.05, 20.0)  # least and most kappa^2


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


class RunningTemperature:
    """tau from the signals of earlier steps: scale-free, and the same however a step is split.

    tau = kappa sigma / belief. sigma^2 is the moving average, within a step, of the variance of what the strategy
    divides by tau. kappa^2 follows the effective sample sizes that the weights really had, so that they stay at
    exp(-belief^2) of the samples, what normal signals have with kappa = 1. The belief is a constant here: `share` of the
    samples.

    Args:
        share: Of the samples, in (0, 1).
        rate: Weight of the newest step in the averages.
    """

    evidence: str | None = None  # what the score must agree with to be believed: "fit" or "trust"
    follows_size = True

    def __init__(self, share: float = AUTO_SHARE, rate: float = 0.1) -> None:
        self.share, self.rate, self.most = share, rate, math.sqrt(-math.log(share))
        self.variance: Tensor | None = None  # sigma^2
        self.shape: Tensor | None = None  # kappa^2

    def belief(self, rho: Tensor) -> Tensor:
        """Return how much the signals count, 0-d, from their correlation with the evidence."""
        return torch.full_like(rho, self.most)

    def value(self, rho: Tensor) -> Tensor:
        """Return tau, 0-d; infinite (equal weights) without belief, and until the signals of a step differed.

        Args:
            rho: Correlation of the signals with the evidence, 0-d.
        """
        if self.variance is None or self.shape is None:
            return torch.full_like(rho, torch.inf)
        belief = self.belief(rho)
        usable = (self.variance > 0) & (belief > 0)
        return torch.where(usable, (self.variance * self.shape).sqrt() / belief.clamp_min(1e-6), torch.inf)

    def start(self, signals: Tensor) -> None:
        """Begin with what suits the signals (N,) of the first step."""
        several = len(signals) > 1
        self.variance = signals.var() if several else signals.new_zeros(())
        self.shape = torch.ones_like(self.variance)
        if several and self.follows_size:
            tau = auto_temperature(signals, self.share ** _among(len(signals)))
            shape = (tau * self.most).square() / self.variance
            self.shape = torch.where(shape.isfinite(), shape, self.shape).clamp(*_SHAPES)

    def update(self, variance: Tensor, effective_share: Tensor, count: Tensor, rho: Tensor) -> None:
        """Take in one step.

        A step of one sample, or of equal signals, says nothing and changes nothing; a share that is not a number leaves
        kappa as it is.

        Args:
            variance: Of its signals, 0-d as all of them.
            effective_share: The weights' effective sample size as a share of the samples.
            count: Of samples.
            rho: What its temperature was made of.
        """
        if self.variance is None or self.shape is None:
            self.variance, self.shape = torch.zeros_like(variance), torch.ones_like(variance)
        before, belief = self.variance, self.belief(rho)
        told = variance.isfinite() & (variance > 0) & (count > 1)
        # A step with one sample far away must not set the temperature of the next hundred.
        capped = torch.minimum(variance, _LARGEST_JUMP * before)
        self.variance = torch.where(told, torch.where(before > 0, before.lerp(capped, self.rate), variance), before)
        if self.follows_size:
            wanted = -belief.square() * _among(count)
            moved = self.shape * (1 + self.rate * (effective_share.log() / wanted - 1)).clamp_max(2)
            # Nearly equal weights say nothing of the signals' shape.
            told = told & (before > 0) & effective_share.isfinite() & (belief > _LEAST_BELIEF)
            self.shape = torch.where(told, moved, self.shape).clamp(*_SHAPES)


def _among(count: Any) -> Any:
    """Return the power of an effective share that is left among `count` samples: few spread less than many."""
    return (count - 1) / (count + 1)


class FitTemperature(RunningTemperature):
    """tau of strategy="mimic": the score counts by how much it agrees with the model's own fit, -loss.

    belief = 2 rho^3, rho > 0, at most that of `share`. The more labels are wrong, the closer score and fit go together:
    rho is about .3 where nearly all are right, .8 with 40 % of noise (examples/benchmarks/bench_trust.py). A score that
    says nothing, or has turned around, gets tau = infinity: it is left out.
    """

    evidence = "fit"

    def belief(self, rho: Tensor) -> Tensor:
        """Return 2 rho^3, at most `share`'s."""
        return (2 * rho.clamp_min(0) ** 3).clamp_max(self.most)


class TrustTemperature(RunningTemperature):
    """tau = sigma / rho of strategy="trust": the score counts by how much it agrees with the trust.

    A score that says nothing, or points the wrong way, gets tau = infinity: it is left out. The weights hold the trust,
    too, so their effective size says nothing about the scores.
    """

    evidence = "trust"
    follows_size = False

    def belief(self, rho: Tensor) -> Tensor:
        """Return rho, or 0."""
        return rho.clamp_min(0)


def temperature_of(strategy: str) -> RunningTemperature:
    """Return what chooses the automatic temperature of a strategy."""
    return {"mimic": FitTemperature, "trust": TrustTemperature}.get(strategy, RunningTemperature)()
