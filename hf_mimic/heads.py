"""The head that a student starts with: as it is, zero, or the reference's; and whether two heads belong together."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from hf_mimic.layers import match_parameters
from hf_mimic.reference import Reference, read_tensors

HEAD_INITS = ("keep", "zero", "reference")


@torch.no_grad()
def init_head(model: nn.Module, reference: Reference, how: str, *, revision: str | None = None) -> list[str]:
    """Replace the model's head by zeros, or by the reference's; return the names of the parameters.

    Args:
        model: Changed in place.
        reference: See `read_tensors`.
        how: "zero" or "reference".
        revision: Branch, tag or commit of the reference's Hub repo.

    Raises:
        ValueError: If there is no linear layer to set to zero (image-text models; a frozen one or one that an adapter
            wraps), or the reference's head does not fit.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    if how == "zero":
        names = _last_linear(model)
        tensors = {name: torch.zeros_like(named[name]) for name in names}
    else:
        names = match_parameters(model, "head")
        tensors = read_tensors(reference, model, names, revision=revision)
    for name in names:
        named[name].copy_(tensors[name])
    return names


def _last_linear(model: nn.Module) -> list[str]:
    """Return the parameters of the head's last linear layer: with more of them at zero, none would ever learn."""
    if any(re.sub(r"^((base_model\.model|module)\.)+", "", n) == "logit_scale" for n, _ in model.named_parameters()):
        raise ValueError('`head_init` must be "keep" or "reference" for image-text models, got "zero".')
    head = match_parameters(model, "head")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    last = [name for name in layers if any(n.startswith(f"{name}.") for n in head)][-1:]
    names = [n for n in head if last and n.startswith(f"{last[0]}.")]
    named = dict(model.named_parameters(remove_duplicate=False))
    if not names or "lora_" in names[0] or not all(named[n].requires_grad for n in names):
        raise ValueError(
            '`head_init`="zero" needs a linear layer at the end of the head that is trained itself, got none: the head is '
            'frozen, or an adapter wraps it. Name it in `modules_to_save`, or use "keep" or "reference".'
        )
    return names


@torch.no_grad()
def head_cosine(model: nn.Module, reference: Reference, *, revision: str | None = None) -> float | None:
    """Return the cosine between the two heads' weights; 1 if one of them is zero, None if the reference's is not there."""
    named = dict(model.named_parameters(remove_duplicate=False))
    try:
        names = [name for name in match_parameters(model, "head") if named[name].dim() > 1]
        theirs = read_tensors(reference, model, names, revision=revision)
    except ValueError:
        return None
    if not names or any(hasattr(named[name], "full_tensor") for name in names):  # sharded
        return None
    pairs: list[tuple[Tensor, Tensor]] = [(named[n].detach().float().cpu(), theirs[n].float().cpu()) for n in names]
    dot = sum(float((a * b).sum()) for a, b in pairs)
    own, other = (sum(float(head.square().sum()) for head in heads) for heads in zip(*pairs, strict=True))
    return dot / math.sqrt(own * other) if own and other else 1.0
