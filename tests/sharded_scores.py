"""Scoring under FSDP2 without the Trainer: sharded and whole model side by side, in every process of a group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import oracles
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hf_mimic.forward_ad import Dual
from hf_mimic.losses import loss_for_model, model_inputs
from hf_mimic.mimic import MimicDirection, mimic_forward, reference_direction

_BLOCKS = ("ViTLayer", "Dinov2Layer", "ResNetBasicLayer")


def build(family: str, *, blocks: bool, reshard: bool, checkpoint: str, low: bool) -> nn.Module:
    """Return a model whose blocks and root, or root alone, are sharded; some with activation checkpointing."""
    model = models.make(family).train()
    for norm in [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]:
        norm.eval()
    if checkpoint == "transformers":
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if checkpoint == "accelerate":
        for name in [name for name, m in model.named_modules() if type(m).__name__ in _BLOCKS]:
            model.set_submodule(name, checkpoint_wrapper(model.get_submodule(name), preserve_rng_state=False))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if low else MixedPrecisionPolicy()
    units = ("CheckpointWrapper",) if checkpoint == "accelerate" else _BLOCKS
    for module in [m for m in model.modules() if blocks and type(m).__name__ in units]:
        fully_shard(module, reshard_after_forward=reshard, mp_policy=policy)
    return fully_shard(model, reshard_after_forward=reshard, mp_policy=policy)


def plain_name(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def shards_of_gradients(model: nn.Module) -> dict[str, Any]:
    return {plain_name(n): None if p.grad is None else p.grad.to_local().clone() for n, p in model.named_parameters()}


def of_other_process(v: DTensor) -> DTensor:
    """Return v with the shards of two processes exchanged where they have one shape."""
    local, shapes = v.to_local().contiguous(), [None, None]
    dist.all_gather_object(shapes, tuple(local.shape))
    if shapes[0] == shapes[1]:
        parts = [torch.empty_like(local) for _ in range(2)]
        dist.all_gather(parts, local)
        local = parts[1 - dist.get_rank()]
    return DTensor.from_local(local, v.device_mesh, v.placements, run_check=False, shape=v.shape, stride=v.stride())


def compare(folder: Path, *, family: str, layers: str, low: bool = False, **kind: Any) -> dict[str, Any]:
    """Return errors of scores and norm, and whether gradients and modules are as without scoring."""
    batch, plain = models.make_batch(family, seed=1 + dist.get_rank()), models.make(family)
    loss_fn, reference = loss_for_model(plain), models.moved(plain)
    unscored, model = build(family, low=low, **kind), build(family, low=low, **kind)
    named = {name: reference[plain_name(name)] for name, _ in model.named_parameters(remove_duplicate=False)}
    losses = loss_fn(unscored(**model_inputs(batch)), batch)
    losses.mean().backward()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    direction = MimicDirection(model, named, layers)()
    forward = mimic_forward(model, batch, direction, loss_fn)
    clean = not any(isinstance(p, Dual) for m in model.modules() for p in m._parameters.values())
    clean &= hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    forward.losses.mean().backward()
    whole = reference_direction(plain, reference, layers)
    expected = oracles.scores_by_loop(plain, batch, whole, loss_fn)
    wrong = {name: of_other_process(v) for name, v in direction.items()}
    return {
        "scores": oracles.relative_error(forward.scores, expected),
        "norm": abs(forward.norm.item() / sum(v.square().sum() for v in whole.values()).sqrt().item() - 1),
        "same": torch.equal(losses, forward.losses)
        and oracles.identical(shards_of_gradients(unscored), shards_of_gradients(model)),
        "clean": clean,
        "control": oracles.relative_error(mimic_forward(model, batch, wrong, loss_fn).scores, expected),
    }
