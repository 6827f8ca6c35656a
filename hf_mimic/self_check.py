"""The self-check: the gradient that training is about to use must agree with the scores that were computed.

The weights w are constants, so the gradient g of sum_i w_i l_i satisfies <g, v> = sum_i w_i <grad l_i, v> =
-||v|| sum_i w_i m_i: one dot product over the chosen layers tests every score, every weight and every scale at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_mimic.sharding import is_shard


class GradientMismatchError(RuntimeError):
    """The gradient and the mimic scores contradict each other: one of them is wrong."""


def gradient_along(direction: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor | None:
    """Return <g, v> over the chosen parameters, 0-d; None if one of them is not trained.

    Args:
        direction: Parameter name to v.
        parameters: Parameter name to parameter with its `.grad`; both may be sharded over processes, which then all
            must call this.
    """
    terms = []
    for name, v in direction.items():
        gradient: Any = parameters[name].grad
        if gradient is None:
            return None
        wide = torch.float32 if gradient.device.type == "mps" else torch.float64
        term = (gradient.to(wide) * v.to(wide)).sum()
        terms.append(term.full_tensor() if is_shard(term) else term)
    return torch.stack(terms).sum()


def check_gradient(product: Tensor, weighted_score: float, scale: float, *, norm: float, low_precision: bool) -> None:
    """Raise unless <g, v> equals -||v|| sum w m, to 0.5 % of ||v|| sum w |m| (5 % in low precision).

    Args:
        product: <g, v>.
        weighted_score: sum w m over the optimizer step.
        scale: sum w |m|.
        norm: ||v||.
        low_precision: Whether forward and backward ran in float16 or bfloat16.

    Raises:
        GradientMismatchError: With the likely cause.
    """
    expected, allowed = -norm * weighted_score, norm * scale * (0.05 if low_precision else 0.005)
    found = float(product)
    if abs(found - expected) <= allowed:
        return
    ratio = found / expected if expected else 0.0
    if 1.5 < ratio < 1e6 and abs(ratio - round(ratio)) < 0.02:
        cause = (
            f"The gradient is {round(ratio)} times too large: something scales the loss, by the number of processes or "
            "accumulated micro-batches for instance. Look for an overridden `training_step` or `compute_loss`."
        )
    else:
        cause = (
            "A tangent was lost on its way to the loss, or the gradient is changed by a hook. Usual causes: a part of "
            "the model in torch.jit.script, torch.func or a custom kernel; a wrapper that detaches; a loss that "
            "depends on `mimic_layers` through a buffer. Choose `mimic_layers` behind that part."
        )
    raise GradientMismatchError(
        f"<gradient, v> must equal -||v|| sum w m = {expected:.6g}, got {found:.6g} (allowed difference "
        f"{allowed:.2g}): the scores do not describe this gradient. {cause} To train all the same, without "
        "this guard: self_check_steps=-1."
    )
