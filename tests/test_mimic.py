"""`mimic_forward` and `mimic_scores` against one backward per sample, for every model family."""

import models
import pytest
import torch
from oracles import closed_form_head_scores, gradients, identical, plain_step, relative_error, scores_by_loop
from torch import nn

from hf_mimic import losses
from hf_mimic.layers import match_parameters
from hf_mimic.mimic import mimic_forward, mimic_scores, reference_direction

FAMILIES = ["vit", "dinov2", "resnet", "bert", "clip", "siglip"]
LAYERS = ["head", "last_mlp", "last_block", "all"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def setup(family, layers, dtype=torch.float32, **config):
    model, batch = models.make(family, dtype, **config), models.make_batch(family, dtype)
    return model, batch, reference_direction(model, models.moved(model), layers), losses.loss_for_model(model)


# ---- the score -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_one_backward_per_sample(family, layers, dtype):
    model, batch, direction, loss_fn = setup(family, layers, dtype)
    oracle = scores_by_loop(model, batch, direction, loss_fn)
    fused = mimic_forward(model, batch, direction, loss_fn).scores
    alone = mimic_scores(model, batch, direction)
    assert fused.dtype == alone.dtype == dtype
    assert relative_error(fused, oracle) <= TOLERANCE[dtype]
    assert relative_error(alone, oracle) <= TOLERANCE[dtype]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("family", ["vit", "clip", "siglip", "bert"])
def test_scores_with_eager_attention(family, layers):
    model, batch, direction, loss_fn = setup(family, layers, attn_implementation="eager")
    oracle = scores_by_loop(model, batch, direction, loss_fn)
    assert relative_error(mimic_forward(model, batch, direction, loss_fn).scores, oracle) <= 1e-5


@pytest.mark.parametrize("layers", ["head", "last_block", "all"])
@pytest.mark.parametrize("family", ["clip_classifier", "siglip_classifier", "swinv2", "blip"])
def test_scores_of_other_families(family, layers):
    model, batch, direction, loss_fn = setup(family, layers)
    oracle = scores_by_loop(model, batch, direction, loss_fn)
    assert relative_error(mimic_forward(model, batch, direction, loss_fn).scores, oracle) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_direction_and_wrong_sign_fail_the_comparison(family):
    model, batch, direction, loss_fn = setup(family, "last_block", torch.float64)
    oracle = scores_by_loop(model, batch, direction, loss_fn)
    scores = mimic_scores(model, batch, direction)
    shuffled = {n: v.flatten()[torch.randperm(v.numel())].view_as(v) for n, v in direction.items()}
    other = reference_direction(model, models.moved(model, seed=3), "last_block")
    assert relative_error(mimic_scores(model, batch, shuffled), oracle) > 0.1
    assert relative_error(mimic_scores(model, batch, other), oracle) > 0.1
    assert relative_error(-scores, oracle) > 0.1
    assert relative_error(scores.roll(1), oracle) > 0.1


def test_closed_form_of_a_linear_head():
    model, batch, direction, _ = setup("vit", "head", torch.float64)
    hidden = model.vit(batch["pixel_values"]).last_hidden_state[:, 0].detach()
    weight, bias = direction["classifier.weight"], direction["classifier.bias"]
    oracle = closed_form_head_scores(hidden, model.classifier(hidden).detach(), batch["labels"], weight, bias)
    assert relative_error(mimic_scores(model, batch, direction), oracle) <= 1e-12
    swapped = closed_form_head_scores(hidden, model.classifier(hidden).detach(), batch["labels"].roll(1), weight, bias)
    assert relative_error(swapped, oracle) > 0.1


@pytest.mark.parametrize("layers", ["head", "all"])
def test_scores_with_label_smoothing(layers):
    model, batch, direction, plain = setup("vit", layers)
    loss_fn = losses.loss_for_model(model, label_smoothing=0.2)
    oracle = scores_by_loop(model, batch, direction, loss_fn)
    assert relative_error(mimic_scores(model, batch, direction, loss_fn), oracle) <= 1e-5
    assert relative_error(mimic_scores(model, batch, direction, plain), oracle) > 0.01


@pytest.mark.parametrize("layers", ["head", "all"])
def test_scores_with_multi_label_targets(layers):
    model, batch, direction, loss_fn = setup("vit", layers, problem_type="multi_label_classification")
    batch["labels"] = torch.nn.functional.one_hot(batch["labels"], models.LABELS).float()
    oracle = scores_by_loop(model, batch, direction, loss_fn)
    assert relative_error(mimic_scores(model, batch, direction), oracle) <= 1e-5


def test_score_predicts_the_change_of_the_loss():
    """Moving all parameters by eps v/||v|| changes l_i by -eps m_i: finite differences, no autograd."""
    model, batch, direction, loss_fn = setup("vit", "all", torch.float64)
    scores, norm = mimic_scores(model, batch, direction), sum(v.square().sum() for v in direction.values()) ** 0.5
    change = []
    for sign in (1, -1):
        twin = models.make("vit", torch.float64)
        for name, p in twin.named_parameters():
            p.data.add_(sign * 1e-5 * direction[name] / norm)
        change.append(plain_step(twin, batch, loss_fn, torch.ones(models.BATCH))[0])
    assert relative_error(scores, -(change[0] - change[1]) / 2e-5) <= 1e-7


@pytest.mark.parametrize("family", ["vit", "resnet", "bert"])
def test_a_batch_scores_like_its_halves(family):
    model, batch, direction, _ = setup(family, "last_block", torch.float64)
    whole = mimic_scores(model, batch, direction)
    halves = [mimic_scores(model, {k: x[s] for k, x in batch.items()}, direction) for s in (slice(3), slice(3, 6))]
    assert relative_error(torch.cat(halves), whole) <= 1e-12


def test_a_batch_of_pairs_does_not_score_like_its_halves():
    model, batch, direction, _ = setup("clip", "last_block", torch.float64)
    half = mimic_scores(model, {k: x[:3] for k, x in batch.items()}, direction)
    assert relative_error(half, mimic_scores(model, batch, direction)[:3]) > 0.01


@pytest.mark.parametrize("layers", ["head", "all"])
def test_no_distance_gives_zero(layers):
    model, batch = models.make("vit"), models.make_batch("vit")
    direction = reference_direction(model, dict(model.named_parameters()), layers)
    assert torch.equal(mimic_scores(model, batch, direction), torch.zeros(models.BATCH))


def test_length_of_the_direction_does_not_matter():
    model, batch, direction, _ = setup("vit", "last_block", torch.float64)
    longer = {name: 7 * v for name, v in direction.items()}
    assert relative_error(mimic_scores(model, batch, longer), mimic_scores(model, batch, direction)) <= 1e-12


def test_mimic_scores_runs_in_eval_mode_and_leaves_the_mode():
    model, batch, direction, _ = setup("vit", "head", hidden_dropout_prob=0.5)
    in_eval = mimic_scores(model, batch, direction)
    in_train = mimic_scores(model.train(), batch, direction)
    assert model.training
    assert torch.equal(in_eval, in_train)


def test_modules_that_were_in_another_mode_stay_in_it():
    model, batch, direction, _ = setup("resnet", "head")
    model.train().resnet.embedder.eval()
    before = [module.training for module in model.modules()]
    mimic_scores(model, batch, direction)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("layers", ["head", "all"])
def test_scores_under_inference_mode(layers):
    model, batch, direction, _ = setup("vit", layers)
    with torch.inference_mode():
        batch_there = {key: x.clone() for key, x in batch.items()}
        scores = mimic_scores(model, batch_there, direction)
    assert torch.equal(scores, mimic_scores(model, batch, direction))


# ---- training is not disturbed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("family", [*FAMILIES, "clip_classifier", "swinv2", "blip"])
def test_losses_and_gradients_are_those_of_a_plain_step(family, layers):
    model, batch, direction, loss_fn = setup(family, layers)
    weights = torch.rand(models.BATCH)
    plain_losses, plain = plain_step(model, batch, loss_fn, weights)
    forward = mimic_forward(model, batch, direction, loss_fn)
    assert torch.equal(forward.losses, plain_losses)
    assert identical(gradients(model, forward.losses, weights), plain)
    assert not identical(gradients(model, mimic_forward(model, batch, direction, loss_fn).losses, weights + 1), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_along_the_direction_is_the_weighted_sum_of_scores(family):
    """sum_i w_i m_i ||v|| = -<grad sum_i w_i l_i, v>: what training can check at every step, for one dot product."""
    model, batch, direction, loss_fn = setup(family, "all", torch.float64)
    weights = torch.rand(models.BATCH, dtype=torch.float64)
    forward = mimic_forward(model, batch, direction, loss_fn)
    grads = gradients(model, forward.losses, weights)
    along = sum((grads[name] * v).sum() for name, v in direction.items() if grads[name] is not None)
    torch.testing.assert_close((weights * forward.scores).sum() * forward.norm, -along)


def test_outputs_are_plain_tensors_with_graph():
    model, batch, direction, loss_fn = setup("clip", "all")
    forward = mimic_forward(model, batch, direction, loss_fn)
    outputs = forward.outputs
    hidden = outputs.vision_model_output.last_hidden_state
    for x in (forward.losses, outputs.logits_per_image, outputs.text_embeds, outputs.image_embeds, hidden):
        assert type(x) is torch.Tensor
        assert x.requires_grad
    assert not forward.scores.requires_grad


def test_norm_is_that_of_the_whole_direction():
    model, batch, direction, loss_fn = setup("vit", "all", torch.float64)
    flat = torch.cat([v.flatten() for v in direction.values()])
    torch.testing.assert_close(mimic_forward(model, batch, direction, loss_fn).norm, flat.norm())


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_fn", [lambda o, b: losses.cross_entropy(o, b).mean(), lambda o, b: o.logits])
def test_loss_must_be_one_per_sample(loss_fn):
    model, batch, direction, _ = setup("vit", "head")
    with pytest.raises(ValueError, match=r"shape \(B,\), got shape \((6, 4)?\)"):
        mimic_forward(model, batch, direction, loss_fn)


def test_parameters_that_do_not_influence_the_loss():
    model, batch, _, loss_fn = setup("vit", "head")
    model.unused = nn.Linear(2, 2)
    direction = reference_direction(model, models.moved(model), "unused")
    with pytest.raises(ValueError, match=r"no chosen parameter influences the losses: unused.weight"):
        mimic_forward(model, batch, direction, loss_fn)


@pytest.mark.parametrize(
    "direction", [{}, {"classifier.weight": torch.ones(4)}, {"head.weight": torch.ones(4, 32)}], ids=str
)
def test_direction_of_another_model(direction):
    model, batch, _, loss_fn = setup("vit", "head")
    with pytest.raises(ValueError, match=rf"got {len(direction)} of which {len(direction)} do not fit"):
        mimic_forward(model, batch, direction, loss_fn)


def test_some_unused_parameters_count_in_the_norm_only():
    model, batch, _, loss_fn = setup("vit", "head")
    model.unused = nn.Linear(2, 2)
    direction = reference_direction(model, models.moved(model), ["head", "unused"])
    assert match_parameters(model, ["head", "unused"]) == list(direction)
    oracle = scores_by_loop(model, batch, direction, loss_fn)
    assert relative_error(mimic_forward(model, batch, direction, loss_fn).scores, oracle) <= 1e-5
