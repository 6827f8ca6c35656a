"""`hf-mimic train --text_column ...`: train an image-text model with a contrastive loss; read `train_pairs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_mimic.captions import check_columns, image_places
from hf_mimic.checks import check_choice
from hf_mimic.data import drop_unreadable, load_rows
from hf_mimic.data_arguments import DataArguments, evaluation_part, resume_point
from hf_mimic.embeddings import context_length
from hf_mimic.evaluation import load_image_text_model
from hf_mimic.metrics import retrieval
from hf_mimic.pairs import PairCollator, check_captions, drop_empty_captions, identified
from hf_mimic.selection import NEED_A_REFERENCE, STRATEGIES
from hf_mimic.trainer import MimicTrainer

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_ID = "image_id"  # the column of the evaluation data that says which rows have one image


def train_pairs(options: DataArguments, args: Any) -> dict[str, Any]:
    """Train with MimicTrainer; save the model with its tokenizer and image processor, and the scores.

    A row without a caption is left out; of a list of captions the first counts.

    Args:
        options: Which model, data set and columns; `text_column` is given.
        args: `MimicTrainingArguments`; its `remove_unused_columns` and `label_names` are set here.

    Returns:
        The lines of a table, name to value; of a run on several processes, none but for the first.

    Raises:
        ValueError: If no strategy is chosen and there is no reference, a column or its kind does not fit, no caption
            or no image is left, an image does not decode (its row is named), or the model does not embed images and
            texts.
    """
    _check_options(options, args)
    model, tokenizer, processor = load_image_text_model(options.model, device="cpu")  # the Trainer moves it
    context = context_length(model, tokenizer)
    rows, lines = _rows(options, args.sample_id_column, tokenizer, context)
    rows = rows.select_columns([options.image_column, str(options.text_column), args.sample_id_column])
    evaluation = None
    if options.eval_split:
        evaluation = _evaluation(evaluation_part(options), args.sample_id_column, tokenizer, context)
        args.eval_strategy = "epoch" if args.eval_strategy == "no" else args.eval_strategy
    args.remove_unused_columns = False  # the collator makes the model's inputs out of the columns
    args.label_names = [IMAGE_ID] if options.image_id_column else []
    trainer = MimicTrainer(
        model,
        args,
        PairCollator(
            tokenizer, processor, options.image_column, options.text_column or "", model=model, keep=[IMAGE_ID]
        ),
        rows,
        evaluation,
        processing_class=_Both(tokenizer, processor),
        compute_metrics=retrieval,
    )
    trainer.train(resume_from_checkpoint=resume_point(args.resume_from_checkpoint))
    trainer.save_model()
    lines |= {"strategy": trainer.strategy, "selection rate": f"{args.rate:g}"} | _cost(trainer)
    if evaluation is not None:
        lines["rsum"] = f"{trainer.evaluate()['eval_rsum']:.1f}"
    lines |= {"model": args.output_dir, "scores": args.scores_dir if args.record_scores else "not recorded"}
    return lines if trainer.is_world_process_zero() else {}


@dataclass(frozen=True)
class _Both:
    """What a Trainer is to save beside the model."""

    tokenizer: Any
    image_processor: Any

    def save_pretrained(self, folder: str) -> None:
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def _check_options(options: DataArguments, args: Any) -> None:
    check_choice("on_error", options.on_error, ("raise", "skip"))
    if args.strategy == "auto" and args.reference_model is None:
        free = [name for name in STRATEGIES if name not in NEED_A_REFERENCE]
        raise ValueError(
            f"--strategy must be chosen where there is no --reference_model, one of {', '.join(free)}, got neither. "
            "dissect trains on half of each batch, chosen by how the CLIPScores of its pairs change, uniform on all."
        )


def _rows(
    options: DataArguments, sample_id_column: str, tokenizer: Any, context: int
) -> tuple[Dataset, dict[str, Any]]:
    """Return the rows with caption and image, with ids, and the lines of the table on what was left out."""
    text_column: Any = options.text_column
    rows = load_rows(options.dataset, options.split, **options.place)
    check_columns(
        rows,
        image_column=options.image_column,
        text_column=text_column,
        image_id_column=options.image_id_column,
    )
    rows, total = identified(rows, sample_id_column), len(rows)
    found = check_captions(rows, text_column, tokenizer, context)
    rows, empty = drop_empty_captions(rows, text_column)
    if not len(rows):
        raise ValueError(
            f"at least one row must have a caption in {text_column!r}, got {empty} that are all empty. Name another "
            "column with --text_column."
        )
    bad: list[int] = []
    if options.on_error == "skip":
        rows, bad = drop_unreadable(rows, options.image_column)
        if not len(rows):
            raise ValueError(f"at least one image must decode, got {len(bad)} that do not.")
    return rows, {
        "rows": total,
        "empty captions": f"{empty} (left out)",
        "captions cut off": f"{found['cut_captions']} (longer than {context} tokens)",
        "unreadable images": f"{len(bad)} (left out)"
        if options.on_error == "skip"
        else "not looked for (--on_error skip does)",
        "pairs": len(rows),
    }


def _evaluation(options: DataArguments, sample_id_column: str, tokenizer: Any, context: int) -> Dataset:
    """Return the rows to evaluate on; with an `image_id_column`, the images are numbered in the column `IMAGE_ID`."""
    rows, _ = _rows(options, sample_id_column, tokenizer, context)
    chosen = rows.select_columns([options.image_column, str(options.text_column), sample_id_column])
    if options.image_id_column is None:
        return chosen
    return chosen.add_column(IMAGE_ID, image_places(rows, options.image_id_column))


def _cost(trainer: Any) -> dict[str, str]:
    """Return the ledger as lines of the table."""
    counts = trainer.ledger.report(trainer.engine.gather, trainer.args.device)
    compute = counts.pop("compute")
    told = ", ".join(f"{count:.0f} {name.removeprefix('samples_')}" for name, count in counts.items())
    return {"compute": f"{compute:.0f} training steps on one pair", "samples": told}
