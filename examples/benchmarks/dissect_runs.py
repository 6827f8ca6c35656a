"""What is run in the study of DISSect: one training by any method, through MimicTrainer.

Read `METHODS`, then `train`.
"""

import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from dissect_settings import SHIFTED, Pairs, Rows, Study, load_pairs
from transformers import CLIPModel
from turns import QUIET, quiet

from hf_mimic import MimicTrainer, MimicTrainingArguments
from hf_mimic.metrics import detection, recall

EPOCHS, WARMUP, BATCH, RATE = 16, 4, 128, 2e-3
TRUSTED = 0.25  # of the pairs, with right captions: what the reference is trained on
WARM = {"warmup_epochs": WARMUP}
METHODS: dict[str, dict] = {
    "full": {"strategy": "uniform"},
    "random": {"strategy": "random"},
    "random after warm-up": {"strategy": "dissect", **WARM},  # with a rule that forgets
    "small loss": {"strategy": "small_loss"},
    "big loss": {"strategy": "big_loss"},
    "CLIPScore": {"strategy": "clip_score"},
    "SCAN": {"strategy": "scan"},
    "InfoBatch": {"strategy": "info_batch"},
    "DISSect warm-up": {"strategy": "dissect", **WARM},
    "DISSect warm-up, selected": {"strategy": "dissect", **WARM, "warmup_data": "selected"},
    "DISSect momentum": {"strategy": "dissect", "variant": "momentum"},
    "DISSect warm-up, epoch": {"strategy": "dissect", **WARM, "refresh": "epoch"},
    "RHO-loss (reference)": {"strategy": "rho_loss"},
    "mimic top (reference)": {"strategy": "mimic", "mimic_layers": ["all"]},
    "DISSect + mimic (reference)": {"strategy": "dissect_mimic", **WARM, "mimic_layers": ["all"]},
    "coreset CLIPScore (reference)": {"strategy": "ref_clip_score"},
    "coreset CLIPLoss (reference)": {"strategy": "ref_clip_loss"},
}
LAYERS = {
    "image tower, last layer": ["vision_model.out.weight", "vision_model.out.bias"],
    "text tower, last MLP": ["text_model.*mlp.*"],
    "both projections": ["visual_projection.weight", "text_projection.weight"],
    "all": ["all"],
}


def recalls(model: CLIPModel, pairs: Pairs) -> dict[str, float]:
    """Return the recalls and RSum of held-out pairs."""
    model.eval()
    with torch.no_grad():
        found = model(pixel_values=pairs.images, input_ids=pairs.tokens)
    return recall(found.image_embeds, found.text_embeds, torch.arange(len(pairs)))


def reference_of(study: Study, name: str, noise: float, seed: int, cache: Path) -> dict:
    """Return the weights of a model from the same start, trained on some pairs with right captions."""
    path = cache / f"reference-{name}-{noise}-{seed}.pt"
    if not path.is_file():
        rows = torch.randperm(len(study.right), generator=torch.Generator().manual_seed(seed))
        rows = rows[: round(TRUSTED * len(rows))]
        trusted = Pairs(study.right.images[rows], study.right.tokens[rows], study.right.clean[rows])
        with tempfile.TemporaryDirectory() as folder:
            trainer = fit(study.make(seed), trusted, folder, seed, strategy="uniform", selection_rate=1.0)
        torch.save(trainer.model.state_dict(), path.with_suffix(f".{time.time_ns()}"))
        next(iter(sorted(cache.glob(f"{path.stem}.1*")))).rename(path)
    return torch.load(path, weights_only=True)


def fit(model: CLIPModel, pairs: Pairs, folder: str, seed: int, *, epochs: float = EPOCHS, shift: int = 0, **options):
    """Train; every method sees the same batches, learning rates and number of steps per epoch."""
    steps, reference = math.ceil(len(pairs) / BATCH) * epochs, options.pop("reference", None)
    args = MimicTrainingArguments(
        folder,
        **QUIET,
        per_device_train_batch_size=BATCH,
        num_train_epochs=epochs,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=int(0.1 * steps),
        adam_beta2=0.98,
        weight_decay=0.1,
        seed=seed,
        **options,
    )
    trainer = MimicTrainer(model, args, train_dataset=Rows(pairs, shift), reference_model=reference)
    trainer.train()
    return trainer


