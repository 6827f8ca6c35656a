"""Slow and obviously right: what every fast path is compared with.

`scores_by_loop` is one backward per sample; `plain_step` is training without hf_mimic; `DissectByHand` goes from sample
to sample with a dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_mimic.forward_ad import dual_parameters, primal_of, tangent_of
from hf_mimic.losses import PerSampleLoss, model_inputs

Context = Callable[[], AbstractContextManager]


def scores_by_loop(
    model: nn.Module,
    batch: Mapping[str, Any],
    direction: Mapping[str, Tensor],
    loss_fn: PerSampleLoss,
    *,
    seed: int = 0,
    context: Context = nullcontext,
) -> Tensor:
    """Return m_i = -<grad l_i, v> / ||v|| by one forward and one backward per sample: (B,)."""
    named = dict(model.named_parameters(remove_duplicate=False))
    norm = sum(v.square().sum() for v in direction.values()) ** 0.5
    scores: list[Tensor] = []
    size = len(next(iter(batch.values())))
    with same_start(model, seed, requires_grad=[named[name] for name in direction]) as restart:
        for i in range(size):
            restart()
            with context():
                loss = loss_fn(model(**model_inputs(batch)), batch)[i]
            grads = torch.autograd.grad(loss, [named[name] for name in direction], allow_unused=True)
            pairs = zip(grads, direction.values(), strict=True)
            scores.append(-sum((g.to(v) * v).sum() for g, v in pairs if g is not None) / norm)
    return torch.stack(scores)


def plain_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    loss_fn: PerSampleLoss,
    weights: Tensor,
    *,
    seed: int = 0,
    context: Context = nullcontext,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Return losses (B,) and the gradients of sum_i w_i l_i, without any of hf_mimic's engine."""
    torch.manual_seed(seed)
    with context():
        losses = loss_fn(model(**model_inputs(batch)), batch)
    return losses.detach(), gradients(model, losses, weights)


def gradients(model: nn.Module, losses: Tensor, weights: Tensor) -> dict[str, Tensor | None]:
    """Return parameter name to gradient of sum_i w_i l_i, None where a parameter gets none."""
    model.zero_grad(set_to_none=True)
    (weights.to(losses.dtype) * losses).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def relative_error(value: Tensor, oracle: Tensor) -> float:
    """Return max |value - oracle| / max |oracle|."""
    return ((value - oracle).abs().max() / oracle.abs().max()).item()


def identical(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor | None]) -> bool:
    """Return whether two sets of gradients are equal to the last bit, and None at the same places."""
    return a.keys() == b.keys() and all(
        (a[name] is None and b[name] is None)
        or (a[name] is not None and b[name] is not None and torch.equal(a[name], b[name]))
        for name in a
    )


