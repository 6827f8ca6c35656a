"""Weights over a whole optimizer step: a softmax computed micro-batch by micro-batch, on every process at once.

Read `OnlineSoftmax`: what the gradient accumulated so far stands for, before and after a micro-batch. The sums that
travel along in the same small gather (`StepSums`) serve the log, the self-check and the temperature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StepSums:
    """Sums over the samples of an optimizer step, 0-d tensors; e_i = exp(a_i - c) with the log-weights a."""

    weight: Tensor  # Z = sum e_i
    weight_square: Tensor  # sum e_i^2
    weighted_score: Tensor  # sum e_i m_i
    weighted_absolute_score: Tensor
    weighted_loss: Tensor
    count: Tensor
    loss: Tensor
    score: Tensor
    score_square: Tensor
    negative: Tensor  # how many scores are below 0
    signal: Tensor  # of what the strategy divides by the temperature
    signal_square: Tensor
    loss_square: Tensor
    loss_score: Tensor
    known: Tensor  # how many have a trust; the six sums that follow are over these
    trust: Tensor
    trust_square: Tensor
    known_score: Tensor
    known_score_square: Tensor
    trust_score: Tensor

    @property
    def effective_sample_size(self) -> Tensor:
        """1 / sum w^2: `count` if the weights are uniform, 1 if one sample has all."""
        return self.weight.square() / self.weight_square

    @property
    def signal_variance(self) -> Tensor:
        """The unbiased variance of the strategy's signal; not a number for fewer than two samples."""
        return _deviation(self.signal, self.signal_square, self.count) / (self.count - 1)

    @property
    def fit_correlation(self) -> Tensor:
        """Of the scores with -loss, the model's own fit; not a number where one of them does not vary."""
        both = self.loss_score - self.loss * self.score / self.count
        square = _deviation(self.loss, self.loss_square, self.count)
        return -_correlation(both, square, _deviation(self.score, self.score_square, self.count))

    @property
    def trust_correlation(self) -> Tensor:
        """Of the scores with the trust, over the samples that have one; not a number where one does not vary."""
        both = self.trust_score - self.trust * self.known_score / self.known
        square = _deviation(self.trust, self.trust_square, self.known)
        return _correlation(both, square, _deviation(self.known_score, self.known_score_square, self.known))


def _deviation(total: Tensor, square: Tensor, count: Tensor) -> Tensor:
    """Return the sum of squared deviations from the mean; 0 where it is only rounding of the difference."""
    deviation = square - total.square() / count
    return torch.where(deviation > _ROUNDING * torch.finfo(square.dtype).eps * square, deviation, 0)


def _correlation(both: Tensor, square: Tensor, other_square: Tensor) -> Tensor:
    """Return the correlation from sums over deviations; the roots apart, so that their product does not overflow."""
    varies = (square > 0) & (other_square > 0)
    return torch.where(varies, both / square.sqrt() / other_square.sqrt(), torch.nan).clamp(-1, 1)


_ROUNDING = 100.0  # in units of eps
_POWERS = (1, 2, 1, 1, 1) + 15 * (0,)  # of e_i in each sum: how it scales with exp(-c)


@dataclass(frozen=True)
class Weighed:
    """What is known of the scored samples of a micro-batch, tensors (b,) without graph.

    `logits` are the log-weights a, finite; `signals` is what the strategy divides by the temperature; `trust` may be
    NaN.
    """

    logits: Tensor
    losses: Tensor
    scores: Tensor
    signals: Tensor | None = None
    trust: Tensor | None = None


