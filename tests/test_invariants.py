"""The same gradient however a step is split, here within one process; test_distributed.py has the rest.

The control: the stock Trainer fails the same comparison for most of these models.
"""

import models
import pytest
import torch
from oracles import gradients as gradients_by_hand
from oracles import scores_by_loop
from splits import FAMILIES, ROWS, difference, make, steps_of, train

from hf_mimic import losses
from hf_mimic.losses import loss_for_model, model_inputs
from hf_mimic.mimic import reference_direction
from hf_mimic.self_check import GradientMismatchError
from hf_mimic.trainer import MimicTrainer

ONE_STEP = [slice(0, 16), slice(16, ROWS)]


def by_hand(family, *, temperature, groups=ONE_STEP, layers="head"):
    """Return the gradients of sum w l with w the softmax over each step, scores by one backward per sample."""
    model, batch = make(family, torch.float64)
    model.eval()
    direction, loss_fn = reference_direction(model, models.moved(model), layers), loss_for_model(model)
    found = []
    for rows in groups:
        part = {name: x[rows] for name, x in batch.items()}
        weights = torch.softmax(scores_by_loop(model, part, direction, loss_fn) / temperature, 0)
        found.append(gradients_by_hand(model, loss_fn(model(**model_inputs(part)), part), weights))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_split_has_the_gradient_by_hand(family, tmp_path):
    expected = by_hand(family, temperature=0.3)
    for split in ("16", "4x4"):
        found = steps_of(train(family, split, tmp_path / split, double=True, temperature=0.3))
        assert [difference(g, e) for g, e in zip(found, expected, strict=True)] == pytest.approx([0, 0], abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulation_in_float32(family, tmp_path):
    whole, split = (steps_of(train(family, name, tmp_path / name)) for name in ("16", "4x4"))
    assert [difference(g, e) for g, e in zip(split, whole, strict=True)] == pytest.approx([0, 0], abs=1e-5)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "vit"])
def test_the_stock_trainer_fails_this(family, tmp_path):
    """transformers issue 47688: four accumulated micro-batches give four times the gradient."""
    whole, split = (steps_of(train(family, name, tmp_path / name, plain=True)) for name in ("16", "4x4"))
    assert difference(split[0], whole[0]) == pytest.approx(3, rel=1e-3)


def test_equal_weights_have_the_gradient_of_the_mean(tmp_path):
    """Where the stock Trainer is right: ViT with one label."""
    plain = steps_of(train("vit", "4x4", tmp_path / "plain", plain=True))
    ours = steps_of(train("vit", "4x4", tmp_path / "ours", strategy="uniform"))
    assert [difference(g, e) for g, e in zip(ours, plain, strict=True)] == pytest.approx([0, 0], abs=1e-6)


def test_label_smoothing_of_every_split(tmp_path):
    whole, split = (
        steps_of(train("vit", name, tmp_path / name, double=True, label_smoothing_factor=0.2))
        for name in ("16", "4x4")
    )
    other = steps_of(train("vit", "16", tmp_path / "other", double=True))
    assert difference(split[0], whole[0]) < 1e-9
    assert difference(other[0], whole[0]) > 1e-2


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_contrastive_steps_are_the_weighted_mean_over_their_micro_batches(family, tmp_path):
    """Negatives are those of the micro-batch; the weights are a softmax over all pairs of the step."""
    model, batch = make(family, torch.float64)
    direction, loss_fn = reference_direction(model, models.moved(model), "head"), loss_for_model(model)
    parts = [{name: x[i : i + 4] for name, x in batch.items()} for i in range(0, 16, 4)]
    scores = torch.cat([scores_by_loop(model, part, direction, loss_fn) for part in parts])
    weights = torch.softmax(scores / 0.3, 0)
    per_pair = torch.cat([loss_fn(model(**model_inputs(part)), part) for part in parts])
    expected = gradients_by_hand(model, per_pair, weights)
    found = steps_of(train(family, "4x4", tmp_path / "a", double=True, temperature=0.3))[0]
    assert difference(found, expected) < 1e-9
    plain = steps_of(train(family, "4x4", tmp_path / "b", double=True, strategy="uniform"))[0]
    expected = gradients_by_hand(
        model, torch.cat([loss_fn(model(**model_inputs(p)), p) for p in parts]), weights * 0 + 1 / 16
    )
    assert difference(plain, expected) < 1e-9
    assert difference(plain, found) > 1e-2


