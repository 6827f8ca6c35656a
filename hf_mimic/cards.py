"""The cards of what is published: of a curated data set, of a repo of scores, of a model.

Read `dataset_card`. The texts are the Jinja templates in model_cards/; `merge_card` keeps what people wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from hf_mimic.card_merging import mark_sections, merge_card
from hf_mimic.card_metadata import SOURCE, repo_ids
from hf_mimic.card_run import load_line, run_words, source_of_mistakes, uses_reference
from hf_mimic.card_selection import selection_words
from hf_mimic.card_words import HUB, code, escape, fenced, number, percent, picture, python, repo_link, table
from hf_mimic.run_record import RunRecord, hub_id
from hf_mimic.selection_record import SelectionRecord

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard, EvalResult, ModelCard

__all__ = ["dataset_card", "merge_card", "model_card", "scores_card"]

_TAGS = ("hf_mimic", "data-curation", "mimic-score")
_MEANINGS = {
    "sample_id": "the sample, by the id column of its data set",
    "epoch": "of training, from 0",
    "step": "of the optimizer, or batch of a pass without training",
    "mimic_score": "how far the sample's own gradient pulls the weights toward the reference: the higher the better",
    "relative_weight": "the weight that it had in training, times the number of samples: 1 is average",
    "loss": "of the model that was trained or scored",
    "ref_loss": "of the reference",
    "ref_trust": "the probability that the label is right, by the reference's predictions",
    "trust": "the same, with what score and loss said while training",
    "clip_score": "similarity of image and text, from 0 to 100, by the model that was trained",
    "kept": "whether the sample was chosen to be trained on at this visit; as a mean, the share of visits",
    "n_visits": "how often the sample was scored",
    "keep": "whether the filter keeps the sample",
    "reason": "why",
}
_NO_METRICS = re.compile(r"(runtime|.*_per_second|epoch|.*_time)$")


def dataset_card(
    record: SelectionRecord,
    *,
    repo_id: str,
    metadata: Mapping[str, Any],
    config: str = "default",
    figures: Mapping[str, str] = {},
    existing: str | None = None,
) -> str:
    """Return the card of a curated data set.

    Args:
        record: What was kept, and why.
        repo_id: Where it is published.
        metadata: `configs` and `dataset_info`, as datasets writes them, and what else belongs in the card's head.
        config: Configuration that the rows are.
        figures: Caption to path in the repo.
        existing: The card that is there; what people wrote in it stays.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    head = _head(metadata, _TAGS)
    if repo_ids(record.original_dataset):
        head.setdefault("source_datasets", repo_ids(record.original_dataset))
    card = DatasetCard.from_template(
        DatasetCardData(**head),
        template_path=_template("dataset_card"),
        repo_id=escape(repo_id),
        **run_words(record.run, record.quality),
        **selection_words(record, repo_id, metadata.get("configs"), config=config),
        figures=[picture(caption, path) for caption, path in figures.items()],
    )
    return _merged(existing, card)


