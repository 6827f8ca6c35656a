"""How well embeddings find each other: recall of images and texts, zero-shot accuracy.

Read `recall`. Ranks are counted tile by tile, in float64: nothing is sorted, and the whole matrix of similarities is never there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TIE = 1e-10  # cosines that differ by less are equal: rounding in float64 must not break a tie


def recall(
    image_embeds: Tensor | np.ndarray,
    text_embeds: Tensor | np.ndarray,
    text_image: Tensor | np.ndarray | Sequence[int],
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 1024,
) -> dict[str, float]:
    """Return how often the right answer is among the k nearest by cosine similarity, in both directions.

    An image is found if any of its texts is among the k nearest texts, a text if its image is among the k nearest images.
    The rank of an answer is the number of wrong candidates that are at least as near: ties count against it, so embeddings
    that have collapsed to a point are found by nobody.

    Args:
        image_embeds: (M, D), on any device, of any length: they are normalised here.
        text_embeds: (N, D).
        text_image: For each text, the row of its image (N,), integers in [0, M). Every image must have a text.
        ks: How many of the nearest count.
        chunk_size: Images and texts at a time: similarities take O(chunk_size ** 2) memory. The result is the same.

    Returns:
        `image_to_text_recall@k` and `text_to_image_recall@k`, shares in [0, 1], and `rsum`: the sum of all of them in
        per cent, as papers have it (at most 600 for three k).

    Raises:
        ValueError: If an embedding is not finite, an image has no text, or shapes or indices do not fit.
    """
    _check_counts(ks, chunk_size)
    images, texts = _directions(image_embeds, "image"), _directions(text_embeds, "text")
    _check_widths(images, texts, "text")
    texts = texts.to(images.device)
    image_ranks, text_ranks = _ranks(images, texts, _owners(text_image, images, texts), chunk_size)
    shares = {f"image_to_text_recall@{k}": _share_below(image_ranks, k) for k in ks}
    shares |= {f"text_to_image_recall@{k}": _share_below(text_ranks, k) for k in ks}
    return {**shares, "rsum": 100 * sum(shares.values())}


def _ranks(images: Tensor, texts: Tensor, owner: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Return for each image (M,) and each text (N,) how many wrong answers are as near as the (best) right one."""
    right = torch.linalg.vecdot(images[owner], texts) - _TIE  # (N,): each text with its image
    nearest = right.new_full((len(images),), -torch.inf).scatter_reduce(0, owner, right, "amax")  # (M,)
    image_ranks, text_ranks = torch.zeros_like(nearest, dtype=torch.long), torch.zeros_like(owner)
    for start in range(0, len(images), chunk_size):
        rows = slice(start, start + chunk_size)
        for first in range(0, len(texts), chunk_size):
            columns = slice(first, first + chunk_size)
            cosines = images[rows] @ texts[columns].T  # (c, c)
            place = owner[columns] - start
            own = ((place >= 0) & (place < len(cosines))).nonzero()[:, 0]
            cosines[place[own], own] = -torch.inf  # a right answer is no rival
            image_ranks[rows] += (cosines >= nearest[rows, None]).sum(1)
            text_ranks[columns] += (cosines >= right[columns]).sum(0)
    return image_ranks, text_ranks


def retrieval(prediction: Any) -> dict[str, float]:
    """Return `recall` at 1, 5 and 10, as `compute_metrics` of a Trainer.

    A Trainer hands over all of a model's outputs; of CLIP, SigLIP, AltCLIP, ChineseCLIP and BLIP keep the two embeddings
    with `preprocess_logits_for_metrics=lambda outputs, labels: (outputs[3], outputs[2])`.

    Args:
        prediction: A `transformers.EvalPrediction`: `predictions` are the image embeddings (N, D) and the text embeddings
            (N, D), in this order; `label_ids` are None, or image ids (N,). Rows with the same id are captions of one
            image, whose embedding is that of its first row; without ids every row has its own.

    Raises:
        ValueError: If there is something else in `predictions`, or the lengths differ.
    """
    found = prediction.predictions
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        came = f"{len(found)} values" if isinstance(found, (tuple, list)) else type(found).__name__
        raise ValueError(
            f"`predictions` must be (image embeddings, text embeddings), got {came}. Choose them with the Trainer's "
            "preprocess_logits_for_metrics=lambda outputs, labels: (outputs[3], outputs[2])."
        )
    images, texts = found
    given = prediction.label_ids
    nothing = given is None or len(given) == 0  # a Trainer without label names has ()
    ids = np.arange(len(texts)) if nothing else np.asarray(given)
    if ids.ndim != 1 or not len(images) == len(texts) == len(ids):
        raise ValueError(
            "image embeddings, text embeddings and image ids must have a row for each pair, got "
            f"{len(images)}, {len(texts)} and ids of shape {ids.shape}. `label_names` of the TrainingArguments says "
            "which column has the ids."
        )
    _, first, owner = np.unique(ids, return_index=True, return_inverse=True)
    return recall(images[first], texts, owner)


