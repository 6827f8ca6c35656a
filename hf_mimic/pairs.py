"""Images and captions on their way to an image-text model: a collator, captions that say nothing, ids out of keys.

Read `PairCollator`. What takes a data set takes a stream too, and then does its work while the stream is read.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hf_mimic.captions import TEXT
from hf_mimic.data import SAMPLE_ID, UNREADABLE, add_sample_ids
from hf_mimic.embeddings import context_length, count_cut, needs_full_length, tokenize, tokenizer_of
from hf_mimic.images import as_rgb, check_column

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Rows: TypeAlias = Dataset | IterableDataset

_NO_LIMIT = 10**6  # a tokenizer that does not know its model says 10^30


class PairCollator:
    """Make a batch of an image-text model from raw examples: decode, resize, tokenize.

    A Trainer must not remove the columns before: `remove_unused_columns=False`. Columns in `keep` are for the
    evaluation data (`label_names=["image_id"]`); in the training data they would be handed to the model. A stream on
    several processes needs batches of one length, as accelerate shares them out: `collator.fixed_length = True`.

    Args:
        tokenizer: Of the model, or a processor that has it.
        image_processor: Of the model, or a processor that has it.
        image_column: PIL images of any mode, or {"bytes", "path"} of an image that is not decoded yet.
        text_column: Captions; of a list, the first that is not empty.
        max_length: Tokens of a caption; what is longer is cut off. By default the model's context.
        model: Says how long its context is, and whether captions are padded to it (SigLIP); without it, tokenizer and
            image processor say so.
        keep: Integer columns to pass on, where an example has them.

    Raises:
        ValueError: If nothing says how long a caption may be.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        image_column: str = "image",
        text_column: str = TEXT,
        *,
        max_length: int | None = None,
        model: Any = None,
        keep: Sequence[str] = (),
    ) -> None:
        self.tokenizer = tokenizer_of(tokenizer)
        self.image_processor = getattr(image_processor, "image_processor", image_processor)
        self.image_column, self.text_column, self.keep = image_column, text_column, tuple(keep)
        allowed = self.tokenizer.model_max_length if model is None else context_length(model, tokenizer)
        self.max_length = allowed if max_length is None else max_length
        if self.max_length > _NO_LIMIT:
            raise ValueError(
                "`max_length` must be given, as neither the tokenizer nor a model says how many tokens a caption may "
                "have. Use 77 for CLIP, or pass the model."
            )
        by_name = any(type(part).__name__.startswith("Siglip") for part in (self.tokenizer, self.image_processor))
        self.fixed_length = False
        self.full_length = by_name if model is None else needs_full_length(model)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `pixel_values` (B, C, H, W), `input_ids` and, if the tokenizer gives one, `attention_mask` (B, L).

        Args:
            examples: B rows with an image and a caption.

        Raises:
            ValueError: If an image does not decode, a caption is empty, or a column is missing.
        """
        images = [self._image(example) for example in examples]
        texts = [self._text(example) for example in examples]
        kept = [name for name in self.keep if name in examples[0]]
        return {
            **self.image_processor(images, return_tensors="pt"),
            **self._tokens(texts),
            **{name: torch.tensor([_integer(example[name], name) for example in examples]) for name in kept},  # (B,)
        }

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        padding = "max_length" if self.fixed_length else "longest"
        return tokenize(self.tokenizer, texts, context=self.max_length, full=self.full_length, padding=padding)

    def _image(self, example: Mapping[str, Any]) -> Any:
        try:
            return as_rgb(_cell(example, self.image_column))
        except UNREADABLE as error:
            raise ValueError(
                f"every image must decode, got one that does not: {error}. Drop it (hf_mimic.data.drop_unreadable, "
                "of a stream hf_mimic.images.skip_unreadable, or --on_error skip)."
            ) from error

    def _text(self, example: Mapping[str, Any]) -> str:
        cell = _cell(example, self.text_column)
        text = first_caption(cell)
        if not text:
            raise ValueError(
                f"every caption must have words, got {cell!r}. Drop it: hf_mimic.pairs.drop_empty_captions."
            )
        return text


def _cell(example: Mapping[str, Any], column: str) -> Any:
    if column not in example:
        raise ValueError(
            f"an example must have the column {column!r}, got {', '.join(example)}. Name yours; with a Trainer, set "
            "remove_unused_columns=False."
        )
    return example[column]


def _integer(value: Any, column: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"the column {column!r} must hold integers, got {value!r}.") from None


# ---- captions ------------------------------------------------------------------------------------------------------


def first_caption(cell: Any) -> str:
    """Return the caption of a row, of a list the first that is not empty; "" if there is none.

    Raises:
        ValueError: If it is neither a string nor a list of strings.
    """
    listed = cell if isinstance(cell, (list, tuple)) else [cell]
    strange = [text for text in listed if not (text is None or isinstance(text, str))]
    if strange:
        raise ValueError(f"a caption must be a string or a list of strings, got {cell!r}.")
    return next((text for text in listed if text and text.strip()), "")


def check_captions(rows: Dataset, text_column: str, tokenizer: Any, context: int) -> dict[str, int]:
    """Return `empty_captions` and `cut_captions` (longer than `context` tokens) of a data set; no image is decoded."""
    texts = [first_caption(cell) for cell in _column(rows, text_column)]
    given = [text for text in texts if text]
    return {"empty_captions": len(texts) - len(given), "cut_captions": count_cut(tokenizer, given, context)}


def drop_empty_captions(dataset: Rows, text_column: str = TEXT) -> tuple[Any, int | None]:
    """Return the rows with a caption, and how many have none; of a stream, that is not known yet: None."""
    from datasets import IterableDataset

    check_column(dataset, text_column)
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_has_caption, input_columns=text_column), None
    full = [row for row, cell in enumerate(_column(dataset, text_column)) if _has_caption(cell)]
    empty = len(dataset) - len(full)
    return (dataset.select(full) if empty else dataset), empty


def _has_caption(cell: Any) -> bool:
    return bool(first_caption(cell))


def _column(dataset: Dataset, column: str) -> list:
    check_column(dataset, column)
    return dataset.with_format(None).select_columns([column])[column][:]


# ---- ids -----------------------------------------------------------------------------------------------------------


def hash_ids(dataset: Rows, column: str | Sequence[str], into: str = SAMPLE_ID) -> Any:
    """Return the data set with int64 ids made from string keys, the `__key__` of a webdataset for instance.

    A stream needs them: `map(with_indices=True)` counts anew in every shard that a worker or a process reads. That any
    two of n keys get the same id has a chance of about n^2 / 2^65: 3e-8 for a million, 3 % for a billion. Of a stream
    no one notices, and the two then share one history of scores.

    Args:
        dataset: With keys; of a stream, its images are best left undecoded (`undecoded`).
        column: The keys, unique; several columns if only together they are (`__url__`, `__key__`).
        into: Name of the new column.

    Raises:
        ValueError: If a key is not a string, the new column is there already, or two rows of a data set have the
            same id.
    """
    from datasets import Features, IterableDataset, Value

    columns = [column] if isinstance(column, str) else list(column)
    names = dataset.column_names
    if names is not None and (into in names or not set(columns) <= set(names)):
        raise ValueError(
            f"the data set must have the key columns {', '.join(columns)} and no column {into!r}, got "
            f"{', '.join(names)}."
        )
    if isinstance(dataset, IterableDataset):
        known = dataset.features
        features = None if known is None else Features({**known, into: Value("int64")})
        return dataset.map(_Hash(into), input_columns=columns, features=features)
    keys = zip(*(_column(dataset, name) for name in columns), strict=True)
    ids = np.fromiter((_hash(key) for key in keys), dtype=np.int64, count=len(dataset))  # (N,)
    repeated = len(ids) - len(np.unique(ids))
    if repeated:
        raise ValueError(f"the keys in {', '.join(columns)} must be unique, got {repeated} repeated ones.")
    return dataset.add_column(into, ids)


def identified(dataset: Dataset, column: str = SAMPLE_ID) -> Dataset:
    """Return the data set with integer ids in `column`: its own, hashes of strings, or new ones if it is not there.

    The strings stay, as `<column>_key`.
    """
    from datasets import Value

    if column not in dataset.column_names:
        return add_sample_ids(dataset, column)
    kind = dataset.features[column]
    if not (isinstance(kind, Value) and kind.dtype in ("string", "large_string")):
        return dataset
    key = f"{column}_key"
    return hash_ids(dataset.rename_column(column, key), key, into=column)


class _Hash:
    def __init__(self, into: str) -> None:
        self.into = into

    def __call__(self, *key: Any) -> dict[str, int]:
        return {self.into: _hash(key)}


def _hash(key: Sequence[Any]) -> int:
    strange = [part for part in key if not isinstance(part, str)]
    if strange:
        raise ValueError(f"a key must be a string, got {strange[0]!r}. Integers are ids as they are.")
    digest = hashlib.blake2b("\0".join(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
