"""Strategies: the signals of some samples in, their log-weights (B,) out; the softmax over `weight_scope` is the caller's.

Read `STRATEGIES` at the end for what there is. Every function can be read against its paper in one screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AUTO_SHARE = 0.5
_LARGEST_JUMP = 25.0  # of the scores' variance from one step to the next


@dataclass(frozen=True)
class BatchSignals:
    """What is known about samples when their weights are chosen: tensors (B,), without graph.

    `ref_losses` (the reference's own loss) and `ref_trust` (P(label is right) by the reference's predictions) are there
    for strategies that run the reference; NaN for a sample that it has not seen.
    """

    losses: Tensor
    mimic_scores: Tensor
    ref_losses: Tensor | None = None
    ref_trust: Tensor | None = None


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


def _needed(values: Tensor | None, strategy: str) -> Tensor:
    if values is None:
        raise ValueError(f'strategy="{strategy}" needs what the reference says of the samples, got none.')
    return values


def _reference_losses(signals: BatchSignals, strategy: str) -> Tensor:
    found = _needed(signals.ref_losses, strategy)
    return torch.where(found.isfinite(), found, signals.losses)


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
        variance, shape = self._started()
        return torch.where(variance > 0, (variance * shape).sqrt(), torch.inf)

    def _started(self) -> tuple[Tensor, Tensor]:
        if self.variance is None or self.shape is None:
            raise RuntimeError("the running temperature must have seen the scores of a step, got none.")
        return self.variance, self.shape

    def start(self, scores: Tensor, trust: Tensor | None = None) -> None:
        """Begin with the temperature that suits the scores (N,) of the first step; their trust does not matter."""
        size = torch.tensor(float(len(scores)))
        tau = auto_temperature(scores, float(_share_of(size, self.share))) if len(scores) > 1 else torch.inf
        variance = scores.var() if len(scores) > 1 else scores.new_zeros(())
        shape = torch.as_tensor(tau, device=scores.device, dtype=scores.dtype).square() / variance
        self.variance = variance
        self.shape = torch.where(shape.isfinite(), shape, -1 / math.log(self.share))

    def update(self, variance: Tensor, effective_share: Tensor, count: Tensor) -> None:
        """Take in one step: its scores' variance, their effective sample size as a share, their number; 0-d each.

        A step of one sample, or of equal scores, says nothing and changes nothing; an effective share that is not a
        number (the weights were not this temperature's) leaves k as it is.
        """
        if self.variance is None or self.shape is None:
            return
        told, wanted = self._spread(variance, count), _share_of(count, self.share).log()
        moved = self.shape * (1 + self.rate * (effective_share.log() / wanted - 1))
        told = told & self._varied & effective_share.isfinite()
        self.shape = torch.where(told, moved, self.shape).clamp(1e-4, 1e4)

    def _spread(self, variance: Tensor, count: Tensor) -> Tensor:
        """Average the variance; return whether the step told anything."""
        before: Any = self.variance
        self._varied = before > 0
        told = variance.isfinite() & (variance > 0) & (count > 1)
        # A step with one sample far away must not set the temperature of the next hundred.
        capped = torch.minimum(variance, _LARGEST_JUMP * before)
        self.variance = torch.where(told, torch.where(before > 0, before.lerp(capped, self.rate), variance), before)
        return told


class EvidenceTemperature(RunningTemperature):
    """tau = sigma / rho of strategy="trust": the mimic score counts by how much it agrees with the trust.

    rho is the running correlation, within steps, of the score with the trust. A score that says nothing, or points the
    wrong way, gets tau = infinity: it is left out.
    """

    def start(self, scores: Tensor, trust: Tensor | None = None) -> None:
        """Begin with the first step's scores (N,) and trust (N,)."""
        self.variance = scores.var() if len(scores) > 1 else scores.new_zeros(())
        self.shape = torch.nan_to_num(correlation(scores, scores if trust is None else trust))

    @property
    def value(self) -> Tensor:
        """tau, 0-d."""
        variance, shape = self._started()
        usable = (variance > 0) & (shape > 0)
        return torch.where(usable, variance.sqrt() / shape.clamp_min(1e-6), torch.inf)

    def update(self, variance: Tensor, found: Tensor, count: Tensor) -> None:
        """Take in one step: its scores' variance, their correlation with the trust, their number; 0-d each."""
        if self.variance is None or self.shape is None:
            return
        told = self._spread(variance, count) & found.isfinite()
        self.shape = torch.where(told, self.shape.lerp(torch.nan_to_num(found), self.rate), self.shape)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return the correlation of a (N,) and b (N,), 0-d; NaN where one of them does not vary. NaN in b is left out."""
    known = b.isfinite()
    a, b = a[known], b[known]
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()


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
    "trust": trust,
    "ref_loss": ref_loss,
    "rho_loss": rho_loss,
    "small_loss": small_loss,
    "uniform": uniform,
}
USE_THE_SCORE = ("mimic", "trust")
RUN_THE_REFERENCE = ("trust", "ref_loss", "rho_loss")


def scaled_part(strategy: str, signals: BatchSignals) -> Tensor:
    """Return what a strategy divides by the temperature (B,): its log-weights at tau = 1 less those at infinity."""
    if strategy in USE_THE_SCORE:  # exactly: a difference would lose small scores to rounding
        return signals.mimic_scores
    weigh = STRATEGIES[strategy]
    return weigh(signals, temperature=1.0) - weigh(signals, temperature=torch.inf)
