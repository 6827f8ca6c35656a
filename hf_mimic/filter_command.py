"""What `hf-mimic filter` does: join the scores, decide by one rule, write the curated data set.

Read `filter_data`, then `decided_rows`, with which `hf-mimic push` begins, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from hf_mimic.command_arguments import FilterArguments, RuleArguments
from hf_mimic.cuts import FilterResult
from hf_mimic.data import load_rows, read_sample_ids
from hf_mimic.joins import find_ids
from hf_mimic.pairs import identified
from hf_mimic.parquet import write_parquet
from hf_mimic.rules import decide
from hf_mimic.scores import ATTACHED, ScoreTable, attach_scores
from hf_mimic.shared_scores import open_scores

if TYPE_CHECKING:
    from datasets import Dataset


class Decided(NamedTuple):
    """A data set with its scores and the column `keep`, and where these come from."""

    rows: Dataset
    table: ScoreTable
    result: FilterResult


def filter_data(options: FilterArguments, rule: RuleArguments) -> dict[str, Any]:
    """Attach the scores, decide what to keep, write Parquet; return the lines of a table.

    Raises:
        ValueError: If data set, scores and rule do not fit together, or nothing is kept.
    """
    check_output(options)
    given = load_rows(options.dataset, options.split, **options.place)
    scored, _, result = decided_rows(given, options.scores, rule, options.sample_id_column)
    decided = scored.select_columns("keep").with_format("arrow")[:]["keep"]
    kept = np.asarray(decided.fill_null(not rule.drop_unscored))
    if not kept.any():
        raise ValueError("at least one row must be kept, got none. Choose a rule that keeps more.")
    if options.keep_all:
        curated = _with_reasons(scored, result, options.sample_id_column)
    else:
        curated = scored.select(np.flatnonzero(kept))
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    write_parquet(curated, Path(options.output))
    without = f"{decided.null_count} ({'left out' if rule.drop_unscored else 'kept'})"
    return {
        "rows": len(scored),
        "without a score": without,
        "kept": share(kept),
        "rule": result.rule,
        "written": options.output,
    }


def decided_rows(given: Dataset, scores: str, rule: RuleArguments, sample_id_column: str) -> Decided:
    """Attach the scores and the column `keep`; the columns of an earlier filter are replaced.

    Args:
        given: The data set that was scored.
        scores: Folder with score shards, or a Hub data set that has some.
        rule: What decides.
        sample_id_column: Added, in row order, if the data set has none.

    Raises:
        ValueError: If data set, scores and rule do not fit together.
    """
    table = open_scores(scores)
    if {"mimic_score", "n_visits", "keep"} <= {*given.column_names}:  # of an earlier filter, not the user's own
        earlier = _earlier(given.column_names)
        print(f"columns of an earlier filter are replaced: {', '.join(earlier)}")
        given = given.remove_columns(earlier)
    rows = identified(given, sample_id_column)
    ids = table.aggregate()["sample_id"].to_numpy()
    if sample_id_column not in given.column_names and ids.max() >= len(rows):
        raise ValueError(
            f"the data set must be the one that was scored: ids are its row numbers, up to {len(rows) - 1}, but the "
            f"scores have an id {ids.max()}. Give the same data set and split."
        )
    result = decide(rule, scores, table)
    known = np.isin(result.sample_id, ids)  # another table may know more
    scored = attach_scores(rows, table, keep=result.keep[known], sample_id_column=sample_id_column)
    return Decided(scored, table, result)


def share(kept: np.ndarray) -> str:
    """Return how many of the rows are kept (N,)."""
    return f"{kept.sum()} ({kept.mean():.1%})"


def _earlier(columns: list[str]) -> list[str]:
    """Return the columns that an earlier filter put behind the user's own, which may have the same names."""
    end = columns.index("keep") + 1
    start = end - 1
    while start and columns[start - 1] in ATTACHED[: ATTACHED.index(columns[start])]:  # always in this order
        start -= 1
    return columns[start:end] + [name for name in columns[end : end + 1] if name == "reason"]


def _with_reasons(rows: Dataset, result: FilterResult, sample_id_column: str) -> Dataset:
    """Return the rows with the column `reason`: why each one is kept or not, null without a score."""
    if "reason" in rows.column_names:
        raise ValueError("the data set must not have the column reason yet. Rename it, or leave --keep_all out.")
    ids = read_sample_ids(rows, sample_id_column)
    place, known = find_ids(result.sample_id, ids)
    code = pa.array(result.code[place], mask=~known)
    return rows.add_column("reason", pa.array(result.reasons).take(code))


def check_output(options: FilterArguments) -> None:
    """Refuse to write what is no Parquet file, or over the data set.

    Raises:
        ValueError: If the output is one of them.
    """
    output, source = Path(options.output).resolve(), Path(options.dataset).resolve()
    if output.suffix != ".parquet":
        raise ValueError(f"--output must be a .parquet file, got {options.output}.")
    if source.exists() and (output == source or source in output.parents):
        raise ValueError(f"--output must not overwrite the data set, got {options.output}. Choose another place.")
