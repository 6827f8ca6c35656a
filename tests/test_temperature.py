"""The automatic temperature: of one batch, of a run, and by what the score is believed."""

import math

import pytest
import torch

from hf_mimic import temperature as module
from hf_mimic.temperature import (
    FitTemperature,
    RunningTemperature,
    TrustTemperature,
    auto_temperature,
    effective_sample_size,
    temperature_of,
)

RHO = torch.tensor(0.7)  # does not matter where the belief is a constant


def draw(kind, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, generator=generator)
    if kind == "heavy":  # Cauchy: no variance
        return normal / torch.randn(size, generator=generator).abs()
    if kind == "bimodal":
        return 0.2 * normal + (torch.arange(size) % 5 < 2) * 3.0
    return normal


def softmax(scores, tau="auto"):
    scores = torch.as_tensor(scores)
    return torch.softmax(scores / (auto_temperature(scores) if tau == "auto" else tau), 0)


# ---- of one batch --------------------------------------------------------------------------------------------------


def test_effective_sample_size_by_hand():
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.25, 0.25, 0.0]])
    torch.testing.assert_close(effective_sample_size(weights), torch.tensor([4.0, 1.0, 1 / 0.375]))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 16, 33, 64, 128, 512])
@pytest.mark.parametrize("kind", ["normal", "heavy", "bimodal"])
def test_auto_temperature_gives_an_effective_size_of_half_the_batch(kind, size):
    scores = draw(kind, size, seed=size)
    share = effective_sample_size(softmax(scores)) / size
    assert share.item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("outlier", [-1e4, 1e4])
def test_auto_temperature_with_one_sample_far_away(outlier):
    scores = draw("normal", 64)
    scores[5] = outlier
    weights = softmax(scores)
    assert effective_sample_size(weights).item() / 64 == pytest.approx(0.5, rel=0.02)
    assert weights[5] == (weights.min() if outlier < 0 else weights.max())


@pytest.mark.parametrize("scale", [10.0, 1e-6, 1e6])
@pytest.mark.parametrize("kind", ["normal", "heavy", "bimodal"])
def test_auto_weights_do_not_depend_on_the_scale_of_the_scores(kind, scale):
    scores = draw(kind, 32)
    weights = softmax(scores)
    torch.testing.assert_close(softmax(scale * scores), weights, rtol=1e-3, atol=1e-6)
    fixed = softmax(scores, 1.0)
    assert not torch.allclose(softmax(scale * scores, 1.0), fixed, rtol=1e-2)


def test_auto_weights_do_not_depend_on_an_offset():
    scores = draw("normal", 32)
    weights = softmax(scores)
    torch.testing.assert_close(softmax(scores + 5), weights, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.7, -1e-30])
def test_equal_scores_are_weighted_alike(value):
    assert softmax([value] * 8).tolist() == [0.125] * 8


def test_auto_temperature_where_half_the_batch_cannot_be_reached():
    # three of four share the first place: no temperature gives an effective size below 3
    weights = softmax([1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 1.0, 0.0]) / 3)


def test_auto_temperature_with_another_share():
    scores = draw("normal", 64)
    for share in (0.1, 0.3, 0.9):
        weights = torch.softmax(scores / auto_temperature(scores, share), 0)
        assert effective_sample_size(weights).item() / 64 == pytest.approx(share, rel=0.02)


def test_auto_temperature_of_equal_scores_is_infinite():
    assert auto_temperature(torch.zeros(8)) == torch.inf
    assert auto_temperature(torch.tensor([0.4])) == torch.inf


# ---- of a run ------------------------------------------------------------------------------------------------------


def run(temperature, steps):
    """Feed the steps' scores; return the effective sample size of each, as a share."""
    shares = []
    for scores in steps:
        if temperature.variance is None:
            temperature.start(scores)
        size = effective_sample_size(torch.softmax(scores / temperature.value(RHO), 0)) / len(scores)
        variance = scores.var() if len(scores) > 1 else torch.tensor(torch.nan)
        temperature.update(variance, size, torch.tensor(float(len(scores))), RHO)
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
    assert small.value(RHO).item() == pytest.approx(large.value(RHO).item(), rel=0.3)


@pytest.mark.parametrize("jump", [30.0, 1 / 30])
def test_running_temperature_follows_the_scale_of_the_scores(jump):
    temperature = RunningTemperature()
    run(temperature, [draw("normal", 64, seed) for seed in range(30)])
    before = temperature.value(RHO).item()
    shares = run(temperature, [jump * draw("normal", 64, seed) for seed in range(100, 200)])
    assert temperature.value(RHO).item() / before == pytest.approx(jump, rel=0.3)
    assert sum(shares[-20:]) / 20 == pytest.approx(0.5, abs=0.06)
    assert min(shares[6:]) > 0.05  # only in the first steps after the jump may one sample take it all


@pytest.mark.parametrize("size", [100.0, 1e6])
def test_running_temperature_forgets_an_outlier(size):
    temperature = RunningTemperature()
    run(temperature, [draw("normal", 64, seed) for seed in range(30)])
    before, far = temperature.value(RHO).item(), draw("normal", 64, 99)
    far[3] = size
    run(temperature, [far])
    assert temperature.value(RHO).item() < 3 * before
    shares = run(temperature, [draw("normal", 64, seed) for seed in range(100, 120)])
    assert max(shares) < 0.9
    assert shares[-1] == pytest.approx(0.5, abs=0.15)


