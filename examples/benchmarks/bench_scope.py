"""What weights over all processes cost: a step with weight_scope="global" over one with "device", on two processes.

    python examples/benchmarks/bench_scope.py [--quick] [--max global=1.03]

One gather of eleven numbers more per optimizer step. Both trainers live in the same two processes and take turns, a
few steps each; ratio of the medians of the paired rounds, the first step of each round left out.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import transformers
from ranks import run_ranks
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification
from turns import QUIET

from hf_mimic import MimicTrainer, MimicTrainingArguments

SIZES = {"quick": (64, 3, 32, 8), "full": (192, 12, 224, 8)}  # hidden size, layers, image, rows per process
STEPS = 4


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        self.begin = time.perf_counter()

    def on_optimizer_step(self, *args, **kwargs):
        self.times.append(time.perf_counter() - self.begin)


def make_trainer(folder: str, scope: str, size: str) -> tuple[MimicTrainer, StepTimes]:
    hidden, layers, image, batch = SIZES[size]
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 3 if hidden % 3 == 0 else 2}
    model = ViTForImageClassification(
        ViTConfig(**shape, intermediate_size=4 * hidden, image_size=image, num_labels=100)
    )
    reference = {name: p.detach() + 1e-3 * torch.randn(p.shape) for name, p in model.named_parameters()}
    rows = [{"pixel_values": torch.randn(3, image, image), "labels": i % 100, "sample_id": i} for i in range(64)]
    args = MimicTrainingArguments(
        f"{folder}/{scope}",
        **QUIET,
        per_device_train_batch_size=batch,
        max_steps=STEPS + 1,
        learning_rate=1e-5,
        weight_scope=scope,
        temperature=1.0,
        mimic_layers=["last_mlp"],
        record_scores=False,
        self_check_steps=-1,
        ddp_find_unused_parameters=False,
    )
    trainer, times = MimicTrainer(model, args, train_dataset=rows, reference_model=reference), StepTimes()
    trainer.add_callback(times)
    return trainer, times


def measure(folder: str, size: str, rounds: int) -> None:
    """Let both trainers take turns; save the median step time of every round."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    trainers = {scope: make_trainer(folder, scope, size) for scope in ("global", "device")}
    found: dict[str, list[float]] = {scope: [] for scope in trainers}
    for number in range(rounds + 1):
        for scope in sorted(trainers, reverse=bool(number % 2)):
            trainer, times = trainers[scope]
            times.times.clear()
            trainer.train()
            if number:  # the first round warms up
                found[scope].append(median(times.times[1:]))
    if trainer.args.process_index == 0:
        (Path(folder) / "times.json").write_text(json.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--max", action="append", default=[], metavar="global=RATIO", help="exit with 1 above this")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    size, root = "quick" if options.quick else "full", Path(tempfile.mkdtemp())
    try:
        run_ranks(measure, (str(root), size, options.rounds), 2, seconds=3600)
        times = json.loads((root / "times.json").read_text())
    finally:
        shutil.rmtree(root, ignore_errors=True)
    ratios = [a / b for a, b in zip(times["global"], times["device"], strict=True)]
    ratio = median(ratios)
    hidden, layers, image, batch = SIZES[size]
    print(
        f"ViT {hidden} x {layers}, {image} pixels, 2 processes x {batch} rows, {options.rounds} rounds of {STEPS} steps"
    )
    print(f"device {1e3 * median(times['device']):.1f} ms, global {1e3 * median(times['global']):.1f} ms a step")
    print(f"global over device: {ratio:.3f} ({min(ratios):.2f}-{max(ratios):.2f})")
    if options.json:
        options.json.write_text(json.dumps({"times": times, "ratio": ratio}, indent=2))
    limits = [float(limit.split("=")[1]) for limit in options.max]
    return 1 if any(ratio > limit for limit in limits) else 0


if __name__ == "__main__":
    sys.exit(main())
