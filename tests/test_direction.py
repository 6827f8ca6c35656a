"""`MimicDirection`: its three kinds, its precision, and what it refuses."""

import models
import pytest
import torch
from oracles import identical

from hf_mimic import losses
from hf_mimic.mimic import MimicDirection, mimic_forward, mimic_scores, reference_direction


def directions(kind):
    model = models.make("vit")
    base, reference = models.moved(model, seed=5), models.moved(model, seed=6)
    return model, base, reference, MimicDirection(model, reference, "head", kind=kind, base=base)


def step(model):
    for p in model.parameters():
        p.data.add_(0.1)


def test_current_direction_follows_the_model():
    model, _, reference, direction = directions("current")
    step(model)
    for name, v in direction().items():
        torch.testing.assert_close(v, reference[name] - dict(model.named_parameters())[name].detach())


def test_start_direction_stays():
    model, _, reference, direction = directions("start")
    expected = {n: reference[n] - p.detach().clone() for n, p in model.named_parameters() if n in direction.names}
    step(model)
    assert identical(direction(), expected)


def test_task_vector_is_reference_minus_base():
    model, base, reference, direction = directions("task_vector")
    step(model)
    assert identical(direction(), {name: reference[name] - base[name] for name in direction.names})


def test_direction_owns_its_tensors():
    model, _, reference, direction = directions("start")
    before = {name: v.clone() for name, v in direction().items()}
    for tensor in reference.values():
        tensor.zero_()
    mimic_forward(model, models.make_batch("vit"), direction(), losses.cross_entropy).losses.sum().backward()
    assert identical(direction(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_direction_is_at_least_float32(dtype):
    model = models.make("vit", dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    direction = reference_direction(model, models.moved(model), "head")
    assert {v.dtype for v in direction.values()} == {wide}
    assert mimic_scores(model, models.make_batch("vit", dtype), direction).dtype == wide


def test_unknown_direction():
    model = models.make("vit")
    with pytest.raises(ValueError, match=r"one of 'current', 'start', 'task_vector', got 'back'"):
        MimicDirection(model, models.moved(model), kind="back")


def test_task_vector_needs_a_base():
    model = models.make("vit")
    with pytest.raises(ValueError, match=r"found none: a dict has no card\. Name it as `reference_base_model`"):
        MimicDirection(model, models.moved(model), kind="task_vector")


def test_half_precision_parameters():
    model = models.make("vit").half()
    with pytest.raises(ValueError, match=r"got float16 for classifier.weight.*fp16=True"):
        reference_direction(model, models.moved(model))


def test_no_layer_matches():
    model = models.make("vit")
    with pytest.raises(ValueError, match=r"'clasifier' matched none. Closest: .*classifier"):
        reference_direction(model, models.moved(model), "clasifier")
