"""Weights of a batch: softmax by hand, its limits, and the automatic temperature."""

import pytest
import torch

from hf_mimic.selection import STRATEGIES, BatchSignals, auto_temperature, effective_sample_size, mimic, uniform


def signals(scores):
    scores = torch.as_tensor(scores, dtype=torch.float32)
    return BatchSignals(losses=torch.ones_like(scores), mimic_scores=scores)


def draw(kind, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, generator=generator)
    if kind == "heavy":  # Cauchy: no variance
        return normal / torch.randn(size, generator=generator).abs()
    if kind == "bimodal":
        return 0.2 * normal + (torch.arange(size) % 5 < 2) * 3.0
    return normal


# ---- weights -------------------------------------------------------------------------------------------------------


def test_weights_are_the_softmax_of_scores_over_temperature():
    # exp(0), exp(1), exp(2) after division by tau = 0.5
    e = torch.tensor([1.0, 2.718281828, 7.389056099])
    weights = mimic(signals([0.0, 0.5, 1.0]), temperature=0.5)
    torch.testing.assert_close(weights, e / e.sum())
    assert not torch.allclose(mimic(signals([0.0, 0.5, 1.0]), temperature=1.0), weights)


def test_temperature_given_as_text_is_the_same_number():
    scores = signals([0.3, -1.0, 2.0])
    assert torch.equal(mimic(scores, temperature="0.3"), mimic(scores, temperature=0.3))


def test_higher_score_gets_more_weight():
    weights = mimic(signals([0.1, 0.3, -0.2, 0.2]))
    assert weights.argsort().tolist() == [2, 0, 3, 1]


def test_high_temperature_is_uniform_and_low_is_the_best_sample():
    scores = signals([0.3, -0.1, 2.0, 1.9])
    torch.testing.assert_close(mimic(scores, temperature=1e12), torch.full((4,), 0.25), rtol=0, atol=0)
    torch.testing.assert_close(mimic(scores, temperature=1e-4), torch.tensor([0.0, 0.0, 1.0, 0.0]))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("temperature", [0.1, 1.0, "auto"])
@pytest.mark.parametrize("size", [1, 2, 3, 48, 512])
def test_weights_of_every_strategy_are_non_negative_and_sum_to_one(name, temperature, size):
    weights = STRATEGIES[name](signals(draw("normal", size)), temperature=temperature)
    assert weights.shape == (size,)
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)


def test_uniform_ignores_the_scores():
    assert uniform(signals([5.0, -1.0, 0.0, 9.0]), temperature=0.1).tolist() == [0.25] * 4


def test_batch_of_one_has_all_the_weight():
    for temperature in (0.1, "auto"):
        assert mimic(signals([-3.0]), temperature=temperature).tolist() == [1.0]


# ---- effective sample size and the automatic temperature -----------------------------------------------------------


def test_effective_sample_size_by_hand():
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.25, 0.25, 0.0]])
    torch.testing.assert_close(effective_sample_size(weights), torch.tensor([4.0, 1.0, 1 / 0.375]))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 16, 33, 64, 128, 512])
@pytest.mark.parametrize("kind", ["normal", "heavy", "bimodal"])
def test_auto_temperature_gives_an_effective_size_of_half_the_batch(kind, size):
    scores = draw(kind, size, seed=size)
    share = effective_sample_size(mimic(signals(scores), temperature="auto")) / size
    assert share.item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("outlier", [-1e4, 1e4])
def test_auto_temperature_with_one_sample_far_away(outlier):
    scores = draw("normal", 64)
    scores[5] = outlier
    weights = mimic(signals(scores), temperature="auto")
    assert effective_sample_size(weights).item() / 64 == pytest.approx(0.5, rel=0.02)
    assert weights[5] == (weights.min() if outlier < 0 else weights.max())


def test_auto_temperature_with_another_share():
    scores = draw("normal", 64)
    for share in (0.1, 0.3, 0.9):
        weights = torch.softmax(scores / auto_temperature(scores, share), 0)
        assert effective_sample_size(weights).item() / 64 == pytest.approx(share, rel=0.02)


@pytest.mark.parametrize("scale", [10.0, 1e-6, 1e6])
@pytest.mark.parametrize("kind", ["normal", "heavy", "bimodal"])
def test_auto_weights_do_not_depend_on_the_scale_of_the_scores(kind, scale):
    scores = draw(kind, 32)
    weights = mimic(signals(scores), temperature="auto")
    torch.testing.assert_close(mimic(signals(scale * scores), temperature="auto"), weights, rtol=1e-3, atol=1e-6)
    fixed = mimic(signals(scores), temperature=1.0)
    assert not torch.allclose(mimic(signals(scale * scores), temperature=1.0), fixed, rtol=1e-2)


def test_auto_weights_do_not_depend_on_an_offset():
    scores = draw("normal", 32)
    weights = mimic(signals(scores), temperature="auto")
    torch.testing.assert_close(mimic(signals(scores + 5), temperature="auto"), weights, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.7, -1e-30])
def test_equal_scores_are_weighted_alike(value):
    assert mimic(signals([value] * 8), temperature="auto").tolist() == [0.125] * 8


def test_auto_temperature_of_equal_scores_is_infinite():
    assert auto_temperature(torch.zeros(8)) == torch.inf
    assert auto_temperature(torch.tensor([0.4])) == torch.inf


def test_auto_temperature_where_half_the_batch_cannot_be_reached():
    # three of four share the first place: no temperature gives an effective size below 3
    weights = mimic(signals([1.0, 1.0, 1.0, 0.0]), temperature="auto")
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 1.0, 0.0]) / 3)
