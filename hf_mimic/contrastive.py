"""Contrastive losses over more pairs than one forward pass has: those of all processes, or of a whole optimizer step.

Read `ContrastiveLoss`, then `gather_rows`: features travel between processes with their gradient and their tangent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_mimic.forward_ad import pass_of, primal_of, tangent_of, with_tangent
from hf_mimic.losses import (
    COUNTED,
    PerSampleLoss,
    clip_contrastive,
    embeddings,
    own_parameters,
    siglip_sigmoid,
)

# Outputs of image-text models that are not gathered over an evaluation data set.
NOT_FEATURES = ("logits_per_image", "logits_per_text", "text_model_output", "vision_model_output", "loss")


class ContrastiveLoss:
    """The symmetric loss of each pair among the pairs of all processes: `(outputs, batch) -> (B,)`.

    With images x_i, texts y_j, z_ij = s <x_i, y_j> + b over all N pairs and the set P(i) of texts that are right for
    image i (its own; with `multi_positive` every equal caption):

        softmax (CLIP):   l_i = half of [log sum_j exp z_ij - mean_{j in P(i)} z_ij] + the same over images for text i
        sigmoid (SigLIP): l_i = half of [-sum_j log sigmoid(+-z_ij)] + the same over images for text i

    Args:
        model: Has `logit_scale` (log s) and, if its loss is SigLIP's, `logit_bias` (b).
        processes: Whose pairs are negatives: all processes', or 1 for this process's alone.
        rank: Of this process among them.
        multi_positive: Equal captions (the same `input_ids`) are right for each other's images, not negatives.

    References:
        CLIP, arXiv 2103.00020; SigLIP, arXiv 2303.15343; several right texts: UniCL, arXiv 2204.03610.
    """

    def __init__(self, model: nn.Module, *, processes: int = 1, rank: int = 0, multi_positive: bool = False) -> None:
        self.processes, self.rank, self.multi_positive = processes, rank, multi_positive
        self.owner, self.sigmoid = _owner(model), "logit_bias" in own_parameters(model)

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters of the loss itself: `logit_scale`, `logit_bias`."""
        return [primal_of(p) for n, p in self.owner._parameters.items() if n in ("logit_scale", "logit_bias")]

    def __call__(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        """Return the losses of this process's pairs.

        Args:
            outputs: Have `image_embeds` and `text_embeds` (B, D), of length one.
            batch: Has `input_ids` (B, T) for `multi_positive`. Where processes may have unequal numbers of rows, or rows
                that do not count, all of them give the booleans `COUNTED` (B,): other rows are no one's negatives.

        Returns:
            Losses (B,); those of rows that do not count mean nothing.
        """
        captions = caption_hashes(batch) if self.multi_positive else None
        return self.losses(*embeddings(outputs), captions=captions, counted=batch.get(COUNTED))

    def losses(
        self, image: Tensor, text: Tensor, *, captions: Tensor | None = None, counted: Tensor | None = None
    ) -> Tensor:
        """Return the losses (B,) of pairs from their features (B, D); the rest (B,) as in `__call__`."""
        size = len(image)
        images, texts, captions, counted, first = self._everyone(image, text, captions, counted)
        own = torch.arange(first, first + size, device=text.device)
        if captions is None:
            positive = own[:, None] == torch.arange(len(texts), device=text.device)  # (B, N)
        else:
            positive = captions[own][:, None] == captions
        loss = _sigmoid if self.sigmoid else _softmax
        to_texts = loss(self._logits(image, texts), positive, counted)
        return (to_texts + loss(self._logits(text, images), positive, counted)) / 2

    def _everyone(self, image: Tensor, text: Tensor, captions: Tensor | None, counted: Tensor | None) -> tuple:
        """Return images and texts (N, D), captions and counted (N,) of all processes, and where this one's begin."""
        if self.processes == 1:
            return image, text, captions, counted, 0
        size, most = len(image), len(image)
        if counted is not None:
            sizes = torch.tensor([size], device=image.device)
            most = int(gather_rows(sizes).max())
        pad = functools.partial(_pad, missing=most - size)
        both = gather_rows(pad(torch.stack([image, text], 1)))  # (N, 2, D): one exchange, also in backward
        if captions is not None:
            captions = gather_rows(pad(captions))
        if counted is not None:
            counted = gather_rows(pad(counted.long())).bool()
        images, texts = both.unbind(1)
        return images, texts, captions, counted, self.rank * most

    def _logits(self, rows: Tensor, columns: Tensor) -> Tensor:
        owner: Any = self.owner  # at every call: its parameters may be duals
        logits = rows @ columns.T * owner.logit_scale.exp()
        return logits + owner.logit_bias if self.sigmoid else logits


def couples(loss_fn: Any) -> bool:
    """Return whether the loss of a sample depends on the others of its batch."""
    contrastive = getattr(loss_fn, "func", loss_fn)
    return contrastive in (clip_contrastive, siglip_sigmoid) or isinstance(contrastive, ContrastiveLoss)


def contrastive_loss(loss_fn: PerSampleLoss, model: nn.Module, trainer: Any) -> PerSampleLoss:
    """Return the loss of `model` as `gather_negatives`, `cache_negatives` and `multi_positive` want it.

    Raises:
        ValueError: If one of the last two is asked for and the loss is not contrastive, or FSDP shards the parameters of
            the loss.
    """
    args, accelerator = trainer.args, trainer.accelerator
    special = [name for name in ("cache_negatives", "multi_positive") if getattr(args, name)]
    if loss_fn not in (clip_contrastive, siglip_sigmoid):
        if special:
            raise ValueError(
                f"`{special[0]}` must be False without the model's own loss of image-text pairs, got True with "
                f"{type(model).__name__} and {getattr(loss_fn, '__name__', type(loss_fn).__name__)}. Leave out `loss_fn` "
                "if you gave one."
            )
        return loss_fn
    processes = accelerator.num_processes if args.gather_negatives else 1
    if processes == 1 and not special:
        return loss_fn
    if trainer.is_fsdp_enabled:
        raise ValueError(
            "negatives can be gathered or cached with whole parameters only, got FSDP. Use DistributedDataParallel, or "
            "gather_negatives=False and cache_negatives=False."
        )
    return ContrastiveLoss(
        model, processes=processes, rank=accelerator.process_index, multi_positive=args.multi_positive
    )


@torch.no_grad()
def clamp_scale(loss_fn: Any, model: nn.Module, most: float) -> None:
    """Keep exp(logit_scale) of a softmax contrastive loss at `most` or below; 0: no limit.

    References:
        CLIP, arXiv 2103.00020, section 2.5.
    """
    softmax = loss_fn is clip_contrastive or (isinstance(loss_fn, ContrastiveLoss) and not loss_fn.sigmoid)
    if most and softmax:
        own_parameters(model)["logit_scale"].clamp_(max=math.log(most))


def _owner(model: nn.Module) -> nn.Module:
    scale = own_parameters(model).get("logit_scale")
    if scale is None:
        raise ValueError(
            "a contrastive model must have a parameter `logit_scale` of its own (CLIP, SigLIP, BLIP and their kin), got "
            f"{type(model).__name__}. Pass your own `loss_fn`: a callable (outputs, batch) -> (B,)."
        )
    return next(m for m in model.modules() if m._parameters.get("logit_scale") is scale)


def _softmax(logits: Tensor, positive: Tensor, counted: Tensor | None) -> Tensor:
    """Return -mean log softmax of the positives of each row (B,)."""
    if counted is not None:
        positive = positive & counted
        logits = logits.masked_fill(~counted, -torch.inf)
    right = torch.where(positive, logits, 0).sum(1) / positive.sum(1).clamp_min(1)
    return torch.logsumexp(logits, 1) - right


def _sigmoid(logits: Tensor, positive: Tensor, counted: Tensor | None) -> Tensor:
    """Return the sum of binary cross-entropies of each row (B,)."""
    terms = -F.logsigmoid(torch.where(positive, logits, -logits))
    return (terms if counted is None else torch.where(counted, terms, 0)).sum(1)


def caption_hashes(batch: Mapping[str, Any]) -> Tensor:
    """Return one integer per caption (B,), equal for equal texts whatever their padding.

    Raises:
        ValueError: If the batch has no `input_ids`.
    """
    if "input_ids" not in batch:
        raise ValueError(
            f"multi_positive compares captions by `input_ids`, got a batch with {', '.join(batch)}. Tokenize the captions, "
            "or use multi_positive=False."
        )
    tokens, mask = batch["input_ids"].long(), batch.get("attention_mask")
    if mask is not None:
        tokens = torch.where(mask.bool(), tokens, -1)
    place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    # Odd multipliers of a linear congruential generator: int64 arithmetic wraps around.
    mixed = (tokens + 1) * (place * 6364136223846793005 + 1442695040888963407)
    return (mixed ^ (mixed >> 29)).mul(-4417276706812531889).sum(1)


def _pad(x: Tensor, missing: int) -> Tensor:
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x


def gather_rows(x: Tensor) -> Tensor:
    """Return the rows (B, ...) of all processes as (P * B, ...), with the gradient and the tangent of each.

    All processes must have as many rows. The gradient is the sum over what all processes make of this one's rows.
    """
    tangent, primal = tangent_of(x), _Gather.apply(primal_of(x))
    return with_tangent(primal, None if tangent is None else _gathered(tangent.detach()), pass_of(x))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return _gathered(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(gradient)
        first = torch.distributed.get_rank() * ctx.rows
        return gradient[first : first + ctx.rows]


def _gathered(x: Tensor) -> Tensor:
    everyone = x.new_empty(torch.distributed.get_world_size() * len(x), *x.shape[1:])
    torch.distributed.all_gather_into_tensor(everyone, x.contiguous())
    return everyone
