"""The head that a student starts with: as it is, zero, or the reference's; and whether two heads belong together."""

from __future__ import annotations

import math

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
        ValueError: If a contrastive model's projections would be set to zero, or the reference's head does not fit.
    """
    names = match_parameters(model, "head")
    named = dict(model.named_parameters(remove_duplicate=False))
    if how == "zero":
        if any(name.rpartition(".")[2] in ("logit_scale", "logit_bias") for name in named):
            raise ValueError('`head_init` must be "keep" or "reference" for image-text models, got "zero".')
        tensors = {name: torch.zeros_like(named[name]) for name in names}
    else:
        tensors = read_tensors(reference, model, names, revision=revision)
    for name in names:
        named[name].copy_(tensors[name])
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
