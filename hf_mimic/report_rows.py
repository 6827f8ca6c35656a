"""What a report is about: the rows of a data set with their scores, labels and captions, joined by id.

Read `read_rows`. Nothing is decoded here.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hf_mimic.checks import check_choice
from hf_mimic.data import read_sample_ids
from hf_mimic.joins import find_ids
from hf_mimic.pairs import identified
from hf_mimic.report_options import ReportOptions
from hf_mimic.scores import VALUES, ScoreTable
from hf_mimic.trust import most_f1

if TYPE_CHECKING:
    from datasets import Dataset

SCORES = ("trust", "mimic_score", "relative_weight", "clip_score", "ref_trust", "kept")  # higher is better
_COLUMNS = ("trust", *VALUES)


@dataclass(frozen=True, eq=False)
class Rows:
    """N rows of a data set, or N scored samples where there is no data set.

    Args:
        ids: Sample ids (N,), int64.
        columns: Name to values (N,), float32, NaN where there is none; only those with any value.
        score_name: Which of the columns is cut.
        found: Place of each row among the scored samples (N,), -1 for a row that is not among them.
        samples: How many were scored.
        labels: Place of the label in `classes` (N,), int32, -1 for none.
        classes: Names of the labels.
        text_lengths: Characters of each caption (N,); None where there are no captions.
        notes: What a reader must know, in sentences.
        dataset: With the images and captions; row i is sample `ids[i]`.
        columns_of: Role ("image", "label", "text") to the name of the column; a role without one is absent.
    """

    ids: np.ndarray
    columns: dict[str, np.ndarray]
    score_name: str
    found: np.ndarray
    samples: int
    labels: np.ndarray
    classes: list[str]
    text_lengths: np.ndarray | None
    notes: list[str]
    dataset: Dataset | None = None
    columns_of: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def score(self) -> np.ndarray:
        """The score that is cut (N,), float64: a cut must not be rounded to float32 before it is compared."""
        return self.columns[self.score_name].astype(float)

    def captions(self, rows: np.ndarray) -> list[str]:
        """Return the captions of some rows; of a list of captions, the first."""
        if self.dataset is None or "text" not in self.columns_of:
            return [""] * len(rows)
        column = self.columns_of["text"]
        cells = self.dataset.select_columns([column]).with_format(None)[np.asarray(rows).tolist()][column]
        return [_first(cell) for cell in cells]

    def by_row(self, keep: np.ndarray) -> np.ndarray:
        """Return a mask of the scored samples (S,) as one of the rows (N,): what is not scored is kept."""
        return np.where(self.found >= 0, np.asarray(keep, dtype=bool)[self.found], True)


def read_rows(table: ScoreTable | None, dataset: Dataset | None, options: ReportOptions) -> Rows:
    """Join scores and data set.

    Args:
        table: The scores; None takes the columns that `attach_scores` gave the data set.
        dataset: Rows with ids (or whose row numbers are the ids); None reports on the scores alone.
        options: Names of columns.

    Raises:
        ValueError: If there is no score, a column that is named is absent, or the two do not belong together.
    """
    if table is None and dataset is None:
        raise ValueError("a report must have scores or a data set with score columns, got neither.")
    given = None if dataset is None else dataset.with_format(None)
    scores = table.aggregate() if table is not None else _attached(given, options.sample_id_column)
    columns_of = {} if given is None else _columns_of(given, options)
    known, notes = scores["sample_id"].to_numpy(), []
    if given is None:
        ids, found = known, np.arange(len(known))
    else:
        numbered = options.sample_id_column not in given.column_names
        ids = row_ids(given, options.sample_id_column)
        found = _match(ids, known, numbered=numbered)
        notes += _unmatched(found, len(known))
    columns = {n: _taken(scores[n], found) for n in _COLUMNS if scores[n].null_count < len(scores)}
    columns = {name: values for name, values in columns.items() if np.isfinite(values).any()}
    score_name = _score_name(columns, options.score, len(ids))
    labels, classes = np.full(len(ids), -1, dtype=np.int32), list[str]()
    if given is not None and "label" in columns_of:
        labels, classes = read_labels(given, columns_of["label"])
    notes += _gaps(columns_of, columns[score_name], labels, given is not None)
    lengths = _lengths(given, columns_of["text"]) if given is not None and "text" in columns_of else None
    return Rows(ids, columns, score_name, found, len(known), labels, classes, lengths, notes, given, columns_of)


def row_ids(dataset: Dataset, column: str) -> np.ndarray:
    """Return the ids of the rows (N,), int64: integers, hashes of strings, or row numbers where there is no column.

    Nothing but the ids is read: adding a column to a data set would copy every image of one that was shuffled.
    """
    if column not in dataset.column_names:
        return np.arange(len(dataset))
    return read_sample_ids(identified(dataset.select_columns([column]), column), column)


def default_cut(rows: Rows) -> tuple[float, str]:
    """Return where the score is cut if nobody says, and why there."""
    score = rows.score[np.isfinite(rows.score)].astype(float)
    if rows.score_name in ("trust", "ref_trust"):
        return _short(most_f1(score), score), "the highest expected F1 of finding wrong labels, as TrustFilter cuts"
    if rows.score_name == "relative_weight":
        return 1.0, "the uniform weight, the papers' 1/b"
    if rows.score_name == "mimic_score":
        return 0.0, "below 0 a sample's gradient points away from the reference"
    return _short(float(np.median(score)), score), "the median: no rule is known for this score"


def _short(cut: float, score: np.ndarray) -> float:
    """Return the number of fewest digits that keeps the same samples."""
    kept = (score >= cut).sum()
    for digits in range(2, 17):
        if (score >= round(cut, digits)).sum() == kept:
            return round(cut, digits)
    return cut


def _attached(dataset: Dataset, sample_id_column: str) -> pa.Table:
    """Return the score columns of a data set as `ScoreTable.aggregate` would."""
    names = [name for name in _COLUMNS if name in dataset.column_names]
    if not names:
        raise ValueError(
            f"the data set must have a score column ({', '.join(_COLUMNS)}), got {', '.join(dataset.column_names)}. Give "
            "the scores of a run (--scores), or what `hf-mimic filter --keep_all` wrote."
        )
    ids = row_ids(dataset, sample_id_column)
    cells = dataset.select_columns(names).with_format("arrow")[:]
    absent = pa.nulls(len(ids), pa.float32())
    columns = [cells[name].cast(pa.float32()) if name in names else absent for name in _COLUMNS]
    return pa.table([pa.array(ids), *columns], names=["sample_id", *_COLUMNS]).sort_by("sample_id")


def _columns_of(dataset: Dataset, options: ReportOptions) -> dict[str, str]:
    """Return role to column: what is named must be there, what is not is taken if it is."""
    from datasets import Image

    named = {"image": options.image_column, "label": options.label_column, "text": options.text_column}
    result = {}
    for role, column in named.items():
        if column is not None and column not in dataset.column_names:
            raise ValueError(
                f"the data set must have the column {column!r}, got {', '.join(dataset.column_names)}. "
                f"Name yours with {role}_column."
            )
        if (column or role) in dataset.column_names:
            result[role] = column or role
    if "image" in result and not isinstance(dataset.features[result["image"]], Image):
        kind = dataset.features[result["image"]]
        raise ValueError(
            f"the column {result['image']!r} must hold images, got {kind}. Name the right one with image_column, or cast "
            "it: dataset.cast_column(name, datasets.Image())."
        )
    return result


def _match(ids: np.ndarray, known: np.ndarray, *, numbered: bool) -> np.ndarray:
    """Return the place of each id in `known`, -1 where it is not in it."""
    place, inside = find_ids(known, ids)
    both = int(inside.sum())
    told = f"{len(ids)} rows, {len(known)} scored samples, {both} ids in both"
    if numbered and len(known) and known.max() >= len(ids):
        raise ValueError(
            f"the data set must be the one that was scored: its ids are row numbers, up to {len(ids) - 1}, but the scores "
            f"have an id {known.max()} ({told}). Give the same data set and split."
        )
    if 2 * both < min(len(ids), len(known)) or not both:
        raise ValueError(
            f"scores and data set must belong together: at least half of the ids of the smaller one must be in the other, "
            f"got {told}. Give the data set that was scored, with the ids it had then."
        )
    return np.where(inside, place, -1)


def _unmatched(found: np.ndarray, known: int) -> list[str]:
    rows, extra = int((found < 0).sum()), known - int((found >= 0).sum())
    notes = []
    if extra:
        notes.append(f"{extra:,} of {known:,} scored samples are not in the data set and are left out.")
    if rows and extra:
        warnings.warn(
            f"{rows} of {len(found)} rows have no scores, and {extra} of {known} scored samples are not in the data set. "
            "Is it the data set that was scored?",
            stacklevel=5,
        )
    return notes


def _taken(column: pa.ChunkedArray, found: np.ndarray) -> np.ndarray:
    values = column.cast(pa.float32()).to_numpy()
    return np.where((found >= 0) & np.isfinite(values[found]), values[found], np.nan).astype(np.float32)


def _score_name(columns: Mapping[str, Any], wanted: str | None, size: int) -> str:
    there = [name for name in SCORES if name in columns]
    if wanted is not None:
        check_choice("score", wanted, SCORES)
        if wanted not in there:
            raise ValueError(
                f"the score {wanted!r} must have values, got none in {size} rows. There are: {', '.join(there) or 'none'}."
            )
        return wanted
    if not there:
        raise ValueError(
            f"a report must have scores ({', '.join(SCORES)}), got none: all of them are null in {size} rows. Look at "
            "the log of the run: was every loss not finite, or nothing recorded?"
        )
    return there[0]


def read_labels(dataset: Dataset, column: str) -> tuple[np.ndarray, list[str]]:
    """Return the code of each row's label (N,), int32, -1 for none, and the names; strings and numbers are sorted."""
    from datasets import ClassLabel

    feature = dataset.features[column]
    cells = dataset.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
    if isinstance(feature, ClassLabel):
        codes = cells.fill_null(-1).to_numpy(zero_copy_only=False)
        return np.where(codes < 0, -1, codes).astype(np.int32), list(feature.names)
    if pa.types.is_nested(cells.type):
        raise ValueError(
            f"the column {column!r} must hold one label per row, got {feature}. Name another label_column."
        )
    encoded = cells.dictionary_encode()
    values = encoded.dictionary.to_pylist()
    missing = [isinstance(value, float) and math.isnan(value) for value in values]
    order = sorted((i for i in range(len(values)) if not missing[i]), key=lambda i: values[i])
    rank = np.full(len(values) + 1, -1, dtype=np.int32)  # the last one is for null
    rank[order] = np.arange(len(order))
    return rank[encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)], [str(values[i]) for i in order]