def closed_form_head_scores(features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the scores of a linear head under cross-entropy: grad l_i = (softmax(z_i) - e_i) [x_i, 1]', row by row.

    Args:
        features: What the head sees, (B, D).
        logits: (B, C).
        labels: (B,).
        weight: The direction's weight, (C, D).
        bias: The direction's bias, (C,).
    """
    norm = (weight.square().sum() + bias.square().sum()).sqrt()
    scores = []
    for x, z, label in zip(features, logits, labels, strict=True):
        residual = z.softmax(0)
        residual[label] -= 1
        scores.append(-(residual @ (weight @ x + bias)) / norm)
    return torch.stack(scores)


@contextmanager
def same_start(model: nn.Module, seed: int, requires_grad: list[Tensor]):
    """Give a function that restores buffers and seed; inside, the given parameters are trainable."""
    buffers = {name: x.clone() for name, x in model.named_buffers()}
    frozen = [p for p in requires_grad if not p.requires_grad]

    def restart() -> None:
        torch.manual_seed(seed)
        for name, x in model.named_buffers():
            x.copy_(buffers[name])

    for p in frozen:
        p.requires_grad_(True)
    try:
        yield restart
    finally:
        restart()
        for p in frozen:
            p.requires_grad_(False)


def jvp_by_two_backwards(
    function: Callable, primals: Mapping[str, Tensor], tangents: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return f(x) and its derivative along the tangents, by reverse mode alone: d/du <J'u, v> = J v.

    Args:
        function: Takes tensors by position, in the order of `primals`; may change them in place.
        primals: Name to tensor.
        tangents: Name to tensor, for some of the primals.
    """
    leaves = {name: x.clone().requires_grad_() for name, x in primals.items()}
    out = function(*(x * 1 for x in leaves.values()))
    if not out.requires_grad:
        return out, torch.zeros_like(out)
    u = torch.zeros_like(out, requires_grad=True)
    grads = torch.autograd.grad(out, [leaves[n] for n in tangents], u, create_graph=True, allow_unused=True)
    product = sum((g * v).sum() for g, v in zip(grads, tangents.values(), strict=True) if g is not None)
    if not isinstance(product, Tensor) or not product.requires_grad:
        return out.detach(), torch.zeros_like(out)
    tangent = torch.autograd.grad(product, u, allow_unused=True)[0]
    return out.detach(), torch.zeros_like(out) if tangent is None else tangent


def through_duals(function, primals, tangents):
    """Return output, tangent (zeros for None) and the gradients of the output's sum."""
    holder = nn.Module()
    for name, x in primals.items():
        holder.register_parameter(name, nn.Parameter(x.clone()))
    with dual_parameters(holder, tangents):
        out = function(*(getattr(holder, name) for name in primals))
        out, tangent = primal_of(out), tangent_of(out)
    grads = torch.autograd.grad(out.sum(), list(holder.parameters()), allow_unused=True) if out.requires_grad else []
    return out.detach(), torch.zeros_like(out) if tangent is None else tangent, grads


def tensors(*names, shape=(4, 6), seed=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name in names}


def tie_key_by_hand(sample_id: int, seed: int, epoch: int) -> int:
    """Return the seeded hash of an id, by Python's integers."""

    def mixed(x: int) -> int:
        x %= 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    key = mixed(sample_id + mixed(mixed(seed * 0x9E3779B97F4A7C15) + epoch))
    return key - 2**64 if key >= 2**63 else key


class DissectByHand:
    """DISSect's rule with a dict, one sample after the other.

    Args:
        rate: As text, such as "0.7".
        variant: "warmup" or "momentum".
        start: What an id without a history is compared with, as in the official code; None for the batch's median.
        **options: As `DISSect`'s.
    """

    def __init__(self, rate: str, variant: str, *, start: float | None = None, **options: Any) -> None:
        self.rate, self.variant, self.start = Fraction(rate), variant, start
        self.options = {"momentum": 0.9, "warmup_epochs": 1, "warmup_data": "full", "seed": 0} | options
        self.history: dict[int, np.float32] = {}

    def warming_up(self, epoch: int) -> bool:
        return self.variant == "warmup" and epoch < self.options["warmup_epochs"]

    def choose(self, ids: list[int], scores: np.ndarray, epoch: int) -> list[int]:
        """Return positions."""
        everyone = range(len(ids))
        if self.warming_up(epoch) and self.options["warmup_data"] == "full":
            return list(everyone)
        deltas: list[Any] = []
        for sample, score in zip(ids, scores, strict=True):
            before = None if self.warming_up(epoch) else self.history.get(sample, self.start)
            known = before is not None
            deltas.append(-np.inf if not np.isfinite(score) else np.float32(before) - score if known else None)
        seen = [delta for delta in deltas if delta is not None and np.isfinite(delta)]
        median = np.median(np.array(seen, np.float32)) if seen else 0.0
        deltas = [median if delta is None else delta for delta in deltas]
        keys = [tie_key_by_hand(sample, self.options["seed"], epoch) for sample in ids]
        best = sorted(everyone, key=lambda i: (-deltas[i], keys[i]))
        return sorted(best[: max(1, int(len(ids) * self.rate))])

    def update(self, ids: list[int], scores: np.ndarray, epoch: int) -> None:
        beta = self.options["momentum"]
        for sample, score in zip(ids, scores, strict=True):
            if not np.isfinite(score):
                continue
            if sample not in self.history or self.warming_up(epoch):
                self.history[sample] = score
            elif self.variant == "momentum":
                self.history[sample] = np.float32(beta) * self.history[sample] + np.float32(1 - beta) * score
