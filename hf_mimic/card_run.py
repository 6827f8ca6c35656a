"""What cards say of a run: how its scores were made, whether they say anything, how many labels are wrong, whom to cite.

Read `run_words`, which is what all templates share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_mimic.card_words import UNKNOWN, escape, fenced, number, percent, python, repo_link, shell, table, value
from hf_mimic.run_record import RunRecord, hub_id
from hf_mimic.selection import DISSECT, NEED_A_REFERENCE, ONLY_SELECT

_FIRST = ("strategy", "mimic_layers", "direction", "temperature")  # settings that come first
_KINDS = {
    "training": "recorded at every visit, while the model was trained",
    "scoring": "of the model as it is, without training",
    "unknown": UNKNOWN,
}
_SIGNALS = {
    "score_trust_correlation": "with the reference's trust in the labels",
    "score_fit_correlation": "with how well the model itself fits the sample",
}
_WIDTH = 80
_EVIDENCE = {
    "trust": "a model of the label noise, fitted to the reference's predictions and the given labels",
    "votes": "filters that each see two groups of scores",
}
PAPERS = {
    "mimic": """@article{huang2025evaluating,
  title = {Evaluating Sample Utility for Efficient Data Selection by Mimicking Model Weights},
  author = {Huang, Tzu-Heng and Bilkhu, Manjot and Cooper, John and Sala, Frederic and
            Movellan, Javier},
  journal = {arXiv preprint arXiv:2501.06708},
  year = {2025}
}""",
    "dissect": """@article{zhao2025differential,
  title = {Differential-informed Sample Selection Accelerates Multimodal Contrastive Learning},
  author = {Zhao, Zihua and Hong, Feng and Chen, Mengxi and Chen, Pengyi and Liu, Benyuan and
            Yao, Jiangchao and Zhang, Ya and Wang, Yanfeng},
  journal = {arXiv preprint arXiv:2507.12998},
  year = {2025}
}""",
}


def run_words(run: RunRecord, quality: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the templates say of a run, as Markdown.

    Args:
        run: The record.
        quality: `QualityReport.as_dict()`; None where it is not known.
    """
    dissect = run.settings.get("strategy") in DISSECT
    return {
        "how": table(("setting", "value"), run_rows(run)),
        "unhealthy": is_unhealthy(run),
        "signals": signals(run),
        "health": health_words(run),
        "noise": noise_words(quality),
        "noise_known": (quality or {}).get("noise_rate") is not None,
        "uses_reference": uses_reference(run),
        "reference": repo_link(run.reference_model, run.reference_revision),
        "papers": fenced("\n\n".join([PAPERS["mimic"], *([PAPERS["dissect"]] if dissect else [])]), "bibtex"),
        "command": fenced(shell(run.command), "bash") if run.command else "",
        "load_original": load_line(run.dataset, run.dataset_config, run.dataset_revision, run.split),
    }


def run_rows(run: RunRecord) -> list[tuple[str, str]]:
    """Return the table of how scores were made: name and value in Markdown."""
    reference = repo_link(run.reference_model, run.reference_revision) if uses_reference(run) else "none"
    rows = [
        ("scores", _KINDS[run.kind]),
        ("model", _with_revision(run.model, run.model_revision)),
        ("reference", reference + _no_revision(run.reference_model, run.reference_revision)),
    ]
    if run.base_model is not None:
        rows.append(("base model of the reference", repo_link(run.base_model)))
    rows.append(("data set", _with_revision(run.dataset, run.dataset_revision, "dataset")))
    if run.split is not None:
        rows.append(("split", f"{escape(run.split)}"))
    rows += [(f"`{key}`", value(run.settings.get(key))) for key in _FIRST if _belongs(key, run)]
    others = {key: given for key, given in run.settings.items() if key not in _FIRST and given is not None}
    rows += [(f"`{key}`" if key.isidentifier() else escape(key), value(given)) for key, given in others.items()]
    seeds = ", ".join(f"{escape(name)} {seed}" for name, seed in run.seeds.items())
    versions = ", ".join(f"{escape(name)} {escape(version)}" for name, version in run.versions.items())
    return [*rows, ("seeds", seeds or UNKNOWN), ("versions", versions or UNKNOWN)]