def test_device_scope_is_the_mean_of_the_micro_batches(tmp_path):
    groups = [slice(i, i + 4) for i in range(0, 16, 4)]
    parts = by_hand("vit", temperature=0.3, groups=groups)
    expected = {name: sum(p[name] for p in parts) / 4 for name in parts[0] if parts[0][name] is not None}
    found = steps_of(train("vit", "4x4", tmp_path / "a", double=True, temperature=0.3, weight_scope="device"))[0]
    assert difference(found, expected) < 1e-9
    wide = steps_of(train("vit", "4x4", tmp_path / "b", double=True, temperature=0.3))[0]
    assert difference(wide, expected) > 1e-2


@pytest.mark.parametrize("scope", ["global", "device"])
def test_a_step_that_begins_in_one_pass_of_a_stream_and_ends_in_the_next(scope, tmp_path):
    """Six micro-batches a pass, four a step: the last two of a pass wait for four of the next, as in the Trainer."""
    options = {"temperature": 0.3, "shards": 1, "max_steps": 2, "weight_scope": scope, "self_check_steps": 1}
    trainer = train("vit", "4x4", tmp_path, **options)
    parts = [[16, 17, 18, 19], [20, 21], *([*range(i, i + 4)] for i in range(0, 16, 4))]
    groups = [[row for part in parts for row in part]] if scope == "global" else parts
    each = by_hand("vit", temperature=0.3, groups=groups)
    expected = {n: sum(g[n] for g in each) / len(each) for n in each[0] if each[0][n] is not None}
    assert difference(steps_of(trainer)[1], expected) < 1e-5
    rows = trainer.scores.to_arrow().to_pydict()
    assert rows["epoch"] == [0] * 16 + [1] * 16 + [0] * 6
    assert rows["step"] == [0] * 16 + [1] * 22


@pytest.mark.parametrize("layers", ["head", "all"])
def test_reweighting_only_the_mimic_layers_of_every_split(layers, tmp_path):
    options = {"double": True, "reweight": "mimic_layers", "mimic_layers": layers}
    whole, split = (steps_of(train("vit", name, tmp_path / name, **options)) for name in ("16", "4x4"))
    assert [difference(g, e) for g, e in zip(split, whole, strict=True)] == pytest.approx([0, 0], abs=1e-9)


# ---- clipping, scaling, precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("norm", [0.0, 0.05])
@pytest.mark.parametrize("scaler", [False, True])
def test_trajectories_of_every_split(optim, norm, scaler, tmp_path):
    """Clipping sees the normalised gradient; the automatic temperature is the same; so are the weights in the end."""
    options = {"double": True, "optim": optim, "learning_rate": 1e-2, "max_grad_norm": norm, "scaler": scaler}
    options |= {"num_train_epochs": 3, "logging_steps": 1}
    whole, split = (train("vit", name, tmp_path / name, **options) for name in ("16", "4x4"))
    for p, q in zip(split.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    for a, b in zip(split.state.log_history[:-1], whole.state.log_history[:-1], strict=True):
        # The Trainer counts a short tail as a whole epoch's worth of micro-batches.
        assert {k: v for k, v in a.items() if k != "epoch"} == pytest.approx(
            {k: v for k, v in b.items() if k != "epoch"}, rel=1e-6
        )
    start, _ = make("vit", torch.float64)
    assert any(not torch.allclose(p, q) for p, q in zip(start.parameters(), whole.model.parameters(), strict=True))


def test_the_clipped_norm_is_that_of_the_normalised_gradient(tmp_path):
    options = {"double": True, "max_grad_norm": 1e-3, "logging_steps": 1}
    trainer = train("vit", "4x4", tmp_path, **options)
    free = steps_of(train("vit", "4x4", tmp_path / "free", double=True))[0]
    norm = sum(float(g.square().sum()) for g in free.values() if g is not None) ** 0.5
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)
    clipped = sum(float(g.square().sum()) for g in steps_of(trainer)[0].values() if g is not None) ** 0.5
    assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_bfloat16_of_every_split(tmp_path):
    exact = steps_of(train("vit", "16", tmp_path / "exact"))[0]
    for name in ("16", "4x4"):
        assert difference(steps_of(train("vit", name, tmp_path / name, bf16=True))[0], exact) < 0.05


def test_the_scores_are_the_same_in_every_split(tmp_path):
    a, b = (train("vit", name, tmp_path / name, double=True).scores.to_arrow().to_pydict() for name in ("16", "4x4"))
    assert a["sample_id"] == b["sample_id"] == list(range(100, 100 + ROWS))
    for name in ("step", "loss", "mimic_score", "relative_weight"):
        assert a[name] == pytest.approx(b[name], rel=1e-5), name
    assert sum(a["relative_weight"][:16]) == pytest.approx(16, rel=1e-5)


