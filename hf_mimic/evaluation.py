"""Measure an image-text model on a data set: how images and captions find each other, zero-shot classification.

Read `evaluate_image_text`; `readable` makes the printed table of what it returns.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_mimic.captions import Pairs, check_columns, read_pairs
from hf_mimic.checks import check_choice
from hf_mimic.command_arguments import EvaluateArguments
from hf_mimic.data import SampleIdDataset, drop_unreadable, load_rows, with_class_labels
from hf_mimic.embeddings import (
    check_image_text,
    class_embeddings,
    context_length,
    count_cut,
    feature_matrix,
    text_features,
)
from hf_mimic.files import write_atomically
from hf_mimic.hub_loading import loading
from hf_mimic.images import as_rgb
from hf_mimic.mimic import eval_mode
from hf_mimic.retrieval import recall, zero_shot_accuracy

if TYPE_CHECKING:
    from datasets import Dataset


def evaluate_image_text(options: EvaluateArguments) -> dict[str, Any]:
    """Return what `hf-mimic evaluate` measures; write it to `options.output` if given.

    An empty caption is counted and left out of the retrieval, with its image if that has no other.

    Args:
        options: Which model, data set and columns.

    Returns:
        The metrics of `recall` and `zero_shot_accuracy`, and counts: `images`, `unreadable_images`, `captions` (in the
        retrieval), `empty_captions`, `cut_captions` (longer than `context` tokens), `images_without_caption`,
        `classes`. What was not measured is not there; `no_retrieval` says why.

    Raises:
        ValueError: If a column or its kind does not fit, an image does not decode (its row is named), there is nothing to
            measure, or the model does not embed images and texts.
    """
    _check_options(options)
    if options.split == "test" and Path(options.dataset).is_file():
        options = dataclasses.replace(options, split="train")  # the name of a file's only split
    rows, unreadable = _rows(options)
    pairs = read_pairs(rows, options.text_column, options.image_id_column, needed=options.label_column is None)
    model, tokenizer, processor = load_image_text_model(options.model)
    if options.label_column is not None:  # first: a bad template need not wait for the images
        names = rows.features[options.label_column].names
        classes = class_embeddings(model, tokenizer, names, options.templates, batch_size=options.batch_size)  # (C, D)
    images = image_features(
        model,
        processor,
        rows,
        chosen=pairs.rows,
        column=options.image_column,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )  # (M, D)
    results: dict[str, Any] = {"model": options.model, "dataset": options.dataset, "split": options.split}
    results |= {"images": len(images), "unreadable_images": unreadable}
    results |= _retrieval(model, tokenizer, images, pairs, batch_size=options.batch_size)
    if options.label_column is not None:
        labels = np.asarray(rows.with_format(None)[options.label_column][:])[pairs.rows]  # (M,)
        results |= {"classes": len(classes), "templates": options.templates}
        results |= zero_shot_accuracy(images, labels, classes)
    if options.output is not None:
        text = json.dumps(results, indent=2) + "\n"
        write_atomically(Path(options.output), lambda file: file.write(text.encode()))
        results["output"] = options.output
    return results


def readable(results: dict[str, Any]) -> dict[str, Any]:
    """Return the lines of a table, name to value.

    Args:
        results: Of `evaluate_image_text`.
    """
    lines = {"images": results["images"]}
    if results["unreadable_images"]:
        lines["images that do not decode"] = f"{results['unreadable_images']} (left out)"
    if "no_retrieval" in results:
        lines["retrieval"] = f"not measured: {results['no_retrieval']}"
    else:
        lines["captions"] = results["captions"]
        lines["empty captions"] = f"{results['empty_captions']} (left out)"
        lines["images without a caption"] = f"{results['images_without_caption']} (left out of the retrieval)"
        lines["captions cut off"] = f"{results['cut_captions']} (longer than {results['context']} tokens)"
        lines["image to text recall"] = _at_each_k(results, "image_to_text_recall@")
        lines["text to image recall"] = _at_each_k(results, "text_to_image_recall@")
        lines["rsum"] = f"{results['rsum']:.1f}"
    if "classes" in results:
        found = _at_each_k(results, "zero_shot_accuracy@")
        lines["zero-shot accuracy"] = f"{found}  ({results['classes']} classes, {len(results['templates'])} templates)"
    if "output" in results:
        lines["written"] = results["output"]
    return lines


def _at_each_k(results: dict[str, Any], start: str) -> str:
    return "  ".join(f"@{k[len(start) :]} {value:.4f}" for k, value in results.items() if k.startswith(start))


# ---- the model -----------------------------------------------------------------------------------------------------


def load_image_text_model(name: str, *, device: str | None = None) -> tuple[Any, Any, Any]:
    """Return a model in float32, its tokenizer and its image processor.

    Args:
        name: Hub repo id or folder.
        device: Of the model; by default the GPU if there is one.

    Raises:
        ValueError: If it does not embed images and texts, or its checkpoint lacks weights for that.
    """
    from transformers import AutoImageProcessor, AutoModel

    with loading(name, repo_type="model"):
        model, info = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        processor = AutoImageProcessor.from_pretrained(name)
    check_image_text(model)
    made = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if made:
        raise ValueError(
            f"the checkpoint {name} must have all weights of a {type(model).__name__}, got none for {len(made)} of them, "
            f"such as {made[0]}: they would be drawn at random. Is it the classifier or captioner of that family?"
        )
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model, _tokenizer(name), processor


def _tokenizer(name: str) -> Any:
    """Return the tokenizer of a checkpoint; where there is none, transformers may make one that knows no word."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"the checkpoint {name} must have a tokenizer: {str(error).splitlines()[0]}") from error
    if {*tokenizer.get_vocab()} <= {*tokenizer.all_special_tokens}:
        raise ValueError(
            f"the checkpoint {name} must have a tokenizer, got none. Save it there: tokenizer.save_pretrained."
        )
    return tokenizer


