"""The self-check's arithmetic; test_invariants.py and test_distributed.py run it in training."""

import pytest
import torch

from hf_mimic.self_check import GradientMismatchError, check_gradient, gradient_along


def check(found, *, weighted_score=0.5, scale=2.0, norm=3.0, low_precision=False):
    check_gradient(torch.tensor(found), weighted_score, scale, norm=norm, low_precision=low_precision)


def test_product_with_the_direction():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([1.0, 2.0]), torch.tensor([10.0])
    direction = {"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([0.5])}
    assert gradient_along(direction, {"a": a, "b": b}).item() == 6.0
    b.grad = None
    assert gradient_along(direction, {"a": a, "b": b}) is None


@pytest.mark.parametrize("found", [-1.5, -1.5 + 0.029, -1.5 - 0.029])
def test_small_differences_are_rounding(found):
    """-||v|| sum w m = -1.5; 0.5 % of ||v|| sum w |m| = 0.03."""
    check(found)


def test_low_precision_is_given_ten_times_as_much():
    with pytest.raises(
        GradientMismatchError, match=r"must equal -\|\|v\|\| sum w m = -1.5, got -1.4 \(allowed .* 0.03\)"
    ):
        check(-1.4)
    check(-1.4, low_precision=True)


@pytest.mark.parametrize("factor", [2, 3, 8])
def test_a_scaled_loss_is_named(factor):
    with pytest.raises(GradientMismatchError, match=rf"The gradient is {factor} times too large"):
        check(-1.5 * factor)


@pytest.mark.parametrize("found", [0.0, -2.2, 1.5])
def test_a_lost_tangent_is_named(found):
    with pytest.raises(GradientMismatchError, match="A tangent was lost on its way to the loss"):
        check(found)


def test_scores_that_cancel():
    check(0.0, weighted_score=0.0)
    with pytest.raises(GradientMismatchError, match="A tangent was lost"):
        check(1.0, weighted_score=0.0)