def _belongs(key: str, run: RunRecord) -> bool:
    """Whether a setting is said even where it is not known."""
    if run.settings.get(key) is not None:
        return True
    if key in ("mimic_layers", "direction"):
        return uses_reference(run)
    weighs = key == "strategy" or run.settings.get("strategy") not in ("uniform", *ONLY_SELECT)
    return run.kind != "scoring" and weighs


def uses_reference(run: RunRecord) -> bool:
    """Whether a reference was used, or may have been."""
    strategy = run.settings.get("strategy")
    return run.reference_model is not None or strategy is None or strategy in NEED_A_REFERENCE


def is_unhealthy(run: RunRecord) -> bool | None:
    """Return the run's verdict on its score; None where there is none."""
    verdict = run.health.get("unhealthy")
    return None if verdict is None else bool(verdict)


def source_of_mistakes(run: RunRecord) -> str:
    """Return whose mistakes are in a score, as an item of a list."""
    if not uses_reference(run):
        return "- The scores come from the model itself: what it finds hard looks bad, wrong or not."
    return (
        "- A score sees only what its reference knows. What the reference has never seen, or sees wrongly, gets a bad "
        "score although it is right: its mistakes and its biases are handed on."
    )


def signals(run: RunRecord) -> str:
    """Return the correlations behind the verdict."""
    known = {name: run.health.get(name) for name in _SIGNALS}
    told = ", ".join(f"{_SIGNALS[name]}: {found:.2f}" for name, found in known.items() if found is not None)
    return f"correlation {told}" if told else ""


def health_words(run: RunRecord) -> str:
    """Return whether the mimic score says anything, in a sentence or two."""
    told = signals(run)
    behind = f" ({told}; below 0 it has turned around)" if told else ""
    verdict = is_unhealthy(run)
    if verdict is None:
        return f"Whether the mimic score says anything about these data is not known{behind}."
    if not verdict:
        return f"The run found its mimic score healthy{behind}."
    return (
        f"**The run found its mimic score unhealthy**: it says little about these data, or has turned around{behind}. "
        "Do not cut by it. What the reference itself predicts (`ref_loss`, `ref_trust`) does not depend on it."
    )


def noise_words(quality: Mapping[str, Any] | None) -> str:
    """Return how many labels are probably wrong, with the interval and where that comes from."""
    if quality is None:
        return "How many labels are wrong is not known."
    rate, evidence = quality.get("noise_rate"), quality.get("evidence")
    if rate is None:
        return "How many labels are wrong is not known: nothing in the scores tells. This is no sign of clean labels."
    low, high = quality.get("noise_low"), quality.get("noise_high")
    interval = "" if low is None or high is None else f" (interval {percent(low)} to {percent(high)})"
    samples = quality.get("n_samples")
    scored = f"the {number(samples)} samples" if isinstance(samples, int) else "the samples"
    source = f" The estimate comes from {_EVIDENCE[evidence]}; no label was checked." if evidence in _EVIDENCE else ""
    return f"By estimate {percent(rate)} of the labels of {scored} that were scored are wrong{interval}.{source}"


def load_line(dataset: str | None, config: str | None, revision: str | None, split: str | None) -> str:
    """Return the Python that loads a data set from the Hub at its commit, "" if it is not there."""
    if hub_id(dataset) is None or dataset is None:
        return ""
    options = [python(dataset), *([python(config)] if config else [])]
    options += [f"revision={python(revision)}"] if revision else []
    options += [f"split={python(split)}"] if split else []
    line = f"load_dataset({', '.join(options)})"
    return line if len(line) <= _WIDTH else "load_dataset(\n" + "".join(f"    {option},\n" for option in options) + ")"


def _with_revision(name: str | None, revision: str | None, kind: str = "model") -> str:
    return repo_link(name, revision, kind=kind) + _no_revision(name, revision)


def _no_revision(name: str | None, revision: str | None) -> str:
    if hub_id(name) is not None:
        return "" if revision else " (revision not known)"
    return "" if name is None or not name.startswith("local ") else " (not published)"
