"""The settings of the study of trust: real data cut into disjoint parts, models pre-trained and references fine-tuned here.

Read `SETTINGS`, then `Setting` (the parts of one seed), then `Zoo` (base, reference and student, cached on the disk).
"""

import copy
import hashlib
import os
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset
from PIL import Image
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

FASHION = [f"fashion-{kind}-{rate}" for kind in ("sym", "pair") for rate in (0.2, 0.4, 0.6)]
CIFAR = [f"cifar-{labels}" for labels in ("worse", "random1", "aggre")]
CLOTHING = ["clothing-crowd", "clothing-sym-0.4"]  # the crowd's labels are nearly all right
SETTINGS = ["digits-sym-0.4", *FASHION, *CIFAR, *CLOTHING]
CORE = ["digits-sym-0.4", "fashion-sym-0.4", "cifar-worse", "clothing-crowd"]  # one of each data set
HEADS = ("shared", "zero", "independent")
REGIMES = ("full", "lora", "probe")


@dataclass(frozen=True)
class Sizes:
    """How much of a data set goes where, and how long each model is trained."""

    base: int
    trusted: int
    noisy: int
    test: int
    base_epochs: int
    reference_epochs: int
    epochs: int
    batch: int = 64


SIZES = {
    "digits": Sizes(500, 300, 600, 397, 30, 20, 8, 32),
    "fashion": Sizes(4000, 3000, 2000, 2500, 12, 10, 4),
    "cifar": Sizes(8000, 14000, 3000, 2500, 12, 12, 4),
    "clothing": Sizes(8000, 1200, 1868, 713, 10, 12, 6),  # the base is CIFAR-10's
}
RATES = {"full": 5e-4, "lora": 2e-3, "probe": 1e-2}


@dataclass(frozen=True)
class Part:
    """Images (N, channels, size, size) in [-1, 1] with labels (N,), and the true labels where they are known."""

    images: Tensor
    labels: Tensor
    clean: Tensor

    def __getitem__(self, rows: Tensor) -> "Part":
        return Part(self.images[rows], self.labels[rows], self.clean[rows])


@dataclass(frozen=True)
class Setting:
    """The parts of one setting and seed."""

    name: str
    seed: int
    base: Part
    trusted: Part
    noisy: Part
    test: Part
    sizes: Sizes

    @property
    def data(self) -> str:
        return self.name.split("-")[0]

    @property
    def flips(self) -> bool:
        return self.data != "digits"

    def make(self) -> nn.Module:
        """Return a fresh model: a ViT for digits and fashion, a ResNet for photographs."""
        channels, size = self.noisy.images.shape[1:3]
        if self.data in ("digits", "fashion"):
            config = ViTConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128)
            patch = 2 if size == 8 else 7
            config.update({"image_size": size, "patch_size": patch, "num_channels": channels, "num_labels": 10})
            return ViTForImageClassification(config)
        shape = {"embedding_size": 24, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1], "layer_type": "basic"}
        return ResNetForImageClassification(ResNetConfig(num_channels=channels, num_labels=10, **shape))


def make_setting(name: str, seed: int, data: Path, cache: Path, scale: float = 1.0) -> Setting:
    """Cut the data of a setting into its parts; `scale` shrinks them."""
    kind, *noise = name.split("-")
    sizes = SIZES[kind]
    if scale != 1:
        shrunk = {n: max(round(getattr(sizes, n) * scale), 64) for n in ("trusted", "noisy", "test")}
        sizes = replace(sizes, **shrunk)
    rows = _load(kind, data, cache)
    order = torch.randperm(len(rows["labels"]), generator=torch.Generator().manual_seed(1000 + seed))
    starts = np.cumsum([0, 0 if kind == "clothing" else sizes.base, sizes.trusted, sizes.noisy])
    base, trusted, noisy = (order[a:b] for a, b in pairwise(starts))
    everything = Part(rows["images"], rows["labels"], rows["labels"])
    if kind == "digits":
        test = everything[order[starts[-1] :]]
    else:
        test = Part(rows["test_images"], rows["test_labels"], rows["test_labels"])
    if noise[0] in ("sym", "pair"):
        student = with_noise(everything[noisy], noise[0], float(noise[1]), seed)
    else:
        student = Part(rows["images"][noisy], rows[noise[0]][noisy], rows["labels"][noisy])
    if kind == "clothing":
        other = _load("cifar", data, cache)
        pick = torch.randperm(len(other["labels"]), generator=torch.Generator().manual_seed(seed))[: sizes.base]
        start = Part(other["images"][pick], other["labels"][pick], other["labels"][pick])
    else:
        start = everything[base]
    return Setting(name, seed, start, everything[trusted], student, test[torch.arange(sizes.test)], sizes)


