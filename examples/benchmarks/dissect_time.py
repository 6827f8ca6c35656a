"""Wall clock of an epoch that chooses over one that trains on everything, image decoding included."""

import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from datasets import Dataset, load_dataset
from dissect_tables import table
from transformers import CLIPConfig, CLIPModel, TrainerCallback
from turns import QUIET, quiet, take_turns

from hf_mimic import MimicTrainer, MimicTrainingArguments
from hf_mimic.data import add_sample_ids

BATCH, BATCHES, EPOCHS = 64, 4, 3
PLANS = {  # name: options, and what the ratio must not exceed
    "full": ({"strategy": "uniform"}, None),
    **{
        f"{refresh}, r = {rate}": (
            {"strategy": "dissect", "variant": "momentum", "refresh": refresh, "selection_rate": rate},
            (1 + 3 * rate) / 3 + 0.05 if refresh == "step" else rate + 0.10,
        )
        for refresh in ("step", "epoch")
        for rate in (0.3, 0.5)
    },
}


class Epochs(TrainerCallback):
    """Times every epoch but the first, re-scoring included."""

    def __init__(self) -> None:
        self.begun, self.seconds = 0.0, []

    def on_epoch_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self.begun:
            self.seconds.append(now - self.begun)
        self.begun = now


def train(trainer: MimicTrainer, epochs: Epochs) -> float:
    """Train once; return the seconds of an epoch."""
    epochs.begun, epochs.seconds = 0.0, []
    trainer.train()
    return median(epochs.seconds)


def time_table(quick: bool, data: Path) -> tuple[str, list[str], list[dict]]:
    """Return the table, the limits that do not hold, and the times.

    All trainers live in one process and take turns; in each turn each trains for some epochs, of which the first is not
    counted. The ratio is the median over the turns of the ratio to the full training of the same turn.
    """
    quiet()
    rows, rounds = _rows(data), 5 if quick else 15
    root = Path(tempfile.mkdtemp())
    try:
        trainers = {name: _trainer(rows, root / str(n), plan[0]) for n, (name, plan) in enumerate(PLANS.items())}
        times = take_turns({name: partial(train, *trainers[name]) for name in PLANS}, rounds)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    lines, broken, results = [], [], []
    for name, (_, limit) in PLANS.items():
        ratios = [a / b for a, b in zip(times[name], times["full"], strict=True)]
        ratio = median(ratios)
        results.append({"plan": name, "ratio": ratio, "limit": limit, "seconds": times[name]})
        bounds = f"{min(ratios):.2f}-{max(ratios):.2f}"
        lines.append(
            [name, f"{median(times[name]):.2f}", f"{ratio:.3f}", bounds, "-" if limit is None else f"{limit:.3f}"]
        )
        if limit is not None and ratio > limit:
            broken.append(f"{name} must cost at most {limit:.3f} of full training, got {ratio:.3f}")
    head = ["epoch", "seconds", "over full", "range", "limit"]
    told = f"{len(rows)} drawings of 64 pixels, batches of {BATCH}, {rounds} turns of {EPOCHS - 1} epochs"
    return f"{told}\n\n{table(head, lines)}", broken, results


def _rows(data: Path) -> Dataset:
    rows = load_dataset("parquet", data_files=str(data / "icons" / "phosphor.parquet"), split="train")
    rows = add_sample_ids(rows.select(range(BATCH * BATCHES)).select_columns(["image", "text"]))

    def transform(batch: dict) -> dict:
        pixels = [torch.frombuffer(bytearray(x.convert("RGB").tobytes()), dtype=torch.uint8) for x in batch["image"]]
        pixels = [x.view(64, 64, 3).permute(2, 0, 1).float() / 127.5 - 1 for x in pixels]
        tokens = [
            torch.tensor([1, *(4 + sum(word.encode()) % 995 for word in text.split()[:30]), 3])
            for text in batch["text"]
        ]
        padded = torch.nn.utils.rnn.pad_sequence([*tokens, torch.zeros(32)], batch_first=True)[:-1].long()
        return {"pixel_values": pixels, "input_ids": list(padded)}

    return rows.with_transform(transform)


def _trainer(rows: Dataset, folder: Path, options: dict) -> tuple[MimicTrainer, Epochs]:
    torch.manual_seed(0)
    block = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}
    text = {**block, "vocab_size": 1000, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1}
    text |= {"eos_token_id": 3}
    shape = {"text_config": text, "vision_config": {**block, "image_size": 64, "patch_size": 8}}
    model = CLIPModel(CLIPConfig(**shape, projection_dim=128))
    args = MimicTrainingArguments(
        str(folder),
        **QUIET,
        per_device_train_batch_size=BATCH,
        num_train_epochs=EPOCHS,
        **options,
    )
    trainer, epochs = MimicTrainer(model, args, train_dataset=rows), Epochs()
    trainer.add_callback(epochs)
    return trainer, epochs
