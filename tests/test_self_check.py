"""The self-check's arithmetic; test_invariants.py and test_distributed.py run it in training."""

import pytest
import torch

from hf_mimic.self_check import GradientMismatchError, check_gradient, gradient_along


def check(found, *, weighted_score=0.5, scale=2.0, loss=1.0, norm=3.0, dtype=torch.float32):
    sums = {"weighted_score": weighted_score, "weighted_absolute_score": scale, "weighted_loss": loss}
    check_gradient(torch.tensor(found), sums, norm=norm, eps=torch.finfo(dtype).eps)


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
    check(-1.4, dtype=torch.bfloat16)


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


def test_a_loss_that_was_divided_is_named():
    with pytest.raises(GradientMismatchError, match="The gradient is 4 times too small: something scales the loss"):
        check(-1.5 / 4)


def test_losses_made_of_rounding_are_given_more():
    """1 - p is 1e-6 of rounding 6e-8: the gradient cannot be better than a tenth."""
    with pytest.raises(GradientMismatchError, match="A tangent was lost"):
        check(-1.0)
    check(-1.0, loss=1e-6)


def test_what_cannot_change_the_loss_is_not_checked():
    """The key biases of attention have no gradient: all is rounding."""
    check(1e-8, weighted_score=1e-9, scale=2e-9, norm=3.0, loss=1.4)
