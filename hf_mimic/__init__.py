"""hf_mimic: score, reweight, record and filter training samples by a reference model from the Hub."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_mimic import data, losses, metrics, selection
    from hf_mimic.arguments import MimicTrainingArguments
    from hf_mimic.curated import push_curated_dataset
    from hf_mimic.ensembles import EnsembleFilter
    from hf_mimic.expressions import CombinedFilter
    from hf_mimic.filters import MixtureFilter, ThresholdFilter, TrustFilter, TwoMeansFilter
    from hf_mimic.mimic import mimic_scores, reference_direction
    from hf_mimic.pairs import PairCollator
    from hf_mimic.quality import QualityReport, compare_datasets
    from hf_mimic.report import build_report
    from hf_mimic.report_options import ReportOptions
    from hf_mimic.samplers import DISSectBatchSampler
    from hf_mimic.scores import ScoreTable, attach_scores
    from hf_mimic.scoring import score_dataset
    from hf_mimic.shared_scores import load_scores, push_scores
    from hf_mimic.trainer import MimicTrainer

__version__ = "0.1.0"

# Where each public name lives: importing one costs what it needs, importing the package almost nothing.
_HOMES = {
    "CombinedFilter": "expressions",
    "DISSectBatchSampler": "samplers",
    "EnsembleFilter": "ensembles",
    "MimicTrainer": "trainer",
    "MimicTrainingArguments": "arguments",
    "MixtureFilter": "filters",
    "PairCollator": "pairs",
    "QualityReport": "quality",
    "ReportOptions": "report_options",
    "ScoreTable": "scores",
    "ThresholdFilter": "filters",
    "TrustFilter": "filters",
    "TwoMeansFilter": "filters",
    "attach_scores": "scores",
    "build_report": "report",
    "compare_datasets": "quality",
    "load_scores": "shared_scores",
    "mimic_scores": "mimic",
    "push_curated_dataset": "curated",
    "push_scores": "shared_scores",
    "reference_direction": "mimic",
    "score_dataset": "scoring",
}
_MODULES = ("data", "losses", "metrics", "selection")

__all__ = [
    "CombinedFilter",
    "DISSectBatchSampler",
    "EnsembleFilter",
    "MimicTrainer",
    "MimicTrainingArguments",
    "MixtureFilter",
    "PairCollator",
    "QualityReport",
    "ReportOptions",
    "ScoreTable",
    "ThresholdFilter",
    "TrustFilter",
    "TwoMeansFilter",
    "attach_scores",
    "build_report",
    "compare_datasets",
    "data",
    "load_scores",
    "losses",
    "metrics",
    "mimic_scores",
    "push_curated_dataset",
    "push_scores",
    "reference_direction",
    "score_dataset",
    "selection",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"hf_mimic.{name}")
    if name in _HOMES:
        return getattr(import_module(f"hf_mimic.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hf_mimic' has no attribute {name!r}; it has {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
