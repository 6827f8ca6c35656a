"""The design as a drawing: which module imports which, and how long a file and a function may get.

A new arrow is a decision: add it to `ARROWS` in the same change, and say why in the review.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_mimic"

ARROWS: dict[str, set[str]] = {
    "checks": set(),
    "tangents": set(),
    "forward_ad": {"tangents"},
    "layers": set(),
    "losses": set(),
    "hub_files": {"hub_errors"},
    "reference": {"hub_errors", "hub_files"},
    "hub_loading": {"hub_errors", "hub_files"},
    "data": {"hub_loading"},
    "selection": set(),
    "temperature": set(),
    "captions": set(),
    "retrieval": set(),
    "embeddings": {"mimic"},
    "images": {"data"},
    "pairs": {"captions", "data", "embeddings", "images"},
    "metrics": {"embeddings", "membership", "retrieval"},
    "sharding": {"forward_ad"},
    "contrastive": {"forward_ad", "losses"},
    "mimic": {"base_model", "checks", "forward_ad", "hub_files", "layers", "losses", "reference", "sharding"},
    "files": set(),
    "hub_errors": set(),
    "trust": set(),
    "base_model": {"hub_files", "layers", "reference"},
    "heads": {"layers", "reference"},
    "parts": set(),
    "blocks": set(),
    "visits": {"parts"},
    "matrices": {"blocks", "parts", "trust", "visits"},
    "scores": {"joins", "data", "files", "matrices", "parts", "visits"},
    "two_groups": set(),
    "votes": {"blocks", "two_groups"},
    "cuts": {"blocks", "checks", "scores", "two_groups", "votes"},
    "filters": {"blocks", "cuts", "scores", "trust", "two_groups", "votes"},
    "table_odds": {"blocks", "trust", "votes"},
    "joined": {"blocks", "scores"},
    "ensembles": {
        "blocks",
        "checks",
        "cuts",
        "filters",
        "joined",
        "scores",
        "table_odds",
        "trust",
        "two_groups",
        "votes",
    },
    "expressions": {"cuts", "filters", "scores"},
    "quality": {"checks", "corpus_folder", "ensembles", "filters", "scores"},
    "membership": set(),
    # what is said of a run and a selection, on the Hub
    "run_record": {"checks", "corpus_folder", "files"},
    "selection_record": {"run_record"},
    "card_metadata": {"run_record"},
    "card_merging": {"card_metadata"},
    "card_words": {"run_record"},
    "card_run": {"card_words", "run_record", "selection"},
    "card_selection": {"card_run", "card_words", "run_record", "selection_record"},
    "cards": {
        "card_merging",
        "card_metadata",
        "card_run",
        "card_selection",
        "card_words",
        "run_record",
        "selection_record",
    },
    # a corpus in shards
    "judge": {"files", "trust"},
    "processes": set(),
    "corpus_folder": {"files", "scores"},
    "corpus": {
        "corpus_folder",
        "data",
        "judge",
        "losses",
        "mimic",
        "processes",
        "reference_pass",
        "scores",
        "scoring",
        "trust",
    },
    "scoring": {"data", "losses", "micro_batch", "mimic", "reference", "reference_pass", "scores"},
    "arguments": {"checks", "heads", "mimic", "selection"},
    # which samples to train on
    "history": {"checks"},
    "dissect": {"checks", "history"},
    "samplers": {"checks", "dissect"},
    # one optimizer step
    "weights": set(),
    "optimizer_step": {"weights"},
    "step_log": {"weights"},
    "micro_batch": {"losses"},
    "finite": {"micro_batch", "mimic"},
    "cached_negatives": {"contrastive", "finite", "forward_ad", "losses", "micro_batch", "mimic"},
    "padding": set(),
    "self_check": {"sharding"},
    "engine": {"finite", "losses", "mimic", "sharding"},
    "health": {"weights"},
    "weighing": {"health", "selection", "temperature"},
    "ledger": set(),
    "subsets": {"dissect", "history"},
    "candidates": {"dissect", "finite", "losses", "micro_batch", "mimic", "selection"},
    "batch_selection": {
        "candidates",
        "data",
        "dissect",
        "losses",
        "micro_batch",
        "mimic",
        "padding",
        "samplers",
        "selection",
        "subsets",
    },
    "scored_training": {
        "cached_negatives",
        "engine",
        "finite",
        "losses",
        "micro_batch",
        "mimic",
        "optimizer_step",
        "selection",
        "self_check",
        "step_log",
        "weighing",
        "weights",
    },
    # what a run takes from its reference
    "reference_pass": {"files", "finite", "hub_files", "judge", "losses", "mimic", "reference"},
    "reference_setup": {
        "contrastive",
        "heads",
        "health",
        "layers",
        "losses",
        "micro_batch",
        "mimic",
        "pinned",
        "reference",
        "reference_pass",
        "selection",
        "sharding",
    },
    "pinned": {"base_model", "hub_files", "processes", "reference"},
    "checkpoints": {"files", "reference"},
    "resuming": {"checkpoints"},
    "hub_trainer": {"cards", "files", "hub", "hub_errors", "resuming", "shared_scores", "trainer_record"},
    "trainer": {
        "arguments",
        "batch_selection",
        "contrastive",
        "data",
        "engine",
        "hub_trainer",
        "ledger",
        "losses",
        "micro_batch",
        "padding",
        "reference",
        "reference_pass",
        "reference_setup",
        "scored_training",
        "scores",
    },
    "demo": {"arguments", "data", "filters", "metrics", "scores", "trainer"},
    "data_arguments": set(),
    "command_arguments": {"data_arguments"},
    "evaluation": {
        "captions",
        "checks",
        "command_arguments",
        "data",
        "embeddings",
        "files",
        "hub_loading",
        "images",
        "mimic",
        "retrieval",
    },
    "pair_training": {
        "captions",
        "checks",
        "data",
        "data_arguments",
        "embeddings",
        "evaluation",
        "metrics",
        "pairs",
        "selection",
        "trainer",
    },
    # a report
    "thumbnails": {"images"},
    "neighbours": set(),
    "report_numbers": {"visits"},
    "report_sampling": set(),
    "report_rows": {"joins", "checks", "data", "pairs", "report_options", "scores", "trust"},
    "report_options": set(),
    "report_health": {"checkpoints", "health", "report_numbers"},
    "report_charts": set(),
    "report_figures": {"report_numbers", "thumbnails"},
    "report_html": {"report_charts", "report_numbers", "report_rows", "thumbnails"},
    "report": {
        "files",
        "neighbours",
        "report_figures",
        "report_health",
        "report_html",
        "report_numbers",
        "report_options",
        "report_rows",
        "report_sampling",
        "scores",
        "thumbnails",
    },
    "quality_command": {"command_arguments", "files", "quality", "scores"},
    # to the Hub
    "hub": {"hub_errors", "hub_files"},
    "hub_datasets": {"card_metadata", "hub", "parquet"},
    "parquet": set(),
    "joins": set(),
    "push_options": {"checks", "hub", "run_record"},
    "shared_scores": {
        "cards",
        "hub",
        "hub_datasets",
        "hub_errors",
        "hub_files",
        "parts",
        "push_options",
        "quality",
        "run_record",
        "scores",
    },
    "filter_words": {"ensembles", "expressions", "filters"},
    "origins": set(),
    "trainer_record": {"origins", "run_record"},
    "curation": {"joins", "cuts", "data", "filter_words", "scores", "selection_record"},
    "curated_splits": {"curation", "push_options"},
    "curated": {
        "cards",
        "curated_splits",
        "curation",
        "cuts",
        "hub",
        "hub_datasets",
        "origins",
        "push_options",
        "report",
        "report_options",
        "run_record",
        "scores",
        "selection_record",
        "shared_scores",
    },
    "rules": {
        "checks",
        "command_arguments",
        "cuts",
        "ensembles",
        "expressions",
        "filter_words",
        "filters",
        "scores",
    },
    "filter_command": {
        "joins",
        "command_arguments",
        "cuts",
        "data",
        "pairs",
        "parquet",
        "rules",
        "scores",
        "shared_scores",
    },
    "push_command": {
        "command_arguments",
        "curated",
        "curation",
        "data",
        "filter_command",
        "hub",
        "push_options",
        "run_record",
        "shared_scores",
    },
    "report_command": {
        "joins",
        "command_arguments",
        "cuts",
        "data",
        "ensembles",
        "expressions",
        "filters",
        "report",
        "report_health",
        "report_options",
        "report_rows",
        "scores",
    },
    "commands": {
        "arguments",
        "command_arguments",
        "checks",
        "corpus",
        "corpus_folder",
        "data",
        "data_arguments",
        "demo",
        "evaluation",
        "filter_command",
        "hub_files",
        "hub_loading",
        "metrics",
        "mimic",
        "pair_training",
        "pairs",
        "processes",
        "push_command",
        "quality_command",
        "reference_pass",
        "report_command",
        "run_command",
        "tables",
        "trainer",
    },
    "flags": set(),
    "tables": set(),
    "recipes": {"command_arguments", "flags"},
    "run_command": {
        "checkpoints",
        "checks",
        "command_arguments",
        "filter_command",
        "hub_login",
        "recipes",
        "report_figures",
        "rules",
        "run_notes",
        "scores",
        "tables",
    },
    "hub_login": {"hub_errors"},
    "run_notes": {"files", "hub_files", "run_record"},
    "cli": {"commands", "flags", "origins"},
}
LINES, BODY = 300, 50

FILES = {path.stem: path for path in sorted(PACKAGE.glob("*.py")) if path.stem != "__init__"}


def imported(tree: ast.Module, package: str = "hf_mimic") -> set[str]:
    """Return the package's modules that a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = f"{package}." if node.level and node.module else package if node.level else ""
            module = f"{prefix}{node.module or ''}"
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == package else {module}
    return {name.split(".")[1] for name in found if name.startswith(f"{package}.")}


