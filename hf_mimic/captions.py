"""Images and their captions, out of a data set: a caption per row, a list of them, or rows that share an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

TEXT = "text"  # the column, unless another is named


@dataclass(frozen=True)
class Pairs:
    """M images and their N captions.

    Args:
        rows: The first row of each image (M,).
        texts: The captions that are not empty (N,).
        text_image: For each caption, the place of its image in `rows` (N,), int64.
        empty: How many captions were left out.
        missing: Why there is no caption, if there is none.
    """

    rows: list[int]
    texts: list[str]
    text_image: np.ndarray
    empty: int
    missing: str | None = None


def read_pairs(
    dataset: Dataset, text_column: str | None = None, image_id_column: str | None = None, *, needed: bool = True
) -> Pairs:
    """Read which images there are, and their captions, without decoding anything.

    Args:
        dataset: Rows with an image each.
        text_column: Strings, or lists of strings; "text" by default. What is missing or only white space is empty.
        image_id_column: Rows with the same value have the same image; by default every row has its own.
        needed: Raise if there is no caption.

    Raises:
        ValueError: If there is no caption, or a row has no image id.
    """
    places = image_places(dataset, image_id_column)  # (rows,)
    column = text_column or TEXT
    cells = dataset.with_format(None)[column][:] if column in dataset.column_names else []
    given = [(text, place) for cell, place in zip(cells, places, strict=False) for text in _listed(cell)]
    kept = [(text, place) for text, place in given if text and text.strip()]
    missing = None
    if not kept:
        missing = f"all {len(given)} captions are empty" if cells else f"there is no column {column!r}"
    if missing and needed:
        raise ValueError(
            f"retrieval must have captions, got none: {missing}. Name their column with --text_column, or classify with "
            "--label_column."
        )
    return Pairs(
        rows=np.unique(places, return_index=True)[1].tolist(),
        texts=[text for text, _ in kept],
        text_image=np.asarray([place for _, place in kept], dtype=np.int64),
        empty=len(given) - len(kept),
        missing=missing,
    )


def _listed(cell: str | list[str | None] | None) -> list[str | None]:
    return cell if isinstance(cell, list) else [cell]


def image_places(dataset: Dataset, column: str | None) -> np.ndarray:
    """Return which image each row has (rows,): 0, 1, ... M-1 in the order of their first rows."""
    if column is None:
        return np.arange(len(dataset))
    ids = dataset.with_format(None)[column][:]
    bare = sum(value is None for value in ids)
    if bare:
        raise ValueError(f"every row must have an image id in `{column}`, got {bare} without. Drop these rows.")
    seen: dict[Any, int] = {}
    return np.asarray([seen.setdefault(value, len(seen)) for value in ids])


def check_columns(
    dataset: Dataset,
    *,
    image_column: str,
    text_column: str | None = None,
    image_id_column: str | None = None,
    label_column: str | None = None,
) -> None:
    """Raise a `ValueError` unless the columns that are named are there, with values of their kind.

    Args:
        dataset: At least one row.
        image_column: Images.
        text_column: Strings or lists of strings; None for "text", which need not be there.
        image_id_column: Integers or strings.
        label_column: Class labels or strings.
    """
    import datasets

    named = {"image": image_column, "text": text_column, "image_id": image_id_column, "label": label_column}
    for role, column in named.items():
        if column is not None and column not in dataset.column_names:
            raise ValueError(
                f"the data set must have the column {column!r}, got {', '.join(dataset.column_names)}. Name yours with "
                f"--{role}_column."
            )
    if not len(dataset):
        raise ValueError("the data set must have at least one row, got none. Look at --split.")
    kinds = dataset.features
    text, label = text_column or TEXT, label_column
    if not isinstance(kinds[image_column], datasets.Image):
        raise ValueError(f"the column {image_column!r} must hold images, got {kinds[image_column]}.")
    if text in kinds and not _is_text(getattr(kinds[text], "feature", kinds[text])):
        raise ValueError(f"the column {text!r} must hold captions, strings or lists of strings, got {kinds[text]}.")
    if image_id_column is not None and not isinstance(kinds[image_id_column], (datasets.Value, datasets.ClassLabel)):
        raise ValueError(
            f"the column {image_id_column!r} must hold integers or strings, got {kinds[image_id_column]}."
        )
    if label is not None and not isinstance(kinds[label], datasets.ClassLabel) and not _is_text(kinds[label]):
        raise ValueError(
            f"the column {label!r} must hold class names (ClassLabel or strings), got {kinds[label]}: a number does not "
            "say what is on an image."
        )


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string", "null")
