"""One optimizer step split in every way: batch sizes, accumulated micro-batches, processes. Run in a process, or in two.

`gradients_of_splits` trains one model by every split; tests compare what it returns with an oracle.
"""

from __future__ import annotations

from typing import Any

import models
import torch
import transformers as tf
from accelerate.state import AcceleratorState
from torch import nn
from training import FIRST, QUIET, Gradients, gradients_of

from hf_mimic.arguments import MimicTrainingArguments
from hf_mimic.trainer import MimicTrainer

# name: (processes, batch size, accumulated micro-batches); each step has 16 rows
SPLITS = {"16": (1, 16, 1), "4x4": (1, 4, 4), "2p8": (2, 8, 1), "2p4x2": (2, 4, 2)}
ROWS = 22  # the second step has 6: a short tail, or a padded one
FAMILIES = ("vit", "clip_classifier", "siglip_classifier", "resnet", "swinv2", "multi_label")


class Rows(torch.utils.data.Dataset):
    """A batch as a data set that keeps its precision, with ids 100, 101 ..."""

    def __init__(self, batch: dict[str, torch.Tensor], ids: bool = True) -> None:
        self.batch = {**batch, "sample_id": torch.arange(FIRST, FIRST + ROWS)} if ids else batch

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: column[row] for name, column in self.batch.items()}


def freeze_norms(model: nn.Module) -> nn.Module:
    """Keep batch norm in eval mode while the rest trains: its statistics would depend on the split."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
    return model


def make(family: str, dtype: torch.dtype) -> tuple[nn.Module, dict]:
    """Return the model and a batch of ROWS."""
    kind = "vit" if family == "multi_label" else family
    options = {"problem_type": "multi_label_classification"} if family == "multi_label" else {}
    options |= {"drop_path_rate": 0.0} if family == "swinv2" else {}  # random numbers would differ
    model = freeze_norms(models.make(kind, dtype, **options))
    batch = models.make_batch(kind, dtype, size=ROWS)
    if family == "multi_label":
        generator = torch.Generator().manual_seed(3)
        batch["labels"] = (torch.rand(ROWS, models.LABELS, generator=generator) < 0.5).to(dtype)
    return model, batch


def train(family: str, split: str, folder: Any, *, dtype: torch.dtype = torch.float32, plain: bool = False, **options):
    """Train one pass with a learning rate of 0 (all steps see the same weights) unless given; return the trainer."""
    AcceleratorState._reset_state()
    model, batch = make(family, dtype)
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
    if plain:
        args = tf.TrainingArguments(str(folder), **options)
        trainer = tf.Trainer(model, args, train_dataset=Rows(batch, ids=False))
    else:
        args = MimicTrainingArguments(str(folder), **options)
        trainer = MimicTrainer(model, args, train_dataset=Rows(batch), reference_model=models.moved(model))
    trainer.add_callback(Gradients())
    trainer.train()
    return trainer


def steps_of(trainer: tf.Trainer) -> list[dict[str, torch.Tensor]]:
    """Return the gradients of every optimizer step."""
    return gradients_of(trainer)


def difference(gradients: dict, expected: dict) -> float:
    """Return |g - g'| / |g'| over all parameters; a missing gradient counts as 0."""
    square, size = 0.0, 0.0
    for name, right in expected.items():
        left = gradients[name]
        zero = torch.zeros(())
        square += float(
            ((zero if left is None else left) - (zero if right is None else right)).double().square().sum()
        )
        size += 0.0 if right is None else float(right.double().square().sum())
    return (square / size) ** 0.5
