"""What the benchmark of filters runs: students whose scores are recorded, references that judge, subsets to train on.

Read `recorded` (scores of one student), `detectors` (what finds wrong labels in them), then `judged`, `members`, `subset`.
"""

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score
from trust_runs import TRAININGS, _issues, train
from trust_settings import RATES, Zoo, accuracy, fit, make_setting, predict

from hf_mimic import EnsembleFilter, MixtureFilter, ScoreTable, ThresholdFilter, TrustFilter, TwoMeansFilter
from hf_mimic.filters import top_p
from hf_mimic.losses import cross_entropy
from hf_mimic.membership import membership
from hf_mimic.mimic import mimic_scores, reference_direction
from hf_mimic.quality import QualityReport, noise_rate
from hf_mimic.trust import LabelNoiseModel, agrees_beyond_chance

DETECTED = [f"cifar-{name}" for name in ("aggre", "random1", "worse")] + [f"fashion-sym-{r}" for r in (0.4, 0.5, 0.6)]
LEVELS = tuple(k / 10 for k in range(8))
SHARES = (0.5, 0.6, 0.7, 0.8)
WAYS = ("default", "mimic, head", "mimic, all layers")  # of `TRAININGS`
PAPER = {
    "threshold 1/b": ThresholdFilter(),
    "two means": TwoMeansFilter("relative_weight", check=False),
    "GMM": MixtureFilter("relative_weight", check=False),
}
OURS = {"two means": TwoMeansFilter(check=False), "GMM": MixtureFilter(check=False)}


def recorded(name: str, seed: int, way: str, data: Path, cache: Path) -> Path:
    """Train a student, head shared with the reference's start; return the folder with its scores and the truth."""
    folder = cache / f"{name}-{seed}-{way.replace(', ', '-').replace(' ', '-')}"
    if not folder.is_dir():
        setting = make_setting(name, seed, data, cache)
        zoo = Zoo(setting, "full", "shared", cache)
        with tempfile.TemporaryDirectory() as place:
            trainer = train(zoo, Path(place), **TRAININGS[way])
            trainer.scores.flush()
            log_probs = predict(zoo.reference, setting.noisy.images).numpy()
            truth = {"labels": setting.noisy.labels.numpy(), "clean": setting.noisy.clean.numpy()}
            whole = folder.with_suffix(".tmp")
            shutil.copytree(trainer.scores.folder, whole, dirs_exist_ok=True)
            np.savez(whole / "truth.npz", log_probs=log_probs, **truth)
            whole.rename(folder)
    return folder


def detectors(name: str, seed: int, data: Path, cache: Path) -> dict[str, float]:
    """Return the F1 of finding wrong labels, by method."""
    folders = {way: recorded(name, seed, way, data, cache) for way in WAYS}
    truth = np.load(folders["default"] / "truth.npz")
    labels, log_probs = truth["labels"], truth["log_probs"].astype(float)
    wrong = labels != truth["clean"]
    tables = {way: ScoreTable.load(folder) for way, folder in folders.items()}
    keep = {"reference's argmax": log_probs.argmax(1) == labels, "cleanlab": ~_issues(labels, np.exp(log_probs))}
    for way in WAYS[1:]:
        keep |= {f"{rule}, {way}": model.fit(tables[way]).predict(tables[way]) for rule, model in PAPER.items()}
        keep |= {f"{rule} of scores, {way}": m.fit(tables[way]).predict(tables[way]) for rule, m in OURS.items()}
    mimic = {way: tables[way] for way in WAYS[1:]}
    voters = [("threshold", ThresholdFilter()), *OURS.items()]  # without a check, as above
    for vote in ("majority", "dawid_skene", "correlated"):
        keep[f"votes alone, both layers: {vote}"] = EnsembleFilter(voters, vote=vote, least=0.5).fit_predict(mimic)
    keep["votes alone, with a check"] = EnsembleFilter(vote="correlated").fit_predict(mimic)
    keep["trust filter"] = TrustFilter().fit_predict(tables["default"])
    keep["ensemble"] = EnsembleFilter().fit_predict({way: tables[way] for way in ("default", "mimic, all layers")})
    return {method: 100 * float(f1_score(wrong, ~kept)) for method, kept in keep.items()}


