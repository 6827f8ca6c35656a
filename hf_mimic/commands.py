"""What the commands do: each takes its dataclasses and returns the text to print.

Every field of a dataclass is a flag, described by the docstring. Read `COMMANDS` at the end, then one command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class DemoArguments:
    """Score, reweight, record and filter on scikit-learn's digits, without network.

    Args:
        output_dir: Where scores, the curated data set, figures and results.json go.
        seeds: How many seeds to run.
    """

    output_dir: str = "demo_output"
    seeds: int = 3


@dataclass
class DataArguments:
    """The data set to train on or to score.

    Args:
        model: Hub repo id or folder of the student; for training, its head is made anew if the labels differ.
        dataset: Hub data set, folder (images, Parquet, save_to_disk) or data file.
        split: Split of the data set.
        eval_split: Split to evaluate on after each epoch, or a data file.
        image_column: Column with the images.
        label_column: Column with the labels.
        on_error: What to do with an image that does not decode: "raise" names its row, "skip" drops and counts it.
    """

    model: str
    dataset: str
    split: str = "train"
    eval_split: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    on_error: str = "raise"


@dataclass
class ScoreArguments:
    """Score a data set with a frozen model.

    Args:
        reference_model: Hub repo id or folder of the reference.
        reference_revision: Branch, tag or commit of the reference's Hub repo.
        mimic_layers: "head", "last_mlp", "last_block", "all", names, suffixes or regular expressions.
        sample_id_column: Integer id column; added if the data set has none.
        batch_size: Samples per forward pass.
        num_workers: Processes that decode images.
        output_dir: Where the score shards go.
    """

    reference_model: str
    reference_revision: str | None = None
    mimic_layers: list[str] = field(default_factory=lambda: ["head"])
    sample_id_column: str = "sample_id"
    batch_size: int = 32
    num_workers: int = 0
    output_dir: str = "scores"


@dataclass
class FilterArguments:
    """Write the curated data set: scores as columns, rejected rows left out.

    Args:
        dataset: The data set that was scored: Hub data set, folder or data file.
        scores: Folder with score shards: <output_dir>/scores of a training run, or of `hf-mimic score`.
        output: Parquet file to write.
        split: Split of the data set.
        sample_id_column: Integer id column; added, in row order, if the data set has none.
        threshold: Least relative weight (uniform = 1) at most visits; the papers' 1/b is 1.
        min_score: Keep by a mean mimic score of at least this instead; for scores without training.
        keep_all: Write every row, with the column `keep`.
    """

    dataset: str
    scores: str
    output: str = "curated.parquet"
    split: str = "train"
    sample_id_column: str = "sample_id"
    threshold: float = 1.0
    min_score: float | None = None
    keep_all: bool = False


def demo(options: DemoArguments) -> str:
    """Score, reweight, record and filter on scikit-learn's digits, without network."""
    import torch

    from hf_mimic.demo import run_demo

    torch.set_num_threads(1)  # more threads do not speed so small a model up, and slow it down on a busy machine
    return f"{run_demo(options.output_dir, range(options.seeds))}\n\nsaved in {options.output_dir}"


def train(options: DataArguments, args: Any) -> str:
    """Fine-tune with MimicTrainer; save the model and the scores."""
    from transformers import set_seed

    from hf_mimic.metrics import accuracy
    from hf_mimic.trainer import MimicTrainer

    rows, labels = _rows(options, args.sample_id_column)
    set_seed(args.seed)  # a new head is drawn before the Trainer sets it
    model, processor, _ = _model(options.model, labels)
    evaluation = None
    if options.eval_split:
        place = (
            (options.eval_split, "train")
            if Path(options.eval_split).exists()
            else (options.dataset, options.eval_split)
        )
        part = dataclasses.replace(options, dataset=place[0], split=place[1])
        evaluation, _ = _rows(part, args.sample_id_column, labels)
        args.eval_strategy = "epoch" if args.eval_strategy == "no" else args.eval_strategy
    trainer = MimicTrainer(
        model,
        args,
        train_dataset=_transformed(rows, processor, options),
        eval_dataset=None if evaluation is None else _transformed(evaluation, processor, options),
        processing_class=processor,
        compute_metrics=accuracy,
    )
    trainer.train()
    trainer.save_model()
    lines = {"samples": len(rows), "visits": len(trainer.scores), "model": args.output_dir, "scores": args.scores_dir}
    if evaluation is not None:
        lines["accuracy"] = f"{trainer.evaluate()['eval_accuracy']:.4f}"
    return _table(lines) + f"\n\nnext: hf-mimic filter --dataset {options.dataset} --scores {args.scores_dir}"


