"""A report of scores: numbers as JSON, figures, and one HTML page on which a person chooses the cut.

Read `build_report`. Rows come from report_rows.py, numbers from report_numbers.py, figures from report_figures.py, the
page from report_html.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_mimic.files import write_atomically
from hf_mimic.neighbours import confusions, neighbour_votes
from hf_mimic.report_figures import check_matplotlib, draw_figures
from hf_mimic.report_health import health_numbers
from hf_mimic.report_html import data_uri, render
from hf_mimic.report_numbers import agreement, by_epoch, by_length, distributions, drift, number, per_class, summary
from hf_mimic.report_options import ReportOptions
from hf_mimic.report_rows import Rows, default_cut, read_rows
from hf_mimic.report_sampling import best_and_worst, choose_pictures, choose_rows
from hf_mimic.scores import ScoreTable
from hf_mimic.thumbnails import Thumbnails, make_thumbnails

if TYPE_CHECKING:
    from datasets import Dataset

_BY_EPOCH = ("mimic_score", "relative_weight", "clip_score", "loss")


@dataclass(frozen=True)
class Report:
    """Where a report is, and its numbers.

    Args:
        html: The page.
        json: The numbers.
        figures: PNG and SVG files.
        numbers: What the JSON holds.
    """

    html: Path
    json: Path
    figures: list[Path]
    numbers: dict[str, Any] = field(repr=False)


def build_report(
    table: ScoreTable | None,
    output_dir: str | Path,
    *,
    dataset: Dataset | None = None,
    filters: Mapping[str, np.ndarray] | None = None,
    compare: Mapping[str, Mapping[str, Any]] | None = None,
    health: Mapping[str, Any] | None = None,
    options: ReportOptions | None = None,
) -> Report:
    """Write `report.html`, `report.json` and `figures/`.

    Args:
        table: The scores of S samples; None takes the columns that `attach_scores` gave the data set.
        output_dir: Made if it is not there.
        dataset: The rows that were scored, with images, labels or captions. Only the images shown are decoded.
        filters: Name to what a filter's `predict(table)` returned (S,): how far they agree.
        compare: Name of a data set to its quality, such as `noise_rate`, `retained`, `mean_score`, and `noise` if known.
        health: What the run said: of mimic_state.json, of trainer_state.json, or `Health.report`.
        options: What to show.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no score, a column that is named is absent, or scores and data set do not belong together.
    """
    check_matplotlib()
    options = options or ReportOptions()
    rows = read_rows(table, dataset, options)
    cut, why = _cut(rows, options)
    shown = choose_rows(rows.score, rows.labels, options.max_rows, options.seed)
    chosen = choose_pictures(rows.score, shown, cut, options.max_images, options.seed)
    pictures = Thumbnails()
    if rows.dataset is not None and "image" in rows.columns_of:
        pictures = make_thumbnails(rows.dataset, chosen, rows.columns_of["image"])
    numbers = _numbers(rows, cut, why, options) | _extremes(rows, pictures)
    numbers["sampling"] |= {"rows_on_page": len(shown), "sampled": len(shown) < len(rows.ids)}
    numbers["images"] = pictures.counts()
    numbers["notes"] += _notes(numbers)
    missing: dict[str, str] = numbers["missing"]
    parts: dict[str, Callable[[], Any]] = {
        "confusions": lambda: _confusions(rows, pictures, ~(rows.score < cut), options),
        "agreement": lambda: _agreement(rows, filters),
        "compare": lambda: _compared(compare),
    }
    for name, find in parts.items():
        try:
            numbers[name] = find()
        except _MissingError as error:
            numbers[name], missing[name] = None, str(error)
    numbers |= _epochs(rows, table, missing)
    numbers["health"] = health_numbers(rows.columns, health)
    missing |= (
        {} if health else {"health": "Nothing was given of the run (its last checkpoint says how the score was)."}
    )
    return _written(Path(output_dir), numbers, rows, shown, pictures, space=options.space)


class _MissingError(Exception):
    """Says in a sentence why a part of the report is not there."""


def _cut(rows: Rows, options: ReportOptions) -> tuple[float, str]:
    if options.cut is None:
        return default_cut(rows)
    if not math.isfinite(options.cut):
        raise ValueError(
            f"`cut` must be a finite number, got {options.cut}. Leave it out for one that fits the score."
        )
    return float(options.cut), "as you said"


def _numbers(rows: Rows, cut: float, why: str, options: ReportOptions) -> dict[str, Any]:
    import hf_mimic

    keep = ~(rows.score < cut)
    found = summary(rows.score)
    classes = per_class(rows.labels, rows.classes, rows.score, keep, rows.columns.get("trust"))
    length = None if rows.text_lengths is None else by_length(rows.text_lengths, rows.score)
    missing = {} if classes else {"classes": "There are no labels."}
    missing |= {} if length else {"caption_length": "There are no captions with a score."}
    kept = {"kept": int(keep.sum()), "dropped": int((~keep).sum()), "kept_share": float(keep.mean())}
    return {
        "title": options.title,
        "version": hf_mimic.__version__,
        "score": rows.score_name,
        "cut": {"value": cut, "why": why, **kept},
        "summary": found,
        "columns": {name: summary(values) for name, values in rows.columns.items()},
        "sampling": {"rows": len(rows.ids), "seed": options.seed},
        "classes": classes,
        "class_names": rows.classes,
        "caption_length": length,
        "notes": [*rows.notes],
        "missing": missing,
    }


def _notes(numbers: Mapping[str, Any]) -> list[str]:
    sampling, images = numbers["sampling"], numbers["images"]
    notes = []
    if sampling["sampled"]:
        notes.append(
            f"This page holds a sample of {sampling['rows_on_page']:,} of {sampling['rows']:,} rows, with every class and "
            "every part of its scores in proportion. What follows the cut counts the sample; report.json counts all rows."
        )
    unread = {name: count for name, count in images.items() if name not in ("shown", "no image")}
    if unread:
        kinds = ", ".join(f"{name} {count:,}" for name, count in unread.items())
        notes.append(f"{sum(unread.values()):,} of the images looked at do not decode ({kinds}).")
    if images.get("no image"):
        notes.append(f"{images['no image']:,} of the rows looked at have no image.")
    if 0 < images["shown"] < sampling["rows_on_page"]:
        notes.append(f"There are pictures of {images['shown']:,} of {sampling['rows_on_page']:,} rows on this page.")
    known = numbers["summary"]
    if known["scored"] > 1 and known["min"] == known["max"]:
        notes.append(f"All scores are equal ({known['min']:.4g}): they tell no sample from another.")
    return notes


def _extremes(rows: Rows, pictures: Thumbnails) -> dict[str, Any]:
    """Return the best and the worst samples."""
    result = {}
    for name, places in zip(("best", "worst"), best_and_worst(rows.score), strict=True):
        result[name] = [
            {
                "row": row,
                "id": int(rows.ids[row]),
                "score": float(rows.score[row]),
                "label": rows.classes[rows.labels[row]] if rows.labels[row] >= 0 else None,
                "caption": caption,
                "picture": data_uri(pictures.data[row]) if row in pictures.data else None,
                "broken": row in pictures.broken,
            }
            for row, caption in zip(places.tolist(), rows.captions(places), strict=True)
        ]
    return result


def _epochs(rows: Rows, table: ScoreTable | None, missing: dict[str, str]) -> dict[str, Any]:
    """Return the distributions by epoch and their drift, of the score itself or of what it was made from."""
    order = (rows.score_name, *_BY_EPOCH)
    name = next((n for n in order if n in rows.columns and n not in ("trust", "ref_trust", "kept")), None)
    if table is None or name is None:
        missing["epochs"] = "Scores that are columns have no epochs: give the folder of the score table."
        return {"epochs": None, "drift": None, "by_epoch_of": name}
    epochs, values = by_epoch(table.matrix(name))
    return {"epochs": distributions(epochs, values), "drift": drift(epochs, values), "by_epoch_of": name}


def _confusions(rows: Rows, pictures: Thumbnails, keep: np.ndarray, options: ReportOptions) -> dict[str, Any]:
    labels, features, by = rows.labels, options.features, "the features that were given"
    if features is not None and rows.dataset is None:
        raise ValueError("`features` must come with a data set, got none: they are one per row of it.")
    if len({*labels[labels >= 0].tolist()}) < 2:
        raise _MissingError("Confusions need labels of at least two classes.")
    if features is None:
        known = np.asarray(sorted(pictures.pixels), dtype=np.int64)
        if len(known) < 3 or (keep[known] & (labels[known] >= 0)).sum() < 2:
            raise _MissingError("Neighbours are found by features, or by at least three images: there are too few.")
        features = np.stack([pictures.pixels[row] for row in known.tolist()])
        by = f"the pixels (8 x 8) of the {len(known):,} pictures on this page: a rough guide; give features for a good one"
        labels, keep = labels[known], keep[known]
    asked, said = neighbour_votes(features, labels, keep, seed=options.seed)
    size = min(10, int((keep & (labels >= 0)).sum()) - 1)
    return confusions(labels[asked], said, rows.classes) | {"by": by, "neighbours": size}


def _agreement(rows: Rows, filters: Mapping[str, np.ndarray] | None) -> dict[str, Any]:
    if not filters:
        raise _MissingError("No decisions of filters were given.")
    samples = rows.samples
    for name, keep in filters.items():
        given = np.asarray(keep)
        if given.shape != (samples,) or given.dtype != bool:
            raise ValueError(
                f"the filter {name!r} must have one boolean per scored sample, {samples}, got {given.dtype} of shape "
                f"{given.shape}. Give what its `predict(table)` returned."
            )
    there = rows.found >= 0
    return agreement({name: rows.by_row(keep)[there] for name, keep in filters.items()})


def _compared(compare: Mapping[str, Any] | None) -> dict[str, dict[str, float | None]]:
    """Return the numbers of each data set."""
    if not compare:
        raise _MissingError("No other data set was given to compare with.")
    result = {}
    for name, given in compare.items():
        values = given.as_dict() if hasattr(given, "as_dict") else given
        if not isinstance(values, Mapping):
            raise ValueError(f"the quality of {name!r} must be names and numbers, got {type(values).__name__}.")
        kinds = (int, float, np.integer, np.floating)
        result[str(name)] = {str(k): number(v) for k, v in values.items() if isinstance(v, kinds)}
    return result


def _written(
    folder: Path, numbers: dict[str, Any], rows: Rows, shown: np.ndarray, pictures: Thumbnails, *, space: bool
) -> Report:
    folder.mkdir(parents=True, exist_ok=True)
    page = render(numbers, rows, shown, pictures)
    figures = draw_figures(numbers, pictures, folder / "figures")
    for name in ("best", "worst"):
        numbers[name] = [{k: v for k, v in sample.items() if k != "picture"} for sample in numbers[name]]
    text = json.dumps(numbers, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    files = {"report.html": page, "report.json": text}
    if space:
        title = json.dumps(numbers["title"], ensure_ascii=False)
        lines = [f"title: {title}", "colorFrom: blue", "colorTo: yellow", "sdk: static", "app_file: report.html"]
        files["README.md"] = "\n".join(["---", *lines, "---", "", "A report of hf_mimic: open report.html.", ""])
    for name, content in files.items():
        data = content.encode("utf-8", "replace")
        write_atomically(folder / name, lambda file, data=data: file.write(data))  # type: ignore[misc]
    return Report(folder / "report.html", folder / "report.json", figures, numbers)
