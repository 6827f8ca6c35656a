"""Embeddings of image-text models: of texts, and of classes that are described by texts.

Any model with `get_image_features` and `get_text_features` will do: CLIP, SigLIP, AltCLIP, ChineseCLIP, BLIP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_mimic.mimic import eval_mode

_ALWAYS_PADDED = ("siglip", "siglip2")


@torch.no_grad()
def class_embeddings(
    model: Any,
    tokenizer: Any,
    class_names: Sequence[str],
    templates: Sequence[str] = ("a photo of a {}.",),
    *,
    batch_size: int = 256,
) -> Tensor:
    """Return what an image of each class should be near to: the mean direction of the texts that describe it.

    Args:
        model: An image-text model, on its device; it runs in eval mode.
        tokenizer: Of the model, or a processor that has it.
        class_names: C names, as they are to stand in a sentence.
        templates: Sentences with {} in place of the name.
        batch_size: Texts per forward pass.

    Returns:
        Unit vectors (C, D): for each class, the mean over templates of normalised text features, normalised again.

    Raises:
        ValueError: If there are no names or templates, or a template has no {}.

    References:
        CLIP, arXiv 2103.00020, section 3.1.4.
    """
    for kind, given in (("class_names", class_names), ("templates", templates)):
        if isinstance(given, str) or not len(given):
            raise ValueError(f"`{kind}` must be a list with at least one text, got {given!r}.")
    bare = [template for template in templates if "{}" not in template]
    if bare:
        raise ValueError(
            f"every template must have {{}} in place of the class name, got {bare[0]!r}. Write 'a photo of a {{}}.'."
        )
    texts = [template.replace("{}", name) for name in class_names for template in templates]
    features = text_features(model, tokenizer, texts, batch_size=batch_size)  # (C * T, D)
    directions = normalize(features, dim=1).view(len(class_names), len(templates), -1)  # (C, T, D)
    return normalize(directions.mean(1), dim=1)


@torch.no_grad()
def text_features(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Tensor:
    """Return the model's projected features of texts, not normalised.

    Args:
        model: An image-text model, on its device; it runs in eval mode.
        tokenizer: Of the model, or a processor that has it.
        texts: N texts, at least one; what is longer than `context_length` is cut off.
        batch_size: Texts per forward pass.
        progress: Wraps the batches, tqdm for instance.

    Returns:
        (N, D), on the model's device, float32 or finer.
    """
    check_image_text(model)
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    with eval_mode(model):
        found = [feature_matrix(model.get_text_features(**_tokens(model, tokenizer, b))) for b in progress(batches)]
    return torch.cat(found)


def tokenize(
    tokenizer: Any, texts: Sequence[str], *, context: int, full: bool, padding: str = "longest"
) -> dict[str, Tensor]:
    """Return a batch of texts as an image-text model takes it.

    Args:
        tokenizer: Of the model, or a processor that has it.
        texts: B texts.
        context: Tokens that a text may have; what is longer is cut off.
        full: Pad to `context` and give no mask; see `needs_full_length`.
        padding: Otherwise pad to the "longest" of the batch, or to the "max_length", which is `context`.

    Returns:
        `input_ids` (B, L) and what else the tokenizer gives, an `attention_mask` for instance.
    """
    padding = "max_length" if full else padding
    options: dict[str, Any] = {"padding": padding, "truncation": True, "max_length": context, "return_tensors": "pt"}
    tokens = tokenizer_of(tokenizer)(list(texts), **options)
    return {"input_ids": tokens["input_ids"]} if full else dict(tokens)


def needs_full_length(model: Any) -> bool:
    """Return whether the model was trained on texts of full length, and without a mask."""
    return model.config.model_type in _ALWAYS_PADDED


def feature_matrix(output: Any) -> Tensor:
    """Return the features (B, D) out of what `get_image_features` or `get_text_features` returned.

    Args:
        output: A tensor, or an output with `pooler_output` (transformers 5).

    Raises:
        ValueError: If there is no such matrix, but features of every token for instance.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if found is None or found.ndim != 2:
        came = type(output).__name__ if found is None else f"features of shape {tuple(found.shape)}"
        raise ValueError(
            f"an image-text model must return one feature vector for each sample, got {came}. "
            "Models such as CLIP, SigLIP, AltCLIP, ChineseCLIP and BLIP do."
        )
    return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found


def check_image_text(model: Any) -> None:
    """Raise a `ValueError` unless the model embeds both images and texts."""
    missing = [name for name in ("get_image_features", "get_text_features") if not hasattr(model, name)]
    if missing:
        raise ValueError(
            f"the model must embed images and texts, but {type(model).__name__} has no {' and no '.join(missing)}. "
            "Take an image-text model such as CLIP, SigLIP, AltCLIP, ChineseCLIP or BLIP."
        )


def context_length(model: Any, tokenizer: Any) -> int:
    """Return how many tokens a text may have, special ones included: what model and tokenizer both allow."""
    config = model.config
    positions = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    allowed = tokenizer_of(tokenizer).model_max_length  # very large if it is not known
    return allowed if positions is None else min(allowed, positions - _reserved_positions(model))


def count_cut(tokenizer: Any, texts: Sequence[str], context: int) -> int:
    """Return how many texts have more than `context` tokens."""
    tokenizer, cut = tokenizer_of(tokenizer), 0
    for start in range(0, len(texts), 1000):
        tokens = tokenizer(list(texts[start : start + 1000]), truncation=False, verbose=False)["input_ids"]
        cut += sum(len(row) > context for row in tokens)
    return cut


def tokenizer_of(processor: Any) -> Any:
    """Return a processor's tokenizer, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def _reserved_positions(model: Any) -> int:
    """Return how many positions come before that of the first token: RoBERTa, in AltCLIP, counts from its padding on."""
    tables = [m for name, m in model.named_modules() if name.endswith(".position_embeddings")]
    return max((m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None), default=0)


def _tokens(model: Any, tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """Return a batch of texts (B, L) as `get_text_features` takes it, on the model's device."""
    tokens = tokenize(tokenizer, texts, context=context_length(model, tokenizer), full=needs_full_length(model))
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in tokens.items()}
