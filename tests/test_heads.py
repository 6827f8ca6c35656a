"""The head that a student starts with, whether two heads belong together, and the base model of a reference."""

import json

import models
import pytest
import torch
from oracles import identical

from hf_mimic.base_model import find_base_model
from hf_mimic.heads import head_cosine, init_head
from hf_mimic.mimic import MimicDirection


def card(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{text}\n---\n# A model\n", encoding="utf-8")
    return str(folder)


def test_zero_head_changes_the_head_alone():
    model, before = models.make("vit"), models.make("vit").state_dict()
    assert init_head(model, models.moved(model), "zero") == ["classifier.weight", "classifier.bias"]
    assert not model.classifier.weight.any()
    rest = {n: t for n, t in model.state_dict().items() if "classifier" not in n}
    assert identical(rest, {n: before[n] for n in rest})


@pytest.mark.parametrize("family", ["vit", "resnet", "clip"])
def test_the_reference_s_head(family):
    model, reference = models.make(family), models.make(family, seed=1)
    names = init_head(model, reference, "reference")
    own, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert names
    assert identical({n: own[n] for n in names}, {n: theirs[n] for n in names})


def test_the_head_that_an_adapter_trains():
    model, reference = models.with_lora(models.make("vit")), models.make("vit", seed=1)
    init_head(model, reference, "reference")
    trained = model.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(trained.weight, reference.classifier.weight)


def test_only_the_last_layer_of_a_head_is_zero():
    model = models.make("vit")
    model.classifier = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    assert init_head(model, model, "zero") == ["classifier.2.weight", "classifier.2.bias"]
    assert model.classifier[0].weight.any()
    assert init_head(models.make("swinv2"), model, "zero") == ["classifier.weight", "classifier.bias"]  # logit_scale


@pytest.mark.parametrize(
    "how", [{"modules_to_save": None}, {"target_modules": ["classifier"], "modules_to_save": None}]
)
def test_a_head_that_is_not_trained_itself_cannot_be_zero(how):
    model = models.with_lora(models.make("vit"), **how)
    with pytest.raises(ValueError, match="needs a linear layer at the end of the head that is trained itself"):
        init_head(model, model, "zero")


def test_projections_cannot_be_zero():
    model = models.make("clip")
    with pytest.raises(ValueError, match=r'must be "keep" or "reference" for image-text models, got "zero"'):
        init_head(model, models.moved(model), "zero")


def test_a_head_for_other_labels():
    model, reference = models.make("vit"), models.make("vit", num_labels=models.LABELS + 1)
    with pytest.raises(ValueError, match="do not match"):
        init_head(model, reference, "reference")
    assert head_cosine(model, reference) is None


def test_cosine_of_heads():
    model = models.make("vit")
    assert head_cosine(model, models.moved(model)) > 0.5
    assert head_cosine(model, model) == pytest.approx(1.0)
    assert abs(head_cosine(model, models.make("vit", seed=1))) < 0.3
    init_head(model, model, "zero")
    assert head_cosine(model, models.make("vit", seed=1)) == 1.0


# ---- base model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["base_model: user/base", "base_model:\n- user/base"])
def test_the_base_that_the_card_names(tmp_path, text):
    assert find_base_model(card(tmp_path / "reference", text)) == "user/base"


def test_the_base_that_the_adapter_names(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "user/base"}))
    assert find_base_model(str(tmp_path)) == "user/base"


@pytest.mark.parametrize("text", ["license: mit", "base_model: []", "base_model: ''"])
def test_no_base_says_what_was_looked_for(tmp_path, text):
    folder = card(tmp_path / "reference", text)
    message = (
        r"looked for `base_model` in README.md and `base_model_name_or_path` in adapter_config.json of .*reference"
    )
    with pytest.raises(
        ValueError, match=message + r'\. Name it as `reference_base_model`, or use direction="current"'
    ):
        find_base_model(folder)


def test_a_merged_model_has_several(tmp_path):
    with pytest.raises(ValueError, match="must name one base model, got user/a, user/b"):
        find_base_model(card(tmp_path / "reference", "base_model:\n- user/a\n- user/b"))


@pytest.mark.parametrize("named", ["/no/such/dir", "a b c", "outputs/checkpoint-500/x"])
def test_a_base_that_cannot_be_read(tmp_path, named):
    model = models.make("vit")
    model.save_pretrained(tmp_path)
    folder = card(tmp_path, f"base_model: {named}")
    with pytest.raises(
        ValueError, match=r"the reference's base model .*could not be read.*\n.*`reference_base_model`"
    ):
        MimicDirection(model, folder, kind="task_vector")


@pytest.mark.parametrize("text", ["base_model: [unclosed", "base_model:\n  name: x"])
def test_metadata_that_names_nothing(tmp_path, text):
    with pytest.raises(ValueError, match="found none: looked for"):
        find_base_model(card(tmp_path / "reference", text))


def test_the_same_base_twice_is_one(tmp_path):
    assert find_base_model(card(tmp_path / "reference", "base_model:\n- user/a\n- user/a")) == "user/a"


def test_task_vector_by_the_card(tmp_path):
    model, base, reference = (models.make("vit", seed=seed) for seed in (0, 1, 2))
    base.save_pretrained(tmp_path / "base")
    reference.save_pretrained(tmp_path / "reference")
    folder = card(tmp_path / "reference", f"base_model: {tmp_path / 'base'}")
    direction = MimicDirection(model, folder, "all", kind="task_vector")()
    theirs, origin = dict(reference.named_parameters()), dict(base.named_parameters())
    assert identical(direction, {n: theirs[n].detach() - origin[n].detach() for n in direction})


def test_task_vector_by_the_card_on_the_hub(hub, tmp_path):
    model = models.make("vit")
    for seed, name in ((1, "base"), (2, "reference")):
        models.make("vit", seed=seed).save_pretrained(tmp_path / name)
        if name == "reference":
            card(tmp_path / name, "base_model: user/base")
        hub.create(f"user/{name}").commit(tmp_path / name)
    direction = MimicDirection(model, "user/reference", "head", kind="task_vector")()
    expected = MimicDirection(model, "user/reference", "head", kind="task_vector", base="user/base")()
    assert identical(direction, expected)
    assert any(v.any() for v in direction.values())


@pytest.mark.parametrize("labels", [{"num_labels": 7}, {"id2label": dict(enumerate("dcba")), "num_labels": 4}])
def test_a_base_with_the_head_of_other_labels_counts_as_zero_there(tmp_path, labels):
    names = {"id2label": dict(enumerate("abcd")), "num_labels": 4}
    model, reference = models.make("vit", **names), models.make("vit", seed=2, **names)
    base = models.make("vit", seed=1, **labels)
    base.save_pretrained(tmp_path)
    direction = MimicDirection(model, reference, "all", kind="task_vector", base=str(tmp_path))()
    assert torch.equal(direction["classifier.weight"], reference.classifier.weight)
    name = "vit.layernorm.weight"
    expected = dict(reference.named_parameters())[name] - dict(base.named_parameters())[name]
    assert torch.equal(direction[name], expected)


def test_a_base_of_another_shape(tmp_path):
    model = models.make("vit")
    models.make("vit", intermediate_size=48).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"in the reference\n"):
        MimicDirection(model, models.moved(model), "last_mlp", kind="task_vector", base=str(tmp_path))