@torch.no_grad()
def image_features(
    model: Any,
    processor: Any,
    dataset: Dataset,
    *,
    chosen: Sequence[int],
    column: str = "image",
    batch_size: int = 64,
    num_workers: int = 0,
) -> Tensor:
    """Return the model's projected features of images, not normalised.

    Args:
        model: An image-text model, on its device; it runs in eval mode.
        processor: Its image processor.
        dataset: Rows with images.
        chosen: Which rows (M,).
        column: With the images.
        batch_size: Images per forward pass.
        num_workers: Processes that decode images.

    Returns:
        (M, D), on the model's device, float32 or finer.

    Raises:
        ValueError: If an image does not decode; its row is named.
    """
    from transformers import default_data_collator

    check_image_text(model)
    rows = dataset.select_columns([column]).with_transform(
        functools.partial(_pixels, processor=processor, column=column)
    )
    loader = torch.utils.data.DataLoader(
        SampleIdDataset(rows, None),
        sampler=chosen,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=default_data_collator,
    )
    device, found = next(model.parameters()).device, []
    with eval_mode(model):
        for batch in _progress(loader, "embedding images"):
            inputs = {name: value.to(device) for name, value in batch.items()}
            found.append(feature_matrix(model.get_image_features(**inputs)))  # (B, D)
    return torch.cat(found)


def _pixels(batch: dict[str, list], *, processor: Any, column: str) -> dict[str, Any]:
    return dict(processor([as_rgb(picture) for picture in batch[column]], return_tensors="pt"))


def _progress(batches: Iterable, what: str) -> Iterable:
    from tqdm.auto import tqdm

    return tqdm(batches, desc=what, unit="batch")


# ---- retrieval -----------------------------------------------------------------------------------------------------


def _retrieval(model: Any, tokenizer: Any, images: Tensor, pairs: Pairs, *, batch_size: int) -> dict[str, Any]:
    """Embed the captions and return recalls and counts.

    Args:
        model: On its device.
        tokenizer: Of the model.
        images: Features (M, D).
        pairs: Their captions.
        batch_size: Captions per forward pass.
    """
    if pairs.missing is not None:
        return {"no_retrieval": pairs.missing}
    context = context_length(model, tokenizer)
    bar = functools.partial(_progress, what="embedding captions")
    texts = text_features(model, tokenizer, pairs.texts, batch_size=batch_size, progress=bar)  # (N, D)
    captioned, text_image = np.unique(pairs.text_image, return_inverse=True)
    return {
        "captions": len(pairs.texts),
        "empty_captions": pairs.empty,
        "images_without_caption": len(images) - len(captioned),
        "cut_captions": count_cut(tokenizer, pairs.texts, context),
        "context": context,
        **recall(images[torch.as_tensor(captioned, device=images.device)], texts, text_image),
    }


# ---- the data set --------------------------------------------------------------------------------------------------


def _check_options(options: EvaluateArguments) -> None:
    check_choice("on_error", options.on_error, ("raise", "skip"))
    if options.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {options.batch_size}.")
    if options.output is None:
        return
    output = Path(options.output)
    if output.suffix != ".json" or output.resolve() == Path(options.dataset).resolve():
        raise ValueError(f"--output must be a .json file other than the data set, got {options.output}.")
    output.parent.mkdir(parents=True, exist_ok=True)


def _rows(options: EvaluateArguments) -> tuple[Dataset, int]:
    """Return the rows whose images decode, with class labels if asked for, and how many were left out."""
    rows = load_rows(options.dataset, options.split, **options.place)
    check_columns(
        rows,
        image_column=options.image_column,
        text_column=options.text_column,
        image_id_column=options.image_id_column,
        label_column=options.label_column,
    )
    if options.label_column is not None:
        rows = with_class_labels(rows, options.label_column)
    if options.on_error == "raise":
        return rows, 0
    rows, bad = drop_unreadable(rows, options.image_column)
    if not len(rows):
        raise ValueError(f"at least one image must decode, got {len(bad)} that do not.")
    return rows, len(bad)
