"""The mimic score of every sample of a batch: m_i = <-grad l_i, v> / ||v||, by one forward-mode pass.

Read `match_parameters` (which parameters), `reference_direction` and `MimicDirection` (v), `mimic_forward` (the
training forward that also scores) and `mimic_scores` (the same without training).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_mimic.base_model import find_base_model, read_base_tensors
from hf_mimic.checks import check_choice
from hf_mimic.forward_ad import dual_parameters, primal_of, strip, tangent_of
from hf_mimic.hub_files import pin
from hf_mimic.layers import match_parameters
from hf_mimic.losses import PerSampleLoss, loss_for_model, model_inputs
from hf_mimic.reference import Reference, read_tensors
from hf_mimic.sharding import dual_shards, reshard, shard_like, total_norm, units

DIRECTIONS = ("current", "start", "task_vector")


def reference_direction(
    model: nn.Module, reference: Reference, layers: str | Sequence[str] = "head", *, revision: str | None = None
) -> dict[str, Tensor]:
    """Return v = theta_ref - theta over the chosen parameters.

    Args:
        model: The student.
        reference: A Hub repo id, a folder, a model, or a state dict.
        layers: What `match_parameters` takes.
        revision: Branch, tag or commit of the Hub repo.

    Returns:
        Parameter name to tensor of the parameter's shape and device, float32 (float64 for float64 parameters).

    Raises:
        ValueError: If no parameter matches or the reference does not fit; see `read_tensors`.
    """
    return dict(MimicDirection(model, reference, layers, revision=revision)())


class MimicDirection:
    """The direction v of the mimic score while training runs.

    `"current"` is the paper's theta_ref - theta_t, `"start"` theta_ref - theta_0, `"task_vector"` theta_ref -
    theta_base with the base checkpoint that the reference was fine-tuned from (by default the one that its card names; a
    head that the base has not counts as 0). Only the chosen tensors are kept.

    References:
        Mimic Score, arXiv 2501.06708; task vectors, arXiv 2212.04089.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: Reference,
        layers: str | Sequence[str] = "head",
        *,
        kind: str = "current",
        base: Reference | None = None,
        revision: str | None = None,
        base_revision: str | None = None,
    ) -> None:
        check_choice("direction", kind, DIRECTIONS)
        revision = pin(reference, revision)
        if kind == "task_vector" and base is None:
            base = find_base_model(reference, revision=revision)
        self.kind = kind
        reshard(model)
        self.names = match_parameters(model, layers)
        named = dict(model.named_parameters(remove_duplicate=False))
        self.parameters = {name: named[name] for name in self.names}
        half = [name for name, p in self.parameters.items() if p.dtype == torch.float16]
        if half:
            raise ValueError(
                f"the chosen parameters must be float32, bfloat16 or float64, got float16 for {half[0]}: tangents "
                "underflow and LayerNorm's overflow. Load the model in float32 and train with fp16=True (autocast)."
            )
        self.tensors = self._like_parameters(read_tensors(reference, model, self.names, revision=revision))
        if kind == "start":
            self.tensors = dict(_Difference(self.tensors, self.parameters))
        elif kind == "task_vector":
            known: Any = base
            origin = read_base_tensors(known, model, self.names, self.tensors, revision=base_revision)
            self.tensors = dict(_Difference(self.tensors, self._like_parameters(origin)))

    def __call__(self) -> Mapping[str, Tensor]:
        """Return v at the parameters' present values: name to tensor."""
        return _Difference(self.tensors, self.parameters) if self.kind == "current" else self.tensors

    def restart(self, direction: Mapping[str, Tensor]) -> None:
        """Take v of direction="start" from where an interrupted run started."""
        self.tensors = self._like_parameters(direction)

    def _like_parameters(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        wide = {n: torch.promote_types(p.dtype, torch.float32) for n, p in self.parameters.items()}
        return {n: shard_like(tensors[n].to(p.device, wide[n], copy=True), p) for n, p in self.parameters.items()}


class _Difference(Mapping[str, Tensor]):
    """The tensors a - b, each made when it is asked for: all at once would take as much memory as the model."""

    def __init__(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
        self.a, self.b = a, b

    def __getitem__(self, name: str) -> Tensor:
        return self.a[name] - self.b[name].detach().to(self.a[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.a)

    def __len__(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class MimicForward:
    """What one forward pass gives: losses (B,) with graph, scores (B,) without, the outputs, and ||v||."""

    losses: Tensor
    scores: Tensor
    outputs: Any
    norm: Tensor


def direction_norm(direction: Mapping[str, Tensor]) -> Tensor:
    """Return ||v|| over all chosen parameters, as a 0-d tensor."""
    return total_norm(direction.values())


def mimic_forward(
    model: nn.Module,
    batch: Mapping[str, Any],
    direction: Mapping[str, Tensor] | None,
    loss_fn: PerSampleLoss,
    *,
    base: nn.Module | None = None,
) -> MimicForward:
    """Run the model once; return losses, their graph as in plain training, and m_i = <-grad l_i, v> / ||v||.

    Args:
        model: In the mode and under the autocast and grad settings of the caller.
        batch: What the model takes, labels included; B samples.
        direction: Parameter name to v, from `reference_direction`; None to run without scoring (scores are 0).
        loss_fn: (outputs, batch) -> (B,).
        base: The model inside `model`, if that is a wrapper (DistributedDataParallel); the direction names its
            parameters.

    Raises:
        ValueError: If the direction does not fit the model, no chosen parameter influences the losses, or `loss_fn`
            returns another shape.
        NotImplementedError: If a function behind the chosen parameters has no forward-mode derivative.
    """
    base = base or model
    norm, tangents = tangents_of(base, direction)
    duals = dual_shards(base, direction or {}) if units(base) else dual_parameters(base, tangents)
    grad = torch.is_grad_enabled()
    # NOTE: forward-mode AD drops every tangent under inference_mode, without a word.
    with torch.inference_mode(False), torch.set_grad_enabled(grad), duals:
        outputs = model(**model_inputs(batch))
        losses = loss_fn(outputs, batch)
        tangent, losses, outputs = tangent_of(losses), primal_of(losses), strip(outputs)
    if losses.dim() != 1:
        raise ValueError(
            f"`loss_fn` must return one loss per sample, shape (B,), got shape {tuple(losses.shape)}. "
            'Use reduction="none".'
        )
    return MimicForward(losses, scores_from(tangent, direction, norm, losses), outputs, norm)


def tangents_of(model: nn.Module, direction: Mapping[str, Tensor] | None) -> tuple[Tensor, dict[str, Any]]:
    """Return ||v||, 0-d, and what makes the tangent of every chosen parameter, in its dtype.

    Raises:
        ValueError: If the direction does not fit the model.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    if direction is None:
        return torch.zeros((), device=next(iter(named.values())).device), {}
    norm = _checked_norm(direction, named)
    return norm, {name: partial(_cast, direction, name, named[name].dtype) for name in direction}


def scores_from(
    tangent: Tensor | None, direction: Mapping[str, Tensor] | None, norm: Tensor, losses: Tensor
) -> Tensor:
    """Return m = -tangent / ||v|| (B,), float32 at least; 0 without a direction.

    Args:
        tangent: Of the losses (B,); None if no chosen parameter influences them.
        direction: Parameter name to v; None if nothing is scored.
        norm: ||v||, 0-d.
        losses: (B,).

    Raises:
        ValueError: If no chosen parameter influences the losses.
    """
    wide = torch.promote_types(losses.dtype, torch.float32)
    if direction is None:
        return torch.zeros_like(losses, dtype=wide)
    if tangent is None:
        raise ValueError(
            f"no chosen parameter influences the losses: {', '.join(list(direction)[:3])}... Choose `mimic_layers` "
            "on the path to the loss; a loss computed in a custom kernel or under torch.compile loses the tangent."
        )
    norm = norm.to(wide)
    zero = torch.zeros((), dtype=wide, device=norm.device)
    return torch.where(norm > 0, -tangent.to(wide) / norm, zero).detach()


def _cast(direction: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    return direction[name].to(dtype)


def _checked_norm(direction: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> Tensor:
    """Return ||v||, looking at every tensor once: a direction may make them as they are asked for."""
    wrong: list[str] = []

    def checked() -> Iterator[Tensor]:
        for name, v in direction.items():
            if name not in named or v.shape != named[name].shape:
                wrong.append(name)
            yield v

    norm = total_norm(checked()) if direction else torch.zeros(())
    if wrong or not direction:
        raise ValueError(
            f"the direction must hold one tensor per chosen parameter of this model, in its shape, got {len(direction)} "
            f"of which {len(wrong)} do not fit{': ' * bool(wrong)}{', '.join(wrong[:3])}. Compute it by "
            "`reference_direction` with the model as it is scored (after PEFT wrapped it)."
        )
    return norm


@torch.no_grad()
def mimic_scores(
    model: nn.Module, batch: Mapping[str, Any], direction: Mapping[str, Tensor], loss_fn: PerSampleLoss | None = None
) -> Tensor:
    """Score a batch without training: m_i = <-grad l_i, v> / ||v||; higher means it pulls toward the reference.

    The model runs once, in eval mode, without graph, at about the cost of a forward pass.

    Args:
        model: The student.
        batch: What the model takes, labels included; B samples.
        direction: Parameter name to v, from `reference_direction`.
        loss_fn: (outputs, batch) -> (B,); by default the loss that the model is trained with.

    Returns:
        Scores (B,), in units of the loss per unit of parameter distance; float64 for a float64 model, else float32.

    References:
        Mimic Score, arXiv 2501.06708.
    """
    with eval_mode(model):
        return mimic_forward(model, batch, direction, loss_fn or loss_for_model(model)).scores


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in eval mode; afterwards every module is in its own (BatchNorm may be frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
