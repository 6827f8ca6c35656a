"""Tiny models of every family, made from their configuration, and batches for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

BATCH = 6
LABELS = 4
_ATTENTION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_BLOCKS = {**_ATTENTION, "intermediate_size": 64}
_IMAGE = {"image_size": 16, "patch_size": 8}
_TEXT = {**_BLOCKS, "vocab_size": 50, "max_position_embeddings": 16}

_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def vit(**config: Any) -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(**{**_BLOCKS, **_IMAGE, "num_labels": LABELS, **config}))


def dinov2(**config: Any) -> nn.Module:
    config = {**_ATTENTION, **_IMAGE, "mlp_ratio": 2, "num_labels": LABELS, **config}
    return tf.Dinov2ForImageClassification(tf.Dinov2Config(**config))


def resnet(**config: Any) -> nn.Module:
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}
    return tf.ResNetForImageClassification(tf.ResNetConfig(**{**shape, "num_labels": LABELS, **config}))


def swinv2(**config: Any) -> nn.Module:
    shape = {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    }
    return tf.Swinv2ForImageClassification(tf.Swinv2Config(**{**shape, "num_labels": LABELS, **config}))


def bert(**config: Any) -> nn.Module:
    return tf.BertForSequenceClassification(tf.BertConfig(**{**_TEXT, "num_labels": LABELS, **config}))


def clip(**config: Any) -> nn.Module:
    text = {**_TEXT, "bos_token_id": 0, "eos_token_id": 1}
    shape = {"text_config": text, "vision_config": {**_BLOCKS, **_IMAGE}, "projection_dim": 16}
    return tf.CLIPModel(tf.CLIPConfig(**{**shape, **config}))


def clip_classifier(**config: Any) -> nn.Module:
    shape = {"vision_config": {**_BLOCKS, **_IMAGE}, "projection_dim": 16, "num_labels": LABELS}
    return tf.CLIPForImageClassification(tf.CLIPConfig(**{**shape, **config}))


def siglip(**config: Any) -> nn.Module:
    shape = {"text_config": _TEXT, "vision_config": {**_BLOCKS, **_IMAGE}}
    return tf.SiglipModel(tf.SiglipConfig(**{**shape, **config}))


def siglip_classifier(**config: Any) -> nn.Module:
    shape = {"text_config": _TEXT, "vision_config": {**_BLOCKS, **_IMAGE}, "num_labels": LABELS}
    return tf.SiglipForImageClassification(tf.SiglipConfig(**{**shape, **config}))


def blip(**config: Any) -> nn.Module:
    shape = {"text_config": {**_TEXT, "encoder_hidden_size": 32}, "vision_config": {**_BLOCKS, **_IMAGE}}
    return tf.BlipModel(tf.BlipConfig(**{**shape, "projection_dim": 16, **config}))


def siglip2(**config: Any) -> nn.Module:
    text = {**_TEXT, "bos_token_id": 0, "eos_token_id": 1}
    shape = {"text_config": text, "vision_config": {**_BLOCKS, "patch_size": 8, "num_patches": 4}}
    return tf.Siglip2Model(tf.Siglip2Config(**{**shape, **config}))


def chinese_clip(**config: Any) -> nn.Module:
    text = {**_TEXT, **_NO_DROPOUT}
    shape = {"text_config": text, "vision_config": {**_BLOCKS, **_IMAGE}, "projection_dim": 16}
    return tf.ChineseCLIPModel(tf.ChineseCLIPConfig(**{**shape, **config}))


def altclip(**config: Any) -> nn.Module:
    text = {**_TEXT, "project_dim": 16, "pad_token_id": 0, **_NO_DROPOUT}
    shape = {"text_config": text, "vision_config": {**_BLOCKS, **_IMAGE}, "projection_dim": 16}
    return tf.AltCLIPModel(tf.AltCLIPConfig(**{**shape, **config}))


class Classifier(nn.Module):
    """Any module from pixels to logits, with the interface of a Hugging Face classifier."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.body(pixel_values))


_CLASSIFIERS = (vit, dinov2, resnet, swinv2, bert, clip_classifier, siglip_classifier)
_IMAGE_TEXT = (clip, siglip, blip, siglip2, chinese_clip, altclip)
FAMILIES: dict[str, Callable[..., nn.Module]] = {f.__name__: f for f in (*_CLASSIFIERS, *_IMAGE_TEXT)}
IMAGE_TEXT = [f.__name__ for f in _IMAGE_TEXT]


def make(family: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, **config: Any) -> nn.Module:
    """Return a tiny model in eval mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    model = FAMILIES[family](**config)
    for parameter in model.parameters():  # biases and norms too, or the score would not see them
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def with_lora(model: nn.Module, **config: Any) -> nn.Module:
    """Return `model` with LoRA on its queries and values and a trained copy of its classifier, none of them at zero."""
    config = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"], "r": 2, **config}
    with warnings.catch_warnings():  # PEFT 0.21 asks a property that transformers 5.23 deprecates
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(model, peft.LoraConfig(**config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_batch(
    family: str, dtype: torch.dtype = torch.float32, *, size: int = BATCH, seed: int = 1
) -> dict[str, Tensor]:
    """Return a batch for `make(family)`: pixels, tokens or both, and labels where the family has them."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(size, 3, 16, 16, generator=generator).to(dtype)
    tokens = torch.randint(2, 50, (size, 8), generator=generator)
    tokens[:, -1] = 1  # CLIP's end of text
    labels = torch.randint(LABELS, (size,), generator=generator)
    if family == "bert":
        mask = torch.ones_like(tokens)
        mask[::2, 5:] = 0
        return {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels}
    if family == "blip":
        tokens[::2, 5:] = 0  # padding that is attended to
    if family == "siglip2":  # patches of images that may have any shape
        patches = {"pixel_values": pixels.unfold(2, 8, 8).unfold(3, 8, 8).reshape(size, 4, 192), "input_ids": tokens}
        shapes = {"pixel_attention_mask": torch.ones(size, 4).long(), "spatial_shapes": torch.tensor([[2, 2]] * size)}
        return {**patches, **shapes}
    if family in IMAGE_TEXT:
        return {"pixel_values": pixels, "input_ids": tokens}
    return {"pixel_values": pixels, "labels": labels}


def moved(model: nn.Module, scale: float = 0.05, *, seed: int = 2) -> dict[str, Tensor]:
    """Return a reference near `model`: a state dict of its parameters with noise."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: p.detach() + scale * torch.randn(p.shape, generator=generator).to(p.dtype)
        for name, p in model.named_parameters(remove_duplicate=False)
    }