def test_a_broken_sample_in_an_accumulated_step(tmp_path):
    whole, split = (train("vit", name, tmp_path / name, double=True, broken=[5]) for name in ("16", "4x4"))
    assert difference(steps_of(split)[0], steps_of(whole)[0]) < 1e-9
    rows = split.scores.to_arrow().to_pydict()
    assert rows["mimic_score"][5] is None
    assert rows["relative_weight"][5] == 0
    assert sum(rows["relative_weight"][:16]) == pytest.approx(15, rel=1e-5)


def test_a_broken_micro_batch_in_an_accumulated_step(tmp_path):
    broken = [4, 5, 6, 7]
    whole, split = (train("vit", name, tmp_path / name, double=True, broken=broken) for name in ("16", "4x4"))
    assert difference(steps_of(split)[0], steps_of(whole)[0]) < 1e-9


# ---- the self-check ------------------------------------------------------------------------------------------------


class Twice(MimicTrainer):
    """What a scaled loss does."""

    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


def cut(outputs, batch):
    """Lose a part of the tangent on the way: half of the logits become a constant for forward-mode AD only."""
    logits = Through.apply(outputs.logits)
    return losses.cross_entropy(type(outputs)(logits=logits), batch)


class Through(torch.autograd.Function):
    """The identity, written by someone who did not think of tangents."""

    @staticmethod
    def forward(ctx, logits):
        plain = logits.as_subclass(torch.Tensor).detach().clone()
        return torch.cat([logits[:, :2], plain[:, 2:]], 1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize("split", ["16", "4x4"])
@pytest.mark.parametrize("scope", ["global", "device"])
@pytest.mark.parametrize(
    "options", [{}, {"mimic_layers": "all"}, {"bf16": True}, {"scaler": True}, {"max_grad_norm": 1e-4}]
)
def test_the_self_check_passes(split, scope, options, tmp_path):
    train("vit", split, tmp_path, weight_scope=scope, self_check_steps=1, **options)


@pytest.mark.parametrize("options", [{}, {"scaler": True}, {"weight_scope": "device"}])
def test_the_self_check_names_a_scaled_loss(options, tmp_path):
    with pytest.raises(GradientMismatchError, match="The gradient is 2 times too large: something scales the loss"):
        train("vit", "4x4", tmp_path, trainer_class=Twice, **options)
    train("vit", "4x4", tmp_path, trainer_class=Twice, self_check_steps=-1, **options)


def test_the_self_check_names_a_lost_tangent(tmp_path):
    class Cut(MimicTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, loss_fn=cut)

    with pytest.raises(GradientMismatchError, match=r"A tangent was lost .* torch.jit.script.* self_check_steps=-1"):
        train("vit", "16", tmp_path, trainer_class=Cut)


def test_how_often_is_checked(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr("hf_mimic.scored_training.check_gradient", lambda *args, **kwargs: checked.append(args))
    for every, expected in ((0, 1), (1, 6), (2, 3), (4, 2), (-1, 0)):
        checked.clear()
        train("vit", "16", tmp_path / str(every), self_check_steps=every, num_train_epochs=3, learning_rate=1e-3)
        assert len(checked) == expected, every


# ---- divergence ----------------------------------------------------------------------------------------------------


def test_training_that_has_diverged_ends_with_an_error(tmp_path):
    with pytest.raises(FloatingPointError, match="none for 10 optimizer steps in a row: training has diverged"):
        train("vit", "16", tmp_path, broken=range(ROWS), num_train_epochs=6)
    train("vit", "16", tmp_path / "few", broken=range(ROWS), num_train_epochs=4)


# ---- compiled code -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_is_scored_eagerly(backend, tmp_path):
    options = {"mimic_layers": "all", "self_check_steps": 1}
    expected = train("vit", "16", tmp_path / "eager", **options)
    options |= {"torch_compile": True, "torch_compile_backend": backend}
    found = train("vit", "4x4", tmp_path / "compiled", **options)
    assert found.engine.compiled
    assert [difference(g, e) for g, e in zip(steps_of(found), steps_of(expected), strict=True)] == pytest.approx(
        [0, 0], abs=1e-5
    )
    rows, same = (trainer.scores.to_arrow().to_pydict() for trainer in (found, expected))
    assert rows["mimic_score"] == pytest.approx(same["mimic_score"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_has_the_dropout_that_is_scored(backend, tmp_path):
    """The self-check would see other masks."""
    options = {"torch_compile": True, "torch_compile_backend": backend, "self_check_steps": 1, "num_train_epochs": 2}
    train("dropout", "16", tmp_path, mimic_layers="all", **options)
