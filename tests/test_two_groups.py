"""The exact two-means cut against all splits and KMeans; the mixture against scikit-learn; evidence against known shapes."""

import itertools

import numpy as np
import pytest
from sklearn.cluster import KMeans

from hf_mimic import two_groups
from hf_mimic.two_groups import Mixture, has_two_groups, sampled, two_means


def cost(values, cut):
    """Return the sum of squares around the means of the two groups."""
    groups = values[values < cut], values[values >= cut]
    return sum(((group - group.mean()) ** 2).sum() for group in groups if len(group))


def best_cost(values):
    """Try every split."""
    ordered = np.sort(values)
    return min(cost(ordered, (a + b) / 2) for a, b in itertools.pairwise(ordered) if a < b)


@pytest.mark.parametrize("seed", range(20))
def test_no_split_is_better(seed):
    generator = np.random.default_rng(seed)
    values = [generator.normal(size=60), generator.gamma(0.3, size=60), generator.integers(0, 5, 60).astype(float)][
        seed % 3
    ]
    assert cost(values, two_means(values)) == pytest.approx(best_cost(values), rel=1e-12)
    assert cost(values, np.median(values) + values.std()) > best_cost(values)  # another cut is worse


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (1e-12, 0), (1e12, 0), (1, 1e6)])
def test_scale_and_shift_do_not_matter(scale, shift):
    values = np.concatenate([np.random.default_rng(0).normal(0, 1, 500), np.random.default_rng(1).normal(6, 1, 300)])
    assert two_means(values * scale + shift) == pytest.approx(two_means(values) * scale + shift, rel=1e-9)


def test_it_is_never_worse_than_kmeans():
    values = np.random.default_rng(3).gamma(1.0, size=3_000)
    found = KMeans(2, n_init=10, random_state=0).fit(values[:, None])
    assert cost(values, two_means(values)) <= found.inertia_ * (1 + 1e-12)


def test_more_values_than_a_block_are_cut_alike():
    generator = np.random.default_rng(0)
    values = np.where(
        generator.random(450_001) < 0.3, generator.normal(0, 1, 450_001), generator.normal(5, 1, 450_001)
    )
    ordered = np.sort(values)
    sums, n = np.cumsum(ordered - ordered.mean())[:-1], np.arange(1, len(values))
    split = (sums**2 / (n * (len(values) - n))).argmax() + 1
    assert two_means(values) == pytest.approx((ordered[:split].mean() + ordered[split:].mean()) / 2, rel=1e-9)
    assert two_means(values.astype(np.float32)) == pytest.approx(two_means(values), rel=1e-6)


@pytest.mark.parametrize("block", [1, 2, 7, 59, 60, 61])
@pytest.mark.parametrize("seed", range(6))
def test_blocks_that_are_left_out_do_not_hold_the_cut(monkeypatch, seed, block):
    generator = np.random.default_rng(seed)
    values = [generator.normal(size=60), generator.gamma(0.3, size=60), generator.integers(0, 3, 60).astype(float)]
    monkeypatch.setattr(two_groups, "_BLOCK", block)
    assert cost(values[seed % 3], two_means(values[seed % 3])) == pytest.approx(best_cost(values[seed % 3]), rel=1e-12)


def test_leaving_out_the_wrong_blocks_is_seen(monkeypatch):
    """The control; and how few blocks are looked at."""
    values = np.concatenate([np.random.default_rng(0).normal(m, 1, 500) for m in (0, 8)])
    monkeypatch.setattr(two_groups, "_BLOCK", 50)
    chosen, found = two_groups._with_cut, []
    monkeypatch.setattr(two_groups, "_with_cut", lambda *given: found.extend(chosen(*given)) or chosen(*given))
    assert cost(values, two_means(values)) == pytest.approx(best_cost(values), rel=1e-12)
    assert len(found) <= 2
    monkeypatch.setattr(two_groups, "_with_cut", lambda *given: np.array([3]))
    assert cost(values, two_means(values)) > 1.1 * best_cost(values)


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, 2.0]])
def test_equal_values_have_no_cut(values):
    assert two_means(np.array(values)) is None
    assert Mixture.fit(np.array(values)) is None


def test_two_values_are_cut_between():
    assert two_means(np.array([1.0, 3.0])) == 2.0


def test_a_mixture_is_found_and_cut_where_both_are_as_likely():
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.normal(-2, 0.5, 4_000), generator.normal(3, 1.5, 6_000)])
    found = Mixture.fit(values)
    assert found.weights == pytest.approx([0.4, 0.6], abs=0.02)
    assert found.means == pytest.approx([-2, 3], abs=0.1)
    assert found.deviations == pytest.approx([0.5, 1.5], abs=0.1)
    assert found.posterior(np.array([found.cut()])) == pytest.approx(0.5, abs=0.02)
    assert found.cut(0.1) < found.cut() < found.cut(0.9)
    assert found.posterior(np.array([-9.0])) > 0.5  # the wider group owns the far tail, which the cut does not follow
    assert -9 < found.cut()


def test_far_values_do_not_overflow():
    found = Mixture.fit(np.array([0.0, 1e-3, 1.0, 1.001, 1e30]))
    assert np.isfinite(found.posterior(np.array([-1e30, 0.0, 1e30]))).all()


SHAPES = {
    "normal": lambda g, n: g.normal(size=n),
    "exponential": lambda g, n: g.exponential(size=n),
    "log-normal": lambda g, n: g.lognormal(size=n),
    "heavy tails": lambda g, n: g.standard_t(2, size=n),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [60, 1_000, 30_000])
def test_one_group_is_not_taken_for_two(shape, n):
    found = [has_two_groups(SHAPES[shape](np.random.default_rng(seed), n)) for seed in range(10)]
    assert sum(found) <= 1


@pytest.mark.parametrize(("n", "share", "apart"), [(1_000, 0.5, 4), (2_000, 0.4, 3), (30_000, 0.1, 4)])
def test_two_groups_are_seen(n, share, apart):
    for seed in range(5):
        generator = np.random.default_rng(seed)
        assert has_two_groups(generator.normal(size=n) + apart * (generator.random(n) < share))


def test_few_or_equal_values_are_no_evidence():
    assert not has_two_groups(np.array([0.0, 1.0]))
    assert not has_two_groups(np.ones(1_000))
    assert not has_two_groups(np.r_[np.zeros(20), np.ones(20)])


def test_a_sample_is_seeded_and_whole_where_it_fits():
    values = np.arange(300_000)
    assert len(sampled(values, 0)) == 200_000
    assert (sampled(values, 0) == sampled(values, 0)).all()
    assert (sampled(values, 0) != sampled(values, 1)).any()
    assert sampled(values[:10], 0).tolist() == list(range(10))


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e200])
def test_two_means_of_any_size(scale):
    values = np.array([1.0, 2.0, 9.0, 10.0, 11.0])
    assert two_means(values * scale) == pytest.approx(5.75 * scale, rel=1e-9, abs=0)  # halfway between 1.5 and 10


def test_two_means_of_float32_that_differ_by_more_than_float32_holds():
    assert two_means(np.array([-3e38, 3e38, 2.9e38], np.float32)) == pytest.approx(-2.5e36, rel=1e-2)
