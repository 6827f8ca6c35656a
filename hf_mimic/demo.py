"""The story in one command: score, reweight, record, filter, train again, and compare with what a line could do.

`run_story` tells it for any `Story` (four data sets and a model); `digits_story` is the one that needs no network.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_mimic.arguments import MimicTrainingArguments
from hf_mimic.data import add_label_noise, add_sample_ids
from hf_mimic.filters import default_filter
from hf_mimic.metrics import detection
from hf_mimic.scores import ATTACHED, ScoreTable, attach_scores
from hf_mimic.trainer import MimicTrainer

if TYPE_CHECKING:
    from datasets import Dataset

_QUIET: dict[str, Any] = {
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": torch.cuda.is_available(),
}
ROWS = ("base", "reference", "plain", "argmax filter", "mimic", "curated")


@dataclass(frozen=True)
class Story:
    """Four disjoint data sets with `pixel_values` and `label`, and how to train on them.

    Args:
        base: Pre-trains the checkpoint that everything starts from.
        trusted: Fine-tunes it into the reference.
        noisy: Partly wrong, with `sample_id` and the true `clean_label`; what the student is fine-tuned on.
        test: Measures accuracy.
        make_model: Returns a freshly initialised model.
        options: Of `TrainingArguments`, for every training.
        base_options: The same, for base and reference only.
        mimic_options: Of `MimicTrainingArguments`, for the mimic run only.
    """

    base: Dataset
    trusted: Dataset
    noisy: Dataset
    test: Dataset
    make_model: Callable[[], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    base_options: dict[str, Any] = field(default_factory=dict)
    mimic_options: dict[str, Any] = field(default_factory=dict)


def digits_story(seed: int) -> Story:
    """Scikit-learn's digits (1,797 images of 8 x 8): 500 for the base, 300 trusted, 600 with 40 % wrong labels."""
    from datasets import Array3D, ClassLabel, Dataset, Features
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    digits = load_digits()
    pixels = (digits.images / 8 - 1).astype(np.float32)[:, None]
    features = Features({"pixel_values": Array3D((1, 8, 8), "float32"), "label": ClassLabel(num_classes=10)})
    order = np.random.default_rng(seed).permutation(len(pixels))

    def part(start: int, stop: int | None) -> Dataset:
        rows = order[start:stop]
        columns = {"pixel_values": pixels[rows], "label": digits.target[rows]}
        return Dataset.from_dict(columns, features=features).with_format("torch")

    def make_model() -> nn.Module:
        config = ViTConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128)
        config.update({"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10})
        return ViTForImageClassification(config)

    return Story(
        base=part(0, 500),
        trusted=part(500, 800),
        noisy=add_sample_ids(add_label_noise(part(800, 1400), 0.4, seed=seed)),
        test=part(1400, None),
        make_model=make_model,
        options={"num_train_epochs": 10, "learning_rate": 5e-4, "per_device_train_batch_size": 32},
        base_options={"num_train_epochs": 30, "learning_rate": 1e-3},
        mimic_options={"mimic_layers": "all"},
    )


def run_story(
    story: Story, seed: int, output_dir: Path, tick: Callable[[str | None], None] = lambda _: None
) -> dict[str, Any]:
    """Train six models; return their test accuracies and how well wrong labels were found, by us and by argmax.

    Saves the reference, the scores, the curated data set and a figure in `output_dir`. `tick` hears of each training
    when it begins (its name) and ends (None).
    """
    wrong = _column(story.noisy, "label") != _column(story.noisy, "clean_label")

    def train(start: nn.Module, rows: Dataset, step: str, **options: Any) -> nn.Module:
        tick(step)
        settings = {**story.options, "seed": seed, **options}
        model = _train(Trainer, start, TrainingArguments, rows, output_dir, settings).model
        tick(None)
        return model

    torch.manual_seed(seed)
    base = train(story.make_model(), story.base, "base", **story.base_options)
    reference = train(base, story.trusted, "reference", **story.base_options)
    reference.save_pretrained(output_dir / "reference")  # type: ignore[operator]
    plain = train(base, story.noisy, "plain")
    logits, labels = _predict(reference, story.noisy, output_dir), _column(story.noisy, "label")
    agrees = logits.argmax(-1) == labels
    argmax = train(base, story.noisy.select(np.flatnonzero(agrees)), "argmax filter")

    tick("mimic")
    options = {**story.options, "seed": seed, "reference_model": str(output_dir / "reference"), **story.mimic_options}
    trainer = _train(MimicTrainer, base, MimicTrainingArguments, story.noisy, output_dir, options)
    tick(None)
    keep = default_filter(trainer.scores).fit_predict(trainer.scores)
    scored = attach_scores(story.noisy, trainer.scores, keep=keep)
    kept = scored.select(np.flatnonzero(_column(scored, "keep")))
    curated = train(base, kept.remove_columns([name for name in ATTACHED if name in kept.column_names]), "curated")

    kept.with_format(None).to_parquet(output_dir / "curated.parquet")
    save_figure(
        trainer.scores, dict(zip(_column(story.noisy, "sample_id"), wrong, strict=True)), output_dir / "scores.png"
    )
    models = dict(zip(ROWS, (base, reference, plain, argmax, trainer.model, curated), strict=True))
    results: dict[str, Any] = {
        f"accuracy {name}": accuracy_of(model, story.test, output_dir) for name, model in models.items()
    }
    keep = _column(scored, "keep")
    for name in ("trust", "mimic_score"):
        if name in scored.column_names:
            results[f"auroc {name}"] = detection(wrong, score=_column(scored, name))["auroc"]
    loss = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels), reduction="none")
    theirs = detection(wrong, score=-loss.numpy(), keep=agrees)
    results |= {"auroc reference's loss": theirs["auroc"], "f1 filter": detection(wrong, keep=keep)["f1"]}
    results["f1 reference's argmax"] = theirs["f1"]
    return results


