"""A data set with images, its scores, and what a publication of it must look like."""

import hashlib
import io

import datasets
import numpy as np
from PIL import Image

from hf_mimic import ScoreTable

CLASSES = ["cat", "dog", "owl"]


def picture(number):
    """Return the bytes of an image file, JPEG or PNG by turns."""
    pixels = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG" if number % 2 else "PNG")
    return file.getvalue()


def rows(size=30, *, start=0, **columns):
    """Return a data set with ids from `start`, images and labels."""
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES), sample_id=datasets.Value("int64")
    )
    ids = np.arange(start, start + size)
    images = [{"bytes": picture(int(i)), "path": None} for i in ids]
    made = datasets.Dataset.from_dict({"image": images, "label": ids % 3, "sample_id": ids}, features=features)
    for name, values in columns.items():
        made = made.add_column(name, values)
    return made


def is_wrong(ids):
    return np.asarray(ids) % 5 == 0


def scores(size=30, *, folder=None, visits=2):
    """Return the scores of ids 0 ... size - 1, of which every fifth is wrong."""
    table, ids = ScoreTable(folder), np.arange(size)
    wrong = is_wrong(ids)
    for epoch in range(visits):
        noise = np.random.default_rng(epoch).normal(0, 0.1, size)
        trust = np.where(wrong, 0.05, 0.95)
        values = {"mimic_score": np.where(wrong, -1, 1) + noise, "relative_weight": np.where(wrong, 0.5, 1.1)}
        table.record(ids, epoch=epoch, step=epoch, loss=1.0 + wrong, ref_loss=0.2 + wrong, ref_trust=trust, **values)
    if folder is not None:
        table.flush()
    return table


def md5s(dataset):
    """Return id to md5 of the image's file."""
    plain = dataset.cast_column("image", datasets.Image(decode=False))
    return {row["sample_id"]: hashlib.md5(row["image"]["bytes"]).hexdigest() for row in plain}
