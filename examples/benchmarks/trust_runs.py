"""What is run in the study of trust: one training, one trajectory that is scored in every way, one detector.

Read `train` (any method through MimicTrainer), `METHODS`, then `trajectory`.
"""

import warnings
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from trust_settings import RATES, Setting, Zoo, accuracy, fit, mirrored, predict

from hf_mimic import MimicTrainer, MimicTrainingArguments, ThresholdFilter, TrustFilter
from hf_mimic.health import Health
from hf_mimic.losses import cross_entropy
from hf_mimic.metrics import detection
from hf_mimic.mimic import MimicDirection, mimic_forward
from hf_mimic.optimizer_step import alone
from hf_mimic.trust import LabelNoiseModel
from hf_mimic.weights import OnlineSoftmax, Weighed

LAYERS = ("head", "last_mlp", "last_block", "all")
DIRECTIONS = ("current", "start", "task_vector")
TEMPERATURES = ("0.1", "0.3", "1", "3", "auto")
FOLDS = 3
DEFAULT: dict[str, Any] = {}  # nothing but the package's defaults

# Trained with MimicTrainer on all rows: the arguments that differ from the defaults.
TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {"strategy": "uniform"},
    "default": DEFAULT,
    "trust alone": {"temperature": "1e12"},
    "default, all layers": {"mimic_layers": ["all"]},
    "default, reference's head": {"head_init": "reference"},
    "paper (head, current, tau 1)": {"strategy": "mimic", "temperature": "1"},
    "mimic, head": {"strategy": "mimic"},
    "mimic, all layers": {"strategy": "mimic", "mimic_layers": ["all"]},
    "mimic, all, reference's head": {"strategy": "mimic", "mimic_layers": ["all"], "head_init": "reference"},
    "mimic, head, task vector": {"strategy": "mimic", "direction": "task_vector"},
    "ref_loss": {"strategy": "ref_loss"},
    "rho_loss": {"strategy": "rho_loss"},
    "small_loss": {"strategy": "small_loss"},
}
# Trained plainly on some of the rows, for as many steps.
SELECTIONS = ("random", "argmax", "cleanlab, reference", "cleanlab, cross-validated", "trust filter")


class Rows(torch.utils.data.Dataset):
    """Rows in memory as the Trainer takes them; mirrored at random where the setting says so."""

    def __init__(self, setting: Setting, chosen: np.ndarray) -> None:
        self.setting, self.chosen = setting, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.chosen[index])
        image = self.setting.noisy.images[row]
        image = mirrored(image[None])[0] if self.setting.flips else image
        return {"pixel_values": image, "labels": self.setting.noisy.labels[row], "sample_id": row}


