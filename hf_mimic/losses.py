"""Per-sample losses: `(outputs, batch) -> (B,)`, never reduced.

They are what is scored and what is trained on. `loss_for_model` picks one from a model's configuration; any callable
of the same form takes its place.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PerSampleLoss = Callable[[Any, Mapping[str, Any]], Tensor]
COUNTED = "rows_that_count"  # in a batch, booleans (B,): false for a repeated row, which must be no one's negative
_NOT_FOR_THE_MODEL = ("labels", "return_loss", COUNTED)


def cross_entropy(outputs: Any, batch: Mapping[str, Any], *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each sample: l_i = -sum_c q_ic log softmax(z_i)_c, q the smoothed one-hot label.

    Args:
        outputs: Has `logits` (B, C).
        batch: Has integer `labels` (B,); -100 marks a sample without label, whose loss is 0.
        label_smoothing: Share of the label spread evenly over the classes, in [0, 1).

    Returns:
        Losses (B,).
    """
    return F.cross_entropy(
        _features(outputs, "logits"), _labels(batch), reduction="none", label_smoothing=label_smoothing
    )


def binary_cross_entropy(outputs: Any, batch: Mapping[str, Any], *, label_smoothing: float = 0.0) -> Tensor:
    """Multi-label loss of each sample: the mean over classes of the binary cross-entropy.

    Args:
        outputs: Has `logits` (B, C).
        batch: Has `labels` (B, C) in [0, 1].
        label_smoothing: Share of each label replaced by 1/2.

    Returns:
        Losses (B,).
    """
    logits = _features(outputs, "logits")
    labels = _labels(batch).to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)


def clip_contrastive(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    """Symmetric contrastive loss of each pair: half the row's and half the column's cross-entropy.

    Args:
        outputs: Has `logits_per_image` (B, B), the scaled similarities.
        batch: Not used; the pairs are on the diagonal.

    Returns:
        Losses (B,); each depends on every pair of the batch.

    References:
        CLIP, arXiv 2103.00020, figure 3.
    """
    logits = _features(outputs, "logits_per_image")
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs, reduction="none") + F.cross_entropy(logits.T, pairs, reduction="none")) / 2


def siglip_sigmoid(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    """Sigmoid loss of each pair: half the sum over its row and half that over its column of -log sigmoid(z_ij s_ij).

    The mean over the batch is SigLIP's loss; halving makes the image and the text of a pair count alike.

    Args:
        outputs: Has `logits_per_image` (B, B).
        batch: Not used; the pairs are on the diagonal.

    Returns:
        Losses (B,).

    References:
        SigLIP, arXiv 2303.15343, equation 1.
    """
    logits = _features(outputs, "logits_per_image")
    sign = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    terms = -F.logsigmoid(sign * logits)
    return (terms.sum(0) + terms.sum(1)) / 2


def loss_for_model(model: nn.Module, label_smoothing: float = 0.0) -> PerSampleLoss:
    """Choose the per-sample loss that `model` is trained with, from its parameters and `config.problem_type`.

    Args:
        model: A Hugging Face model, possibly wrapped by PEFT.
        label_smoothing: As in `TrainingArguments.label_smoothing_factor`; contrastive losses have none.

    Raises:
        ValueError: For regression heads and other losses that are not known here.
    """
    own = own_parameters(model)
    if "logit_bias" in own:
        return siglip_sigmoid
    if "logit_scale" in own:
        return clip_contrastive
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        return functools.partial(binary_cross_entropy, label_smoothing=label_smoothing)
    if problem == "regression" or getattr(config, "num_labels", 2) < 2:
        raise ValueError(
            "a per-sample loss is known for classification and image-text models, got a model with "
            f"problem_type={problem!r} and num_labels={getattr(config, 'num_labels', None)}. "
            "Pass your own as `loss_fn`: a callable (outputs, batch) -> (B,)."
        )
    return functools.partial(cross_entropy, label_smoothing=label_smoothing)


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model is called with: without labels, so that it computes no loss of its own."""
    return {key: value for key, value in batch.items() if key not in _NOT_FOR_THE_MODEL}


def own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by name, without the prefixes of wrappers.

    `logit_scale` is then the model's own, not a layer's: Swin v2 has one in every attention.
    """
    prefixes = re.compile(r"^((base_model\.model|module|_orig_mod)\.)+")
    return {prefixes.sub("", name): parameter for name, parameter in model.named_parameters()}


def embeddings(outputs: Any) -> tuple[Tensor, Tensor]:
    """Return the image and text features (B, D) of an image-text model, float32 at least.

    Raises:
        ValueError: If the outputs have none.
    """
    return _features(outputs, "image_embeds"), _features(outputs, "text_embeds")


def clip_score(outputs: Any) -> Tensor:
    """Return CLIPScore of each pair (B,): max(100 cos(image, text), 0), without graph.

    Args:
        outputs: Have `image_embeds` and `text_embeds` (B, D).

    References:
        CLIPScore, arXiv 2104.08718; with this scale in DISSect, arXiv 2507.12998.
    """
    image, text = (features.detach() for features in embeddings(outputs))
    return (100 * F.cosine_similarity(image, text)).clamp_min(0)


def _features(outputs: Any, name: str) -> Tensor:
    """Return one of the outputs, float32 at least."""
    found = getattr(outputs, name, None)
    if found is None:
        raise ValueError(
            f"this loss needs the model's outputs to have `{name}`, got {type(outputs).__name__}. "
            "Pass your own as `loss_fn`: a callable (outputs, batch) -> (B,)."
        )
    return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found


def _labels(batch: Mapping[str, Any]) -> Tensor:
    if "labels" not in batch:
        raise ValueError(f"this loss needs `labels` in the batch, got {', '.join(batch)}. Rename the label column.")
    return batch["labels"]
