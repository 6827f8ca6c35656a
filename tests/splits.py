"""One optimizer step split in every way: batch sizes, accumulated micro-batches, processes.

`train` runs one pass in this process or, called from worker.py, in one of two; tests compare the gradients of its
optimizer steps with those of another split or with an oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import models
import torch
import transformers as tf
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from training import FIRST, QUIET, Gradients, gradients_of

from hf_mimic.arguments import MimicTrainingArguments
from hf_mimic.trainer import MimicTrainer

# name: (processes, batch size, accumulated micro-batches); each step has 16 rows
SPLITS = {"16": (1, 16, 1), "4x4": (1, 4, 4), "8x2": (1, 8, 2), "2p8": (2, 8, 1), "2p4x2": (2, 4, 2)}
ROWS = 22  # the second step has 6: a short tail, or a padded one
FAMILIES = ("vit", "clip_classifier", "siglip_classifier", "resnet", "swinv2", "multi_label")


CONFIGS: dict[str, dict[str, Any]] = {
    "multi_label": {"problem_type": "multi_label_classification"},
    "dropout": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "swinv2": {"drop_path_rate": 0.0},
}


class Rows(torch.utils.data.Dataset):
    """A batch as a data set that keeps its precision, with ids 100, 101 ..."""

    def __init__(self, batch: dict[str, Tensor], ids: bool = True) -> None:
        self.batch = {**batch, "sample_id": torch.arange(FIRST, FIRST + ROWS)} if ids else batch

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: column[row] for name, column in self.batch.items()}


class Unscales(tf.TrainerCallback):
    """Lets clipping unscale first, as in float16 training, once it is too late for autocast to begin."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.accelerator.native_amp, self.accelerator.state._mixed_precision = True, "fp16"


def make(family: str, dtype: torch.dtype, broken: Sequence[int] = ()) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model, its batch norm frozen and without random parts, and a batch of ROWS; some rows with a NaN."""
    kind = {"judged": "vit", "multi_label": "vit", "dropout": "vit", "lora": "clip_classifier"}.get(family, family)
    model, batch = models.make(kind, dtype, **CONFIGS.get(family, {})), models.make_batch(kind, dtype, size=ROWS)
    if family == "lora":
        model = models.with_lora(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
    if family == "multi_label":
        generator = torch.Generator().manual_seed(3)
        batch["labels"] = (torch.rand(ROWS, models.LABELS, generator=generator) < 0.5).to(dtype)
    if family == "judged":  # labels that the reference agrees with, but for some
        batch = models.make_batch(kind, dtype, size=ROWS, seed=3)  # several classes
        with torch.no_grad():
            outputs = torch.func.functional_call(model, models.moved(model), (batch["pixel_values"],))
            batch["labels"] = outputs.logits.argmax(1)
        batch["labels"][::11] = (batch["labels"][::11] + 1) % models.LABELS
    for row in broken:
        batch["pixel_values"][row, 0, 0, 0] = torch.nan
    return model, batch


def train(
    family: str,
    split: str,
    folder: Any,
    *,
    double: bool = False,
    plain: bool = False,
    broken: Sequence[int] = (),
    shards: int = 0,
    scaler: bool = False,
    repeated: bool = False,
    trainer_class: type = MimicTrainer,
    **options: Any,
) -> tf.Trainer:
    """Train one pass with a learning rate of 0 (all steps see the same weights) unless given; return the trainer.

    Args:
        family: Of FAMILIES, a name of models.py, or "lora".
        split: Of SPLITS.
        folder: The output folder.
        double: float64 in place of float32.
        plain: The stock Trainer.
        broken: Rows with a NaN.
        shards: Of a stream of the rows; 0 for no stream.
        scaler: Scale the loss as float16 training does.
        repeated: Every third caption is the same.
        trainer_class: In place of `MimicTrainer`.
        **options: Of the training arguments.
    """
    AcceleratorState._reset_state()
    model, batch = make(family, torch.float64 if double else torch.float32, broken)
    if repeated:
        batch["input_ids"][::3] = batch["input_ids"][0].clone()
    _, size, steps = SPLITS[split]
    options = {
        **QUIET,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": steps,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "optim": "sgd",
        **options,
    }
    rows: Any = Rows(batch, ids=not plain)
    if shards:
        columns = {name: column.numpy() for name, column in rows.batch.items()}
        rows = datasets.Dataset.from_dict(columns).with_format("torch").to_iterable_dataset(num_shards=shards)
    if plain:
        trainer = tf.Trainer(model, tf.TrainingArguments(str(folder), **options), train_dataset=rows)
    else:
        args = MimicTrainingArguments(str(folder), **{"strategy": "mimic", **options})
        trainer = trainer_class(model, args, train_dataset=rows, reference_model=models.moved(model))
    if scaler:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        trainer.add_callback(Unscales(trainer.accelerator))
    trainer.add_callback(Gradients())
    trainer.train()
    return trainer


def steps_of(trainer: tf.Trainer) -> list[dict[str, Tensor | None]]:
    """Return the gradients of every optimizer step."""
    return gradients_of(trainer)


def difference(gradients: dict, expected: dict) -> float:
    """Return |g - g'| / |g'| over all parameters; a missing gradient counts as 0."""
    square, size, zero = 0.0, 0.0, torch.zeros(())
    for name, right in expected.items():
        right, left = (zero if g is None else g.double() for g in (right, gradients[name]))
        square, size = square + float((left - right).square().sum()), size + float(right.square().sum())
    return (square / size) ** 0.5
