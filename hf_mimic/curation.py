"""What of a data set is published: which rows, why, and how many of each kind.

Read `choose`, then `counted`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from hf_mimic.cuts import FilterResult, ScoreFilter
from hf_mimic.data import read_sample_ids
from hf_mimic.filter_words import in_words, threshold_of
from hf_mimic.joins import find_ids
from hf_mimic.scores import ScoreTable, attach_scores
from hf_mimic.selection_record import Counts, count_by

if TYPE_CHECKING:
    from datasets import Dataset

_NO_SCORE, _NO_ROW = "no score", "not among the rows that were given"


@dataclass(frozen=True)
class Choice:
    """Which rows of a data set are kept, and why.

    Args:
        rows: All that were given, with scores as columns (N).
        keep: Booleans (N,).
        decisions: `sample_id`, `keep`, `reason` of all samples that are known, also of those filtered out before.
        rule: In words.
        threshold: Of the rule.
        unscored: How many rows have no score.
    """

    rows: Dataset
    keep: np.ndarray
    decisions: pa.Table
    rule: str
    threshold: Any
    unscored: int

    @property
    def kept(self) -> Dataset:
        """The rows that are kept."""
        return self.rows if self.keep.all() else self.rows.select(np.flatnonzero(self.keep))

    @property
    def filtered_before(self) -> bool:
        """Whether samples are known that are not among the rows."""
        return len(self.decisions) > len(self.rows)


def choose(
    rows: Dataset,
    table: ScoreTable | None,
    rule: ScoreFilter | FilterResult | str | None,
    *,
    sample_id_column: str,
    drop_unscored: bool,
) -> Choice:
    """Decide by a filter, by what it returned, or by the column `keep`.

    Args:
        rows: With ids.
        table: Their scores.
        rule: A filter, fitted here if it is not; its `FilterResult`; or words on who decided.
        sample_id_column: Name of the ids.
        drop_unscored: Whether rows without a score are left out; they are kept otherwise.

    Raises:
        ValueError: If nothing decides, two things disagree, or no row is kept.
    """
    ids = read_sample_ids(rows, sample_id_column)
    words, threshold, result = _result(rule, table)
    if result is not None:
        rows = _attached(rows, ids, table, result, sample_id_column)
    elif "keep" not in rows.column_names and words is None:
        raise ValueError(
            "a curated data set must have the column `keep`, or a `rule` that decides, got neither. Attach one: "
            "attach_scores(dataset, table, keep=...), or give rule=TrustFilter() with the scores."
        )
    elif table is not None:
        rows = _with_scores(rows, table, sample_id_column)
    said = keep_column(rows)
    keep = np.asarray(said.fill_null(not drop_unscored))
    if not keep.any():
        raise ValueError(
            f"at least one row must be kept, got none of {len(rows)}. Choose a rule that keeps more; nothing was published."
        )
    decisions = _decisions(ids, said, keep, result, table)
    by_result = result is not None  # it may have seen other tables, too
    unscored = said.null_count if by_result or table is None else int((~np.isin(ids, _scored(table))).sum())
    words = words or ("by a filter that is not named" if by_result else "by the column `keep`")
    return Choice(rows, keep, decisions, words, threshold, unscored)


def _result(rule: Any, table: ScoreTable | None) -> tuple[str | None, Any, FilterResult | None]:
    """Return the rule in words, its threshold, and what it decided."""
    if rule is None or isinstance(rule, str):
        return rule, None, None
    if isinstance(rule, FilterResult):
        return rule.rule or None, None, rule
    if not isinstance(rule, ScoreFilter):
        raise ValueError(f"`rule` must be a filter, its FilterResult or words, got a {type(rule).__name__}.")
    if table is None:
        raise ValueError("a filter must come with the `scores` that it decides on, got none.")
    try:
        check_is_fitted(rule)
    except NotFittedError:
        rule = clone(rule).fit(table)
    return in_words(rule), threshold_of(rule), rule.filter(table)


def _attached(rows: Dataset, ids: np.ndarray, table: ScoreTable | None, result: FilterResult, column: str) -> Dataset:
    """Return the rows with the column `keep` of a result, and the scores where these are not yet there."""
    place, known = find_ids(result.sample_id, ids)
    keep = pa.array(result.keep[place], mask=~known)
    if not known.any():
        raise ValueError(
            f"no `{column}` of the data set is among the {len(result)} samples of the rule. Use the data set that was "
            "scored, with the ids it had then."
        )
    if "keep" in rows.column_names:
        if not keep_column(rows).equals(keep):
            raise ValueError(
                "the column `keep` of the data set must be what the rule decides, got another one. Remove it "
                "(dataset.remove_columns('keep')), or leave the rule out."
            )
        return rows
    if table is not None:
        rows = _with_scores(rows, table, column)
    return rows.add_column("keep", keep)


def _with_scores(rows: Dataset, table: ScoreTable, column: str) -> Dataset:
    """Return the rows with their scores as columns, unless they have them."""
    there = {"n_visits", "loss"} <= {*rows.column_names}
    return rows if there else attach_scores(rows, table, sample_id_column=column)


def keep_column(rows: Dataset) -> pa.Array:
    """Return the decisions of the rows, null where there is none."""
    if "keep" not in rows.column_names:
        return pa.array(np.ones(len(rows), dtype=bool))
    found = rows.select_columns("keep").with_format("arrow")[:]["keep"].combine_chunks()
    if not pa.types.is_boolean(found.type):
        raise ValueError(
            f"the column `keep` must hold booleans, got {found.type}: is it one of your own? Rename it, then attach what "
            "a filter decided."
        )
    return found


def _decisions(
    ids: np.ndarray, said: pa.Array, keep: np.ndarray, result: FilterResult | None, table: ScoreTable | None
) -> pa.Table:
    """Return `sample_id`, `keep` and `reason` of all samples that are known, ordered by id."""
    scored = np.zeros(0, np.int64) if table is None else _scored(table)
    every = np.union1d(ids, result.sample_id if result is not None else scored)
    kept = np.isin(every, ids[keep])
    if result is None:
        sentences: tuple[str, ...] = (_NO_SCORE,)
        code, known = np.zeros(len(every), np.int64), np.isin(every, ids[np.asarray(said.is_null())])
    else:
        sentences = (*result.reasons, _NO_SCORE, _NO_ROW)
        place, found = find_ids(result.sample_id, every)
        code, known = np.where(found, result.code[place], len(result.reasons)), np.ones(len(every), bool)
        code[found & result.keep[place] & ~np.isin(every, ids)] = len(sentences) - 1  # what dropped it is not known
    reason = pa.array(sentences, pa.string()).take(pa.array(code, mask=~known))
    return pa.table({"sample_id": every, "keep": kept, "reason": reason})


def _scored(table: ScoreTable) -> np.ndarray:
    return table.aggregate()["sample_id"].to_numpy()


def counted(choice: Choice, column: str, *, most: int | None = None) -> dict[str, Counts]:
    """Return value to counts before and after, of a column of labels or groups; class labels by name, in their order.

    Args:
        choice: What was decided.
        column: Of the rows.
        most: Values that are told apart, the most frequent; the others are counted together.

    Raises:
        ValueError: If there is no such column.
    """
    from datasets import ClassLabel

    if column not in choice.rows.column_names:
        raise ValueError(f"the data set must have the column {column!r}, got {', '.join(choice.rows.column_names)}.")
    feature = choice.rows.features[column]
    values = choice.rows.select_columns(column).with_format("arrow")[:][column].to_pylist()
    if isinstance(feature, ClassLabel):
        found = count_by((None if v is None or v < 0 else feature.names[v] for v in values), choice.keep)
        found = {name: found.get(name, Counts(0, 0)) for name in dict.fromkeys([*feature.names, *found])}
    else:
        found = dict(sorted(count_by(values, choice.keep).items()))
    if most is not None:
        found = _with_the_rest(found, most)
    return {k: Counts(None, v.after) for k, v in found.items()} if choice.filtered_before else found


def _with_the_rest(found: Mapping[str, Counts], most: int) -> dict[str, Counts]:
    ranked = sorted(found, key=lambda name: -(found[name].before or 0))
    rest = ranked[most:]
    if not rest:
        return dict(found)
    shown = {name: counts for name, counts in found.items() if name not in {*rest}}
    other = Counts(sum(found[n].before or 0 for n in rest), sum(found[n].after for n in rest))
    return {**shown, f"{len(rest)} others": other}


def label_column(rows: Dataset, named: str | None) -> str | None:
    """Return the column of the labels: the one that is named, or `label` if it has one class per row.

    A mask, a box or a number with a fraction that is called `label` is none.
    """
    if named is not None or "label" not in rows.column_names:
        return named
    kind = getattr(rows.features["label"], "pa_type", None)
    of_classes = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
    return "label" if kind is not None and any(is_one(kind) for is_one in of_classes) else None
