"""Reading a reference's tensors: every family, sharded, renamed, converted, adapters, and bad input."""

import json
from pathlib import Path

import models
import pytest
import torch
import transformers as tf
from oracles import identical
from safetensors.torch import load_file, save_file
from torch import nn

import hf_mimic.reference
from hf_mimic.layers import match_parameters
from hf_mimic.mimic import reference_direction
from hf_mimic.reference import check_labels, read_tensors


def pair(family, **config):
    """Return a student and a reference of the same architecture and other weights."""
    return models.make(family, **config), models.make(family, seed=1, **config)


def named(model, names):
    every = dict(model.named_parameters(remove_duplicate=False))
    return {name: every[name].detach() for name in names}


def labelled(*labels):
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


@pytest.fixture
def opened(monkeypatch):
    """Return the list of weight files that were opened."""
    files, real = [], hf_mimic.reference._open
    monkeypatch.setattr(hf_mimic.reference, "_open", lambda path: (files.append(path.name), real(path))[1])
    return files


# ---- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", models.FAMILIES)
def test_round_trip(family, tmp_path):
    student, reference = pair(family)
    reference.save_pretrained(tmp_path)
    names = match_parameters(student, "all")
    assert identical(read_tensors(tmp_path, student, names), named(reference, names))
    assert not identical(read_tensors(tmp_path, student, names), named(student, names))


@pytest.mark.parametrize("layers", ["head", "last_mlp", "last_block"])
def test_only_the_chosen_tensors_are_returned(layers, tmp_path):
    student, reference = pair("vit")
    reference.save_pretrained(tmp_path)
    names = match_parameters(student, layers)
    assert list(read_tensors(str(tmp_path), student, names)) == names


def test_old_names_of_transformers(tmp_path):
    student, reference = pair("vit")
    reference.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "vit.encoder.layer.1.output.dense.weight" in stored  # what transformers 5 still writes
    read = read_tensors(tmp_path, student, ["vit.layers.1.mlp.fc2.weight"])
    assert torch.equal(read["vit.layers.1.mlp.fc2.weight"], stored["vit.encoder.layer.1.output.dense.weight"])


def test_conversion_of_a_fused_layer(tmp_path):
    student, reference = pair("dinov2", use_swiglu_ffn=True)
    reference.save_pretrained(tmp_path)
    assert any("weights_in" in key for key in load_file(tmp_path / "model.safetensors"))
    names = match_parameters(student, "last_block")
    assert any("gate_proj" in name for name in names)
    assert identical(read_tensors(tmp_path, student, names), named(reference, names))
    one = [name for name in names if "up_proj.weight" in name]
    assert identical(read_tensors(tmp_path, student, one), named(reference, one))


def test_shards_that_are_not_needed_stay_closed(tmp_path, opened):
    student, reference = pair("vit")
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) >= 3
    names = match_parameters(student, "head")
    assert identical(read_tensors(tmp_path, student, names), named(reference, names))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert opened == [index["classifier.weight"]]


def test_all_shards_are_read_once_for_all_parameters(tmp_path, opened):
    student, reference = pair("clip")
    reference.save_pretrained(tmp_path, max_shard_size="50KB")
    names = match_parameters(student, "all")
    assert identical(read_tensors(tmp_path, student, names), named(reference, names))
    assert sorted(opened) == sorted(p.name for p in tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("family", "base"), [("vit", "vit"), ("bert", "bert"), ("resnet", "resnet"), ("dinov2", "dinov2")]
)
def test_checkpoint_of_the_base_model(family, base, tmp_path):
    student, reference = pair(family)
    getattr(reference, base).save_pretrained(tmp_path)
    names = match_parameters(student, "last_block")
    assert identical(read_tensors(tmp_path, student, names), named(reference, names))
    with pytest.raises(ValueError, match=r"classifier(\.1)?\.weight: not in the reference"):
        read_tensors(tmp_path, student, match_parameters(student, "head"))


def test_student_is_the_base_model(tmp_path):
    student, reference = pair("vit")
    reference.save_pretrained(tmp_path)
    names = match_parameters(student.vit, "last_block")
    assert identical(read_tensors(tmp_path, student.vit, names), named(reference.vit, names))


def test_half_precision_file_becomes_a_float32_direction(tmp_path):
    student, reference = pair("vit")
    reference.bfloat16().save_pretrained(tmp_path)
    direction = reference_direction(student, tmp_path, "head")
    for name, v in direction.items():
        expected = dict(reference.named_parameters())[name].float() - dict(student.named_parameters())[name]
        assert torch.equal(v, expected.detach())


def test_a_tied_parameter_is_stored_once(tmp_path):
    config = tf.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20
    )
    student, reference = tf.BertForMaskedLM(config), tf.BertForMaskedLM(config)
    reference.save_pretrained(tmp_path)
    for layers in ("cls.predictions.decoder", "bert.embeddings.word_embeddings"):
        names = match_parameters(student, layers)
        assert identical(read_tensors(tmp_path, student, names), named(reference, names))


