"""Is the gradient of one optimizer step the same however it is split? Ours and the stock Trainer's, in one table.

    python examples/benchmarks/bench_invariance.py [--quick] [--max ours=1.00001]

For each model and split: |g_split| / |g_16|, and |g_split - g_16| / |g_16| in brackets, g_16 being the gradient of one
batch of 16 by the same trainer. The second step (the tail) has 6 of 22 rows; two processes fill it up with repeated ones. Tiny
random models (the scale of a gradient does not depend on the size), batch norm in eval mode, no dropout, float32.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers as tf
from ranks import run_ranks
from torch import nn
from tqdm import tqdm

from hf_mimic import MimicTrainer, MimicTrainingArguments

ROWS, LABELS = 22, 10
SPLITS = {
    "16": (1, 16, 1),
    "4 x 4": (1, 4, 4),
    "2p x 8": (2, 8, 1),
    "2p x 4 x 2": (2, 4, 2),
}  # processes, batch, accumulated
_BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_IMAGE = {"image_size": 16, "patch_size": 8}
_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    vision, labels = {**_BLOCKS, **_IMAGE}, {"num_labels": LABELS}
    if name == "ViT":
        return tf.ViTForImageClassification(tf.ViTConfig(**vision, **labels))
    if name == "ViT multi-label":
        config = tf.ViTConfig(**vision, **labels, problem_type="multi_label_classification")
        return tf.ViTForImageClassification(config)
    if name == "CLIP":
        return tf.CLIPForImageClassification(tf.CLIPConfig(vision_config=vision, projection_dim=16, **labels))
    if name == "SigLIP":
        return tf.SiglipForImageClassification(tf.SiglipConfig(vision_config=vision, **labels))
    if name == "Swin v2":
        return tf.Swinv2ForImageClassification(tf.Swinv2Config(**_SWIN, **labels, drop_path_rate=0.0))
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}
    model = tf.ResNetForImageClassification(tf.ResNetConfig(**shape, **labels)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module
    return model


MODELS = ("ViT", "CLIP", "SigLIP", "ResNet", "Swin v2", "ViT multi-label")


def make_rows(name: str, *, ids: bool) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(ROWS, 3, 16, 16, generator=generator)
    labels = torch.randint(LABELS, (ROWS,), generator=generator)
    if "multi" in name:
        labels = (torch.rand(ROWS, LABELS, generator=generator) < 0.5).float()
    rows = [{"pixel_values": pixels[i], "labels": labels[i]} for i in range(ROWS)]
    return [{**row, "sample_id": i} for i, row in enumerate(rows)] if ids else rows


class Gradients(tf.TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone())


def gradients(folder: str, name: str, split: str, ours: bool) -> None:
    """Train one epoch with a learning rate of 0; save the gradients of its two steps."""
    tf.logging.set_verbosity_error()
    _, batch, accumulated = SPLITS[split]
    options = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulated,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
    }
    model, rows = make_model(name), make_rows(name, ids=ours)
    if ours:
        reference = {key: p.detach() + 0.05 * torch.randn(p.shape) for key, p in model.named_parameters()}
        args = MimicTrainingArguments(folder, mimic_layers=["last_block"], **options)
        trainer: tf.Trainer = MimicTrainer(model, args, train_dataset=rows, reference_model=reference)
    else:
        trainer = tf.Trainer(model, tf.TrainingArguments(folder, **options), train_dataset=rows)
    kept = Gradients()
    trainer.add_callback(kept)
    trainer.train()
    if trainer.args.process_index == 0:
        torch.save(kept.steps, Path(folder) / "gradients.pt")


def compare(root: Path, name: str, ours: bool, splits: list[str], bar: tqdm) -> list[dict]:
    found = {}
    for split in ["16", *splits]:
        folder = root / f"{name}-{ours}-{split}".replace(" ", "_")
        run_ranks(gradients, (str(folder), name, split, ours), SPLITS[split][0])
        found[split] = torch.load(folder / "gradients.pt")
        bar.update()
    results = []
    for split in splits:
        for step, (g, whole) in enumerate(zip(found[split], found["16"], strict=True)):
            ratio, difference = (g.norm() / whole.norm()).item(), ((g - whole).norm() / whole.norm()).item()
            row = {"model": name, "trainer": "ours" if ours else "stock", "split": split, "step": step}
            results.append({**row, "ratio": ratio, "difference": difference})
    return results


def worst(results: list[dict], trainer: str) -> float:
    return max(max(r["ratio"], 1 / r["ratio"], 1 + r["difference"]) for r in results if r["trainer"] == trainer)


def print_table(results: list[dict], splits: list[str]) -> None:
    columns = [(split, step) for split in splits for step in (0, 1)]
    print(f"{'':24s}" + "".join(f"{split + (' tail' if step else ''):>21s}" for split, step in columns))
    by = {(r["model"], r["trainer"], r["split"], r["step"]): r for r in results}
    for name in dict.fromkeys(r["model"] for r in results):
        for trainer in ("ours", "stock"):
            cells = [by[name, trainer, split, step] for split, step in columns]
            text = "".join(f"{c['ratio']:11.6f} ({c['difference']:.0e})".rjust(21) for c in cells)
            print(f"{name:17s} {trainer:6s}{text}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ViT and CLIP, one process")
    parser.add_argument(
        "--max", action="append", default=[], metavar="NAME=RATIO", help="exit with 1 above this, e.g. ours=1.00001"
    )
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models, splits = (("ViT", "CLIP"), ["4 x 4"]) if options.quick else (MODELS, list(SPLITS)[1:])
    root, results = Path(tempfile.mkdtemp()), []
    try:
        with tqdm(total=len(models) * 2 * (1 + len(splits)), desc="trainings") as bar:
            for name in models:
                for ours in (True, False):
                    results += compare(root, name, ours, splits, bar)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print_table(results, splits)
    found = {trainer: worst(results, trainer) for trainer in ("ours", "stock")}
    print(f"farthest from one batch: ours {found['ours']:.7f}, stock {found['stock']:.4f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    limits = dict(limit.split("=") for limit in options.max)
    over = [name for name, limit in limits.items() if found[name] > float(limit)]
    print("".join(f"{name}: {found[name]:.7f} is above the limit {limits[name]}\n" for name in over), end="")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