def _gaps(roles: Mapping[str, str], score: np.ndarray, labels: np.ndarray, dataset: bool) -> list[str]:
    notes = []
    unscored, unlabelled = int(np.isnan(score).sum()), int((labels < 0).sum())
    if unscored:
        notes.append(f"{unscored:,} of {len(score):,} rows have no score. They are kept unless you say otherwise.")
    if not dataset:
        notes.append("No data set was given: there are no images, labels or captions.")
    else:
        if "image" not in roles:
            notes.append("The data set has no image column, or none was named: there are no pictures.")
        if "label" not in roles:
            notes.append("The data set has no label column, or none was named: there is nothing by class.")
        elif unlabelled:
            notes.append(f"{unlabelled:,} of {len(labels):,} rows have no label.")
    return notes


def _lengths(dataset: Dataset, column: str) -> np.ndarray:
    cells = dataset.select_columns([column]).with_format("arrow")[:][column]
    if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
        return pa.compute.fill_null(pa.compute.utf8_length(cells), 0).to_numpy().astype(np.int64)
    return np.asarray([len(_first(cell)) for cell in cells.to_pylist()], dtype=np.int64)


def _first(cell: Any) -> str:
    if isinstance(cell, (list, tuple)):
        cell = cell[0] if cell else None
    return "" if cell is None else str(cell)
