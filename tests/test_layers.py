"""What `mimic_layers` chooses: the four words in every family, names, suffixes, patterns, and its errors."""

import models
import pytest
import torch
from torch import nn

from hf_mimic.layers import WORDS, match_parameters

HEADS = {
    "vit": ["classifier"],
    "dinov2": ["classifier"],
    "resnet": ["classifier.1"],
    "swinv2": ["classifier"],
    "bert": ["classifier"],
    "clip": ["visual_projection", "text_projection"],
    "clip_classifier": ["classifier"],
    "siglip_classifier": ["classifier"],
    "blip": ["visual_projection", "text_projection"],
}
LAST_BLOCKS = {
    "vit": ["vit.layers.1"],
    "dinov2": ["dinov2.encoder.layer.1"],
    "resnet": ["resnet.encoder.stages.1.layers.1"],
    "swinv2": ["swinv2.encoder.layers.1.blocks.0"],
    "bert": ["bert.encoder.layer.1"],
    "clip": ["text_model.encoder.layers.1", "vision_model.encoder.layers.1"],
    "clip_classifier": ["vision_model.encoder.layers.1"],
    "siglip": ["text_model.encoder.layers.1", "vision_model.encoder.layers.1"],
    "blip": ["text_model.encoder.layer.1", "vision_model.encoder.layers.1"],
}
LAST_MLPS = {
    "vit": ["mlp.fc2"],
    "dinov2": ["mlp.fc2"],
    "resnet": ["layer.1.convolution"],
    "swinv2": ["output.dense"],
    "bert": ["output.dense"],
    "clip": ["mlp.fc2", "mlp.fc2"],
    "siglip": ["mlp.fc2", "mlp.fc2"],
    "blip": ["output.dense", "mlp.fc2"],
}


