"""Per-sample losses: by hand, against the loss each Hugging Face model computes itself, and which one is chosen."""

from math import exp, log
from types import SimpleNamespace

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_mimic import losses
from hf_mimic.losses import loss_for_model, model_inputs


def logits(rows, name="logits"):
    return SimpleNamespace(**{name: torch.tensor(rows)})


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand():
    batch = {"labels": torch.tensor([0, 2, -100])}
    value = losses.cross_entropy(logits([[0.0, 0.0, 0.0], [1.0, 1.0, log(2) + 1], [5.0, 0.0, 0.0]]), batch)
    torch.testing.assert_close(value, torch.tensor([log(3), log(2), 0.0]))


def test_label_smoothing_by_hand():
    value = losses.cross_entropy(logits([[log(3), 0.0]]), {"labels": torch.tensor([0])}, label_smoothing=0.2)
    torch.testing.assert_close(value, torch.tensor([0.9 * log(4 / 3) + 0.1 * log(4)]))


def test_binary_cross_entropy_by_hand():
    outputs, batch = logits([[0.0, log(3)], [0.0, log(3)]]), {"labels": torch.tensor([[1, 1], [0, 0]])}
    plain = torch.tensor([(log(2) + log(4 / 3)) / 2, (log(2) + log(4)) / 2])
    torch.testing.assert_close(losses.binary_cross_entropy(outputs, batch), plain)
    smooth = losses.binary_cross_entropy(outputs, batch, label_smoothing=1.0)  # every label is 1/2
    torch.testing.assert_close(smooth, torch.full((2,), (log(2) + (log(4 / 3) + log(4)) / 2) / 2))


def test_clip_contrastive_by_hand():
    value = losses.clip_contrastive(logits([[log(3), 0.0], [0.0, 0.0]], "logits_per_image"), {})
    torch.testing.assert_close(value, torch.tensor([log(4 / 3), log(2)]))


def test_clip_contrastive_looks_at_rows_and_columns():
    value = losses.clip_contrastive(logits([[0.0, 0.0], [log(3), 0.0]], "logits_per_image"), {})
    torch.testing.assert_close(value, torch.tensor([(log(2) + log(4)) / 2, (log(4) + log(2)) / 2]))


def test_siglip_sigmoid_by_hand():
    value = losses.siglip_sigmoid(logits([[0.0, log(3)], [-log(3), 0.0]], "logits_per_image"), {})
    off = (log(4) + log(4 / 3)) / 2  # one of the two off-diagonal terms in the row, the other in the column
    torch.testing.assert_close(value, torch.tensor([log(2) + off, log(2) + off]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_logits_give_float32_losses(dtype):
    wide = torch.tensor([[4.0, 0.5], [1.0, 2.0]])
    narrow = SimpleNamespace(logits=wide.to(dtype), logits_per_image=wide.to(dtype))
    batch = {"labels": torch.tensor([0, 1])}
    hot = {"labels": F.one_hot(batch["labels"])}
    for value in (losses.cross_entropy(narrow, batch), losses.binary_cross_entropy(narrow, hot)):
        assert value.dtype == torch.float32
    for loss_fn in (losses.clip_contrastive, losses.siglip_sigmoid):
        torch.testing.assert_close(loss_fn(narrow, {}), loss_fn(SimpleNamespace(logits_per_image=wide), {}))
    assert exp(-losses.cross_entropy(narrow, batch)[0]) == pytest.approx(1 / (1 + exp(-3.5)), rel=1e-6)


# ---- against Hugging Face -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "dinov2", "resnet", "bert", "clip_classifier", "siglip_classifier"])
def test_mean_is_the_loss_of_the_classifier(family):
    model, batch = models.make(family), models.make_batch(family)
    outputs = model(**batch)
    torch.testing.assert_close(loss_for_model(model)(outputs, batch).mean(), outputs.loss)
    assert (loss_for_model(model)(outputs, {"labels": batch["labels"].roll(1)}).mean() - outputs.loss).abs() > 1e-3


@pytest.mark.parametrize("family", ["clip", "siglip", "blip"])
def test_mean_is_the_loss_of_the_image_text_model(family):
    model, batch = models.make(family), models.make_batch(family)
    outputs = model(**batch, return_loss=True)
    torch.testing.assert_close(loss_for_model(model)(outputs, batch).mean(), outputs.loss)
    mismatched = SimpleNamespace(logits_per_image=outputs.logits_per_image.roll(1, 0))
    assert (loss_for_model(model)(mismatched, batch).mean() - outputs.loss).abs() > 1e-4


def test_mean_is_the_loss_of_the_multi_label_model():
    model, batch = models.make("vit", problem_type="multi_label_classification"), models.make_batch("vit")
    batch["labels"] = F.one_hot(batch["labels"], models.LABELS).float()
    outputs = model(**batch)
    torch.testing.assert_close(loss_for_model(model)(outputs, batch).mean(), outputs.loss)


def test_mean_is_the_trainers_label_smoothing():
    from transformers.trainer_pt_utils import LabelSmoother

    model, batch = models.make("vit"), models.make_batch("vit")
    outputs = model(**batch)
    theirs = LabelSmoother(epsilon=0.1)(outputs, batch["labels"])
    torch.testing.assert_close(loss_for_model(model, label_smoothing=0.1)(outputs, batch).mean(), theirs)


# ---- which loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "expected"),
    [("clip", losses.clip_contrastive), ("blip", losses.clip_contrastive), ("siglip", losses.siglip_sigmoid)],
)
def test_image_text_models_get_their_loss(family, expected):
    assert loss_for_model(models.make(family)) is expected


@pytest.mark.parametrize("family", ["vit", "swinv2", "clip_classifier", "siglip_classifier", "bert"])
def test_classifiers_get_cross_entropy(family):
    chosen = loss_for_model(models.make(family), label_smoothing=0.3)
    assert chosen.func is losses.cross_entropy
    assert chosen.keywords == {"label_smoothing": 0.3}


def test_adapters_and_wrappers_do_not_change_the_loss():
    assert loss_for_model(models.with_lora(models.make("vit"))).func is losses.cross_entropy
    clip = models.with_lora(models.make("clip"), modules_to_save=None)
    assert loss_for_model(clip) is losses.clip_contrastive
    assert loss_for_model(nn.ModuleDict({"module": models.make("siglip")})) is losses.siglip_sigmoid


def test_module_without_configuration_is_a_classifier():
    assert loss_for_model(nn.Linear(3, 2)).func is losses.cross_entropy


@pytest.mark.parametrize("config", [{"num_labels": 1}, {"problem_type": "regression"}])
def test_regression_has_no_default_loss(config):
    with pytest.raises(ValueError, match=r"(?s)a per-sample loss is known for .* Pass your own as `loss_fn`"):
        loss_for_model(models.make("vit", **config))


def test_outputs_without_what_the_loss_needs():
    with pytest.raises(ValueError, match="needs the model's outputs to have `logits_per_image`, got SimpleNamespace"):
        losses.clip_contrastive(logits([[1.0]]), {})


def test_batch_without_labels():
    with pytest.raises(ValueError, match=r"needs `labels` in the batch, got pixel_values, label\."):
        losses.cross_entropy(logits([[1.0, 2.0]]), {"pixel_values": 0, "label": 1})


def test_model_inputs_leave_the_labels_out():
    batch = {"pixel_values": 1, "labels": 2, "return_loss": True, "attention_mask": 3}
    assert model_inputs(batch) == {"pixel_values": 1, "attention_mask": 3}
