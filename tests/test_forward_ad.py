"""Whole models that carry tangents: dropout, checkpointing, autocast, adapters, hooks, and what is left behind."""

import gc
from contextlib import nullcontext

import models
import pytest
import torch
import torch.nn.functional as F
from oracles import gradients, identical, plain_step, relative_error, same_start, scores_by_loop
from torch import nn

from hf_mimic import losses
from hf_mimic.forward_ad import Dual, dual_parameters, primal_of, tangent_of
from hf_mimic.mimic import mimic_forward, mimic_scores, reference_direction

LAYERS = ["head", "last_mlp", ["last_mlp", "head"], "last_block", "all"]


def assert_exact(model, batch, layers, *, tolerance=1e-5, context=nullcontext, before_oracle=None):
    """Scores as one backward per sample; losses, gradients, buffers and random numbers as in a plain step."""
    direction = reference_direction(model, models.moved(model), layers)
    loss_fn, weights = losses.loss_for_model(model), torch.rand(models.BATCH)
    with same_start(model, 0, []) as restart:
        restart()
        plain_losses, plain = plain_step(model, batch, loss_fn, weights, context=context)
        random, buffers = torch.rand(1), {name: x.clone() for name, x in model.named_buffers()}
        restart()
        with context():
            forward = mimic_forward(model, batch, direction, loss_fn)
        assert identical(gradients(model, forward.losses, weights), plain)
        assert torch.equal(forward.losses, plain_losses)
        assert torch.equal(torch.rand(1), random)
        assert identical(dict(model.named_buffers()), buffers)
    if before_oracle:
        before_oracle()
    oracle = scores_by_loop(model, batch, direction, loss_fn, context=context)
    assert relative_error(forward.scores, oracle) <= tolerance
    assert relative_error(forward.scores.roll(1), oracle) > 0.1


# ---- what training does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_dropout_draws_the_same_mask(layers, attention):
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
    model = models.make("vit", attn_implementation=attention, **dropout).train()
    assert_exact(model, models.make_batch("vit"), layers)


def test_another_mask_fails_the_comparison():
    model, batch = models.make("vit", hidden_dropout_prob=0.3).train(), models.make_batch("vit")
    direction = reference_direction(model, models.moved(model), "head")
    oracle = scores_by_loop(model, batch, direction, losses.cross_entropy, seed=0)
    torch.manual_seed(1)
    assert relative_error(mimic_forward(model, batch, direction, losses.cross_entropy).scores, oracle) > 0.1


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("layers", [*LAYERS, "vit.embeddings"], ids=str)
def test_activation_checkpointing(layers, reentrant):
    model = models.make("vit", hidden_dropout_prob=0.1).train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:  # which refuses the oracle's `torch.autograd.grad`
        model.enable_input_require_grads()
    assert_exact(model, models.make_batch("vit"), layers, before_oracle=model.activation_checkpointing_disable)


def test_every_second_layer_checkpointed_and_saved_tensors_offloaded():
    model = models.make("vit", hidden_dropout_prob=0.1).train()
    model.activation_checkpointing_enable(every_n_layers=2)
    assert_exact(model, models.make_batch("vit"), "all", context=torch.autograd.graph.save_on_cpu)


@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_bfloat16_autocast(layers):
    context = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    assert_exact(models.make("vit"), models.make_batch("vit"), layers, tolerance=3e-2, context=context)


@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_bfloat16_model(layers):
    model = models.make("vit", torch.bfloat16)
    assert_exact(model, models.make_batch("vit", torch.bfloat16), layers, tolerance=3e-2)


@pytest.mark.parametrize("layers", [*LAYERS[:-1], "vit.embeddings", ".*"], ids=str)
def test_frozen_backbone(layers):
    model = models.make("vit")
    model.vit.requires_grad_(False)
    assert_exact(model, models.make_batch("vit"), layers)