def train(task: dict, data: Path, cache: Path) -> dict:
    """Run one task: data, noise, seed, method, rate, epochs."""
    quiet()
    name, noise, seed, method = (task[key] for key in ("data", "noise", "seed", "method"))
    study = load_pairs(name, noise, seed, data, cache)
    options = dict(METHODS[method])
    reference = reference_of(study, name, noise, seed, cache) if "(reference)" in method else None
    with tempfile.TemporaryDirectory() as folder:
        patch = forgets if method == "random after warm-up" else None
        begin = time.perf_counter()
        rate = 1.0 if method == "full" else max(task["rate"], 0.55) if method == "SCAN" else task["rate"]  # its least
        with patched(patch):
            trainer = fit(
                study.make(seed),
                study.train,
                folder,
                seed,
                epochs=task["epochs"],
                shift=2 if name.endswith(SHIFTED) else 0,
                reference=reference,
                selection_rate=rate,
                **options,
            )
        seconds = time.perf_counter() - begin
        share = clean_share(trainer, study.train.clean.numpy())
    ledger = trainer.ledger.report(lambda row: row[None], torch.device("cpu"))
    found = {**recalls(trainer.model, study.test), "clean": share, "seconds": seconds}
    return {**task, "result": {**found, **ledger, "pairs": len(study.train), "test": len(study.test)}}


def clean_share(trainer: MimicTrainer, clean: np.ndarray) -> list[float]:
    """Return the share of right captions among the pairs that were trained on, by epoch."""
    rows = trainer.scores.to_arrow()
    trained = ~np.isnan(rows["relative_weight"].to_numpy())
    epochs, right = rows["epoch"].to_numpy()[trained], clean[rows["sample_id"].to_numpy()[trained]]
    return [float(right[epochs == epoch].mean()) for epoch in np.unique(epochs)]


def scores(task: dict, data: Path, cache: Path) -> dict:
    """Train plainly while mimic scores of some layers are recorded; return how well they find wrong captions."""
    quiet()
    study = load_pairs(task["data"], task["noise"], task["seed"], data, cache)
    reference = reference_of(study, task["data"], task["noise"], task["seed"], cache)
    with tempfile.TemporaryDirectory() as folder:
        options = {"strategy": "uniform", "mimic_layers": LAYERS[task["method"]], "epochs": task["epochs"]}
        trainer = fit(study.make(task["seed"]), study.train, folder, task["seed"], reference=reference, **options)
        table = trainer.scores.aggregate().sort_by("sample_id")
        first = trainer.scores.to_arrow().to_pandas().query("epoch < 2").groupby("sample_id").mimic_score.mean()
    wrong, model = ~study.train.clean.numpy(), study.make(task["seed"])
    columns = {
        "mimic score": table["mimic_score"].to_numpy(),
        "mimic score, first 2 epochs": first.to_numpy(),
        "-loss while training": -table["loss"].to_numpy(),
        "CLIPScore while training": table["clip_score"].to_numpy(),
        "CLIPScore of the model": pair_scores(trainer.model, study.train),
    }
    model.load_state_dict(reference)
    columns["CLIPScore of the reference"] = pair_scores(model, study.train)
    return {**task, "result": {name: detection(wrong, score=score)["auroc"] for name, score in columns.items()}}


def pair_scores(model: CLIPModel, pairs: Pairs) -> np.ndarray:
    model.eval()
    with torch.no_grad():
        found = model(pixel_values=pairs.images, input_ids=pairs.tokens)
    return (found.image_embeds * found.text_embeds).sum(1).numpy()


class patched:
    """Within the context a rule of DISSect is changed."""

    def __init__(self, change) -> None:
        self.change = change

    def __enter__(self) -> None:
        from hf_mimic.dissect import DISSect

        self.kind, self.before = DISSect, DISSect.update
        if self.change is not None:
            DISSect.update = self.change

    def __exit__(self, *_) -> None:
        self.kind.update = self.before


def forgets(rule, ids, scores, *, time=None) -> None:
    """Take no note of any score: every sample stays new, and chance decides after the warm-up."""