def score(options: DataArguments, scoring: ScoreArguments) -> str:
    """Score every sample with the model as it is."""
    import torch

    from hf_mimic.mimic import reference_direction
    from hf_mimic.scores import ScoreTable
    from hf_mimic.scoring import score_dataset

    rows, labels = _rows(options, scoring.sample_id_column)
    model, processor, made = _model(options.model, labels)
    if made:
        raise ValueError(
            f"the model must have a trained head for the data set's {len(labels)} labels; {options.model} has none "
            f"({', '.join(made)} would be made anew, and its scores be noise). Fine-tune it first: hf-mimic train."
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    direction = reference_direction(
        model, scoring.reference_model, scoring.mimic_layers, revision=scoring.reference_revision
    )
    table = score_dataset(
        model,
        _transformed(rows, processor, options),
        direction,
        batch_size=scoring.batch_size,
        sample_id_column=scoring.sample_id_column,
        num_workers=scoring.num_workers,
    )
    stored = ScoreTable(scoring.output_dir)
    stored.set_aside()
    stored.extend(table)
    stored.flush()
    values = table.aggregate()["mimic_score"].to_numpy()
    return _table(
        {
            "samples": len(values),
            "mean score": f"{values.mean():.4g}",
            "negative": f"{(values < 0).mean():.1%}",
            "layers": f"{len(direction)} tensors, {sum(v.numel() for v in direction.values()):,} parameters",
            "scores": scoring.output_dir,
        }
    )


def filter_rows(options: FilterArguments) -> str:
    """Attach the scores, decide what to keep, write Parquet."""
    import numpy as np

    from hf_mimic.data import load_rows
    from hf_mimic.filters import ThresholdFilter
    from hf_mimic.scores import ScoreTable, attach_scores

    rows = _identified(load_rows(options.dataset, options.split), options.sample_id_column)
    table = ScoreTable.load(options.scores)
    if options.min_score is None:
        keep = ThresholdFilter(options.threshold).fit_predict(table)
    else:
        keep = ~(table.aggregate()["mimic_score"].to_numpy() < options.min_score)  # without a score: kept
    scored = attach_scores(rows, table, keep=keep, sample_id_column=options.sample_id_column)
    kept = np.asarray(scored.with_format("arrow")[:]["keep"].fill_null(True))  # a row without a score is not dropped
    curated = scored if options.keep_all else scored.select(np.flatnonzero(kept))
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    curated.to_parquet(options.output)
    share = f"{kept.mean():.1%}"
    return _table(
        {
            "rows": len(rows),
            "scored": len(table.aggregate()),
            "kept": f"{kept.sum()} ({share})",
            "written": options.output,
        }
    )


# ---- shared by the commands ----------------------------------------------------------------------------------------


def _rows(options: DataArguments, sample_id_column: str, labels: list[str] | None = None) -> tuple[Dataset, list[str]]:
    """Return the data set with ids and class labels (in the order of `labels`, if given), and its labels."""
    from hf_mimic.checks import check_choice
    from hf_mimic.data import drop_unreadable, load_rows, with_class_labels

    check_choice("on_error", options.on_error, ("raise", "skip"))
    rows = with_class_labels(
        _identified(load_rows(options.dataset, options.split), sample_id_column), options.label_column, labels
    )
    if options.on_error == "skip":
        rows, bad = drop_unreadable(rows, options.image_column)
        print(
            f"{len(bad)} images do not decode and are skipped{': rows ' if bad else ''}{', '.join(map(str, bad[:20]))}"
        )
    return rows, rows.features[options.label_column].names


def _identified(rows: Dataset, column: str) -> Dataset:
    from hf_mimic.data import add_sample_ids

    return rows if column in rows.column_names else add_sample_ids(rows, column)


def _transformed(rows: Dataset, processor: Any, options: DataArguments) -> Dataset:
    from hf_mimic.data import with_image_transform

    return with_image_transform(rows, processor, options.image_column, options.label_column)


def _model(name: str, labels: list[str]) -> tuple[Any, Any, list[str]]:
    """Return the model with these labels, its image processor, and the parameters that the checkpoint did not have."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    ids = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    model, info = AutoModelForImageClassification.from_pretrained(
        name, ignore_mismatched_sizes=True, output_loading_info=True, **ids
    )
    made = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    return model, AutoImageProcessor.from_pretrained(name), made


def _table(lines: dict[str, Any]) -> str:
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _training_arguments() -> list[Any]:
    from hf_mimic.arguments import MimicTrainingArguments

    return [DataArguments, MimicTrainingArguments]


COMMANDS: dict[str, tuple[Callable[..., str], Callable[[], list[Any]]]] = {
    "demo": (demo, lambda: [DemoArguments]),
    "train": (train, _training_arguments),
    "score": (score, lambda: [DataArguments, ScoreArguments]),
    "filter": (filter_rows, lambda: [FilterArguments]),
}