# ---- a model or a state dict ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["module", "state dict"])
def test_reference_in_memory(kind):
    student, reference = pair("clip")
    names = match_parameters(student, "last_block")
    given = reference if kind == "module" else reference.state_dict()
    read = read_tensors(given, student, names)
    assert identical(read, named(reference, names))
    assert not any(x.requires_grad for x in read.values())


def test_plain_modules():
    student, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    direction = reference_direction(student, reference, "all")
    assert torch.equal(direction["bias"], (reference.bias - student.bias).detach())


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"target_modules": ["projection", "fc2"]}], ids=str)
def test_adapter_folder_for_an_adapter(config, tmp_path):
    student, reference = (models.with_lora(m, **config) for m in pair("vit"))
    reference.save_pretrained(tmp_path)
    names = match_parameters(student, "all")
    assert any("lora_A" in name for name in names)
    for given in (tmp_path, reference, reference.state_dict()):
        assert identical(read_tensors(given, student, names), named(reference, names))


@pytest.mark.parametrize("kind", ["folder", "module"])
@pytest.mark.parametrize("layers", ["head", "last_mlp", "q_proj.base_layer"])
def test_full_model_for_the_base_weights_of_an_adapter(layers, kind, tmp_path):
    student, reference = pair("vit")
    student = models.with_lora(student)
    reference.save_pretrained(tmp_path)
    read = read_tensors(tmp_path if kind == "folder" else reference, student, match_parameters(student, layers))
    expected = {
        "head": "classifier",
        "last_mlp": "vit.layers.1.mlp.fc2",
        "q_proj.base_layer": "vit.layers.1.attention.q_proj",
    }
    weight = [x for name, x in read.items() if name.endswith("weight")][-1]
    assert torch.equal(weight, reference.get_submodule(expected[layers]).weight.detach())


def test_adapter_needs_an_adapter(tmp_path):
    student, reference = pair("vit")
    student = models.with_lora(student)
    reference.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lora_A.default.weight: not in the reference"):
        read_tensors(tmp_path, student, match_parameters(student, "last_block"))


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_every_mismatch_is_listed(tmp_path):
    student, reference = models.make("vit"), models.make("vit", num_labels=7)
    reference.save_pretrained(tmp_path)
    message = r"(?s)2 of 4 do not match.*weight: \(4, 32\) here, \(7, 32\) in.*bias: \(4,\) here, \(7,\) in.*number of labels"
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path, student, match_parameters(student, ["head", "last_mlp"]))


@pytest.mark.parametrize("kind", ["folder", "module", "state dict"])
def test_another_architecture(kind, tmp_path):
    student, reference = models.make("vit"), models.make("resnet")
    reference.save_pretrained(tmp_path)
    given = {"folder": tmp_path, "module": reference, "state dict": reference.state_dict()}[kind]
    names = match_parameters(student, "last_mlp")
    with pytest.raises(
        ValueError, match=r"(?s)2 of 2 do not match:.*fc2.weight: not in.*fc2.bias: not in the reference"
    ):
        read_tensors(given, student, names)


@pytest.mark.parametrize("kind", ["folder", "module"])
def test_labels_in_another_order(kind, tmp_path):
    student = models.make("vit", **labelled("cat", "dog", "owl", "ape"))
    reference = models.make("vit", **labelled("cat", "owl", "dog", "ape"))
    reference.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"got 2 of 4 that differ .*1: 'dog' / 'owl', 2: 'owl' / 'dog'\. Load the student"
    ):
        read_tensors(tmp_path if kind == "folder" else reference, student, ["classifier.bias"])


def test_labels_that_cannot_be_compared():
    named_labels = models.make("vit", **labelled("cat", "dog", "owl", "ape"))
    generic = models.make("vit")
    check_labels(named_labels, generic.config.to_dict(), "x")
    check_labels(generic, named_labels.config.to_dict(), "x")
    check_labels(named_labels, named_labels.config.to_dict(), "x")
    check_labels(nn.Linear(2, 2), {}, "x")


def test_no_weights(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no model.safetensors, model.safetensors.index.json or adapter_model"
    ):
        read_tensors(tmp_path, models.make("vit"), ["classifier.bias"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"])
def test_pickles_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"never read")
    with pytest.raises(FileNotFoundError, match=rf"has only {name}, and reading that would unpickle code"):
        read_tensors(tmp_path, models.make("vit"), ["classifier.bias"])


def test_a_shard_is_missing(tmp_path):
    student, reference = pair("vit")
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    (tmp_path / index["classifier.bias"]).unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"lists {index['classifier.bias']} in its index but does not have it"
    ):
        read_tensors(tmp_path, student, ["classifier.bias"])


@pytest.mark.parametrize("reference", [Path("no/folder"), "./no/folder", "/no/folder", "~/no/folder"])
def test_a_folder_that_does_not_exist(reference):
    with pytest.raises(FileNotFoundError, match=r"must be a Hub repo id or a folder, .*no/folder does not exist"):
        read_tensors(reference, models.make("vit"), ["classifier.bias"])


def test_a_file_with_names_of_its_own(tmp_path):
    save_file({"something.else": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"classifier.bias: not in the reference"):
        read_tensors(tmp_path, models.make("vit"), ["classifier.bias"])