def zero_shot_accuracy(
    image_embeds: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    class_embeds: Tensor | np.ndarray,
    *,
    chunk_size: int = 1024,
) -> dict[str, float]:
    """Return how often an image's class is among the nearest classes by cosine similarity; ties count against it.

    Args:
        image_embeds: (N, D).
        labels: Of each image (N,), integers in [0, C).
        class_embeds: (C, D), from `class_embeddings`.
        chunk_size: Images at a time; memory is O(chunk_size * C).

    Returns:
        `zero_shot_accuracy@1`, and `zero_shot_accuracy@5` if there are five classes; shares in [0, 1].

    Raises:
        ValueError: If an embedding is not finite, or shapes or labels do not fit.

    References:
        CLIP, arXiv 2103.00020, section 3.1.
    """
    _check_counts((1,), chunk_size)
    images, classes = _directions(image_embeds, "image"), _directions(class_embeds, "class")
    _check_widths(images, classes, "class")
    classes = classes.to(images.device)
    labels = _indices(labels, "labels", shape=(len(images),), limit=len(classes)).to(images.device)
    ranks = torch.zeros_like(labels)
    for start in range(0, len(images), chunk_size):
        rows = slice(start, start + chunk_size)
        own = labels[rows, None]  # (c, 1)
        cosines = images[rows] @ classes.T  # (c, C)
        right = cosines.gather(1, own) - _TIE
        ranks[rows] = (cosines.scatter(1, own, -torch.inf) >= right).sum(1)
    return {f"zero_shot_accuracy@{k}": _share_below(ranks, k) for k in (1, 5) if k <= max(1, len(classes))}


# ---- checks --------------------------------------------------------------------------------------------------------


def _directions(embeds: Tensor | np.ndarray, kind: str) -> Tensor:
    """Return the embeddings with length 1, float64, or raise if they are not a matrix of finite numbers."""
    given = embeds.detach() if isinstance(embeds, Tensor) else torch.tensor(np.asarray(embeds))  # may be read-only
    if given.ndim != 2 or not len(given):
        raise ValueError(f"{kind} embeddings must be (rows, width) with at least one row, got {tuple(given.shape)}.")
    given = (given.cpu() if given.device.type == "mps" else given).double()  # there is no float64 on mps
    broken = int((~given.isfinite()).any(1).sum())
    if broken:
        raise ValueError(
            f"every {kind} embedding must be finite, got {broken} of {len(given)} rows with NaN or infinity. "
            "Has the model diverged, or does it overflow in half precision?"
        )
    return torch.nn.functional.normalize(given, dim=1, eps=1e-300)


def _check_widths(images: Tensor, others: Tensor, kind: str) -> None:
    if images.shape[1] != others.shape[1]:
        raise ValueError(
            f"image and {kind} embeddings must have the same width, got {images.shape[1]} and {others.shape[1]}. "
            "Take both after the model's projections."
        )


def _owners(text_image: Any, images: Tensor, texts: Tensor) -> Tensor:
    owner = _indices(text_image, "text_image", shape=(len(texts),), limit=len(images)).to(images.device)
    bare = len(images) - len(owner.unique())
    if bare:
        raise ValueError(f"every image must have a text, got {bare} of {len(images)} without. Leave these images out.")
    return owner


def _indices(values: Any, name: str, *, shape: tuple[int], limit: int) -> Tensor:
    found = values.detach() if isinstance(values, Tensor) else torch.tensor(np.asarray(values))
    if found.shape != shape or found.is_floating_point() or found.dtype == torch.bool:
        raise ValueError(f"`{name}` must be integers of shape {shape}, got {found.dtype} of {tuple(found.shape)}.")
    bad = found[(found < 0) | (found >= limit)]
    if len(bad):
        raise ValueError(f"`{name}` must be in [0, {limit}), got {len(bad)} that are not, such as {bad[0].item()}.")
    return found.long()


def _check_counts(ks: Sequence[int], chunk_size: int) -> None:
    for name, value in (*(("ks", k) for k in ks), ("chunk_size", chunk_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be integers from 1 up, got {value!r}.")


def _share_below(ranks: Tensor, k: int) -> float:
    return (ranks < k).double().mean().item()