def test_running_temperature_is_not_moved_by_steps_that_say_nothing():
    temperature = RunningTemperature()
    run(temperature, [draw("normal", 32, seed) for seed in range(5)])
    before = temperature.value(RHO).item()
    run(temperature, [torch.tensor([0.3]), torch.full((8,), 0.5)])
    assert temperature.value(RHO).item() == before
    run(temperature, [draw("normal", 32, 9)])
    assert temperature.value(RHO).item() != before


@pytest.mark.parametrize("first", [torch.tensor([0.4]), torch.zeros(8), torch.zeros(0)])
def test_running_temperature_starts_when_scores_differ(first):
    temperature = RunningTemperature()
    temperature.start(first)
    assert temperature.value(RHO) == torch.inf
    run(temperature, [draw("normal", 64, seed) for seed in range(40)])
    assert temperature.value(RHO).item() == pytest.approx(1.2, rel=0.3)


def test_running_temperature_before_any_step():
    assert RunningTemperature().value(RHO) == torch.inf


def test_running_temperature_recovers_where_half_cannot_be_reached():
    ties = draw("normal", 64).clamp_max(-0.5)  # most of the 64 share the first place
    temperature = RunningTemperature()
    assert (ties == ties.max()).sum() > 40
    shares = run(temperature, [ties, *(draw("normal", 64, seed) for seed in range(20))])
    assert min(shares[15:]) > 0.3


def test_auto_share_is_half():
    assert module.AUTO_SHARE == 0.5


# ---- by what the score is believed ---------------------------------------------------------------------------------


def believed(kind, rho, scale=1.0, steps=80, draws="normal", size=64):
    """Return the temperature after steps with this belief, and the mean share of the samples that then had weight."""
    temperature, shares, rho = kind(), [], torch.tensor(rho)
    for seed in range(steps):
        scores = scale * draw(draws, size, seed)
        share = effective_sample_size(torch.softmax(scores / temperature.value(rho), 0)) / size
        temperature.update(scores.var(), share, torch.tensor(float(size)), rho)
        shares.append(share.item())
    return temperature.value(rho).item(), sum(shares[40:]) / len(shares[40:])


@pytest.mark.parametrize("draws", ["normal", "bimodal"])
@pytest.mark.parametrize("rho", [0.3, 0.4, 0.5, 0.6, 0.7, 0.9])
def test_a_mimic_score_counts_by_its_agreement_with_the_fit(rho, draws):
    belief = min(2 * rho**3, math.sqrt(math.log(2)))
    _, share = believed(FitTemperature, rho, draws=draws)
    assert share == pytest.approx(math.exp(-(belief**2)), abs=0.04)


def test_a_score_counts_by_its_agreement_with_the_trust():
    assert believed(TrustTemperature, 0.7)[0] == pytest.approx(1 / 0.7, rel=0.1)
    assert believed(TrustTemperature, 0.3)[0] == pytest.approx(1 / 0.3, rel=0.1)


def test_the_trust_s_temperature_has_no_size_to_follow():
    temperature = TrustTemperature()
    for _ in range(30):
        temperature.update(*torch.tensor([4.0, 0.05, 64.0, 0.5]))
    assert temperature.value(torch.tensor(0.5)).item() == pytest.approx(4.0)


@pytest.mark.parametrize("kind", [FitTemperature, TrustTemperature])
@pytest.mark.parametrize("rho", [0.0, -0.2, -1.0])
def test_a_score_that_points_the_wrong_way_is_left_out(kind, rho):
    assert believed(kind, rho) == (torch.inf, 1.0)
    assert believed(RunningTemperature, rho)[0] < torch.inf


@pytest.mark.parametrize("kind", [FitTemperature, TrustTemperature, RunningTemperature])
@pytest.mark.parametrize("scale", [10.0, 1e-3, 1e6, 1e-6])
def test_the_temperature_has_the_scale_of_the_score(kind, scale):
    assert believed(kind, 0.7, scale)[0] == pytest.approx(scale * believed(kind, 0.7)[0], rel=1e-3)


@pytest.mark.parametrize("kind", [FitTemperature, TrustTemperature])
def test_the_temperature_does_not_depend_on_the_batch_size(kind):
    assert believed(kind, 0.7, size=256)[0] == pytest.approx(believed(kind, 0.7, size=64)[0], rel=0.15)


def test_an_outlier_at_low_belief_is_soon_forgotten():
    temperature, rho = FitTemperature(), torch.tensor(0.4)
    for seed in range(60):
        scores = draw("normal", 64, seed)
        if seed == 40:
            scores[3] = 1e4
            before = temperature.value(rho)
        share = effective_sample_size(torch.softmax(scores / temperature.value(rho), 0)) / 64
        temperature.update(scores.var(), share, torch.tensor(64.0), rho)
    assert before / 3 < temperature.value(rho) < 5 * before


def test_each_strategy_has_its_temperature():
    assert type(temperature_of("mimic")) is FitTemperature
    assert type(temperature_of("trust")) is TrustTemperature
    assert type(temperature_of("ref_loss")) is RunningTemperature