def judged(kind: str, seed: int, rate: float, data: Path, cache: Path) -> dict[str, Any]:
    """Return the true share of wrong labels and what the quality says, from one run of the reference."""
    setting = make_setting(f"{kind}-{'sym-' if isinstance(rate, float) else ''}{rate}", seed, data, cache)
    zoo = Zoo(setting, "full", "shared", cache)
    log_probs, labels = (
        predict(zoo.reference, setting.noisy.images).numpy().astype(float),
        setting.noisy.labels.numpy(),
    )
    wrong = labels != setting.noisy.clean.numpy()
    if not agrees_beyond_chance(log_probs, labels):
        return {"noise": float(wrong.mean())}
    right = LabelNoiseModel().fit(log_probs, labels).predict_proba(log_probs, labels)
    found = dict(zip(("rate", "low", "high"), noise_rate(right), strict=True))
    kept = TrustFilter().fit_predict(right)
    return {
        "noise": float(wrong.mean()),
        **found,
        "kept": float(kept.mean()),
        "argmax kept": float((log_probs.argmax(1) == labels).mean()),
        "right and kept": float(kept[~wrong].mean()) if not wrong.all() else float("nan"),
    }


def clean_run(kind: str, seed: int, data: Path, cache: Path) -> dict[str, float]:
    """Return the share of a data set without a wrong label that each filter keeps."""
    name = {"cifar": "cifar-labels", "fashion": "fashion-sym-0.0"}[kind]
    tables = {way: ScoreTable.load(recorded(name, seed, way, data, cache)) for way in WAYS}
    found = {
        "threshold 1/b (mimic, head)": ThresholdFilter().fit_predict(tables["mimic, head"]),
        "two means without a check": TwoMeansFilter(check=False).fit_predict(tables["mimic, head"]),
        "two means": TwoMeansFilter().fit_predict(tables["mimic, head"]),
        "GMM": MixtureFilter().fit_predict(tables["mimic, head"]),
        "ensemble of votes": EnsembleFilter().fit_predict(tables["mimic, head"]),
        "trust filter": TrustFilter().fit_predict(tables["default"]),
        "ensemble": EnsembleFilter().fit_predict(tables["default"]),
    }
    report = QualityReport.from_scores(tables["default"])
    return {**{name: float(keep.mean()) for name, keep in found.items()}, "rate": report.noise_rate}


@torch.no_grad()
def members(kind: str, seed: int, data: Path, cache: Path) -> dict[str, float]:
    """Return how scores of a student that saw neither tell the reference's training samples from others."""
    setting = make_setting(f"{kind}-sym-0.0", seed, data, cache)
    zoo = Zoo(setting, "full", "shared", cache)
    student = zoo.student().eval()
    size = min(len(setting.trusted.labels), len(setting.noisy.labels))
    images = torch.cat([setting.trusted.images[:size], setting.noisy.images[:size]])
    labels = torch.cat([setting.trusted.labels[:size], setting.noisy.clean[:size]])
    member = np.arange(2 * size) < size
    found = {}
    for layers in ("head", "all"):
        direction = reference_direction(student, copy.deepcopy(zoo.reference), layers)
        parts = [
            mimic_scores(student, {"pixel_values": x, "labels": y}, direction)
            for x, y in zip(images.split(250), labels.split(250), strict=True)
        ]
        found[f"mimic score, {layers}"] = torch.cat(parts).numpy()
    picked = torch.arange(len(labels))
    loss = torch.cat([_losses(zoo.reference, images[rows], labels[rows]) for rows in picked.split(500)])
    before = torch.cat([_losses(student, images[rows], labels[rows]) for rows in picked.split(500)])
    found |= {"-loss of the reference": -loss.numpy(), "loss of the student - reference's": (before - loss).numpy()}
    told = {name: membership(score, member, permutations=200, seed=seed) for name, score in found.items()}
    return {f"{name} | {what}": value for name, one in told.items() for what, value in one.as_dict().items()}


def _losses(model: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    model.eval()
    return cross_entropy(model(pixel_values=images), {"labels": labels})


def subset(name: str, seed: int, share: float, data: Path, cache: Path) -> dict[str, float]:
    """Return the accuracy of plain students on the top share by a score and on as many random samples."""
    setting = make_setting(name, seed, data, cache)
    zoo = Zoo(setting, "full", "shared", cache)
    tables = {way: ScoreTable.load(recorded(name, seed, way, data, cache)).aggregate() for way in WAYS}
    labels = setting.noisy.labels.numpy()
    scores = {
        "mimic, head": tables["mimic, head"]["mimic_score"].to_numpy(),
        "mimic, all layers": tables["mimic, all layers"]["mimic_score"].to_numpy(),
        "trust": tables["default"]["trust"].to_numpy(),
        "random": np.random.default_rng(seed).random(len(labels)),
    }
    keep = {score: top_p(values, share) for score, values in scores.items()}
    keep["trust, class-balanced"] = top_p(scores["trust"], share, labels=labels)
    found = {}
    for score, kept in keep.items():
        rows = torch.from_numpy(np.flatnonzero(kept))
        epochs = round(setting.sizes.epochs / share)  # as many steps
        student = fit(zoo.student(), setting.noisy[rows], setting, epochs, RATES["full"], setting.seed)
        found[score] = 100 * accuracy(student, setting.test)
    return found
