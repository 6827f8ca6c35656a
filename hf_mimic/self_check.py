"""The self-check: the gradient that training is about to use must agree with the scores that were computed.

The weights w are constants, so the gradient g of sum_i w_i l_i satisfies <g, v> = sum_i w_i <grad l_i, v> =
-||v|| sum_i w_i m_i: one dot product over the chosen layers tests every score, every weight and every scale at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_mimic.sharding import whole


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
        terms.append(whole((gradient.to(wide) * v.to(wide)).sum()))
    return torch.stack(terms).sum()


def check_gradient(product: Tensor, sums: Mapping[str, float], *, norm: float, eps: float) -> None:
    """Raise unless <g, v> equals -||v|| sum w m, to 0.5 % of ||v|| sum w |m| (5 % in low precision).

    Where losses are so small that 1 - p is made of rounding, more is allowed: a relative error of eps / loss. What
    changes the loss by less than a hundred thousandth is not checked.

    Args:
        product: <g, v>.
        sums: `weighted_score` (sum w m over the optimizer step), `weighted_absolute_score` (sum w |m|) and
            `weighted_loss` (sum w l).
        norm: ||v||.
        eps: Of the number format that forward and backward ran in.

    Raises:
        GradientMismatchError: With the likely cause.
    """
    scale, loss = norm * sums["weighted_absolute_score"], abs(sums["weighted_loss"])
    if scale <= 1e-5 * loss or not loss:
        return
    expected, found = -norm * sums["weighted_score"], float(product)
    allowed = scale * max(0.05 if eps > 1e-4 else 0.005, 4 * eps / loss)
    if abs(found - expected) <= allowed:
        return
    ratio = found / expected if expected else 0.0
    times, kind = (ratio, "large") if ratio > 1 else (1 / ratio if ratio > 0 else 0.0, "small")
    if 1.5 < times < 1e6 and abs(times - round(times)) < 0.02 * times:
        cause = (
            f"The gradient is {round(times)} times too {kind}: something scales the loss, by the number of processes or "
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
