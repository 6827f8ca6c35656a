"""What the commands do: each takes its dataclasses and returns the text to print.

Read `COMMANDS` at the end, then one command.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_mimic.command_arguments import (
    CompareArguments,
    DemoArguments,
    EvaluateArguments,
    FilterArguments,
    PushArguments,
    ReportArguments,
    RuleArguments,
    RunArguments,
    ScoreArguments,
)
from hf_mimic.data_arguments import DataArguments, evaluation_part, resume_point
from hf_mimic.tables import Table

if TYPE_CHECKING:
    from datasets import Dataset


def demo(options: DemoArguments) -> str:
    """Score, reweight, record and filter on scikit-learn's digits, without network."""
    import torch

    from hf_mimic.demo import run_demo

    if options.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {options.seeds}.")
    torch.set_num_threads(1)  # more threads do not speed so small a model up, and slow it down on a busy machine
    return f"{run_demo(options.output_dir, range(options.seeds))}\n\nsaved in {options.output_dir}"


def train(options: DataArguments, args: Any) -> str:
    """Fine-tune with MimicTrainer; save the model and the scores."""
    from transformers import set_seed

    from hf_mimic.metrics import accuracy
    from hf_mimic.trainer import MimicTrainer

    if options.text_column is not None:
        return _train_pairs(options, args)
    if options.image_id_column is not None:
        raise ValueError("--image_id_column must come with --text_column, got it without: it is for pairs.")
    rows, labels = _rows(options, args.sample_id_column)
    set_seed(args.seed)  # a new head is drawn before the Trainer sets it
    model, processor, _ = _model(options.model, labels)
    evaluation = None
    if options.eval_split:
        evaluation, _ = _rows(evaluation_part(options), args.sample_id_column, labels)
        args.eval_strategy = "epoch" if args.eval_strategy == "no" else args.eval_strategy
    trainer = MimicTrainer(
        model,
        args,
        train_dataset=_transformed(rows, processor, options),
        eval_dataset=None if evaluation is None else _transformed(evaluation, processor, options),
        processing_class=processor,
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=resume_point(args.resume_from_checkpoint))
    trainer.save_model()
    lines = {"samples": len(rows), "visits": len(trainer.scores), "model": args.output_dir, "scores": args.scores_dir}
    verdict = trainer.training.weighing.report().get("unhealthy")
    healthy = {None: "not known: too few samples", 0.0: "good", 1.0: "the score says little (see the warning)"}
    lines |= {"strategy": trainer.strategy, "score's health": healthy[verdict]}
    if evaluation is not None:
        lines["accuracy"] = f"{trainer.evaluate()['eval_accuracy']:.4f}"
    if not trainer.is_world_process_zero():
        return ""
    place = "".join(f" --dataset_{name} {value}" for name, value in options.place.items() if value is not None)
    return Table(lines, f"\n\nnext: hf-mimic filter --dataset {options.dataset}{place} --scores {args.scores_dir}")


def _train_pairs(options: DataArguments, args: Any) -> str:
    from hf_mimic.pair_training import train_pairs

    lines = train_pairs(options, args)
    return Table(lines) if lines else ""


def score(options: DataArguments, scoring: ScoreArguments) -> str:
    """Score every sample with the model as it is."""
    from hf_mimic.corpus import ScorePass, score_corpus
    from hf_mimic.corpus_folder import summary
    from hf_mimic.hub_files import pin
    from hf_mimic.mimic import reference_direction
    from hf_mimic.processes import Processes

    if options.text_column is not None or options.image_id_column is not None:
        raise ValueError(
            "--text_column and --image_id_column are for `hf-mimic train`, score takes labels. Leave them out."
        )
    team = Processes()
    rows, labels = _rows(options, scoring.sample_id_column)
    model, processor, made = _model(options.model, labels)
    if made:
        raise ValueError(
            f"the model must have a trained head for the data set's {len(labels)} labels; {options.model} has none "
            f"({', '.join(made)} would be made anew, and its scores be noise). Fine-tune it first: hf-mimic train."
        )
    model.to(team.device)
    reference = scoring.reference_model
    revision = team.once(lambda: pin(reference, scoring.reference_revision))
    direction = reference_direction(model, reference, scoring.mimic_layers, revision=revision)
    named = {"model": options.model, "reference": reference, "revision": revision, "layers": scoring.mimic_layers}
    task = ScorePass(
        model,
        _transformed(rows, processor, options),
        direction,
        reference=_runnable(model, reference, revision) if scoring.run_reference else None,
        batch_size=scoring.batch_size,
        sample_id_column=scoring.sample_id_column,
        loader_options={"num_workers": scoring.num_workers},
        named={**named, "data": options.dataset, "split": options.split},
    )
    report = score_corpus(
        task,
        scoring.output_dir,
        shard=(scoring.shard, scoring.num_shards),
        part_batches=scoring.part_batches,
        overwrite=scoring.overwrite,
    )
    if not team.is_first:
        return ""
    if report.moved is not None:
        print(f"{scoring.output_dir} held earlier scores; they are now in {report.moved}")
    lines = {**report.told(), **summary(scoring.output_dir)}
    lines["layers"] = f"{len(direction)} tensors, {sum(v.numel() for v in direction.values()):,} parameters"
    return Table({**lines, "scores": scoring.output_dir})


