"""Membership against scikit-learn and counting by hand; discoveries against the rate that was asked for."""

import numpy as np
import pytest
from sklearn.metrics import jaccard_score, roc_auc_score

from hf_mimic.membership import discovered, membership

N = 400


def drawn(apart, seed=0):
    generator = np.random.default_rng(seed)
    member = generator.random(N) < 0.3
    return generator.normal(size=N) + apart * member, member


@pytest.mark.parametrize("apart", [0.0, 0.5, 3.0])
def test_numbers_are_scikit_learn_s(apart):
    score, member = drawn(apart)
    top = np.isin(np.arange(N), np.argsort(-score)[: member.sum()])
    assert membership(score, member).jaccard == pytest.approx(jaccard_score(member, top))
    score = np.round(score, 1)  # ties
    found = membership(score, member)
    assert found.auroc == pytest.approx(roc_auc_score(member, score))
    assert found.null_mean == pytest.approx(0.5, abs=0.01)
    n, m = N, int(member.sum())
    assert found.null_deviation == pytest.approx(np.sqrt((n + 1) / (12 * m * (n - m))), rel=0.1)  # Mann and Whitney's
    share = m / n
    assert found.null_jaccard == pytest.approx(share / (2 - share), abs=0.01)
    assert (found.p_value < 0.01) == (apart > 0)


def test_p_values_are_uniform_where_there_is_nothing():
    values = [membership(*drawn(0.0, seed), permutations=200).p_value for seed in range(60)]
    assert 0.3 < np.mean(values) < 0.7
    assert np.mean(np.array(values) < 0.1) < 0.25


def test_the_unknown_are_left_out():
    score, member = drawn(1.0)
    holes = score.copy()
    holes[:50] = np.nan
    assert membership(holes, member) == membership(score[50:], member[50:])


def test_it_is_seeded():
    assert membership(*drawn(0.3), seed=1) == membership(*drawn(0.3), seed=1)
    assert membership(*drawn(0.3), seed=1).null_mean != membership(*drawn(0.3), seed=2).null_mean


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_discoveries_are_mostly_right(rate):
    shares, found = [], []
    for seed in range(30):
        generator = np.random.default_rng(seed)
        score, member = drawn(3.0, seed)
        keep = discovered(score, generator.normal(size=2_000), rate=rate)
        shares.append((keep & ~member).sum() / max(keep.sum(), 1))
        found.append(keep[member].mean())
    assert np.mean(shares) < rate * 1.2
    assert np.mean(found) > 0.6
    assert np.mean(found) > 10 * np.mean(
        [discovered(drawn(0.0, s)[0], drawn(0.0, s + 99)[0]).mean() for s in range(30)]
    )


def test_what_has_no_score_is_no_discovery():
    assert discovered(np.array([np.nan, 9.0, 9.0]), np.zeros(100)).tolist() == [False, True, True]
    assert not discovered(np.zeros(0), np.zeros(5)).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: membership(np.ones(3), np.ones(2, bool)), r"must be \(N,\), got \(3,\) and \(2,\)"),
        (
            lambda: membership(np.ones(3), np.ones(3, bool)),
            "needs members and others with a score, got 3 members of 3",
        ),
        (lambda: membership(np.full(3, np.nan), np.array([True, False, False])), "got 0 members of 0"),
        (lambda: discovered(np.ones(3), np.full(2, np.nan)), "`outsider_score` must have a score, got none"),
        (lambda: discovered(np.ones(3), np.ones(3), rate=5), r"`rate` must be in \(0, 1\), got 5"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_equal_scores_find_no_members_that_come_first():
    found = membership(np.ones(N), np.arange(N) < 100)
    assert found.auroc == 0.5
    assert found.jaccard == pytest.approx(found.null_jaccard, abs=0.06)  # by the order of the rows it would be 1


def test_a_null_distribution_needs_draws():
    with pytest.raises(ValueError, match="`permutations` must be at least 1, got 0"):
        membership(*drawn(0.3), permutations=0)