def with_noise(part: Part, kind: str, rate: float, seed: int) -> Part:
    """Make a share of the labels wrong: any other class ("sym"), or always the next one ("pair")."""
    generator, labels = np.random.default_rng(seed), part.labels.clone()
    wrong = generator.permutation(len(labels))[: round(rate * len(labels))]
    step = 1 if kind == "pair" else torch.from_numpy(generator.integers(1, 10, len(wrong)))
    labels[wrong] = (labels[wrong] + step) % 10
    return replace(part, labels=labels)


def _load(kind: str, data: Path, cache: Path) -> dict[str, Tensor]:
    path = cache / f"{kind}.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    if kind == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        rows = {
            "images": torch.tensor(digits.images / 8 - 1).float()[:, None],
            "labels": torch.tensor(digits.target).long(),
        }
    else:
        rows = _read(kind, data)
    _save(rows, path)
    return rows


def _save(what: dict, path: Path) -> None:
    """Write whole or not at all: other processes read it."""
    temporary = path.with_suffix(f".{os.getpid()}")
    torch.save(what, temporary)
    temporary.replace(path)


def _read(kind: str, data: Path) -> dict[str, Tensor]:
    folder, mode, size, every = {
        "fashion": ("fashion_mnist", "L", 28, 4),
        "cifar": ("cifar10n", "RGB", 32, 1),
        "clothing": ("clothing", "RGB", 32, 1),
    }[kind]
    files = {split: str(data / folder / f"{split}.parquet") for split in ("train", "test")}
    if kind == "clothing":
        files["test"] = [files["test"], str(data / folder / "validation.parquet")]
    splits = load_dataset("parquet", data_files=files)
    train, test = splits["train"].select(range(0, len(splits["train"]), every)), splits["test"]
    test = test.select(range(0, len(test), max(len(test) // 2500, 1)))
    rows = {"images": _pixels(train, mode, size), "labels": torch.tensor(train["label"][:])}
    rows |= {"test_images": _pixels(test, mode, size), "test_labels": torch.tensor(test["label"][:])}
    if kind == "cifar":
        rows |= {name: torch.tensor(train[f"label_{name}"][:]) for name in ("worse", "random1", "aggre")}
    if kind == "clothing":  # the classes of the crowd that the curated labels have, too
        names = [name.lower() for name in train.features["label"].names]
        crowd = [train.features["crowd_label"].int2str(label).lower() for label in train["crowd_label"][:]]
        rows["crowd"] = torch.tensor([names.index(name) for name in crowd])
    return rows


def _pixels(rows, mode: str, size: int) -> Tensor:
    images = [image.convert(mode).resize((size, size), Image.Resampling.BILINEAR) for image in rows["image"]]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]).astype(np.float32) / 127.5 - 1)
    return (pixels[:, None] if mode == "L" else pixels.permute(0, 3, 1, 2)).contiguous()


# ---- models --------------------------------------------------------------------------------------------------------


