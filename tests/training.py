"""What the trainer's tests share: rows with ids, a quiet trainer, the gradients of its steps, its score table."""

import copy
import gc

import models
import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback

from hf_mimic.arguments import MimicTrainingArguments
from hf_mimic.trainer import MimicTrainer

gc.freeze()  # every training collects garbage: it need not walk what was imported

QUIET = {
    "use_cpu": True,
    "report_to": "none",
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "per_device_train_batch_size": 8,
    "train_sampling_strategy": "sequential",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}
SGD = {"optim": "sgd", "learning_rate": 0.1}
FIRST = 100  # the first sample id
ALL = list(range(FIRST, FIRST + 16))


def rows_of(batch):
    """Return a batch as a data set with ids 100, 101 ..."""
    rows = Dataset.from_dict({name: x.numpy() for name, x in batch.items()}).with_format("torch")
    return rows.add_column("sample_id", list(range(FIRST, FIRST + len(rows))))


def prepare(model, folder, *, rows=None, reference=None, arguments=None, **options):
    """Return a trainer of a copy of `model`; `options` of MimicTrainingArguments, `arguments` of MimicTrainer."""
    reference = models.moved(model) if reference is None else reference
    args = MimicTrainingArguments(str(folder), **{**QUIET, "strategy": "mimic", **options})
    return MimicTrainer(copy.deepcopy(model), args, train_dataset=rows, reference_model=reference, **arguments or {})


def fit(*positional, **named):
    trainer = prepare(*positional, **named)
    trainer.add_callback(Gradients())
    trainer.train()
    return trainer


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()})


def gradients_of(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, Gradients)).steps


def assert_close(gradients, expected, tolerance=1e-5):
    largest = max(g.abs().max() for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        if gradient is None or gradients[name] is None:
            missing = gradient if gradients[name] is None else gradients[name]
            assert missing is None or not missing.any(), name
        else:
            assert (gradients[name] - gradient).abs().max() <= tolerance * largest, name


def column(trainer, name):
    return np.array(trainer.scores.to_arrow()[name].to_pylist(), dtype=float)


def visits(trainer):
    """Return the ids of each epoch, sorted."""
    rows = trainer.scores.to_arrow()
    ids, epochs = (rows[name].to_numpy() for name in ("sample_id", "epoch"))
    return [sorted(ids[epochs == epoch].tolist()) for epoch in np.unique(epochs)]


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def distance(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))
