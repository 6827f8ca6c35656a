"""A tiny image-text model with tokenizer and image processor, and captioned pictures, as folders and files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import models
import numpy as np
import transformers as tf
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

COLOURS = ["red", "green", "blue"]
WORDS = ["<pad>", "<end>", "<unk>", "a", "photo", "of", "dark", "bright", "picture", "the", *COLOURS]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the few words; it ends a text with <end> (1), where CLIP reads it, and pads with 0."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def save(folder: Path, family: str = "clip", **config: Any) -> str:
    """Save a model of models.py with its tokenizer and image processor; return the folder's name."""
    models.make(family, **config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    processor().save_pretrained(folder)
    return str(folder)


def picture(row: int, *, corrupt: bool = False) -> dict[str, Any]:
    """Return an encoded picture of noise with one colour in front."""
    pixels = np.random.default_rng(row).integers(0, 120, (20, 24, 3), dtype=np.uint8)
    pixels[..., row % 3] += 130
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue()[: 100 if corrupt else None], "path": None}


def rows(texts: Sequence[Any], *, corrupt: Sequence[int] = (), without: Sequence[int] = (), **columns: Any) -> Dataset:
    """Return rows with pictures, captions (each a string or a list of them) and other columns.

    Args:
        texts: The captions.
        corrupt: Rows whose picture does not decode.
        without: Rows without a picture.
        **columns: Name to values; `label` becomes a `ClassLabel` of the colours.
    """
    pictures = [None if i in without else picture(i, corrupt=i in corrupt) for i in range(len(texts))]
    text = List(Value("string")) if any(isinstance(cell, list) for cell in texts) else Value("string")
    kinds = {"label": ClassLabel(names=COLOURS), "image_id": Value("int64")}
    features = {"image": datasets.Image(), "text": text, **{n: kinds.get(n, Value("string")) for n in columns}}
    return Dataset.from_dict({"image": pictures, "text": list(texts), **columns}, features=Features(features))


def altclip() -> Any:
    """Return a tiny AltCLIP, whose texts go through a RoBERTa that counts positions from its padding on."""
    text = {**models._TEXT, "project_dim": 32, "pad_token_id": 0}
    vision = {**models._BLOCKS, **models._IMAGE}
    return tf.AltCLIPModel(tf.AltCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


def chinese_clip() -> Any:
    vision = {**models._BLOCKS, **models._IMAGE}
    config = tf.ChineseCLIPConfig(text_config=models._TEXT, vision_config=vision, projection_dim=16)
    return tf.ChineseCLIPModel(config).eval()
