"""The scored forward pass of the samples whose loss is finite: one broken sample must not spoil its batch.

Read `finite_forward`; `no_gradient` is the loss of a batch without any such sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_mimic.micro_batch import rows_of
from hf_mimic.mimic import MimicForward

Forward = Callable[[Mapping[str, Any]], MimicForward]


def finite_forward(
    model: nn.Module,
    batch: Mapping[str, Any],
    first: Forward,
    again: Forward,
    *,
    anywhere: Callable[[bool], bool] = bool,
    indispensable: bool = False,
) -> tuple[MimicForward | None, MimicForward, Tensor]:
    """Run the batch; if a loss or score is not finite, run it again without that sample.

    Args:
        model: Whose running statistics a discarded pass must not change.
        batch: B samples.
        first: Runs a batch.
        again: Runs it a second time: without the wrapper that averages gradients, if not all processes do.
        anywhere: Whether something is true on any of the processes that must run in step; `bool` for one.
        indispensable: Whether each of these must go backward, too, even if another has no finite sample.

    Returns:
        The pass over the finite samples or None, the first pass, and which samples are finite (B,).

    Raises:
        FloatingPointError: If a process that is indispensable has no finite sample.
    """
    buffers = [buffer.clone() for buffer in model.buffers()]
    forward = first(batch)
    valid = is_finite(forward)
    if not anywhere(not bool(valid.all())):
        return forward, forward, valid
    # NOTE: a weight of 0 does not stop a NaN (0 * NaN in backward): the forward pass must do without the sample.
    size = len(valid)
    if not valid.any():  # a contrastive loss or batch norm spreads one sample's NaN over the batch
        valid = _has_finite_inputs(batch, valid)
    restore(model, buffers)
    found = anywhere(not bool(valid.all()))  # a loss over all processes carries one's NaN to the others
    if not anywhere(not bool(valid.any()) or not found):
        second = again(rows_of(batch, valid, size))
        if not anywhere(not bool(is_finite(second).all())):
            return second, forward, valid
        restore(model, buffers)
    if indispensable:
        raise FloatingPointError(
            "every process must have samples with finite losses when parameters are sharded, got a batch without. "
            "Lower the learning rate if training diverged; otherwise look for broken inputs."
        )
    return None, forward, torch.zeros_like(valid)


def is_finite(forward: MimicForward) -> Tensor:
    """Return which samples have a finite loss and a finite score (B,)."""
    return torch.isfinite(forward.losses) & torch.isfinite(forward.scores)


def no_gradient(parameters: Iterable[Tensor], losses: Tensor | None = None) -> Tensor:
    """Return a loss of 0 whose gradient is 0 for the parameters, or for those of them that `losses` depends on.

    The graph of `losses` is looked at, not used: a NaN in it would spread.
    """
    reached = None if losses is None else _leaves(losses)
    chosen = [p for p in parameters if p.requires_grad and (reached is None or id(p) in reached)]
    return torch.stack([p.flatten()[:0].sum().float() for p in chosen]).sum()


def _leaves(losses: Tensor) -> set[int]:
    seen, stack, found = set(), [losses.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack += [parent for parent, _ in node.next_functions]
    return found


def _has_finite_inputs(batch: Mapping[str, Any], like: Tensor) -> Tensor:
    """Return which samples have no NaN or infinity among their inputs (B,)."""
    valid = torch.ones_like(like)
    for value in batch.values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape[:1] == like.shape:
            valid &= torch.isfinite(value).flatten(1).all(1)
    return valid


@torch.no_grad()
def restore(model: nn.Module, buffers: list[Tensor]) -> None:
    """Undo what a forward pass did to running statistics."""
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)


@contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Within the context nothing is differentiated or compiled; buffers and random numbers are put back afterwards."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type != "cpu"}
    kind = next(iter(devices)).type if devices else "cuda"
    try:
        with (
            torch.random.fork_rng(devices=[d.index or 0 for d in devices], device_type=kind),
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
        ):
            yield
    finally:
        restore(model, buffers)
