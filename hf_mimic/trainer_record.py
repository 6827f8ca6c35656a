"""What a `MimicTrainer` tells of its run: the record beside its scores, from which cards are made."""

from __future__ import annotations

from typing import Any

from hf_mimic.origins import COMMAND, origin
from hf_mimic.run_record import RunRecord, public_name, versions

_SIGNALS = ("score_fit_correlation", "score_trust_correlation", "unhealthy")
_SETTINGS = {  # name in the record to name of the argument
    "head_init": "head_init",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "processes": "world_size",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "warmup_steps": "warmup_steps",
}


def record_of_run(trainer: Any) -> RunRecord:
    """Return what is known of a run so far.

    Args:
        trainer: A `MimicTrainer`.
    """
    args, settings = trainer.args, trainer.run_settings()
    config = getattr(trainer.model, "config", None)
    source = origin(trainer.train_dataset)
    known = {name: getattr(args, argument) for name, argument in _SETTINGS.items()}
    for name in ("lr_scheduler_type", "optim"):
        known[name] = str(getattr(getattr(args, name), "value", getattr(args, name)))
    known |= _evaluated(trainer.eval_dataset, source.dataset)
    own = {k: v for k, v in settings.items() if not k.startswith("reference_")}
    return RunRecord(
        kind="training",
        model=public_name(getattr(config, "_name_or_path", None) or None),
        model_revision=getattr(config, "_commit_hash", None),
        reference_model=public_name(settings.get("reference_model")),
        reference_revision=settings.get("reference_revision"),
        base_model=public_name(settings.get("reference_base_model")),
        dataset=source.dataset,
        dataset_revision=source.revision,
        dataset_config=source.config,
        split=_split(trainer.train_dataset),
        settings=own | known,
        seeds={"seed": args.seed} | ({} if args.data_seed is None else {"data_seed": args.data_seed}),
        health=_last(trainer.state.log_history, _SIGNALS),
        results=_evaluation(trainer.state.log_history),
        versions=versions(),
        command=COMMAND.get(),
    )


def task_of(model: Any) -> str | None:
    """Return what the Hub calls the task of a model, None for one that it does not tell by its name."""
    if hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
        return "zero-shot-image-classification"
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return "image-classification" if "ForImageClassification" in type(base).__name__ else None


def _evaluated(rows: Any, trained_on: str | None) -> dict[str, str]:
    """Return split and, if it is another one than that of the training, data set of the evaluation."""
    split, repo = _split(rows), origin(rows).dataset
    found = {} if split is None else {"eval_split": split}
    return found | ({} if repo in (None, trained_on) else {"eval_dataset": str(repo)})


def _split(rows: Any) -> str | None:
    return str(getattr(rows, "split", None) or "") or None


def _last(history: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the last value of each name in the log."""
    return {name: row[name] for row in history for name in names if name in row}


def _evaluation(history: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the metrics of the last evaluation."""
    rows = [row for row in history if any(name.startswith("eval_") for name in row)]
    return {k: v for k, v in rows[-1].items() if isinstance(v, (int, float)) and k != "step"} if rows else {}
