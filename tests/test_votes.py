"""Votes counted by hand; EM against a slow twin of Dawid and Skene, and what it does with copies of a voter."""

import numpy as np
import pytest

from hf_mimic.blocks import Beside
from hf_mimic.votes import ABSTAINS, DawidSkene, count_votes, majority, patterns, voting

NO = -1


def drawn(seed, rates, n=4_000, good=0.6):
    """Return votes (n, V) of independent voters that are right at these rates, and the truth."""
    generator = np.random.default_rng(seed)
    truth = generator.random(n) < good
    right = generator.random((n, len(rates))) < np.array(rates)
    return np.where(right, truth[:, None], ~truth[:, None]).astype(int), truth


def slow_em(votes, iterations=100):
    """Dawid and Skene as written: one sample, one voter at a time; add-one-half rates, limited as the fast one."""
    n, voters = votes.shape
    good = np.array([np.mean([v for v in row if v != NO] or [0.5]) for row in votes])
    for _ in range(iterations):
        heard = [i for i in range(n) if (votes[i] != NO).any()]
        prior = np.clip(np.mean([good[i] for i in heard]), 0.02, 0.98)
        rates = np.zeros((2, voters))
        for v in range(voters):
            rows = [i for i in range(n) if votes[i, v] != NO]
            for c in (0, 1):
                mass = [good[i] if c else 1 - good[i] for i in rows]
                keep = sum(m * votes[i, v] for m, i in zip(mass, rows, strict=True))
                rates[c, v] = np.clip((keep + 0.5) / (sum(mass) + 1), 0.02, 0.98)
        before, good = good, good.copy()
        for i in range(n):
            like = [1 - prior, prior]
            for v in range(voters):
                if votes[i, v] != NO:
                    like = [p * (rates[c, v] if votes[i, v] else 1 - rates[c, v]) for c, p in enumerate(like)]
            good[i] = like[1] / sum(like)
        if np.abs(good - before).max() < 1e-6:
            break
    return good


@pytest.mark.parametrize(
    ("votes", "score", "kept"),
    [
        ([1, 1, 0], -1, True),
        ([1, 0, 0], 1, False),
        ([1, 0, NO], 0.1, True),
        ([1, 0, NO], 0.0, True),
        ([1, 0, NO], -0.1, False),
        ([1, 0, NO], np.nan, True),
        ([NO, NO, NO], -1, True),
        ([NO, 0, NO], 1, False),
    ],
)
def test_majority_by_hand(votes, score, kept):
    assert majority(np.array([votes]), np.array([score])).tolist() == [kept]


def test_a_tie_without_a_score_is_kept():
    assert majority(np.array([[1, 0]])).tolist() == [True]


@pytest.mark.parametrize("seed", range(3))
def test_em_equals_its_slow_twin(seed):
    votes, _ = drawn(seed, [0.9, 0.8, 0.7, 0.6], n=300)
    votes[np.random.default_rng(seed).random(votes.shape) < 0.3] = NO
    votes[:3] = NO  # nobody votes
    fast = DawidSkene(correlated=False).fit(votes).predict_proba(votes)
    assert fast == pytest.approx(slow_em(votes), abs=1e-5)
    assert np.abs(DawidSkene(correlated=True).fit(votes).predict_proba(votes) - slow_em(votes)).max() > 1e-3


def test_em_finds_rates_and_prior():
    rates = [0.95, 0.85, 0.75, 0.65]
    votes, truth = drawn(0, rates, n=20_000)
    model = DawidSkene(correlated=False).fit(votes)
    assert model.prior_ == pytest.approx(0.6, abs=0.02)
    assert model.keeps_[1] == pytest.approx(rates, abs=0.03)
    assert 1 - model.keeps_[0] == pytest.approx(rates, abs=0.03)
    assert ((model.predict_proba(votes) > 0.5) == truth).mean() > (majority(votes) == truth).mean() + 0.02


@pytest.mark.parametrize("copies", [2, 7, 50])
def test_copies_of_a_voter_count_as_one(copies):
    votes, truth = drawn(1, [0.8, 0.8, 0.8], n=10_000)
    crowd = np.concatenate([votes, np.repeat(votes[:, :1], copies - 1, 1)], 1)
    alone, together = (DawidSkene().fit(v).predict_proba(v) > 0.5 for v in (votes, crowd))
    assert (alone == together).mean() > 0.999
    independent = DawidSkene(correlated=False).fit(crowd).predict_proba(crowd) > 0.5  # the control: the crowd decides
    assert (independent == (votes[:, 0] > 0)).mean() > 0.99 or copies == 2
    assert ((together == truth).mean() > (independent == truth).mean() + 0.05) or copies == 2


