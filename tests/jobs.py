"""What worker.py runs in two processes: every function takes a folder of its own and returns plain tensors."""

from __future__ import annotations

import os
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import corpora
import models
import sharded_scores
import splits
import torch
from accelerate import PartialState
from splits import steps_of
from test_resuming import Killed, other, trainer_of
from torch.distributed.fsdp import FSDPModule
from training import prepare, rows_of
from transformers.distributed import DistributedConfig

from hf_mimic.sharding import whole


def step_gradients(folder: Path, *, family: str, split: str, **options: Any) -> dict[str, Any]:
    """Return the gradients of every optimizer step, the weights, the score table's rows and the log."""
    trainer = splits.train(family, split, folder, **options)
    rows = {} if options.get("plain") else trainer.scores.to_arrow().to_pydict()
    weights = dict(trainer.model.state_dict())
    return {"gradients": steps_of(trainer), "weights": weights, "rows": rows, "log": trainer.state.log_history}


def sharded_scores_of(folder: Path, **options: Any) -> dict[str, Any]:
    """Return what sharded_scores.py finds."""
    return sharded_scores.compare(folder, **options)


def corpus_of(folder: Path, *, family: str) -> dict[str, Any]:
    """Return what corpora.py finds."""
    return corpora.scored(folder, family=family)


def corpus_error(folder: Path) -> dict[str, Any]:
    """Return the message of the error that only the first process finds: the folder holds another pass."""
    corpora.score_corpus(corpora.make_pass("clip"), folder, shard=(0, 2))
    PartialState().wait_for_everyone()
    try:
        corpora.score_corpus(corpora.make_pass("clip", batch_size=2), folder, shard=(0, 2))
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