def functions(tree: ast.Module) -> dict[str, int]:
    """Return function name to the number of lines of its body, docstring left out."""
    lengths = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) and node.body[1:] else node.body
            lengths[node.name] = (body[-1].end_lineno or 0) - body[0].lineno + 1
    return lengths


def parse(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_are_the_arrows(module):
    assert imported(parse(module)) == ARROWS[module]


def test_arrows_have_no_cycle_and_name_modules_that_exist():
    assert set(TopologicalSorter(ARROWS).static_order()) <= FILES.keys()


def test_every_module_is_drawn():
    assert FILES.keys() == ARROWS.keys()


@pytest.mark.parametrize("module", sorted(FILES))
def test_length_of_file_and_functions(module):
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= LINES
    assert {name: n for name, n in functions(parse(module)).items() if n > BODY} == {}


def test_the_reader_of_imports_sees_every_form():
    source = "import os\nimport hf_mimic.a\nfrom hf_mimic import b\nfrom .c import x\nfrom . import d\n"
    source += "def f():\n    from hf_mimic.e import y\n"
    assert imported(ast.parse(source)) == {"a", "b", "c", "d", "e"}


def test_the_ruler_leaves_the_docstring_out():
    assert functions(ast.parse('def f():\n    """One.\n\n    Two.\n    """\n    x = 1\n    return x\n')) == {"f": 2}
