"""The demo's table on real label noise: CIFAR-10N, human labels, a small ResNet pre-trained here.

    python examples/benchmarks/bench_story.py --noise label_worse --seeds 3 --json cifar10n.json

Disjoint parts: 8,000 clean rows pre-train the base, 7,000 clean ones fine-tune it into the reference, 10,000 with
human labels train the student; accuracy on the 10,000 test rows. The data is found by HF_MIMIC_DATA.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from transformers import ResNetConfig, ResNetForImageClassification

from hf_mimic.data import SAMPLE_ID
from hf_mimic.demo import Story, run_demo

NOISES = ("label_worse", "label_random1", "label_random2", "label_random3", "label_aggre")


def to_inputs(flip: bool):
    """Return a transform: images to `pixel_values` in [-1, 1], half of them mirrored if `flip`."""

    def transform(batch: dict) -> dict:
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in batch["image"]])
        pixels = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
        if flip:
            pixels = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(3), pixels)
        return {"pixel_values": pixels, "labels": batch["label"]}

    return transform


def make_model() -> torch.nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32, hidden_sizes=[64, 128, 256], depths=[1, 1, 1], layer_type="basic", num_labels=10
        )
    )


def cifar_story(folder: Path, noise: str, scale: float, mimic_options: dict):
    """Return seed -> Story; `scale` shrinks every part and the number of epochs."""
    files = {split: str(folder / "cifar10n" / f"{split}.parquet") for split in ("train", "test")}
    data = load_dataset("parquet", data_files=files)
    sizes = [round(size * scale) for size in (8000, 7000, 10000)]

    def story(seed: int) -> Story:
        order = np.random.default_rng(seed).permutation(len(data["train"]))
        parts = [data["train"].select(rows) for rows in np.split(order, np.cumsum(sizes))[:3]]
        noisy: Dataset = parts[2].rename_columns({"label": "clean_label", noise: "label", "idx": SAMPLE_ID})
        test = data["test"].select(range(round(10000 * min(1, 4 * scale))))
        return Story(
            base=parts[0].with_transform(to_inputs(flip=True)),
            trusted=parts[1].with_transform(to_inputs(flip=True)),
            noisy=noisy.with_transform(to_inputs(flip=True)),
            test=test.with_transform(to_inputs(flip=False)),
            make_model=make_model,
            options={
                "num_train_epochs": max(1, round(5 * scale)),
                "learning_rate": 5e-4,
                "per_device_train_batch_size": 64,
            },
            base_options={"num_train_epochs": max(1, round(12 * scale)), "learning_rate": 1e-3},
            mimic_options=mimic_options,
        )

    return story


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--noise", choices=NOISES, default="label_worse")
    parser.add_argument("--layers", default="all", help="mimic_layers")
    parser.add_argument("--strategy", default="auto", help="of MimicTrainingArguments")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tenth of the data, for a smoke test")
    parser.add_argument("--output_dir", default="outputs/story")
    parser.add_argument("--json", help="also write the results here")
    args = parser.parse_args()
    folder = Path(os.environ.get("HF_MIMIC_DATA", "../shared/data"))
    if not (folder / "cifar10n").is_dir():
        print(f"HF_MIMIC_DATA must be a folder with cifar10n/train.parquet, got {folder}.", file=sys.stderr)
        return 2
    output = Path(args.output_dir)
    options = {"mimic_layers": args.layers, "strategy": args.strategy}
    table = run_demo(output, range(args.seeds), cifar_story(folder, args.noise, 0.1 if args.quick else 1, options))
    print(
        f"CIFAR-10N {args.noise}, mimic_layers={args.layers}, strategy={args.strategy}, {args.seeds} seeds, torch {torch.__version__}\n{table}"
    )
    if args.json:
        results = json.loads((output / "results.json").read_text())
        machine = {"torch": torch.__version__, "processor": platform.machine(), "cores": os.cpu_count()}
        Path(args.json).write_text(
            json.dumps({"arguments": vars(args), "machine": machine, "results": results}, indent=2)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
