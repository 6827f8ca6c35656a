"""Embeddings of texts and classes, for every family, against a loop over single texts."""

import image_text
import models
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_mimic.embeddings import (
    check_image_text,
    class_embeddings,
    context_length,
    count_cut,
    feature_matrix,
    text_features,
)

FAMILIES = ("clip", "siglip", "blip", "altclip", "chinese_clip")
TEXTS = ["a red picture", "green", "a photo of the dark blue picture", "the"]
NAMES, TEMPLATES = ["red", "dark blue"], ["a photo of a {}", "the {} picture", "{}"]


def make(family):
    own = {"altclip": image_text.altclip, "chinese_clip": image_text.chinese_clip}
    return own[family]() if family in own else models.make(family)


def by_hand(model, text):
    """Return the features (D,) of one text: SigLIP's padded to its 16 tokens, the others' as they are."""
    ids = image_text.tokenizer()(text)["input_ids"]
    if model.config.model_type == "siglip":
        ids += [0] * (16 - len(ids))
    with torch.no_grad():
        return model.get_text_features(input_ids=torch.tensor([ids])).pooler_output[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_text_features_are_those_of_single_texts(family, batch_size):
    """So the padding of a batch changes nothing."""
    model = make(family)
    given = text_features(model, image_text.tokenizer(), TEXTS, batch_size=batch_size)
    torch.testing.assert_close(given, torch.stack([by_hand(model, text) for text in TEXTS]), rtol=1e-4, atol=1e-5)
    assert not given.requires_grad


def test_siglip_was_trained_on_full_length():
    """The negative control: its features of a text without padding are others."""
    model, tokens = models.make("siglip"), image_text.tokenizer()(TEXTS[:1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        bare = model.get_text_features(input_ids=tokens).pooler_output
    assert not torch.allclose(bare, text_features(model, image_text.tokenizer(), TEXTS[:1]), rtol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_class_embeddings_by_hand(family):
    model = make(family).train()
    given = class_embeddings(model, image_text.tokenizer(), NAMES, TEMPLATES, batch_size=2)
    assert model.training
    model.eval()
    for name, embedding in zip(NAMES, given, strict=True):
        units = [nn.functional.normalize(by_hand(model, t.replace("{}", name)), dim=0) for t in TEMPLATES]
        expected = nn.functional.normalize(sum(units) / 3, dim=0)
        torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-5)


def test_the_default_template_and_a_processor():
    class Processor:
        tokenizer = image_text.tokenizer()

    model = models.make("clip")
    given = class_embeddings(model, Processor(), NAMES)
    torch.testing.assert_close(given, class_embeddings(model, Processor.tokenizer, NAMES, ["a photo of a {}."]))
    torch.testing.assert_close(given.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (NAMES, ["{}", "a photo"], "every template must have {} in place of the class name, got 'a photo'"),
        (NAMES, ["{0}"], "must have {} in place of the class name, got '{0}'"),
        (NAMES, [], r"`templates` must be a list with at least one text, got \[\]"),
        (NAMES, "a {}", "`templates` must be a list with at least one text, got 'a {}'"),
        ([], ["{}"], r"`class_names` must be a list with at least one text, got \[\]"),
    ],
)
def test_bad_templates_and_names(names, templates, message):
    with pytest.raises(ValueError, match=message):
        class_embeddings(models.make("clip"), image_text.tokenizer(), names, templates)


def test_what_the_model_does_not_take_changes_nothing():
    """Of a tokenizer that makes token types, as BERT's do, where the model has none."""
    tokenizer = image_text.tokenizer()
    expected = {family: text_features(make(family), tokenizer, TEXTS) for family in ("clip", "blip")}
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    for family, features in expected.items():
        assert torch.equal(text_features(make(family), tokenizer, TEXTS), features)


# ---- context -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "expected"), [("clip", 16), ("siglip", 16), ("altclip", 15)])
def test_context_length(family, expected):
    model, tokenizer = make(family), image_text.tokenizer()
    assert context_length(model, tokenizer) == expected
    longest = " ".join(["red"] * 50)
    torch.testing.assert_close(  # as long as can be: one more would have no position
        text_features(model, tokenizer, [longest])[0], by_hand(model, " ".join(["red"] * (expected - 1)))
    )
    tokenizer.model_max_length = 8
    assert context_length(model, tokenizer) == 8


def test_captions_that_are_cut_off_are_counted():
    tokenizer = image_text.tokenizer()
    texts = [" ".join(["red"] * n) for n in (1, 7, 8, 20)] * 400  # and <end>
    assert count_cut(tokenizer, texts, 8) == 800
    assert count_cut(tokenizer, texts, 21) == 0


# ---- what comes out of a model -------------------------------------------------------------------------------------


def test_features_of_older_and_newer_transformers():
    x = torch.randn(3, 4)
    assert feature_matrix(x) is x
    assert feature_matrix(BaseModelOutputWithPooling(pooler_output=x)) is x
    assert feature_matrix(x.half()).dtype == torch.float32
    with pytest.raises(ValueError, match="one feature vector for each sample, got BaseModelOutputWithPooling"):
        feature_matrix(BaseModelOutputWithPooling(last_hidden_state=x))
    with pytest.raises(ValueError, match=r"got features of shape \(3, 5, 4\)"):
        feature_matrix(torch.ones(3, 5, 4))


def test_a_model_that_embeds_no_texts():
    check_image_text(models.with_lora(models.make("clip"), modules_to_save=None))
    with pytest.raises(ValueError, match="ViTForImageClassification has no get_image_features and no get_text_feat"):
        check_image_text(models.make("vit"))
    with pytest.raises(ValueError, match="Take an image-text model"):
        text_features(models.make("bert"), image_text.tokenizer(), TEXTS)


def test_a_model_in_half_precision():
    model = models.make("clip", torch.bfloat16)
    given = text_features(model, image_text.tokenizer(), TEXTS)
    assert given.dtype == torch.float32
    torch.testing.assert_close(
        given, text_features(models.make("clip"), image_text.tokenizer(), TEXTS), rtol=0.1, atol=0.1
    )
