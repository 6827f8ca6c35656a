"""Weights of a batch: softmax by hand, its limits, and the automatic temperature."""

import pytest
import torch

from hf_mimic import selection
from hf_mimic.selection import (
    STRATEGIES,
    BatchSignals,
    RunningTemperature,
    auto_temperature,
    effective_sample_size,
)


def signals(scores):
    scores = torch.as_tensor(scores, dtype=torch.float32)
    rank = torch.linspace(0, 1, len(scores))
    return BatchSignals(losses=torch.ones_like(scores), mimic_scores=scores, ref_losses=rank, ref_trust=rank)


def draw(kind, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, generator=generator)
    if kind == "heavy":  # Cauchy: no variance
        return normal / torch.randn(size, generator=generator).abs()
    if kind == "bimodal":
        return 0.2 * normal + (torch.arange(size) % 5 < 2) * 3.0
    return normal


def weights_by(name, signals, temperature=1.0):
    """Return the softmax over one batch of what a strategy gives."""
    return torch.softmax(STRATEGIES[name](signals, temperature=temperature), 0)


def mimic(signals, temperature=1.0):
    tau = auto_temperature(signals.mimic_scores) if temperature == "auto" else temperature
    return weights_by("mimic", signals, tau)


# ---- weights -------------------------------------------------------------------------------------------------------


def test_weights_are_the_softmax_of_scores_over_temperature():
    # exp(0), exp(1), exp(2) after division by tau = 0.5
    e = torch.tensor([1.0, 2.718281828, 7.389056099])
    weights = mimic(signals([0.0, 0.5, 1.0]), temperature=0.5)
    torch.testing.assert_close(weights, e / e.sum())
    assert not torch.allclose(mimic(signals([0.0, 0.5, 1.0]), temperature=1.0), weights)


def test_higher_score_gets_more_weight():
    weights = mimic(signals([0.1, 0.3, -0.2, 0.2]))
    assert weights.argsort().tolist() == [2, 0, 3, 1]


def test_high_temperature_is_uniform_and_low_is_the_best_sample():
    scores = signals([0.3, -0.1, 2.0, 1.9])
    torch.testing.assert_close(mimic(scores, temperature=1e12), torch.full((4,), 0.25), rtol=0, atol=0)
    torch.testing.assert_close(mimic(scores, temperature=1e-4), torch.tensor([0.0, 0.0, 1.0, 0.0]))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("temperature", [0.1, 1.0, torch.tensor(torch.inf)])
@pytest.mark.parametrize("size", [0, 1, 2, 512])
def test_log_weights_of_every_strategy_are_finite(name, temperature, size):
    logits = STRATEGIES[name](signals(draw("normal", size)), temperature=temperature)
    assert logits.shape == (size,)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", STRATEGIES)
def test_log_weights_of_a_sample_do_not_depend_on_its_batch(name):
    """What makes the softmax over a whole step possible, however it is split."""
    everything = signals(draw("normal", 8))
    part = BatchSignals(**{field: values[2:5] for field, values in vars(everything).items()})
    whole = STRATEGIES[name](everything, temperature=0.3)
    torch.testing.assert_close(STRATEGIES[name](part, temperature=0.3), whole[2:5])


def test_the_score_multiplies_the_odds_of_the_trust():
    given = BatchSignals(
        losses=torch.ones(4),
        mimic_scores=torch.tensor([1.0, -1.0, -1.0, 0.0]),
        ref_trust=torch.tensor([0.5, 0.5, 1.0, torch.nan]),
    )
    weights = STRATEGIES["trust"](given, temperature=0.5).exp()
    expected = [7.389 / 8.389, 0.1353 / 1.1353, 1.0, 1.0]  # e^2 and e^-2 to one; who is surely right stays so
    torch.testing.assert_close(weights, torch.tensor(expected), atol=1e-3, rtol=0)
    torch.testing.assert_close(STRATEGIES["trust"](given, temperature=torch.inf).exp()[:2], torch.tensor([0.5, 0.5]))