def scores_card(  # noqa: PLR0913  # all of them are facts that the card tells
    run: RunRecord,
    *,
    repo_id: str,
    metadata: Mapping[str, Any],
    n_samples: int,
    n_visits: int,
    columns: Sequence[str],
    quality: Mapping[str, Any] | None,
    existing: str | None = None,
) -> str:
    """Return the card of a repo of scores without the samples.

    Args:
        run: How they were made.
        repo_id: Where they are published.
        metadata: As `dataset_card` takes it.
        n_samples: How many samples have a score.
        n_visits: How many rows there are.
        columns: Their names.
        quality: `QualityReport.as_dict()`; None where it is not known.
        existing: The card that is there.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    head = _head(metadata, _TAGS)
    if repo_ids(run.dataset):
        head.setdefault("source_datasets", repo_ids(run.dataset))
    rows = [(f"`{name}`" if name in _MEANINGS else escape(name), _MEANINGS.get(name, "")) for name in columns]
    card = DatasetCard.from_template(
        DatasetCardData(**head),
        template_path=_template("scores_card"),
        repo_id=escape(repo_id),
        **run_words(run, quality),
        dataset=repo_link(run.dataset, run.dataset_revision, kind="dataset"),
        n_samples=number(n_samples),
        n_visits=number(n_visits),
        columns=table(("column", "meaning"), rows),
        usage=_join_words(run, repo_id),
        limits=f"{source_of_mistakes(run)}\n"
        "- A low score does not mean that a sample is wrong: rare and hard samples have low scores, too.",
    )
    return _merged(existing, card)


def model_card(
    run: RunRecord,
    *,
    model_id: str,
    metadata: Mapping[str, Any] = {},
    quality: Mapping[str, Any] | None = None,
    existing: str | None = None,
) -> str:
    """Return the card of a model that `MimicTrainer` trained.

    The `model-index` needs `pipeline_tag` in the metadata and `eval_split` among the settings (with `eval_dataset`, if the
    evaluation had another data set than the training); without them results are in the text only.

    Args:
        run: How it was trained.
        model_id: Where it is published.
        metadata: What else belongs in the card's head, such as `license`, `library_name`, `pipeline_tag`.
        quality: Of the training data, `QualityReport.as_dict()`; None where it is not known.
        existing: The card that is there.
    """
    from huggingface_hub import ModelCard, ModelCardData

    head = _head(metadata, ("hf_mimic", "mimic-score") if uses_reference(run) else ("hf_mimic",))
    results = _metrics(run)
    known = {"base_model": repo_ids(run.model), "datasets": repo_ids(run.dataset)}
    head |= {name: ids for name, ids in known.items() if ids}
    evaluated = _eval_results(run, results, metadata.get("pipeline_tag"), model_id)
    if evaluated:
        head |= {"eval_results": evaluated, "model_name": model_id.rsplit("/", 1)[-1]}
        head.setdefault("metrics", [result.metric_type for result in evaluated])
    card = ModelCard.from_template(
        ModelCardData(**head),
        template_path=_template("model_card"),
        **run_words(run, quality) | {"model_id": escape(model_id), "what": _what(run)},
        results=_results_table(results),
        results_words=_evaluated_on(run),
        weights=_weights(run, quality),
        usage=_use_model(model_id, metadata.get("pipeline_tag")),
        limits=_model_limits(run),
    )
    return _merged(existing, card)


def _head(metadata: Mapping[str, Any], tags: Sequence[str]) -> dict[str, Any]:
    given = metadata.get("tags") or []
    mine = [given] if isinstance(given, str) else list(given)
    head = {name: value for name, value in metadata.items() if value is not None}
    return {**head, "tags": [*mine, *(tag for tag in tags if tag not in mine)]}


def _template(name: str) -> str:
    return str(resources.files("hf_mimic") / "model_cards" / f"{name}.md")


def _merged(existing: str | None, card: DatasetCard | ModelCard) -> str:
    """Return the card with marks, brought into the one that is there."""
    body = re.sub(r"\n{3,}", "\n\n", card.text).encode("utf-8", "replace").decode()
    return merge_card(existing, f"---\n{card.data.to_yaml()}\n---\n\n{mark_sections(body)}")


def _join_words(run: RunRecord, repo_id: str) -> str:
    load = (
        load_line(run.dataset, run.dataset_config, run.dataset_revision, run.split)
        or "...  # the data set that was scored"
    )
    lines = ["from datasets import load_dataset", "from hf_mimic import attach_scores, load_scores", ""]
    lines += [f"dataset = {load}", f"scored = attach_scores(dataset, load_scores({python(repo_id)}))"]
    return (
        "Rows are joined by `sample_id`. Where the data set has no such column, it is the number of the row: add it with "
        f"`hf_mimic.data.add_sample_ids(dataset)`, before any shuffle or filter.\n\n{fenced(chr(10).join(lines), 'python')}"
    )


def _eval_results(run: RunRecord, results: Mapping[str, float], task: str | None, model_id: str) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    other = run.settings.get("eval_dataset")
    dataset, split = hub_id(other or run.dataset), run.settings.get("eval_split")
    if task is None or split is None or dataset is None:
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            dataset_revision=None if other else run.dataset_revision,
            metric_type=name,
            metric_value=value,
            source_name=SOURCE,
            source_url=f"{HUB}/{model_id}",
        )
        for name, value in results.items()
        if name != "loss"
    ]


def _metrics(run: RunRecord) -> dict[str, float]:
    """Return the metrics of the last evaluation, without what the Trainer adds about time."""
    named = {name.removeprefix("eval_"): value for name, value in run.results.items()}
    return {name: value for name, value in named.items() if value is not None and not _NO_METRICS.match(name)}


def _results_table(results: Mapping[str, float]) -> str:
    rows = [(escape(name), f"{value:.4g}") for name, value in results.items()]
    return table(("metric", "value"), rows, align="lr") if rows else ""


def _evaluated_on(run: RunRecord) -> str:
    split, dataset = run.settings.get("eval_split"), run.settings.get("eval_dataset") or run.dataset
    if split is None or dataset is None:
        return "Of the last evaluation; on which data is not known."
    return f"Of the last evaluation, on the split {code(split)} of {repo_link(dataset, kind='dataset')}."


def _what(run: RunRecord) -> str:
    model = "a model" if run.model is None else repo_link(run.model, run.model_revision)
    data = (
        "data that are not known"
        if run.dataset is None
        else repo_link(run.dataset, run.dataset_revision, kind="dataset")
    )
    strategy = run.settings.get("strategy")
    reference = (
        f", with the reference {repo_link(run.reference_model, run.reference_revision)}" if run.reference_model else ""
    )
    how = (
        "" if strategy is None else f" Samples were weighed or chosen by the strategy *{escape(strategy)}*{reference}."
    )
    return f"This is {model}, trained on {data} with hf_mimic.{how}"


def _weights(run: RunRecord, quality: Mapping[str, Any] | None) -> str:
    known = {**run.settings, **run.health}
    lines = []
    if known.get("selection_rate") not in (None, 1, 1.0):
        lines.append(f"- Of each batch {percent(known['selection_rate'])} were trained on.")
    if known.get("kept_share") is not None:
        lines.append(f"- Of all visits {percent(known['kept_share'])} were trained on.")
    if known.get("effective_sample_size") is not None:
        lines.append(
            f"- The weights of a step count like {percent(known['effective_sample_size'])} of its samples with equal weights."
        )
    if quality and quality.get("retained") is not None:
        lines.append(f"- A filter on the scores would keep {percent(quality['retained'])} of the samples.")
    return "\n".join(lines)


def _use_model(model_id: str, task: str | None) -> str:
    if task is None:
        return ""
    return fenced(
        f"from transformers import pipeline\n\nmodel = pipeline({python(task)}, model={python(model_id)})", "python"
    )


def _model_limits(run: RunRecord) -> str:
    lines = [
        "- What was weighed down or left out in training, this model has seen less of: rare and hard samples, too.",
        "- The model was not examined for biases, nor on other data than those named here.",
    ]
    if uses_reference(run):
        lines.insert(0, "- The reference decided what counted: its mistakes and its biases may be handed on.")
    return "\n".join(lines)
