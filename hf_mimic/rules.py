"""The rule of a command: which filter its flags choose, and what it keeps of a score table.

Read `decide`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hf_mimic.checks import check_choice
from hf_mimic.command_arguments import RuleArguments
from hf_mimic.cuts import FilterResult, ScoreFilter
from hf_mimic.ensembles import EnsembleFilter
from hf_mimic.expressions import CombinedFilter
from hf_mimic.filter_words import in_words
from hf_mimic.filters import MixtureFilter, ThresholdFilter, TrustFilter, TwoMeansFilter, default_filter
from hf_mimic.scores import ScoreTable

FILTERS: dict[str, Callable[[str | None], ScoreFilter]] = {
    "trust": lambda column: TrustFilter(),
    "threshold": lambda column: ThresholdFilter(),
    "two_means": TwoMeansFilter,
    "mixture": MixtureFilter,
    "ensemble": lambda column: EnsembleFilter(),
}
_RULES = ("filter", "expression", "min_trust", "threshold", "min_score", "top")


def decide(options: RuleArguments, folder: str, table: ScoreTable) -> FilterResult:
    """Return what the rule keeps, with its name.

    Args:
        options: Its flags.
        folder: Of the table; its name among those of `--more_scores`.
        table: The scores.

    Raises:
        ValueError: If the flags contradict each other, or the table does not have what they ask for.
    """
    rule = chosen(options) or default_filter(table)
    scores: Any = table
    if options.more_scores:
        scores = {folder: table, **{name: ScoreTable.load(name) for name in options.more_scores}}
    result = rule.fit(scores).filter(scores)
    return replace(result, rule=in_words(rule))


def chosen(options: RuleArguments) -> ScoreFilter | None:
    """Return the filter of the flags, None for the default, which depends on the scores.

    Raises:
        ValueError: If the flags contradict each other.
    """
    flags = [name for name in _RULES if getattr(options, name) is not None]
    if len(flags) > 1:
        raise ValueError(f"one rule must decide, got {' and '.join(f'--{name}' for name in flags)}. Choose one.")
    if options.column is not None and options.filter not in ("two_means", "mixture") and options.top is None:
        raise ValueError("--column must come with --filter two_means, --filter mixture or --top, got none of them.")
    if options.filter is not None:
        check_choice("--filter", options.filter, FILTERS)
    if options.more_scores and options.filter != "ensemble":
        raise ValueError("--more_scores must come with --filter ensemble, got another rule.")
    given: dict[str, Callable[[], ScoreFilter]] = {
        "expression": lambda: CombinedFilter(str(options.expression)),
        "min_score": lambda: CombinedFilter(f"~(mimic_score < {options.min_score!r})"),
        "top": lambda: ThresholdFilter(top=options.top, column=options.column),
        "threshold": lambda: ThresholdFilter(float(options.threshold or 0)),
        "min_trust": lambda: TrustFilter(float(options.min_trust or 0)),
        "filter": lambda: FILTERS[str(options.filter)](options.column),
    }
    return given[flags[0]]() if flags else None