class Zoo:
    """Base, reference and student of one setting, fine-tuning regime and kind of head.

    "shared": both start from the base's head. "zero": both from a zero one. "independent": each from its own.
    "full", "lora" (rank 4, head trained) and "probe" (head alone) say what is trained, in reference and student alike.
    """

    def __init__(self, setting: Setting, regime: str, head: str, cache: Path) -> None:
        self.setting, self.regime, self.head, self.cache = setting, regime, head, cache
        sizes = setting.sizes
        self.base = self._kept(f"base {setting.data} {setting.seed}", setting.make, self._train_base)
        if setting.data == "clothing" and head == "shared":
            self._fresh_head(self.base, seed=5)
        self.reference = self._kept(
            f"reference {setting.data} {setting.seed} {regime} {head} {sizes}", lambda: self.start(77), self._tune
        )

    def start(self, seed: int) -> nn.Module:
        """Return the base as a model of this regime with this kind of head; `seed` draws what is fresh."""
        model = copy.deepcopy(self.base)
        if self.head == "independent":
            self._fresh_head(model, seed)
        if self.head == "zero":
            for p in head_of(model).parameters():
                nn.init.zeros_(p)
        if self.regime == "probe":
            for name, p in model.named_parameters():
                p.requires_grad_(name.startswith("classifier"))
        if self.regime == "lora":
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(seed if self.head == "independent" else 5)
            layers = ["q_proj", "v_proj"] if isinstance(model, ViTForImageClassification) else ["convolution"]
            model = get_peft_model(
                model, LoraConfig(r=4, lora_alpha=8, target_modules=layers, modules_to_save=["classifier"])
            )
        return model

    def student(self) -> nn.Module:
        return self.start(7 + self.setting.seed)

    def origin(self) -> dict[str, Tensor]:
        """Return the weights that the reference started from; a head of its own is not among them: nobody keeps it."""
        own = self.start(77).state_dict()
        return {n: v for n, v in own.items() if self.head == "shared" or "classifier" not in n}

    def _fresh_head(self, model: nn.Module, seed: int) -> None:
        torch.manual_seed(seed)
        head = head_of(model)
        nn.init.trunc_normal_(head.weight, std=0.02 if self.setting.data in ("digits", "fashion") else 0.09)
        nn.init.zeros_(head.bias)

    def _train_base(self) -> nn.Module:
        setting = self.setting
        torch.manual_seed(setting.seed)
        return fit(setting.make(), setting.base, setting, setting.sizes.base_epochs, 1e-3, setting.seed)

    def _tune(self) -> nn.Module:
        setting, rate = self.setting, RATES[self.regime]
        return fit(self.start(77), setting.trusted, setting, setting.sizes.reference_epochs, rate, setting.seed + 77)

    def _kept(self, key: str, make, train) -> nn.Module:
        path = self.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
        if path.is_file():
            model = make()
            model.load_state_dict(torch.load(path, weights_only=True))
        else:
            model = train()
            _save(model.state_dict(), path)
        return model.eval()


def head_of(model: nn.Module) -> nn.Linear:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def fit(model: nn.Module, part: Part, setting: Setting, epochs: int, rate: float, seed: int) -> nn.Module:
    """Train plainly, in a loop of a few lines: AdamW, linear decay, images mirrored at random."""
    generator, size = torch.Generator().manual_seed(seed), setting.sizes.batch
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    total = epochs * -(-len(part.labels) // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    model.train(len(trained) > 2)  # a probe's features are frozen, batch norm included
    for _ in range(epochs):
        for rows in torch.randperm(len(part.labels), generator=generator).split(size):
            images = mirrored(part.images[rows], generator) if setting.flips else part.images[rows]
            loss = F.cross_entropy(model(pixel_values=images).logits, part.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
    return model


def mirrored(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    flip = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(flip, images.flip(3), images)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return log-probabilities (N, C)."""
    model.eval()
    return torch.cat([torch.log_softmax(model(pixel_values=part).logits, 1) for part in images.split(500)])


def accuracy(model: nn.Module, part: Part) -> float:
    return float((predict(model, part.images).argmax(1) == part.clean).float().mean())
