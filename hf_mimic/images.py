"""Images of any kind as RGB, and streams rid of those that do not decode (of a data set, see data.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_mimic.data import UNREADABLE

if TYPE_CHECKING:
    from datasets import IterableDataset

_SLOTS = 64  # the workers of a loader count for themselves


def as_rgb(image: Any) -> Any:
    """Return an image in mode RGB.

    Args:
        image: A PIL image of any mode, or {"bytes", "path"}.

    Raises:
        OSError: If there is none, or (this or another kind of `UNREADABLE`) it does not decode.
    """
    from datasets import Image

    if image is None:
        raise OSError("there is no image")
    if isinstance(image, Mapping):
        image = Image().decode_example(dict(image))
    if image.mode.startswith("I;16"):  # PIL would make everything above 255 white
        from PIL.Image import fromarray

        image = fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:  # PIL warns of what it does right only this way
        image = image.convert("RGBA")
    return image.convert("RGB")


class Skipped:
    """How many images of a stream were skipped, at every visit, by this process and the workers of its loaders."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_SLOTS, dtype=torch.int64).share_memory_()

    def add(self) -> None:
        """Count one."""
        worker = torch.utils.data.get_worker_info()
        self._counts[0 if worker is None else 1 + worker.id % (_SLOTS - 1)] += 1

    def __int__(self) -> int:
        return int(self._counts.sum())


class _Decodes:
    def __init__(self, skipped: Skipped) -> None:
        self.skipped = skipped

    def __call__(self, image: Any) -> bool:
        try:
            as_rgb(image)
        except UNREADABLE:
            self.skipped.add()
            return False
        return True


def skip_unreadable(stream: IterableDataset, column: str = "image") -> tuple[IterableDataset, Skipped]:
    """Return a stream without the images that do not decode, and the count of them, which grows as it is read.

    Images come as {"bytes", "path"}, for a `PairCollator`; each is decoded once more, to see whether it can be.
    """
    check_column(stream, column)
    skipped = Skipped()
    return undecoded(stream, column).filter(_Decodes(skipped), input_columns=column), skipped


def undecoded(dataset: Any, column: str = "image") -> Any:
    """Return the data set with images as {"bytes", "path"}: what is done to other columns need not decode them."""
    from datasets import Image

    images = dataset.features is not None and isinstance(dataset.features.get(column), Image)
    return dataset.cast_column(column, Image(decode=False)) if images else dataset


def check_column(dataset: Any, column: str) -> None:
    """Raise a `ValueError` if a data set, or a stream that knows its columns, does not have this one."""
    names = dataset.column_names
    if names is not None and column not in names:
        raise ValueError(f"the data set must have the column {column!r}, got {', '.join(names)}. Name yours.")