def train(zoo: Zoo, folder: Path, *, chosen: np.ndarray | None = None, kind: Any = None, **options: Any) -> Any:
    """Train the student by MimicTrainer, as many steps as an epoch of all rows has, times the epochs; return it."""
    setting = zoo.setting
    chosen = np.arange(len(setting.noisy.labels)) if chosen is None else chosen
    steps = -(-len(setting.noisy.labels) // setting.sizes.batch) * setting.sizes.epochs
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    sizes = {"per_device_train_batch_size": setting.sizes.batch, "per_device_eval_batch_size": 256, "max_steps": steps}
    args = MimicTrainingArguments(
        str(folder),
        **quiet,
        **sizes,
        use_cpu=True,
        dataloader_pin_memory=False,
        learning_rate=RATES[zoo.regime],
        seed=setting.seed,
        self_check_steps=-1,
        **options,
    )
    trainer = (kind or MimicTrainer)(
        zoo.student(), args, train_dataset=Rows(setting, chosen), reference_model=zoo.reference
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer


def wrong_labels(setting: Setting) -> np.ndarray:
    return (setting.noisy.labels != setting.noisy.clean).numpy()


def judged(wrong: np.ndarray, name: str, score: np.ndarray | None = None, keep: np.ndarray | None = None) -> dict:
    """Return AUROC and F1 of a detector, where they are defined."""
    if wrong.all() or not wrong.any():
        return {}
    return {f"{name} {what}": value for what, value in detection(wrong, score=score, keep=keep).items()}


def training(zoo: Zoo, method: str, folder: Path) -> dict[str, float]:
    """Train by one method; return test accuracy, detection by what it recorded, and its health."""
    setting, options = zoo.setting, dict(TRAININGS[method])
    if options.get("direction") == "task_vector":
        return _with_origin(zoo, method, folder, options)
    return _result(train(zoo, folder, **options), setting)


def _with_origin(zoo: Zoo, method: str, folder: Path, options: dict) -> dict[str, float]:
    origin = zoo.origin()  # a state dict: the arguments take a name only

    class Trainer(MimicTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            args[1].reference_base_model = origin
            super().__init__(*args, **kwargs)

    return _result(train(zoo, folder, kind=Trainer, **options), zoo.setting)


def _result(trainer: Any, setting: Setting) -> dict[str, float]:
    wrong, table = wrong_labels(setting), trainer.scores.aggregate()
    result = {"accuracy": accuracy(trainer.model, setting.test), **trainer.training.weighing.report()}
    for name in ("trust", "mimic_score", "loss", "ref_loss"):
        values = table[name].to_numpy().astype(float)
        if np.isfinite(values).all():
            result |= judged(wrong, name, -values if "loss" in name else values)
    rows = trainer.scores
    if trainer.strategy != "uniform":
        result |= judged(wrong, "threshold filter", keep=ThresholdFilter().fit_predict(rows))
    if table["trust"].null_count == 0:
        trust = table["trust"].to_numpy().astype(float)
        result |= judged(wrong, "trust filter", keep=TrustFilter().fit_predict(rows))
        result |= judged(wrong, "trust > 0.5", keep=TrustFilter(0.5).fit_predict(rows))
        result["estimated noise"] = float(1 - trust.mean())
    return result


# ---- selections ----------------------------------------------------------------------------------------------------


def selection(zoo: Zoo, method: str, folder: Path) -> dict[str, float]:
    """Choose rows by one rule, train plainly on them; return test accuracy and detection."""
    setting, wrong = zoo.setting, wrong_labels(zoo.setting)
    keep = _kept(zoo, method)
    result = judged(wrong, "filter", keep=keep) | {"kept": float(keep.mean())}
    trainer = train(zoo, folder, chosen=np.flatnonzero(keep), strategy="uniform")
    return result | {"accuracy": accuracy(trainer.model, setting.test)}


def _kept(zoo: Zoo, method: str) -> np.ndarray:
    noisy = zoo.setting.noisy
    log_probs = predict(zoo.reference, noisy.images).numpy().astype(float)
    labels = noisy.labels.numpy()
    if method == "argmax":
        return log_probs.argmax(1) == labels
    if method == "cleanlab, reference":
        return ~_issues(labels, np.exp(log_probs))
    if method == "cleanlab, cross-validated":
        return ~_issues(labels, cross_validated(zoo))
    trust = LabelNoiseModel().fit(log_probs, labels).predict_proba(log_probs, labels)
    keep = TrustFilter().fit_predict(trust)
    if method == "random":
        generator = np.random.default_rng(zoo.setting.seed)
        keep = generator.permutation(keep)
    return keep


def _issues(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    from cleanlab.filter import find_label_issues

    missing = np.setdiff1d(np.arange(probs.shape[1]), labels)
    if len(missing):  # cleanlab wants every class among the labels
        return probs.argmax(1) != labels
    return find_label_issues(labels, probs, n_jobs=1)


def cross_validated(zoo: Zoo) -> np.ndarray:
    """Return probabilities (N, C) from students that were trained on the other folds."""
    setting, noisy = zoo.setting, zoo.setting.noisy
    fold = np.random.default_rng(setting.seed).permutation(len(noisy.labels)) % FOLDS
    probs = np.zeros((len(fold), 10))
    for k in range(FOLDS):
        rest = torch.from_numpy(np.flatnonzero(fold != k))
        model = fit(zoo.student(), noisy[rest], setting, setting.sizes.epochs, RATES[zoo.regime], setting.seed)
        held = np.flatnonzero(fold == k)
        probs[held] = predict(model, noisy.images[torch.from_numpy(held)]).exp().numpy()
    return probs


# ---- one trajectory, scored in every way ---------------------------------------------------------------------------


class _Scorer(MimicTrainer):
    """Trains plainly and scores every batch along every direction."""

    zoo: Zoo

    def compute_loss(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        epochs = self.zoo.setting.sizes.epochs
        if self.current_pass in (0, epochs - 1):
            self._score(model, {k: v for k, v in inputs.items() if k != "sample_id"}, inputs["sample_id"])
        return super().compute_loss(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def _score(self, model: nn.Module, batch: dict, ids: Tensor) -> None:
        from hf_mimic.finite import without_trace

        trust = self.trust[ids]
        with without_trace(model):
            for name, direction in self.ways.items():
                forward = mimic_forward(model, batch, direction(), cross_entropy)
                softmax, zeros = OnlineSoftmax(), torch.zeros(len(ids))
                softmax.add(Weighed(zeros, forward.losses, forward.scores, trust=trust), gather=alone)
                self.healths[name].update([(softmax.sums, 1.0)])
                self.found[name].append((ids.numpy(), forward.scores.numpy()))


def trajectory(zoo: Zoo, folder: Path) -> dict[str, dict[str, float]]:
    """Train plainly; return, by "layers direction", the AUROC of the mean score and the final health signals.

    Scored in the first epoch and in the last. Where only the head is fresh, "start" is the task vector elsewhere.
    """
    setting, wrong = zoo.setting, wrong_labels(zoo.setting)
    log_probs, labels = predict(zoo.reference, setting.noisy.images).numpy(), setting.noisy.labels.numpy()
    trust = LabelNoiseModel().fit(log_probs, labels).predict_proba(log_probs, labels)
    layers = LAYERS[:1] if zoo.regime == "probe" else LAYERS

    class Scorer(_Scorer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.zoo = zoo
            super().__init__(*args, **kwargs)

        def begin_run(self) -> None:
            super().begin_run()
            self.trust, self.found, self.healths, self.ways = torch.from_numpy(trust).float(), {}, {}, {}
            for layer, direction in product(layers, DIRECTIONS):
                if direction == "task_vector" and layer in ("last_mlp", "last_block"):
                    continue
                name = f"{layer} {direction}"
                self.ways[name] = MimicDirection(
                    self.model,
                    zoo.reference,
                    layer,
                    kind=direction,
                    base=zoo.origin() if "task" in direction else None,
                )
                self.found[name], self.healths[name] = [], Health()

    trainer = train(zoo, folder, kind=Scorer, strategy="uniform")
    plain = accuracy(trainer.model, setting.test)
    results = {}
    for name, parts in trainer.found.items():
        ids, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
        count = np.maximum(np.bincount(ids, minlength=len(wrong)), 1)
        mean = np.bincount(ids, scores, minlength=len(wrong)) / count
        fit_only = {k: v for k, v in trainer.healths[name].report().items() if k != "unhealthy"}
        results[name] = judged(wrong, "mimic_score", mean) | fit_only
    results["models"] = {"plain": plain, "reference": accuracy(zoo.reference, setting.test)}
    return results


@cache
def quiet() -> None:
    """Silence what a worker of the study would repeat thousands of times."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
