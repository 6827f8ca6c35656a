"""What a report shows, as one value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class ReportOptions:
    """What a report shows.

    Args:
        title: Of the page.
        score: Column that is cut; by default the first that there is of trust, mimic_score, relative_weight, clip_score.
        cut: Where the slider starts; by default what fits the score, and the page says what.
        image_column: By default "image", if the data set has it.
        label_column: By default "label", if the data set has it.
        text_column: With captions; by default "text", if the data set has it.
        sample_id_column: Integer ids; if there is no such column, row numbers are the ids.
        features: (N, D), one row per row of the data set, to find neighbours by; by default the pixels of the pictures.
        max_rows: Of how many rows the page holds the numbers; of more it holds a seeded sample, and says so.
        max_images: How many images are decoded and shown small.
        seed: Of the samples.
        space: Also write the README.md of a static Space.
    """

    title: str = "Scores of a data set"
    score: str | None = None
    cut: float | None = None
    image_column: str | None = None
    label_column: str | None = None
    text_column: str | None = None
    sample_id_column: str = "sample_id"
    features: np.ndarray | None = None
    max_rows: int = 25_000
    max_images: int = 2_000
    seed: int = 0
    space: bool = False