def test_uniform_ignores_the_scores():
    assert weights_by("uniform", signals([5.0, -1.0, 0.0, 9.0]), 0.1).tolist() == [0.25] * 4


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


# ---- the running temperature ---------------------------------------------------------------------------------------


def run(temperature, steps):
    """Feed the steps' scores; return the effective sample size of each, as a share."""
    shares = []
    for scores in steps:
        if temperature.variance is None:
            temperature.start(scores)
        size = effective_sample_size(torch.softmax(scores / temperature.value, 0)) / len(scores)
        variance = scores.var() if len(scores) > 1 else torch.tensor(torch.nan)
        temperature.update(variance, size, torch.tensor(float(len(scores))))
        shares.append(size.item())
    return shares


@pytest.mark.parametrize("kind", ["normal", "bimodal"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_running_temperature_keeps_half_the_samples(kind, scale):
    shares = run(RunningTemperature(), [scale * draw(kind, 64, seed) for seed in range(120)])
    assert sum(shares[40:]) / 80 == pytest.approx(0.5, abs=0.04)
    assert not sum(shares[40:]) / 80 == pytest.approx(0.7, abs=0.04)


def test_running_temperature_of_another_share():
    shares = run(RunningTemperature(share=0.8), [draw("normal", 64, seed) for seed in range(120)])
    assert sum(shares[40:]) / 80 == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("size", [2, 3, 4, 8, 16])
def test_running_temperature_of_small_steps_is_that_of_large_ones(size):
    small, large = RunningTemperature(), RunningTemperature()
    run(small, [draw("normal", size, seed) for seed in range(600)])
    run(large, [draw("normal", 256, seed) for seed in range(100)])
    assert small.value.item() == pytest.approx(large.value.item(), rel=0.3)


@pytest.mark.parametrize("jump", [30.0, 1 / 30])
def test_running_temperature_follows_the_scale_of_the_scores(jump):
    temperature = RunningTemperature()
    run(temperature, [draw("normal", 64, seed) for seed in range(30)])
    before = temperature.value.item()
    shares = run(temperature, [jump * draw("normal", 64, seed) for seed in range(100, 200)])
    assert temperature.value.item() / before == pytest.approx(jump, rel=0.3)
    assert sum(shares[-20:]) / 20 == pytest.approx(0.5, abs=0.06)
    assert min(shares[6:]) > 0.05  # only in the first steps after the jump may one sample take it all


@pytest.mark.parametrize("size", [100.0, 1e6])
def test_running_temperature_forgets_an_outlier(size):
    temperature = RunningTemperature()
    run(temperature, [draw("normal", 64, seed) for seed in range(30)])
    before, far = temperature.value.item(), draw("normal", 64, 99)
    far[3] = size
    run(temperature, [far])
    assert temperature.value.item() < 3 * before
    shares = run(temperature, [draw("normal", 64, seed) for seed in range(100, 120)])
    assert max(shares) < 0.9
    assert shares[-1] == pytest.approx(0.5, abs=0.15)


def test_running_temperature_is_not_moved_by_steps_that_say_nothing():
    temperature = RunningTemperature()
    run(temperature, [draw("normal", 32, seed) for seed in range(5)])
    before = temperature.value.item()
    run(temperature, [torch.tensor([0.3]), torch.full((8,), 0.5)])
    assert temperature.value.item() == before
    run(temperature, [draw("normal", 32, 9)])
    assert temperature.value.item() != before


@pytest.mark.parametrize("first", [torch.tensor([0.4]), torch.zeros(8), torch.zeros(0)])
def test_running_temperature_starts_when_scores_differ(first):
    temperature = RunningTemperature()
    temperature.start(first)
    assert temperature.value == torch.inf
    run(temperature, [draw("normal", 64, seed) for seed in range(40)])
    assert temperature.value.item() == pytest.approx(1.2, rel=0.3)


def test_running_temperature_before_any_step():
    with pytest.raises(RuntimeError, match="must have seen the scores of a step, got none"):
        RunningTemperature().value  # noqa: B018


def test_auto_share_is_half():
    assert selection.AUTO_SHARE == 0.5
