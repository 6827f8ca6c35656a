"""Small pictures of any image that PIL opens, for a page: CMYK, 16 bits, palettes, transparency, turned, or broken."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, features

from hf_mimic.images import undecoded

if TYPE_CHECKING:
    from datasets import Dataset

KIND = "webp" if features.check("webp") else "jpeg"  # webp: a third smaller
_QUALITY = 80
_SIDE = 8  # pixels of what neighbours are found by
_DEEP = ("I", "F")  # 32 bits per pixel, of any range


@dataclass
class Thumbnails:
    """What came of some rows' images.

    Args:
        data: Row to the encoded picture, in `KIND`.
        pixels: Row to 8 x 8 RGB values (192,), uint8.
        broken: Row to the kind of error of an image that does not decode, "no image" for one that is null.
    """

    data: dict[int, bytes] = field(default_factory=dict)
    pixels: dict[int, np.ndarray] = field(default_factory=dict)
    broken: dict[int, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return how many were shown, and how many were not, by reason."""
        return {"shown": len(self.data), **Counter(self.broken.values())}


def make_thumbnails(dataset: Dataset, rows: np.ndarray, column: str = "image", *, size: int = 64) -> Thumbnails:
    """Decode the images of some rows, and of no other, and make them small.

    Args:
        dataset: Rows with images.
        rows: Which rows.
        column: With the images.
        size: Longest side in pixels; a smaller image is not enlarged.
    """
    from tqdm.auto import tqdm

    plain = undecoded(dataset.with_format(None).select_columns([column]), column)
    result = Thumbnails()
    for row in tqdm(np.asarray(rows).tolist(), desc="pictures", unit="image", leave=False):
        cell = plain[row][column]
        if cell is None:
            result.broken[row] = "no image"
            continue
        try:
            picture = small_rgb(cell, size)
        except Exception as error:  # readers raise what they like on broken files; a report must not end there
            result.broken[row] = type(error).__name__
            continue
        result.data[row] = _encoded(picture)
        result.pixels[row] = np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)).ravel()
    return result


def small_rgb(cell: Any, size: int) -> Image.Image:
    """Return an image in RGB, turned as its EXIF data say, on white where it is transparent, at most `size` wide and high.

    Args:
        cell: A PIL image, or {"bytes", "path"}.
        size: In pixels.
    """
    from datasets import Image as Feature

    with warnings.catch_warnings():  # of very large images: it is only to be looked at
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Feature().decode_example(cell)
    if image.mode in _DEEP or image.mode.startswith("I;"):
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.thumbnail((size, size), Image.Resampling.BICUBIC)
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return the upper 8 of 16 bits, or 32 bits stretched from their lowest to their highest value."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((values >> 8).astype(np.uint8))
    values = np.nan_to_num(values.astype(np.float64))
    low, high = values.min(), values.max()
    return Image.fromarray(((values - low) * (255 / (high - low or 1))).astype(np.uint8))


def _encoded(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, KIND, quality=_QUALITY)
    return file.getvalue()
