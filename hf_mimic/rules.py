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
    given = [name for name in _RULES if getattr(options, name) is not None]
    if len(given) > 1:
        raise ValueError(f"one rule must decide, got {' and '.join(f'--{name}' for name in given)}. Choose one.")
    rule = _rule(options, table)
    if options.more_scores and not isinstance(rule, EnsembleFilter):
        raise ValueError("--more_scores must come with --filter ensemble, got another rule.")
    scores: Any = table
    if options.more_scores:
        scores = {name: ScoreTable.load(name) for name in (folder, *options.more_scores)}
    result = rule.fit(scores).filter(scores)
    return replace(result, rule=in_words(rule))


def _rule(options: RuleArguments, table: ScoreTable) -> ScoreFilter:
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