class OnlineSoftmax:
    """The softmax over all samples of an optimizer step, on P processes, without keeping their graphs.

    With log-weights a_i, the gradient accumulated on process p stands at any time for

        (1 / d_p) (shared + P sum_i exp(a_i - c_p) grad l_i),

    the sum over what p added since gradients were last averaged over processes; `shared` is what was there then, the
    same on all. `add` returns what keeps this true. Where gradients are averaged next, a gather makes c the same on
    all and d = Z, the sum of exp(a_i - c) over everything: averaging then gives sum_i w_i grad l_i with
    w = softmax(a). Nothing is left to divide by, so clipping and loss scaling see the normalised gradient.

    Args:
        processes: P, over which gradients are averaged.

    References:
        Online normaliser of the softmax, arXiv 1805.02867, algorithm 3.
    """

    def __init__(self, processes: int = 1) -> None:
        self.processes = processes
        self._started = self._shared = False
        self._shift: Tensor  # c_p
        self._divisor: Tensor  # d_p
        self._own: Tensor  # this process's sums since the last gather
        self._others: Tensor  # everyone's sums until then
        self._powers: Tensor

    @property
    def sums(self) -> StepSums:
        """The sums over all processes, as of the last gather."""
        if not self._shared:
            raise RuntimeError("the sums of a step are known after a gather, got none yet.")
        return StepSums(*self._others.unbind())

    def add(self, samples: Weighed, *, gather: Gather | None = None) -> tuple[Tensor, Tensor | None]:
        """Take in a micro-batch; return its weights, and the factor for the gradient that is accumulated already.

        Args:
            samples: Of this micro-batch; b may be 0.
            gather: (k,) -> (P, k), if gradients are averaged over processes after this micro-batch, or if processes are in
                each other's losses; so on all.

        Returns:
            Weights (b,) for the losses of this micro-batch; a 0-d factor, None if nothing is accumulated yet.
        """
        logits = samples.logits
        first, peak = not self._started, torch.cat([logits, logits.new_full((1,), -torch.inf)]).max()
        if first:
            self._started, self._shift, self._own = True, peak, logits.new_zeros(len(_POWERS))
            # Any constant would do until the gather; this one keeps the loss near its mean.
            self._divisor, self._others = logits.new_tensor(max(len(logits), 1)), torch.zeros_like(self._own)
            self._powers = logits.new_tensor(_POWERS)
        before, divisor = self._shift, self._divisor
        self._rescale(torch.maximum(before, peak))
        self._own = self._own + _sums(samples, self._shift)
        if gather is not None:
            self._share(gather(torch.cat([self._shift[None], self._own])))
        weights = self.processes * self.normalise(logits)
        if first:
            return weights, None
        return weights, torch.nan_to_num(torch.exp(before - self._shift) * (divisor / self._divisor))

    def normalise(self, logits: Tensor) -> Tensor:
        """Return exp(a - c) / d (b,): the weights of these samples in the sum over everything gathered so far."""
        return torch.exp(logits - self._shift) / self._divisor

    def _rescale(self, shift: Tensor) -> None:
        scale = _scale(self._shift, shift) ** self._powers
        self._own, self._others, self._shift = self._own * scale, self._others * scale, shift

    def _share(self, rows: Tensor) -> None:
        """Merge the sums of all processes: rows (P, 1 + k) of their c and their sums."""
        self._rescale(rows[:, 0].max())
        self._others = self._others + (rows[:, 1:] * _scale(rows[:, :1], self._shift) ** self._powers).sum(0)
        self._own, self._shared = torch.zeros_like(self._own), True
        self._divisor = self._others[0]


def _scale(old: Tensor, new: Tensor) -> Tensor:
    """Return by what exp(-c) changes when c does; 0 where there were no samples (c = -inf)."""
    return torch.nan_to_num(torch.exp(old - new))


def _sums(samples: Weighed, shift: Tensor) -> Tensor:
    losses, scores = samples.losses, samples.scores
    weights, one = torch.exp(samples.logits - shift), torch.ones_like(samples.logits)
    signals = scores if samples.signals is None else samples.signals
    trust = torch.full_like(scores, torch.nan) if samples.trust is None else samples.trust.to(scores)
    known = trust.isfinite().to(one)
    trust = torch.nan_to_num(trust)
    terms = [one, weights, scores, scores.abs(), losses]
    plain = [one, losses, scores, scores.square(), (scores < 0).to(one), signals, signals.square()]
    plain += [losses.square(), losses * scores]
    plain += [known, trust, trust.square(), known * scores, known * scores.square(), trust * scores]
    return torch.stack([(weights * term).sum() for term in terms] + [term.sum() for term in plain])