def error_of(folder: Path, *, family: str, split: str, scale: float, **options: Any) -> dict[str, Any]:
    """Return the message of the error that a trainer with a scaled loss ends with."""

    class Scaled(splits.MimicTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return scale * super().compute_loss(*args, **kwargs)

    try:
        splits.train(family, split, folder, trainer_class=Scaled, **options)
    except RuntimeError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


def sharded(
    folder: Path, *, layers: str, accumulate: int, broken: list[int] | None = None, **more: Any
) -> dict[str, Any]:
    """Train a ViT that transformers shards with FSDP2; return its whole gradients and the scores of its visits."""
    splits.AcceleratorState._reset_state()
    model, batch = splits.make("vit", torch.float32, broken or ())
    saved = folder.parent / "vit"
    if PartialState().is_main_process:
        splits.make("vit", torch.float32)[0].save_pretrained(saved)
    PartialState().wait_for_everyone()
    plan = DistributedConfig(fsdp_size=2, fsdp_plan={"vit.layers.*": "free_full_weight"})
    reference = models.moved(model)
    model = type(model).from_pretrained(saved, distributed_config=plan)
    options = {"per_device_train_batch_size": 8 // accumulate, "gradient_accumulation_steps": accumulate}
    options |= {
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "optim": "sgd",
        "mimic_layers": layers,
        "self_check_steps": 1,
    }
    args = splits.MimicTrainingArguments(str(folder), **{**splits.QUIET, "strategy": "mimic", **options})
    trainer = splits.MimicTrainer(model, args, train_dataset=splits.Rows(batch), reference_model=reference)

    class Whole(splits.Gradients):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            named = model.named_parameters()
            self.steps.append({n: None if p.grad is None else whole(p.grad).clone() for n, p in named})

    trainer.add_callback(Whole())
    try:
        trainer.train()
    except FloatingPointError as error:
        return {"error": str(error)}
    units_found = sum(isinstance(module, FSDPModule) for module in model.modules())
    return {"gradients": steps_of(trainer), "rows": trainer.scores.to_arrow().to_pydict(), "units": units_found}


def resumed(folder: Path, *, kill: int, **options: Any) -> dict[str, Any]:
    """Train without interruption; then be killed before a step, and resume; return both runs' weights and rows."""
    whole = trainer_of(folder / "whole", **options)
    whole.train()
    killed = trainer_of(folder / "killed", kill=kill, **options)
    try:
        killed.train()
    except Killed:
        pass
    if PartialState().is_main_process:
        shutil.copytree(folder / "killed", folder / "left")
    PartialState().wait_for_everyone()
    again = trainer_of(
        folder / "killed", model=None if "family" in options else other(hidden_dropout_prob=0.1), **options
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again.train(resume_from_checkpoint=True)
    runs = {"whole": whole, "resumed": again}
    found = {name: (run.model.state_dict(), run.scores.to_arrow().to_pydict()) for name, run in runs.items()}
    return {**found, "warnings": [str(warning.message) for warning in caught]}


def evaluated(folder: Path, *, family: str, size: int, **options: Any) -> dict[str, Any]:
    """Return the evaluation loss of 22 pairs."""
    splits.AcceleratorState._reset_state()
    model, batch = splits.make(family, torch.float64)
    args = {"per_device_eval_batch_size": size, **options}
    trainer = prepare(model, folder, **args)
    return {"loss": trainer.evaluate(splits.Rows(batch))["eval_loss"]}


def histories(folder: Path, *, apart: bool = False, **options: Any) -> dict[str, Any]:
    """Train a CLIP that chooses; return what is known of every sample after every step, on this process."""
    splits.AcceleratorState._reset_state()
    found: list[Any] = []

    class Looks(splits.Gradients):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            owner = trainer.choice.rule or trainer.choice.sampler
            found.append({name: x.clone() for name, x in owner.history.state_dict().items()})

    rows = rows_of(models.make_batch("clip", size=44))
    moving = {"learning_rate": 1e-3, "optim": "adamw_torch", "num_train_epochs": 3, "selection_rate": 0.5}
    trainer = prepare(
        models.make("clip"), folder, rows=rows, arguments={"callbacks": [Looks()]}, **{**moving, **options}
    )
    if apart:  # as the official code: every process knows what it has seen itself
        trainer.engine.gather_columns = lambda ids, values, **_: (ids, values)
    trainer.train()
    table = trainer.scores.to_arrow().to_pydict()
    return {
        "histories": found,
        "rows": table,
        "ledger": trainer.ledger.report(trainer.engine.gather, trainer.args.device),
    }


def loses_a_process(folder: Path, *, how: str) -> dict[str, Any]:
    """Train with a second process that dies, or sleeps, before the third step."""

    class Loses(splits.Gradients):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and args.process_index == 1:
                (folder.parent / "lost").touch()
                os.kill(os.getpid(), signal.SIGKILL) if how == "dies" else time.sleep(120)

    class Trainer(splits.MimicTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, callbacks=[Loses()])

    splits.train("vit", "2p8", folder, trainer_class=Trainer, num_train_epochs=4, ddp_timeout=5)
    return {}


def pinned(folder: Path, *, repo_id: str, revision: str | None = None) -> dict[str, Any]:
    """Return the commit at which a trainer reads its reference on the Hub, and a tensor of it; or the error."""
    splits.AcceleratorState._reset_state()
    rows = rows_of(models.make_batch("vit", size=16))
    try:
        trainer = prepare(models.make("vit"), folder, rows=rows, reference=repo_id, reference_revision=revision)
    except OSError as error:
        return {"error": str(error)}
    return {"sha": trainer.reference.sha, "bias": trainer.direction.tensors["classifier.bias"]}


def pushed(folder: Path, *, repo_id: str) -> dict[str, Any]:
    """Train, push the model to the Hub, or meet its refusal; return what each process is told."""
    splits.AcceleratorState._reset_state()
    rows = rows_of(models.make_batch("vit", size=32))
    options = {"max_steps": 2, "hub_model_id": repo_id, "per_device_train_batch_size": 4}
    trainer = prepare(models.make("vit"), folder / "out", rows=rows, **options)
    trainer.train()
    done = trainer.push_to_hub()
    return {"oid": done and done.oid, "steps": trainer.state.global_step}
