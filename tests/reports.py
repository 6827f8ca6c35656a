"""Small data sets with scores, for the tests of reports: encoded pictures of known kinds, and tables."""

from __future__ import annotations

import io
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from hf_mimic.scores import ScoreTable

NAMES = ["ant", "bee", "cat"]
NAN = float("nan")
EVIL = "</script><img src=x onerror=\"document.title='owned'\"><b>&amp;\u2028<!--"


def encoded(picture, kind="PNG", **options):
    """Return a PIL image as a data set holds it."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def plain(shade=0, size=(20, 16)):
    return encoded(Image.new("RGB", size, (shade, 255 - shade, 60)))


def images_of(labels: Any, *, captions: Any = None, kind: Any = None, pictures: Any = None) -> Dataset:
    """Return rows with ids 0, 1 ..., a picture of its own shade each, and labels."""
    size = len(labels)
    columns: dict[str, Any] = {
        "sample_id": list(range(size)),
        "image": pictures or [plain(int(255 * i / size)) for i in range(size)],
        "label": labels,
    }
    features = {"sample_id": Value("int64"), "image": datasets.Image(), "label": kind or ClassLabel(names=NAMES)}
    if captions is not None:
        columns["text"], features["text"] = captions, Value("string")
    return Dataset.from_dict(columns, features=Features(features))


def table_of(scores: Any, ids: Any = None, *, epochs: int = 1, shift: float = 0.01, **values: Any) -> ScoreTable:
    """Return a table with one visit of each sample in each epoch; the mean of the mimic scores is `scores`."""
    table, scores = ScoreTable(), np.asarray(scores, dtype=float)
    ids = np.arange(len(scores)) if ids is None else ids
    for epoch in range(epochs):
        moved = scores + shift * (epoch - (epochs - 1) / 2)
        table.record(ids, epoch=epoch, step=epoch, mimic_score=moved, **values)
    return table
