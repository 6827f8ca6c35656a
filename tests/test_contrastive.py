"""Contrastive losses over gathered and cached pairs, in one process; test_distributed.py has two."""

import math
from types import SimpleNamespace

import models
import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error
from splits import ROWS, difference, make, steps_of, train
from torch import nn
from training import fit, prepare, rows_of

from hf_mimic.contrastive import ContrastiveLoss, caption_hashes, clamp_scale, couples
from hf_mimic.losses import COUNTED, clip_contrastive, clip_score, loss_for_model, siglip_sigmoid
from hf_mimic.metrics import recall, retrieval

EXACT = {"double": True, "temperature": 0.3}
CACHED = {"cache_negatives": True}


def features(size, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, size, 4, generator=generator, dtype=torch.float64)
    return F.normalize(both, dim=-1).unbind()


def owner(sigmoid=False):
    module = nn.Module()
    module.logit_scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
    if sigmoid:
        module.logit_bias = nn.Parameter(torch.tensor([-0.7], dtype=torch.float64))
    return module


def by_hand(module, image, text, right, counted):
    """Return the loss of every pair, one logit at a time; right[i] is the set of right columns."""
    scale, sigmoid = math.exp(module.logit_scale.item()), hasattr(module, "logit_bias")
    found = []
    for i in range(len(image)):
        total = 0.0
        for rows, columns in ((image, text), (text, image)):
            z = {j: scale * (rows[i] @ columns[j]).item() for j in counted}
            mine = [j for j in right[i] if j in z]
            if sigmoid:
                z = {j: value + module.logit_bias.item() for j, value in z.items()}
                total += sum(math.log(1 + math.exp(-z[j] if j in mine else z[j])) for j in z)
            else:
                total += math.log(sum(math.exp(x) for x in z.values())) - sum(z[j] for j in mine) / len(mine)
        found.append(total / 2)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_by_hand(sigmoid):
    (image, text), module = features(6), owner(sigmoid)
    outputs = SimpleNamespace(image_embeds=image, text_embeds=text)
    expected = by_hand(module, image, text, [{i} for i in range(6)], range(6))
    torch.testing.assert_close(ContrastiveLoss(module)(outputs, {}), expected)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_rows_that_do_not_count_are_no_ones_negatives(sigmoid):
    (image, text), module = features(6), owner(sigmoid)
    outputs, counted = SimpleNamespace(image_embeds=image, text_embeds=text), torch.arange(6) < 4
    expected = by_hand(module, image[:4], text[:4], [{i} for i in range(4)], range(4))
    found = ContrastiveLoss(module)(outputs, {COUNTED: counted})
    torch.testing.assert_close(found[:4], expected)
    assert (found[:4] - ContrastiveLoss(module)(outputs, {})[:4]).abs().min() > 1e-3


@pytest.mark.parametrize("sigmoid", [False, True])
def test_equal_captions_are_right_for_each_other(sigmoid):
    (image, text), module = features(4), owner(sigmoid)
    outputs = SimpleNamespace(image_embeds=image, text_embeds=text)
    batch = {"input_ids": torch.tensor([[5, 6], [7, 8], [5, 6], [8, 7]])}
    expected = by_hand(module, image, text, [{0, 2}, {1}, {0, 2}, {3}], range(4))
    found = ContrastiveLoss(module, multi_positive=True)(outputs, batch)
    torch.testing.assert_close(found, expected)
    assert (found - ContrastiveLoss(module)(outputs, batch)).abs().max() > 1e-2