def accuracy_of(model: nn.Module, rows: Dataset, output_dir: Path) -> float:
    """Return the test accuracy."""
    logits = _predict(model, rows, output_dir)
    return float((logits.argmax(-1) == _column(rows, "label")).mean())


def _train(trainer: Any, model: nn.Module, arguments: Any, rows: Dataset, output_dir: Path, options: dict) -> Any:
    quiet = {**_QUIET, "logging_strategy": "no", "save_strategy": "no"}
    settings = arguments(str(output_dir), remove_unused_columns=_has_columns(rows), **quiet, **options)
    run = trainer(copy.deepcopy(model), settings, train_dataset=rows)
    run.remove_callback(PrinterCallback)
    run.train()
    return run


def _predict(model: nn.Module, rows: Dataset, output_dir: Path) -> np.ndarray:
    settings = {**_QUIET, "remove_unused_columns": _has_columns(rows), "per_device_eval_batch_size": 256}
    return Trainer(model, TrainingArguments(str(output_dir), **settings)).predict(rows).predictions  # type: ignore[return-value]


def _has_columns(rows: Dataset) -> bool:
    """Tell whether the model's inputs are columns; a transform makes them of others, which must then stay."""
    return rows.format["type"] != "custom"


def _column(rows: Dataset, name: str) -> np.ndarray:
    return np.asarray(rows.with_format("numpy")[name][:])


# ---- what a person sees --------------------------------------------------------------------------------------------


def run_demo(output_dir: str | Path, seeds: Sequence[int], make_story: Callable[[int], Story] = digits_story) -> str:
    """Run the story for every seed, with a progress bar; save `results.json`; return the table to print."""
    import datasets
    import transformers
    from tqdm.auto import tqdm

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    results = []
    with tqdm(total=len(ROWS) * len(seeds), desc="demo", unit="training") as bar:
        for seed in seeds:

            def tick(step: str | None, seed: int = seed) -> None:
                if step is None:
                    bar.update()
                else:
                    bar.set_description(f"seed {seed}: {step}")

            folder = Path(output_dir) / f"seed-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            results.append(run_story(make_story(seed), seed, folder, tick))
    (Path(output_dir) / "results.json").write_text(
        json.dumps(dict(zip(map(str, seeds), results, strict=True)), indent=2)
    )
    return format_table(results)


def format_table(results: Sequence[dict[str, float]]) -> str:
    """Return one line per figure: mean, standard deviation over the seeds, and each seed's value."""
    lines = [f"{'':<24}{'mean':>8}{'std':>8}   each seed"]
    for name in results[0]:
        values = [result[name] for result in results]
        each = "  ".join(f"{value:.3f}" for value in values)
        lines.append(f"{name:<24}{np.mean(values):>8.3f}{np.std(values):>8.3f}   {each}")
    return "\n".join(lines)


def save_figure(table: ScoreTable, wrong: dict[int, bool], path: Path) -> None:
    """Draw the distribution of the relative weight by epoch, wrong and right labels apart; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = table.to_arrow()
    epochs, weights = rows["epoch"].to_numpy(), rows["relative_weight"].to_numpy()
    is_wrong = np.array([wrong[i] for i in rows["sample_id"].to_numpy()])
    shown = np.unique(epochs)[np.linspace(0, len(np.unique(epochs)) - 1, 4).round().astype(int)]
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    bins = np.linspace(0, np.nanquantile(weights, 0.995), 40).tolist()
    for axis, epoch in zip(figure.subplots(1, len(shown), sharey=True), shown, strict=True):
        for flag, color, label in ((False, "#3a7ca5", "right label"), (True, "#d1495b", "wrong label")):
            axis.hist(weights[(epochs == epoch) & (is_wrong == flag)], bins, color=color, alpha=0.7, label=label)
        axis.axvline(1, color="black", linewidth=1, linestyle="--")
        axis.set(title=f"epoch {epoch + 1}", xlabel="relative weight (uniform = 1)")
    figure.axes[0].set_ylabel("samples")
    figure.axes[-1].legend(frameon=False)
    figure.savefig(path, dpi=120)
