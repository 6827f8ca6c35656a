"""What cached negatives cost: the pairs of a whole optimizer step as negatives, with the memory of one micro-batch.

    python examples/benchmarks/bench_negatives.py [--quick] [--max cached=1.40]

Three ways to train a CLIP on 32 pairs per step: accumulated micro-batches (each with its own negatives), the same with
`cache_negatives=True`, and one batch. Floor of the cached step over the accumulated one: 4/3, a forward pass more where a
backward pass is worth two. All trainers live in one process and take turns; memory is that of a process each.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from bench_scoring import resident
from transformers import CLIPConfig, CLIPModel, PrinterCallback, TrainerCallback
from turns import QUIET, quiet, take_turns

from hf_mimic import MimicTrainer, MimicTrainingArguments

STEPS, PAIRS = 3, 32
WAYS = {
    "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8},
    "cached": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, "cache_negatives": True},
    "one batch": {"per_device_train_batch_size": 32},
}


class Steps(TrainerCallback):
    """Times every step but the first of a run, and takes its peak of memory."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak = self.before = 0

    def on_step_begin(self, args, state, control, **kwargs):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the kernel's high-water mark, falls to what is resident
        self.before, self.begun = resident("VmRSS"), time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self.begun)
            self.peak = max(self.peak, resident("VmHWM") - self.before)


def make_trainer(folder: Path, way: str, quick: bool) -> tuple[MimicTrainer, Steps]:
    quiet()
    torch.manual_seed(0)
    width, image = (64, 32) if quick else (256, 112)
    block = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {**block, "vocab_size": 1000, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
    shape = {"text_config": text, "vision_config": {**block, "image_size": image, "patch_size": 16}}
    model = CLIPModel(CLIPConfig(**shape, projection_dim=64))
    rows = [
        {"pixel_values": torch.randn(3, image, image), "input_ids": torch.randint(3, 1000, (32,)), "sample_id": i}
        for i in range(PAIRS)
    ]
    args = MimicTrainingArguments(
        str(folder / way),
        **QUIET,
        max_steps=STEPS + 1,
        strategy="uniform",
        **WAYS[way],
    )
    trainer, steps = MimicTrainer(model, args, train_dataset=rows), Steps()
    trainer.add_callback(steps)
    trainer.remove_callback(PrinterCallback)
    return trainer, steps


def train(trainer: MimicTrainer, steps: Steps) -> float:
    """Train once; return the seconds of a step."""
    steps.seconds.clear()
    trainer.train()
    return median(steps.seconds)


def memory(folder: Path, way: str, quick: bool, queue: multiprocessing.Queue) -> None:
    """Put the peak of one step above what lives between steps."""
    trainer, steps = make_trainer(folder, way, quick)
    trainer.train()
    queue.put(steps.peak)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, fewer rounds")
    parser.add_argument("--max", action="append", default=[], metavar="cached=RATIO", help="exit with 1 above this")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    root, rounds = Path(tempfile.mkdtemp()), 5 if options.quick else 15
    context = multiprocessing.get_context("spawn")
    try:
        peaks = {}
        for way in WAYS:
            queue = context.Queue()
            process = context.Process(target=memory, args=(root, way, options.quick, queue))
            process.start()
            peaks[way] = queue.get()
            process.join()
        trainers = {way: make_trainer(root, way, options.quick) for way in WAYS}
        times = take_turns({way: partial(train, *trainers[way]) for way in WAYS}, rounds)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(f"torch {torch.__version__}, {PAIRS} pairs per step, {rounds} turns of {STEPS} steps")
    print(f"{'':12} {'seconds':>8} {'over accumulated':>22} {'memory':>9}")
    ratios = {}
    for way in WAYS:
        found = [a / b for a, b in zip(times[way], times["accumulated"], strict=True)]
        ratios[way] = median(found)
        spread = f"{ratios[way]:.3f} ({min(found):.2f}-{max(found):.2f})"
        print(f"{way:12} {median(times[way]):8.3f} {spread:>22} {peaks[way] / 1e6:6.0f} MB")
    print(f"{'floor':12} {'':8} {4 / 3:10.3f}")
    if options.json:
        options.json.write_text(json.dumps({"times": times, "ratios": ratios, "memory": peaks}, indent=2))
    limits = (limit.split("=") for limit in options.max)
    return 1 if any(ratios[name] > float(most) for name, most in limits) else 0


if __name__ == "__main__":
    sys.exit(main())
