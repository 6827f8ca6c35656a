"""What `hf-mimic report` does: read the files that are named, find what else there is, build the report."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_mimic.command_arguments import ReportArguments
from hf_mimic.cuts import ScoreFilter
from hf_mimic.data import load_rows
from hf_mimic.ensembles import EnsembleFilter
from hf_mimic.expressions import CombinedFilter
from hf_mimic.filters import MixtureFilter, ThresholdFilter, TrustFilter, TwoMeansFilter
from hf_mimic.joins import find_ids
from hf_mimic.report import build_report
from hf_mimic.report_health import last_checkpoint, read_health
from hf_mimic.report_options import ReportOptions
from hf_mimic.report_rows import row_ids
from hf_mimic.scores import ScoreTable

if TYPE_CHECKING:
    from datasets import Dataset


_NOT_NEGATIVE = CombinedFilter("~(mimic_score < 0)")


def run_report(options: ReportArguments) -> dict[str, Any]:
    """Build the report; return the lines of a table, name to value.

    Raises:
        ValueError: If what is named is absent, or does not fit together.
    """
    if options.scores is None and options.dataset is None:
        raise ValueError("--scores or a --dataset with score columns must be given, got neither.")
    dataset = None if options.dataset is None else load_rows(options.dataset, options.split, **options.place)
    table = None if options.scores is None else ScoreTable.load(options.scores)
    filters = {} if table is None else table_filters(table)
    mine = _own_filter(dataset, table, options)
    if mine is not None:
        filters[options.keep_column or "keep"] = mine
    beside = None if options.scores is None else last_checkpoint(options.scores)
    path = options.health or beside
    report = build_report(
        table,
        options.output_dir,
        dataset=dataset,
        filters=filters,
        compare=None if options.compare is None else _read_json(options.compare),
        health=None if path is None else read_health(path),
        options=_options(options),
    )
    numbers = report.numbers
    cut = numbers["cut"]
    return {
        "rows": f"{numbers['summary']['rows']} ({numbers['summary']['scored']} scored)",
        "cut": f"{numbers['score']} >= {cut['value']:g} keeps {cut['kept']} ({cut['kept_share']:.1%})",
        "pictures": f"{numbers['images']['shown']} of {sum(numbers['images'].values())} decoded",
        "health": "not known: no checkpoint" if path is None else f"from {path}",
        "page": f"{report.html} ({report.html.stat().st_size / 1e6:.1f} MB)",
        "numbers": report.json,
        "figures": f"{len(report.figures)} files in {Path(options.output_dir) / 'figures'}",
    }


def table_filters(table: ScoreTable) -> dict[str, np.ndarray]:
    """Return what the filters that fit these scores keep (S,), by name."""
    scores = table.aggregate()
    there = {name for name in scores.column_names if scores[name].null_count < len(scores)}
    rules: dict[str, ScoreFilter] = {}
    if "trust" in there:
        rules["trust"] = TrustFilter()
    weights = scores["relative_weight"].drop_null().to_numpy()
    if len(weights) and np.ptp(weights) > 1e-6 * weights.max():
        rules["threshold 1/b"] = ThresholdFilter()
    if "mimic_score" in there:
        rules |= {"two means": TwoMeansFilter(), "mixture": MixtureFilter(), "mimic_score >= 0": _NOT_NEGATIVE}
    if there & {"mimic_score", "clip_score", "loss"}:
        rules["ensemble"] = EnsembleFilter()
    with warnings.catch_warnings():  # that one filter of several sees no two groups is what the page shows
        warnings.simplefilter("ignore", UserWarning)
        return {name: rule.fit_predict(table) for name, rule in rules.items()}


def _own_filter(dataset: Dataset | None, table: ScoreTable | None, options: ReportArguments) -> np.ndarray | None:
    """Return the decisions in a column of the data set, one per scored sample."""
    name = options.keep_column
    if dataset is None or (name or "keep") not in dataset.column_names:
        if name is not None:
            columns = "no data set" if dataset is None else ", ".join(dataset.column_names)
            raise ValueError(
                f"the data set must have the column {name!r}, got {columns}. Name yours with --keep_column."
            )
        return None
    ids = row_ids(dataset, options.sample_id_column)
    cells = dataset.select_columns([name or "keep"]).with_format("arrow")[:][name or "keep"].to_pylist()
    known = np.sort(ids) if table is None else table.aggregate()["sample_id"].to_numpy()
    keep = np.ones(len(known), dtype=bool)  # what has no decision is kept
    place, here = find_ids(known, ids)
    keep[place[here]] = np.asarray([cell is None or bool(cell) for cell in cells])[here]
    return keep


def _options(options: ReportArguments) -> ReportOptions:
    features = None
    if options.features is not None:
        try:
            features = np.load(options.features, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--features must be a .npy file of numbers (N, D), got {options.features}: {error}"
            ) from error
    names = (
        "score",
        "cut",
        "image_column",
        "label_column",
        "text_column",
        "sample_id_column",
        "max_rows",
        "max_images",
    )
    same = {name: getattr(options, name) for name in (*names, "seed", "space")}
    title = options.title or f"Scores of {Path(options.dataset or str(options.scores)).name}"
    return ReportOptions(title=title, features=features, **same)


def _read_json(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--compare must be a JSON file, got {path}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--compare must hold names of data sets with their numbers, got a {type(found).__name__}.")
    return found
