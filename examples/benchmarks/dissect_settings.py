"""What the study of DISSect trains: pairs of drawings and names, captions shuffled inside their category, a small CLIP.

Read `load_pairs` (what is trained on and what is held out), then `Study.make`.
"""

import io
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

SIZE, WORDS, WIDTH = 32, 12, 96
SHIFTED = (
    "-shifted"  # after a name: drawings are shifted at random by up to two pixels, so that little is learned by heart
)
SETS = {  # file of each style, the columns of style and category, styles to train on, the held-out one
    "icons": (["icons/phosphor.parquet"], "style", "categories", ["regular", "bold", "fill", "duotone"], "light"),
    "emoji": (
        ["emoji/noto.parquet", "emoji/twemoji.parquet", "emoji/openmoji.parquet"],
        "vendor",
        "group",
        ["noto", "twemoji"],
        "openmoji",
    ),
}


@dataclass(frozen=True)
class Pairs:
    """N images (N, C, 32, 32) with their captions as tokens (N, 12), and whether each caption is the right one (N,)."""

    images: Tensor
    tokens: Tensor
    clean: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Study:
    """Pairs to train on, the same with right captions, a held-out style, and the size of the vocabulary."""

    train: Pairs
    right: Pairs
    test: Pairs
    vocabulary: int

    def make(self, seed: int) -> CLIPModel:
        """Return a CLIP from scratch: a transformer of one layer for words, four convolutions for drawings."""
        torch.manual_seed(seed)
        block = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 3}
        text = {**block, "num_hidden_layers": 1, "vocab_size": self.vocabulary, "max_position_embeddings": WORDS}
        text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
        vision = {**block, "num_hidden_layers": 1, "image_size": SIZE, "patch_size": 8}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
        model.vision_model = Convolutions(self.train.images.shape[1])
        return model


class Convolutions(nn.Module):
    """An image tower that learns small drawings quickly."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths, layers = [channels, 32, 64, 96, 128], []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU()]
        self.body, self.out = nn.Sequential(*layers), nn.Linear(128 * 4, WIDTH)

    def forward(self, pixel_values: Tensor, **_) -> BaseModelOutputWithPooling:
        found = self.out(self.body(pixel_values).flatten(1))
        return BaseModelOutputWithPooling(last_hidden_state=found[:, None], pooler_output=found)


class Rows(torch.utils.data.Dataset):
    """Pairs as the Trainer takes them; the drawings are shifted at random by up to so many pixels."""

    def __init__(self, pairs: Pairs, shift: int = 0) -> None:
        self.pairs, self.shift, self.sample_ids = pairs, shift, torch.arange(len(pairs))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> dict:
        image = self.pairs.images[row]
        if self.shift:
            down, right = torch.randint(2 * self.shift + 1, (2,)).tolist()
            padded = nn.functional.pad(image[None], [self.shift] * 4, mode="replicate")[0]
            image = padded[:, down : down + SIZE, right : right + SIZE]
        return {"pixel_values": image, "input_ids": self.pairs.tokens[row], "sample_id": row}


def load_pairs(name: str, noise: float, seed: int, data: Path, cache: Path) -> Study:
    """Return the pairs of a data set; a share of the training captions is shuffled inside its category.

    Held out is a whole style: the same things, drawn otherwise. A picture that was trained on, or a caption that stands
    there twice, is not in the test.
    """
    name = name.removesuffix(SHIFTED)
    table = _read(name, data, cache)
    _, _, _, styles, held_out = SETS[name]
    style, text = np.array(table["style"]), np.array(table["text"])
    train = np.flatnonzero(np.isin(style, styles))
    seen, names = {table["md5"][i] for i in train}, set(text[train])
    test = [i for i in np.flatnonzero(style == held_out) if table["md5"][i] not in seen and text[i] in names]
    test = _first(_first(test, table["md5"]), table["text"])
    given = _shuffled(text[train], np.array(table["category"])[train], noise, seed)
    vocabulary: dict[str, int] = {}
    for caption in given:
        for word in _words(caption):
            vocabulary.setdefault(word, len(vocabulary) + 4)
    images = table["images"].float()
    images = (images - images[train].mean()) / images[train].std()
    clean = torch.from_numpy(given == text[train])
    everything = torch.ones_like(clean)
    tokens, right = _tokens(given, vocabulary), _tokens(text[train], vocabulary)
    held = Pairs(images[test], _tokens(text[test], vocabulary), torch.ones(len(test), dtype=torch.bool))
    return Study(
        Pairs(images[train], tokens, clean), Pairs(images[train], right, everything), held, len(vocabulary) + 4
    )


def _shuffled(text: np.ndarray, category: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Give a share of the rows of each category each other's captions."""
    generator, found = np.random.default_rng(1000 + seed), text.copy()
    for name in sorted(set(category)):
        rows = generator.permutation(np.flatnonzero(category == name))
        rows = rows[: round(noise * len(rows))]
        other = generator.permutation(rows)
        for _ in range(20):  # a few may have drawn their own caption, or an equal one
            same = np.flatnonzero(text[rows] == text[other])
            if not len(same):
                break
            for i in same:
                j = int(generator.integers(len(rows)))
                other[[i, j]] = other[[j, i]]
        found[rows] = text[other]
    return found


def _words(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())


def _tokens(captions: np.ndarray, vocabulary: dict[str, int]) -> Tensor:
    found = torch.zeros(len(captions), WORDS, dtype=torch.long)
    for row, caption in enumerate(captions):
        words = [1, *(vocabulary.get(word, 2) for word in _words(caption)[: WORDS - 2]), 3]
        found[row, : len(words)] = torch.tensor(words)
    return found


def _first(rows: list[int], values: list) -> list[int]:
    """Return those rows whose value was not there before."""
    known: dict = {}
    for row in rows:
        known.setdefault(values[row], row)
    return sorted(known.values())


def _read(name: str, data: Path, cache: Path) -> dict:
    path = cache / f"{name}-{SIZE}.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    files, style, category, _, _ = SETS[name]
    found: dict[str, list] = {key: [] for key in ("style", "text", "category", "md5", "images")}
    for file in files:
        for row in pq.read_table(data / file).to_pylist():
            if row.get("skin_tone", "none") != "none":
                continue
            found["style"].append(row[style])
            found["text"].append(row["text"])
            found["category"].append(row[category][0] if isinstance(row[category], list) else row[category])
            found["md5"].append(row["image_md5"])
            picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("L" if name == "icons" else "RGB")
            pixels = np.array(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
            found["images"].append(torch.from_numpy(pixels.reshape(SIZE, SIZE, -1).transpose(2, 0, 1).copy()))
    table = {**found, "images": torch.stack(found["images"])}
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(table, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)
    return table
