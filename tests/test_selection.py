"""Strategies: weights of a batch by hand, and their limits."""

import pytest
import torch

from hf_mimic.selection import DISSECT, ONLY_SELECT, RANKINGS, STRATEGIES, SUBSETS, BatchSignals, weighting
from hf_mimic.subsets import KEEPERS


def signals(scores):
    scores = torch.as_tensor(scores, dtype=torch.float32)
    rank = torch.linspace(0, 1, len(scores))
    losses = torch.ones_like(scores)
    return BatchSignals(losses, scores, ref_losses=rank, ref_trust=rank, importance=1 + rank)


def draw(size):
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def weights_by(name, signals, temperature=1.0):
    """Return the softmax over one batch of what a strategy gives."""
    return torch.softmax(STRATEGIES[name](signals, temperature=temperature), 0)


def mimic(signals, temperature=1.0):
    return weights_by("mimic", signals, temperature)


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
    logits = STRATEGIES[name](signals(draw(size)), temperature=temperature)
    assert logits.shape == (size,)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", STRATEGIES)
def test_log_weights_of_a_sample_do_not_depend_on_its_batch(name):
    """What makes the softmax over a whole step possible, however it is split."""
    everything = signals(draw(8))
    part = BatchSignals(**{name: x[2:5] for name, x in vars(everything).items() if x is not None})
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
    for temperature in (0.1, torch.inf):
        assert mimic(signals([-3.0]), temperature=temperature).tolist() == [1.0]


# ---- what is kept of a batch ---------------------------------------------------------------------------------------


def test_rankings_by_hand():
    column = torch.tensor
    given = BatchSignals(
        losses=column([1.0, 3.0, 2.0]),
        mimic_scores=column([0.1, -0.2, 0.3]),
        ref_losses=column([0.5, 2.9, torch.nan]),
        ref_trust=column([0.9, 0.1, torch.nan]),
        clip_scores=column([30.0, 20.0, 25.0]),
    )
    expected = {
        "random": [0.0, 0.0, 0.0],
        "small_loss": [-1.0, -3.0, -2.0],
        "big_loss": [1.0, 3.0, 2.0],
        "clip_score": [30.0, 20.0, 25.0],
        "rho_loss": [0.5, 0.1, 0.0],  # nothing is known of the last one: as if the reference's loss were its own
        "ref_loss": [-0.5, -2.9, -2.0],
        "mimic": [0.1, -0.2, 0.3],
        "trust": [0.9, 0.1, 1.0],
    }
    assert expected.keys() == RANKINGS.keys()
    for name, values in expected.items():
        torch.testing.assert_close(RANKINGS[name](given), column(values), msg=name)


def test_a_ranking_without_its_signal():
    with pytest.raises(ValueError, match='strategy="clip_score" needs CLIPScores of pairs, got none'):
        RANKINGS["clip_score"](signals([1.0]))


def test_who_was_kept_by_chance_counts_for_those_who_were_not():
    given = BatchSignals(torch.ones(2), torch.ones(2), importance=torch.tensor([4.0, 1.0]))
    assert weights_by("info_batch", given).tolist() == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize(
    ("strategy", "rate", "expected"),
    [
        ("mimic", 1.0, "mimic"),
        ("mimic", 0.5, "uniform"),
        ("dissect", 0.5, "uniform"),
        ("dissect_mimic", 0.5, "mimic"),
        ("info_batch", 0.7, "info_batch"),
        ("random", 1.0, "uniform"),
    ],
)
def test_who_weighs_what_was_chosen(strategy, rate, expected):
    assert weighting(strategy, rate) == expected


def test_every_strategy_that_only_chooses_can():
    assert set(ONLY_SELECT) <= {*RANKINGS, *DISSECT, *SUBSETS} <= set(STRATEGIES)
    assert set(SUBSETS) <= set(KEEPERS)