def test_captions_are_compared_without_their_padding():
    short = {"input_ids": torch.tensor([[5, 6, 0], [6, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 0]] * 2)}
    long = {"input_ids": torch.tensor([[5, 6, 9, 9]]), "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    a, b = caption_hashes(short), caption_hashes(long)
    assert a[0] == b[0] != a[1]
    tokens = torch.randint(0, 30000, (20000, 8), generator=torch.Generator().manual_seed(0))
    assert len(caption_hashes({"input_ids": tokens}).unique()) == len(tokens.unique(dim=0))


def test_captions_must_be_there():
    with pytest.raises(ValueError, match=r"compares captions by `input_ids`, got a batch with pixel_values\."):
        caption_hashes({"pixel_values": torch.zeros(1)})


@pytest.mark.parametrize("family", models.IMAGE_TEXT)
def test_it_is_the_loss_of_the_model(family):
    model, batch = models.make(family), models.make_batch(family)
    outputs = model(**batch, return_loss=True)
    torch.testing.assert_close(ContrastiveLoss(model)(outputs, batch).mean(), outputs.loss)
    torch.testing.assert_close(ContrastiveLoss(model)(outputs, batch), loss_for_model(model)(outputs, batch))


def test_a_model_without_a_scale():
    with pytest.raises(ValueError, match=r"must have a parameter `logit_scale` of its own .* got Linear"):
        ContrastiveLoss(nn.Linear(2, 2))


def test_which_losses_couple_samples():
    assert all(couples(loss) for loss in (clip_contrastive, siglip_sigmoid, ContrastiveLoss(owner())))
    assert not couples(loss_for_model(models.make("vit")))


def test_clip_score_by_hand():
    outputs = SimpleNamespace(image_embeds=torch.tensor([[3.0, 4.0], [1.0, 0.0]]), text_embeds=torch.eye(2).flip(0))
    torch.testing.assert_close(clip_score(outputs), torch.tensor([80.0, 100.0]))
    opposite = SimpleNamespace(image_embeds=torch.tensor([[1.0, 0.0]]), text_embeds=torch.tensor([[-1.0, 0.0]]))
    assert clip_score(opposite).tolist() == [0.0]


# ---- GradCache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", models.IMAGE_TEXT)
def test_cached_micro_batches_are_one_batch(family, tmp_path):
    whole = train(family, "16", tmp_path / "whole", **EXACT, self_check_steps=1)
    for split in ("4x4", "8x2"):
        cached = train(family, split, tmp_path / split, **EXACT, **CACHED, self_check_steps=1)
        found = [difference(g, e) for g, e in zip(steps_of(cached), steps_of(whole), strict=True)]
        # Siglip2 resizes its position embeddings in float32
        assert found == pytest.approx([0, 0], abs=1e-8 if family == "siglip2" else 1e-9)
        ours, theirs = (run.scores.to_arrow().to_pydict() for run in (cached, whole))
        for name in ("sample_id", "step", "epoch", "loss", "mimic_score", "relative_weight"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name
    apart = steps_of(train(family, "4x4", tmp_path / "apart", **EXACT))
    assert difference(apart[0], steps_of(whole)[0]) > 1e-2


@pytest.mark.parametrize("layers", ["last_mlp", "all", "logit_scale", "text_model", "text_projection.weight"])
def test_cached_scores_of_every_layer(layers, tmp_path):
    options = {"mimic_layers": [layers] if "_" in layers and layers != "last_mlp" else layers}
    runs = [train("clip", s, tmp_path / s, **EXACT, **options, **o) for s, o in (("16", {}), ("4x4", CACHED))]
    scores = [torch.tensor(run.scores.to_arrow()["mimic_score"].to_pylist()) for run in runs]
    assert relative_error(scores[1], scores[0]) < 1e-6
    assert difference(steps_of(runs[1])[0], steps_of(runs[0])[0]) < 1e-9


def test_cached_in_float32(tmp_path):
    whole, cached = (train("clip", s, tmp_path / s, **o) for s, o in (("16", {}), ("4x4", CACHED)))
    assert difference(steps_of(cached)[0], steps_of(whole)[0]) < 1e-6


@pytest.mark.parametrize("strategy", ["small_loss", "uniform"])
def test_the_first_temperature_is_the_whole_batch_s(strategy, tmp_path):
    options = {"double": True, "strategy": strategy}
    runs = [train("clip", s, tmp_path / s, **options, **o) for s, o in (("16", {}), ("4x4", CACHED))]
    assert difference(steps_of(runs[1])[1], steps_of(runs[0])[1]) < 1e-9


def test_dropout_masks_are_drawn_twice_alike(tmp_path):
    """The self-check compares the gradient of the second pass with the scores of the first."""
    model = models.make("clip")
    for config in (model.config.text_config, model.config.vision_config):
        config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    rows = rows_of(models.make_batch("clip", size=16))
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "self_check_steps": 1}
    trainer = fit(model, tmp_path, rows=rows, mimic_layers="all", max_steps=2, **CACHED, **options)
    assert trainer.state.global_step == 2
    assert model.vision_model.encoder.layers[0].self_attn.dropout == 0.5


def test_multi_positive_cached(tmp_path):
    options = {**EXACT, "multi_positive": True, "repeated": True}
    runs = [train("clip", s, tmp_path / s, **options, **o) for s, o in (("16", {}), ("4x4", CACHED))]
    assert difference(steps_of(runs[1])[0], steps_of(runs[0])[0]) < 1e-9
    plain = train("clip", "16", tmp_path / "plain", **EXACT, repeated=True)
    assert difference(steps_of(plain)[0], steps_of(runs[0])[0]) > 1e-3


@pytest.mark.parametrize("broken", [[5], [4, 5, 6, 7]])
def test_broken_samples_are_left_out_of_the_cache(broken, tmp_path):
    whole, cached = (
        train("clip", s, tmp_path / s, **EXACT, broken=broken, **o) for s, o in (("16", {}), ("4x4", CACHED))
    )
    assert difference(steps_of(cached)[0], steps_of(whole)[0]) < 1e-9
    rows = cached.scores.to_arrow().to_pydict()
    missing = [i for i, score in zip(rows["sample_id"], rows["mimic_score"], strict=True) if score is None]
    assert missing == [100 + row for row in broken]


def test_a_step_without_a_finite_sample(tmp_path):
    trainer = train("clip", "4x4", tmp_path, **EXACT, **CACHED, broken=list(range(16)))
    assert all(g is None or not g.any() for g in steps_of(trainer)[0].values())
    assert any(g is not None and g.any() for g in steps_of(trainer)[1].values())


# ---- arguments, clamp, evaluation -----------------------------------------------------------------------------------


def test_the_scale_is_clamped(tmp_path):
    model, rows = models.make("clip"), rows_of(models.make_batch("clip", size=16))
    model.logit_scale.data.fill_(6.0)
    trainer = fit(model, tmp_path, rows=rows, max_steps=1, max_logit_scale=50.0)
    assert trainer.model.logit_scale.exp().item() == pytest.approx(50)
    free = fit(model, tmp_path / "free", rows=rows, max_steps=1, max_logit_scale=0.0)
    assert free.model.logit_scale.exp().item() > 300


def test_the_scale_of_a_sigmoid_loss_is_free():
    model = models.make("siglip")
    model.logit_scale.data.fill_(6.0)
    clamp_scale(siglip_sigmoid, model, 100.0)
    assert model.logit_scale.item() == 6.0


@pytest.mark.parametrize("name", ["cache_negatives", "multi_positive"])
def test_only_for_image_text_pairs(name, tmp_path):
    message = f"`{name}` must be False without the model's own loss of image-text pairs, got True with ViTForImage"
    with pytest.raises(ValueError, match=message):
        prepare(models.make("vit"), tmp_path, rows=rows_of(models.make_batch("vit")), **{name: True})


def test_one_gradient_per_feature(tmp_path):
    with pytest.raises(ValueError, match=r"`cache_negatives` must be False with `reweight`=\"mimic_layers\""):
        prepare(models.make("clip"), tmp_path, cache_negatives=True, reweight="mimic_layers")


def test_a_negative_limit(tmp_path):
    with pytest.raises(ValueError, match=r"`max_logit_scale` must be positive, or 0 for no limit, got -1\.0"):
        prepare(models.make("clip"), tmp_path, max_logit_scale=-1.0)


def test_evaluation_predicts_features(tmp_path):
    model, batch = make("clip", torch.float32)
    rows, seen = rows_of(batch), []
    trainer = prepare(model, tmp_path, rows=rows, per_device_eval_batch_size=8)
    trainer.compute_metrics = lambda p: seen.append(p) or {"found": 1.0}
    result = trainer.evaluate(rows)
    image, text = seen[0].predictions
    assert image.shape == text.shape == (ROWS, 16)
    parts = [{k: v[i : i + 8] for k, v in batch.items()} for i in (0, 8, 16)]
    with torch.no_grad():
        losses = torch.cat([clip_contrastive(model(**part), part) for part in parts])
    means = [losses[:8].mean(), losses[8:16].mean(), losses[16:].mean()]
    expected = (8 * means[0] + 8 * means[1] + 6 * means[2]) / ROWS
    assert result["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_recall_of_a_trainer(tmp_path):
    """The features come in the order that `metrics.retrieval` takes them in."""
    model, batch = make("clip", torch.float32)
    trainer = prepare(model, tmp_path)
    trainer.compute_metrics = retrieval
    result = trainer.evaluate(rows_of(batch))
    with torch.no_grad():
        outputs = model(**batch)
    expected = recall(outputs.image_embeds, outputs.text_embeds, torch.arange(ROWS))
    assert {name[5:]: result[name] for name in result if "recall" in name or "rsum" in name} == pytest.approx(expected)
    turned = recall(outputs.text_embeds, outputs.image_embeds, torch.arange(ROWS))
    assert turned != expected


def test_evaluation_with_image_ids(tmp_path):
    model, batch = make("clip", torch.float32)
    rows = rows_of(batch).add_column("image_id", [i // 2 for i in range(ROWS)])
    trainer = prepare(model, tmp_path, label_names=["image_id"])
    seen = []
    trainer.compute_metrics = lambda p: seen.append(p) or {}
    trainer.evaluate(rows)
    assert seen[0].label_ids.tolist() == [i // 2 for i in range(ROWS)]


@pytest.mark.parametrize("option", ["cache_negatives", "multi_positive"])
def test_a_loss_of_one_s_own_is_not_made_over(option, tmp_path):
    arguments = {"loss_fn": lambda outputs, batch: clip_contrastive(outputs, batch)}
    with pytest.raises(ValueError, match=f"`{option}` must be False without the model's own loss of image-text pairs"):
        prepare(models.make("clip"), tmp_path, arguments=arguments, **{option: True})
    given = prepare(models.make("clip"), tmp_path, arguments={"loss_fn": clip_contrastive}, **{option: True})
    assert isinstance(given.loss_fn, ContrastiveLoss)
    assert given.loss_fn.multi_positive == (option == "multi_positive")
