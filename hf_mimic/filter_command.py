"""What `hf-mimic filter` does: join the scores, decide by one rule, write the curated data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hf_mimic.checks import check_choice
from hf_mimic.command_arguments import FilterArguments
from hf_mimic.cuts import FilterResult, ScoreFilter
from hf_mimic.data import load_rows, read_sample_ids
from hf_mimic.ensembles import EnsembleFilter
from hf_mimic.expressions import CombinedFilter
from hf_mimic.filters import MixtureFilter, ThresholdFilter, TrustFilter, TwoMeansFilter, default_filter
from hf_mimic.pairs import identified
from hf_mimic.scores import ATTACHED, ScoreTable, attach_scores

if TYPE_CHECKING:
    from datasets import Dataset

FILTERS: dict[str, Callable[[str | None], ScoreFilter]] = {
    "trust": lambda column: TrustFilter(),
    "threshold": lambda column: ThresholdFilter(),
    "two_means": TwoMeansFilter,
    "mixture": MixtureFilter,
    "ensemble": lambda column: EnsembleFilter(),
}
_RULES = ("filter", "expression", "min_trust", "threshold", "min_score", "top")


def filter_data(options: FilterArguments) -> dict[str, Any]:
    """Attach the scores, decide what to keep, write Parquet; return the lines of a table.

    Raises:
        ValueError: If data set, scores and rule do not fit together, or nothing is kept.
    """
    _check_output(options)
    given = load_rows(options.dataset, options.split)
    table = ScoreTable.load(options.scores)
    if {"mimic_score", "n_visits", "keep"} <= {*given.column_names}:  # of an earlier filter, not the user's own
        earlier = _earlier(given.column_names)
        print(f"columns of an earlier filter are replaced: {', '.join(earlier)}")
        given = given.remove_columns(earlier)
    rows = identified(given, options.sample_id_column)
    highest = table.aggregate()["sample_id"].to_numpy().max()
    if options.sample_id_column not in given.column_names and highest >= len(rows):
        raise ValueError(
            f"the data set must be the one that was scored: ids are its row numbers, up to {len(rows) - 1}, but the "
            f"scores have an id {highest}. Give the same data set and split."
        )
    said, result = decide(options, table)
    known = np.isin(result.sample_id, table.aggregate()["sample_id"].to_numpy())  # another table may know more
    scored = attach_scores(rows, table, keep=result.keep[known], sample_id_column=options.sample_id_column)
    decided = scored.select_columns("keep").with_format("arrow")[:]["keep"]
    kept = np.asarray(decided.fill_null(not options.drop_unscored))
    if not kept.any():
        raise ValueError("at least one row must be kept, got none. Choose a rule that keeps more.")
    if options.keep_all:
        curated = _with_reasons(scored, result, options.sample_id_column)
    else:
        curated = scored.select(np.flatnonzero(kept))
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    curated.to_parquet(options.output)
    without = f"{decided.null_count} ({'left out' if options.drop_unscored else 'kept'})"
    return {
        "rows": len(rows),
        "without a score": without,
        "kept": f"{kept.sum()} ({kept.mean():.1%})",
        "rule": said,
        "written": options.output,
    }


def _earlier(columns: list[str]) -> list[str]:
    """Return the columns that an earlier filter put behind the user's own, which may have the same names."""
    end = columns.index("keep") + 1
    start = end - 1
    while start and columns[start - 1] in ATTACHED[: ATTACHED.index(columns[start])]:  # always in this order
        start -= 1
    return columns[start:end] + [name for name in columns[end : end + 1] if name == "reason"]


def decide(options: FilterArguments, table: ScoreTable) -> tuple[str, FilterResult]:
    """Return the rule in words, and what it keeps."""
    given = [name for name in _RULES if getattr(options, name) is not None]
    if len(given) > 1:
        raise ValueError(f"one rule must decide, got {' and '.join(f'--{name}' for name in given)}. Choose one.")
    rule = _rule(options, table)
    if options.more_scores and not isinstance(rule, EnsembleFilter):
        raise ValueError("--more_scores must come with --filter ensemble, got another rule.")
    scores: Any = table
    if options.more_scores:
        scores = {folder: ScoreTable.load(folder) for folder in (options.scores, *options.more_scores)}
    result = rule.fit(scores).filter(scores)
    return _in_words(rule), result


def _rule(options: FilterArguments, table: ScoreTable) -> ScoreFilter:
    if options.column is not None and options.filter not in ("two_means", "mixture") and options.top is None:
        raise ValueError("--column must come with --filter two_means, --filter mixture or --top, got none of them.")
    if options.filter is not None:
        check_choice("--filter", options.filter, FILTERS)
    given: dict[str, tuple[Any, Callable[[], ScoreFilter]]] = {
        "--expression": (options.expression, lambda: CombinedFilter(str(options.expression))),
        "--min_score": (options.min_score, lambda: CombinedFilter(f"~(mimic_score < {options.min_score!r})")),
        "--top": (options.top, lambda: ThresholdFilter(top=options.top, column=options.column)),
        "--threshold": (options.threshold, lambda: ThresholdFilter(float(options.threshold or 0))),
        "--min_trust": (options.min_trust, lambda: TrustFilter(float(options.min_trust or 0))),
        "--filter": (options.filter, lambda: FILTERS[str(options.filter)](options.column)),
    }
    for value, make in given.values():
        if value is not None:
            return make()
    return default_filter(table)


def _in_words(rule: Any) -> str:
    if isinstance(rule, TrustFilter):
        return f"trust >= {rule.threshold_:.3f}"
    if isinstance(rule, CombinedFilter):
        return rule.expression
    if isinstance(rule, EnsembleFilter):
        return f"{len(rule.voters_)} votes ({rule.vote_}), P(good) >= {rule.threshold_:.3f}"
    if isinstance(rule, ThresholdFilter) and rule.top is not None:
        return f"the best {rule.top:.1%} by {rule.column_} (>= {float(np.ravel(rule.threshold_)[0]):.4g})"
    if isinstance(rule, ThresholdFilter):
        return f"relative weight >= {rule.threshold:g} in most epochs"
    cuts = ", ".join(f"{cut:.4g}" for cut in np.atleast_1d(rule.threshold_))
    return f"{rule.column_}, cut at {cuts} by epoch" if rule.two_groups_ else f"{rule.column_} has no two groups"


def _with_reasons(rows: Dataset, result: FilterResult, sample_id_column: str) -> Dataset:
    """Return the rows with the column `reason`: why each one is kept or not, null without a score."""
    if "reason" in rows.column_names:
        raise ValueError("the data set must not have the column reason yet. Rename it, or leave --keep_all out.")
    ids = read_sample_ids(rows, sample_id_column)
    place = np.searchsorted(result.sample_id, ids).clip(max=len(result) - 1)
    code = pa.array(result.code[place], mask=result.sample_id[place] != ids)
    return rows.add_column("reason", pa.array(result.reasons).take(code))


def _check_output(options: FilterArguments) -> None:
    output, source = Path(options.output).resolve(), Path(options.dataset).resolve()
    if output.suffix != ".parquet":
        raise ValueError(f"--output must be a .parquet file, got {options.output}.")
    if source.exists() and (output == source or source in output.parents):
        raise ValueError(f"--output must not overwrite the data set, got {options.output}. Choose another place.")