@pytest.mark.parametrize("repeats", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("sizes", [(6, 3, 3), (9, 3, 2)])
def test_groups_have_one_voice_each(repeats, sizes):
    """Each voter repeats what its group says, or draws anew; the largest group is the worst."""
    generator, columns, truth = np.random.default_rng(0), [], drawn(0, [0.5], n=8_000)[1]
    for size, rate in zip(sizes, (0.7, 0.8, 0.9), strict=True):
        voice = np.where(generator.random(8_000) < rate, truth, ~truth)
        for _ in range(size):
            own = np.where(generator.random(8_000) < rate, truth, ~truth)
            columns.append(np.where(generator.random(8_000) < repeats, voice, own))
    votes, groups = np.stack(columns, 1).astype(int), np.repeat([0, 1, 2], sizes)
    right = (DawidSkene().fit(votes, groups=groups).predict_proba(votes) > 0.5) == truth
    assert right.mean() > 0.88
    assert right.mean() > (majority(votes) == truth).mean() - 0.02
    estimated = (DawidSkene().fit(votes).predict_proba(votes) > 0.5) == truth  # the control: without the groups
    assert estimated.mean() < right.mean() or repeats == 0.5
    with pytest.raises(ValueError, match=f"`groups` must have one per voter, {sum(sizes)}, got"):
        DawidSkene().fit(votes, groups=np.zeros(2, int))


def test_independent_voters_keep_their_weight():
    votes, _ = drawn(2, [0.9, 0.85, 0.8, 0.75], n=20_000)
    assert DawidSkene().fit(votes).weights_.min() > 0.85


@pytest.mark.parametrize("voters", [1, 2])
def test_fewer_than_three_voters_are_an_error(voters):
    votes = np.c_[np.ones((5, voters), int), np.full((5, 2), NO)].astype(int)
    with pytest.raises(ValueError, match=f"at least 3 voters must vote, got {voters} that do not abstain"):
        DawidSkene().fit(votes)
    with pytest.raises(ValueError, match=r"votes must be \(N, V\) with N, V > 0, got \(3,\)"):
        DawidSkene().fit(np.ones(3, int))
    with pytest.raises(ValueError, match="votes must be integers, 1"):
        DawidSkene().fit(np.full((3, 3), 2))


@pytest.mark.parametrize("voters", [3, 14, 45, 90])  # counted, sorted, numbered anew on the way
def test_patterns_are_the_rows(voters):
    generator = np.random.default_rng(voters)
    few = generator.integers(-1, 2, (7, voters))
    votes = few[generator.integers(0, 7, 500)]
    kinds, place, counts = patterns(votes)
    assert len(kinds) == len(np.unique(votes, axis=0))
    assert (np.nan_to_num(kinds[place], nan=ABSTAINS) == votes).all()
    assert (np.bincount(place) == counts).all()


def test_votes_are_counted():
    count, against = count_votes(np.array([[1, 0, NO], [0, 0, 0], [NO, NO, NO]]))
    assert count.tolist() == [2, 3, 0]
    assert against.tolist() == [1, 3, 0]


def test_who_votes_must_be_who_was_learned():
    model = DawidSkene().fit(np.ones((50, 4), np.int8))
    with pytest.raises(ValueError, match=r"votes must be \(N, 4\), as in the fit, got \(2, 3\)"):
        model.predict_proba(np.ones((2, 3), np.int8))


def test_votes_beside_each_other_are_those_of_one_array():
    parts = [np.random.default_rng(v).integers(-1, 2, (50, v)).astype(np.int8) for v in (1, 3, 2)]
    parts[1][:, 2] = NO
    whole, beside, score = np.concatenate(parts, 1), Beside(parts), np.linspace(-1, 1, 50)
    assert beside.shape == whole.shape
    for rows in (slice(None), slice(7, 30), np.array([4, 4, 0])):
        np.testing.assert_array_equal(beside[rows], whole[rows])
        np.testing.assert_array_equal(beside.of([0, 2]).at(rows)[:], whole[:, [0, 4, 5]][rows])
    assert beside.of([]).shape == (50, 0)
    assert voting(beside).tolist() == [True, True, True, False, True, True]
    np.testing.assert_array_equal(count_votes(beside), count_votes(whole))
    np.testing.assert_array_equal(majority(beside, score), majority(whole, score))
    assert (majority(beside, score) != majority(Beside(parts[:2]), score)).any()
    assert DawidSkene().fit(beside).prior_ == DawidSkene().fit(whole).prior_


def test_more_voters_than_a_byte_counts():
    votes = np.zeros((2, 300), dtype=np.int8)
    votes[0, :151] = 1
    np.testing.assert_array_equal(count_votes(votes), [[300, 300], [149, 300]])
    assert majority(votes).tolist() == [True, False]