@pytest.mark.parametrize("layers", ["head", "last_mlp", "last_block", "all"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(layers, checkpointing):
    model = models.with_lora(models.make("vit"), lora_dropout=0.1).train()
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable()
    assert_exact(model, models.make_batch("vit"), layers)


@pytest.mark.parametrize("layers", ["head", "last_block", "all"])
def test_batch_norm_in_training_updates_its_buffers_once(layers):
    model = models.make("resnet").train()
    assert_exact(model, models.make_batch("resnet"), layers)
    assert model.resnet.embedder.embedder.normalization.num_batches_tracked == 0  # same_start put it back
    mimic_forward(model, models.make_batch("resnet"), {"classifier.1.bias": torch.ones(4)}, losses.cross_entropy)
    assert model.resnet.embedder.embedder.normalization.num_batches_tracked == 1


# ---- layers of other models -----------------------------------------------------------------------------------------


class MutatingNet(nn.Module):
    """In-place functions on hidden states, a residual stream and a plain output buffer."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.relu = nn.Linear(768, 16), nn.Linear(16, 16), nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5, inplace=True)

    def forward(self, x):
        hidden = self.relu(self.dropout(self.inner(x.flatten(1))))
        x = self.outer(hidden)
        x += hidden
        out = torch.zeros(len(x), 4)
        out[:, :2] = x[:, :2]
        out[:, 2:].copy_(F.relu(x[:, 2:4] * 2, inplace=True))
        return out.masked_fill_(out > 3, 3.0)


class AttentionNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 2, dropout=0.2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        tokens = x.reshape(len(x), -1, 16)
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))


class TiedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(768, 768), nn.Linear(768, 768), nn.Linear(768, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x.flatten(1)).tanh()))


@pytest.mark.parametrize("net", [MutatingNet, AttentionNet, TiedNet])
@pytest.mark.parametrize("train", [True, False])
def test_plain_modules(net, train):
    model = models.Classifier(net()).train(train)
    assert_exact(model, models.make_batch("vit"), "all")


def test_tied_parameter_counts_every_use():
    model, batch = models.Classifier(TiedNet()), models.make_batch("vit")
    for name in ("body.first.weight", "body.second.weight"):
        assert_exact(model, batch, name)


class StateNet(nn.Module):
    """Writes to a buffer and to a parameter under no_grad, as moving averages and clamped scales do."""

    def __init__(self):
        super().__init__()
        self.inner, self.head, self.scale = nn.Linear(768, 8), nn.Linear(8, 4), nn.Parameter(torch.tensor(5.0))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x):
        with torch.no_grad():
            self.scale.clamp_(0, 2)
        self.last = self.inner(x.flatten(1))
        with torch.no_grad():
            self.average.mul_(0.9).add_(self.last.mean(0))
        return self.head(self.last.tanh()) * self.scale - self.average.mean()


def test_state_that_the_model_writes():
    model, batch = models.Classifier(StateNet()), models.make_batch("vit")
    assert_exact(model, batch, "all")
    direction = reference_direction(model, models.moved(model), "all")
    before = {name: v.clone() for name, v in direction.items()}
    model.body.scale.data.fill_(5.0)
    mimic_scores(model, batch, direction)
    assert identical(direction, before)
    assert type(model.body.average) is type(model.body.last) is torch.Tensor


def test_frozen_part_under_no_grad():
    class Frozen(TiedNet):
        def forward(self, x):
            with torch.no_grad():
                hidden = self.first(x.flatten(1))
            return self.head(self.second(hidden))

    assert_exact(models.Classifier(Frozen()), models.make_batch("vit"), "all")


# ---- what is left behind --------------------------------------------------------------------------------------------


def snapshot(model):
    return [(module, key, id(p)) for module in model.modules() for key, p in module._parameters.items()]


def test_parameters_are_restored():
    model, batch = models.make("clip"), models.make_batch("clip")
    before = snapshot(model)
    mimic_scores(model, batch, reference_direction(model, models.moved(model), "all"))
    assert snapshot(model) == before
    assert all(type(p) is nn.Parameter for p in model.parameters())


@pytest.mark.parametrize("train", [True, False])
def test_parameters_and_mode_are_restored_after_an_error(train):
    def fail(outputs, batch):
        raise RuntimeError("no loss today")

    model = models.make("vit").train(train)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no loss today"):
        mimic_scores(model, models.make_batch("vit"), reference_direction(model, models.moved(model)), fail)
    assert snapshot(model) == before
    assert model.training == train


def test_unknown_parameter_name_leaves_the_model_alone():
    model = models.make("vit")
    before = snapshot(model)
    with pytest.raises(KeyError, match=r"no\.such"), dual_parameters(model, {"no.such": torch.ones(1)}):
        pass
    assert snapshot(model) == before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tangents_are_freed_after_the_pass(checkpointing):
    model = models.make("vit").train()
    if checkpointing:
        model.activation_checkpointing_enable()
    direction = reference_direction(model, models.moved(model), "all")
    forward = mimic_forward(model, models.make_batch("vit"), direction, losses.cross_entropy)
    assert forward.losses.requires_grad
    left = [x for x in gc.get_objects() if type(x) in (Dual, torch.Tensor)]
    assert not any(type(x) is Dual or x.__dict__.get("_tangent") is not None for x in left)


def test_tangents_exist_during_the_pass():
    model = models.make("vit")
    with dual_parameters(model, reference_direction(model, models.moved(model), "head")):
        out = model(models.make_batch("vit")["pixel_values"]).logits
        assert type(out) is Dual
        assert tangent_of(out).shape == primal_of(out).shape == out.shape
        assert tangent_of(model.vit.layernorm.weight) is None
    assert type(out) is torch.Tensor


def test_nested_passes_do_not_mix():
    model, batch = models.make("vit"), models.make_batch("vit")
    direction = reference_direction(model, models.moved(model), "head")
    expected = mimic_scores(model, batch, direction)

    def loss_fn(outputs, batch):
        assert torch.equal(mimic_scores(models.make("vit"), models.make_batch("vit"), direction), expected)
        return losses.cross_entropy(outputs, batch)

    assert torch.equal(mimic_scores(model, batch, direction, loss_fn), expected)


def test_hooks_on_the_output_of_a_checkpointed_block_run():
    """A hook that a wrapper (FSDP) puts on an activation belongs to the node that backward passes through."""
    model, batch, ran = models.make("vit").train(), models.make_batch("vit"), []
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    model.vit.layers[0].register_forward_hook(
        lambda module, args, out: out.register_hook(lambda g: ran.append(1)) and None
    )
    losses.cross_entropy(model(batch["pixel_values"]), batch).mean().backward()
    plain = len(ran)
    direction = reference_direction(model, models.moved(model), "all")
    mimic_forward(model, batch, direction, losses.cross_entropy).losses.mean().backward()
    assert plain >= 1
    assert len(ran) == 2 * plain