def modules(model, layers):
    """Return the modules whose parameters were chosen, in order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in match_parameters(model, layers)))


def below(model, *prefixes):
    """Return all parameter names below the given modules."""
    return [name for name, _ in model.named_parameters() if name.startswith(tuple(f"{p}." for p in prefixes))]


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", HEADS)
def test_head(family):
    assert modules(models.make(family), "head") == HEADS[family]


def test_head_of_siglip_is_its_pooling_heads():
    model = models.make("siglip")
    assert match_parameters(model, "head") == below(model, "text_model.head", "vision_model.head")


@pytest.mark.parametrize("family", LAST_BLOCKS)
def test_last_block_of_every_tower(family):
    model = models.make(family)
    assert match_parameters(model, "last_block") == below(model, *LAST_BLOCKS[family])


@pytest.mark.parametrize("family", LAST_MLPS)
def test_last_mlp_of_every_tower(family):
    places = zip(LAST_BLOCKS[family], LAST_MLPS[family], strict=True)
    assert modules(models.make(family), "last_mlp") == [f"{block}.{layer}" for block, layer in places]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_all_is_every_trainable_parameter(family):
    model = models.make(family)
    assert match_parameters(model, "all") == [name for name, _ in model.named_parameters()]


def test_all_leaves_frozen_parameters_out_and_the_other_words_keep_them():
    model = models.make("vit")
    model.vit.requires_grad_(False)
    assert match_parameters(model, "all") == ["classifier.weight", "classifier.bias"]
    assert modules(model, "last_mlp") == ["vit.layers.1.mlp.fc2"]


def test_words_keep_only_the_trainable_part_of_a_block():
    model = models.make("vit")
    model.vit.layers[1].attention.requires_grad_(False)
    assert modules(model, "last_block")[0] == "vit.layers.1.layernorm_before"


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("classifier.bias", ["classifier.bias"]),
        ("classifier", ["classifier.weight", "classifier.bias"]),
        ("vit.layers.0.mlp.fc1", ["vit.layers.0.mlp.fc1.weight", "vit.layers.0.mlp.fc1.bias"]),
        ("0.mlp.fc1", ["vit.layers.0.mlp.fc1.weight", "vit.layers.0.mlp.fc1.bias"]),
        ("fc1.bias", ["vit.layers.0.mlp.fc1.bias", "vit.layers.1.mlp.fc1.bias"]),
        (r".*layers\.[1-9]\.mlp\.fc\d\.bias", ["vit.layers.1.mlp.fc1.bias", "vit.layers.1.mlp.fc2.bias"]),
        (["classifier.bias", "cls_token"], ["vit.embeddings.cls_token", "classifier.bias"]),
        (["head", "classifier"], ["classifier.weight", "classifier.bias"]),
    ],
)
def test_names_suffixes_and_patterns(entry, expected):
    assert match_parameters(models.make("vit"), entry) == expected


def test_an_exact_name_beats_a_suffix():
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "inner": nn.ModuleDict({"fc": nn.Linear(2, 2)})})
    assert modules(model, "fc") == ["fc"]
    assert modules(model, "inner.fc") == ["inner.fc"]


def test_a_suffix_ends_at_a_dot():
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "last_fc": nn.Linear(2, 2)})
    assert modules(model, "fc") == ["fc"]


def test_a_tied_parameter_is_chosen_once():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    assert match_parameters(model, "all") == ["a.weight", "a.bias", "b.bias"]
    assert match_parameters(model, "b") == ["b.weight", "b.bias"]


def test_integer_parameters_are_never_chosen():
    model = nn.Linear(2, 2)
    model.steps = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)
    assert match_parameters(model, ".*") == ["weight", "bias"]


# ---- other models ---------------------------------------------------------------------------------------------------


def test_lora():
    model = models.with_lora(models.make("vit"))
    core, adapters = "base_model.model", [f"{a}.default" for a in ("lora_A", "lora_B")]
    assert modules(model, "head") == [f"{core}.classifier.modules_to_save.default"]
    assert modules(model, "last_mlp") == [f"{core}.vit.layers.1.mlp.fc2"]
    layers = [f"{core}.vit.layers.1.attention.{q}.{a}" for q in ("q_proj", "v_proj") for a in adapters]
    assert modules(model, "last_block") == layers
    assert set(match_parameters(model, "all")) == {n for n, p in model.named_parameters() if p.requires_grad}


def test_last_mlp_with_an_adapter_is_the_adapter():
    model = models.with_lora(models.make("vit"), target_modules=["fc2"])
    place = "base_model.model.vit.layers.1.mlp.fc2"
    assert modules(model, "last_mlp") == [f"{place}.lora_A.default", f"{place}.lora_B.default"]


def test_plain_sequential():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    assert modules(model, "head") == ["2"]
    with pytest.raises(ValueError, match="'last_block' matched none"):
        match_parameters(model, "last_block")


def test_sequential_of_blocks():
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3)))
    model = nn.ModuleDict({"blocks": blocks, "head": nn.Linear(2, 2)})
    assert modules(model, "last_block") == modules(model, "last_mlp") == ["blocks.2.0"]


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "closest"),
    [("clasifier", "classifier"), ("last_blok", "last_block"), ("vit.layer.1.mlp.fc2", "mlp.fc2")],
)
def test_a_misspelt_name_shows_the_closest(entry, closest):
    with pytest.raises(
        ValueError, match=rf"{entry!r} matched none. Closest: .*{closest}.* Use one of {', '.join(WORDS)}"
    ):
        match_parameters(models.make("vit"), entry)


def test_every_entry_must_match():
    with pytest.raises(ValueError, match=r"'decoder' matched none"):
        match_parameters(models.make("vit"), ["head", "decoder"])


@pytest.mark.parametrize("entry", ["(", "*", ""])
def test_what_is_no_pattern_matches_nothing(entry):
    with pytest.raises(ValueError, match="matched none"):
        match_parameters(models.make("vit"), entry)


def test_empty_list():
    with pytest.raises(ValueError, match=r"must name at least one layer, got \[\]"):
        match_parameters(models.make("vit"), [])