def filter_rows(options: FilterArguments, rule: RuleArguments) -> str:
    """Attach the scores, decide what to keep, write Parquet."""
    from hf_mimic.filter_command import filter_data

    return Table(filter_data(options, rule))


def push(options: PushArguments, rule: RuleArguments) -> str:
    """Publish the curated data set, or the scores alone, on the Hub."""
    from hf_mimic.push_command import run_push

    return Table(run_push(options, rule))


def compare(options: CompareArguments) -> str:
    """Rank data sets by the quality of their scores."""
    from hf_mimic.quality_command import run_compare

    return run_compare(options)


def evaluate(options: EvaluateArguments) -> str:
    """Measure how an image-text model retrieves and classifies."""
    from hf_mimic.evaluation import evaluate_image_text, readable

    return Table(readable(evaluate_image_text(options)))


def report(options: ReportArguments) -> str:
    """Write a page on which a person looks at the scores and chooses the cut."""
    from hf_mimic.report_command import run_report

    return Table(run_report(options))


def run(options: RunArguments) -> str:
    """Train, filter, report, publish and train again, from one recipe."""
    from hf_mimic.run_command import run_recipe

    return Table(run_recipe(options, COMMANDS))


# ---- shared by the commands ----------------------------------------------------------------------------------------


def _rows(options: DataArguments, sample_id_column: str, labels: list[str] | None = None) -> tuple[Dataset, list[str]]:
    """Return the data set with ids and class labels (in the order of `labels`, if given), and its labels."""
    from hf_mimic.checks import check_choice
    from hf_mimic.data import drop_unreadable, load_rows, with_class_labels
    from hf_mimic.pairs import identified

    check_choice("on_error", options.on_error, ("raise", "skip"))
    rows = with_class_labels(
        identified(load_rows(options.dataset, options.split, **options.place), sample_id_column),
        options.label_column,
        labels,
    )
    if options.on_error == "skip":
        rows, bad = drop_unreadable(rows, options.image_column)
        if os.environ.get("RANK", "0") == "0":  # one process tells it for all
            places = f": rows {', '.join(map(str, bad[:20]))}" if bad else ""
            print(f"{len(bad)} images do not decode and are skipped{places}")
    return rows, rows.features[options.label_column].names


def _transformed(rows: Dataset, processor: Any, options: DataArguments) -> Dataset:
    from hf_mimic.data import with_image_transform

    return with_image_transform(rows, processor, options.image_column, options.label_column)


def _model(name: str, labels: list[str]) -> tuple[Any, Any, list[str]]:
    """Return the model with these labels, its image processor, and the parameters that the checkpoint did not have."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from hf_mimic.hub_loading import loading

    ids = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    with loading(name, repo_type="model"):
        model, info = AutoModelForImageClassification.from_pretrained(
            name, ignore_mismatched_sizes=True, output_loading_info=True, **ids
        )
        processor = AutoImageProcessor.from_pretrained(name)
    made = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    return model, processor, made


def _runnable(model: Any, reference: str, revision: str | None) -> Any:
    from hf_mimic.reference_pass import runnable_tensors

    try:
        return runnable_tensors(model, reference, revision=revision)
    except ValueError as error:
        raise ValueError(f"the reference cannot be run: {error}\nScore without: --run_reference False") from error


def _training_arguments() -> list[Any]:
    from hf_mimic.arguments import MimicTrainingArguments

    return [DataArguments, MimicTrainingArguments]


COMMANDS: dict[str, tuple[Callable[..., str], Callable[[], list[Any]]]] = {
    "demo": (demo, lambda: [DemoArguments]),
    "train": (train, _training_arguments),
    "score": (score, lambda: [DataArguments, ScoreArguments]),
    "filter": (filter_rows, lambda: [FilterArguments, RuleArguments]),
    "push": (push, lambda: [PushArguments, RuleArguments]),
    "evaluate": (evaluate, lambda: [EvaluateArguments]),
    "compare": (compare, lambda: [CompareArguments]),
    "report": (report, lambda: [ReportArguments]),
    "run": (run, lambda: [RunArguments]),
}
