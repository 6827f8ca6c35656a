"""Health: correlations by hand, no verdict without evidence, causes and remedies, and what `on_unhealthy` does."""

import numpy as np
import pytest
import torch

from hf_mimic.health import Health, HealthWatch, likely_cause
from hf_mimic.optimizer_step import alone
from hf_mimic.weights import OnlineSoftmax, Weighed


def sums(scores, losses=None, trust=None, split=1):
    """Return the sums of one step, taken in by `split` micro-batches."""
    scores = torch.as_tensor(scores, dtype=torch.float64)
    losses = torch.ones_like(scores) if losses is None else torch.as_tensor(losses, dtype=torch.float64)
    trust = torch.full_like(scores, torch.nan) if trust is None else torch.as_tensor(trust, dtype=torch.float64)
    softmax = OnlineSoftmax()
    for part in zip(
        *(t.chunk(split) for t in (torch.zeros_like(scores), losses, scores)), trust.chunk(split), strict=True
    ):
        softmax.add(Weighed(*part[:3], trust=part[3]), gather=alone)
    return softmax.sums


def fed(steps, size=64, link=1.0, trust=True, seed=0):
    """Return a `Health` that saw steps whose scores go with fit and trust if `link` is positive."""
    generator, health = np.random.default_rng(seed), Health()
    for _ in range(steps):
        good = generator.random(size) < 0.6
        scores = link * good + 0.5 * generator.normal(size=size)
        losses = np.where(good, 0.5, 2.0) + 0.1 * generator.random(size)
        health.update([(sums(scores, losses, np.where(good, 0.9, 0.1) if trust else None), 1.0)])
    return health


@pytest.mark.parametrize("split", [1, 3])
def test_correlations_are_numpy_s(split):
    generator = np.random.default_rng(0)
    scores, losses, trust = generator.normal(size=12), generator.gamma(1.0, size=12), generator.random(12)
    trust[[2, 7]] = np.nan
    known, found = ~np.isnan(trust), sums(scores, losses, trust, split)
    assert found.fit_correlation.item() == pytest.approx(np.corrcoef(scores, -losses)[0, 1])
    assert found.trust_correlation.item() == pytest.approx(np.corrcoef(scores[known], trust[known])[0, 1])
    assert found.trust_correlation.item() != pytest.approx(found.fit_correlation.item(), abs=0.05)


@pytest.mark.parametrize("of_losses", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("of_scores", [1.0, 1e-9, 1e9])
def test_correlations_do_not_depend_on_the_scale(of_scores, of_losses):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(64, generator=generator)
    losses = (torch.randn(64, generator=generator) - scores).exp()

    def found(of_scores, of_losses):
        softmax = OnlineSoftmax()
        softmax.add(Weighed(torch.zeros(64), of_losses * losses, of_scores * scores, trust=-losses), gather=alone)
        return softmax.sums.fit_correlation, softmax.sums.trust_correlation

    torch.testing.assert_close(found(of_scores, of_losses), found(1.0, 1.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("spread", [0.0, 1e-5, 1e-4])
def test_what_varies_by_no_more_than_rounding_has_no_correlation(spread):
    scores, softmax = torch.randn(64, generator=torch.Generator().manual_seed(0)), OnlineSoftmax()
    softmax.add(Weighed(torch.zeros(64), 2.3 + spread * scores, scores), gather=alone)
    assert softmax.sums.fit_correlation.isnan()


@pytest.mark.parametrize("trust", [True, False])
def test_a_good_and_a_turned_score(trust):
    good, turned = (fed(20, link=link, trust=trust) for link in (1.0, -1.0))
    assert not good.unhealthy
    assert turned.unhealthy
    assert good.report()["unhealthy"] == 0.0
    report = turned.report()
    assert report["unhealthy"] == 1.0
    assert report["score_fit_correlation"] < -0.3
    assert ("score_trust_correlation" in report) == trust


def test_the_trust_outweighs_the_fit():
    """A model trained by a turned score fits what that score prefers."""
    health = Health()
    for seed in range(20):
        scores = np.random.default_rng(seed).normal(size=64)
        health.update([(sums(scores, np.exp(-scores), np.where(scores > 0, 0.1, 0.9)), 1.0)])
    report = health.report()
    assert report["score_fit_correlation"] > 0.5 > -0.5 > report["score_trust_correlation"]
    assert health.unhealthy


@pytest.mark.parametrize("size", [1, 4])
def test_what_cannot_be_computed_is_absent(size):
    health = Health()
    assert health.report() == {}
    assert not health.unhealthy
    for _ in range(400):  # one sample a step, or equal scores
        health.update([(sums(np.full(size, 0.3)), 1.0)])
    report = health.report()
    assert "score_fit_correlation" not in report
    assert "score_trust_correlation" not in report
    assert "unhealthy" not in report
    assert not health.unhealthy


def test_no_verdict_before_enough_samples():
    assert "unhealthy" not in fed(3, link=-1.0).report()
    assert not fed(3, link=-1.0).unhealthy
    assert fed(5, link=-1.0).report()["unhealthy"] == 1.0


def test_what_is_believed_grows_with_what_was_seen():
    like = torch.zeros((), dtype=torch.float64)
    assert Health().believed("fit", like) == 0
    many = fed(100)
    report = many.report()
    assert many.believed("fit", like).item() == pytest.approx(report["score_fit_correlation"], rel=0.01)
    assert many.believed("trust", like).item() == pytest.approx(report["score_trust_correlation"], rel=0.01)
    assert many.believed(None, like) == 0
    few = fed(1, size=16)
    rho = few.report()["score_fit_correlation"]
    assert few.believed("fit", like).item() == pytest.approx(rho * (1 - 1 / (16 * rho**2)))
    turned = fed(100, link=-1.0)
    assert turned.believed("fit", like).item() == pytest.approx(turned.report()["score_fit_correlation"], rel=0.01)


@pytest.mark.parametrize("steps", [1, 3, 30])
@pytest.mark.parametrize("size", [4, 8])
def test_chance_is_hardly_believed(size, steps):
    """Scores that say nothing, in steps of a few samples."""
    like = torch.zeros(())
    runs = [fed(steps, size=size, link=0.0, seed=seed) for seed in range(100)]
    believed = np.array([run.believed("fit", like).item() for run in runs])
    found = np.array([run.report()["score_fit_correlation"] for run in runs])
    assert np.abs(believed).mean() < 0.6 * np.abs(found).mean()
    assert (believed == 0).mean() > 0.4


def test_a_score_that_turns_is_found_within_its_window():
    health = fed(100)
    turned = fed(0)
    turned.resume(health.state(), torch.zeros((), dtype=torch.float64))
    generator = np.random.default_rng(1)
    for taken in range(60):  # noqa: B007
        good = generator.random(64) < 0.6
        turned.update([(sums(-1.0 * good + 0.3 * generator.normal(size=64), trust=np.where(good, 0.9, 0.1)), 1.0)])
        if turned.unhealthy:
            break
    assert 3 < taken < 40


def test_processes_are_averaged():
    here, there = fed(20), fed(20, link=-3.0)
    report = here.report(lambda state: torch.stack([state, there._state]))
    middle = (here.report()["score_trust_correlation"] + there.report()["score_trust_correlation"]) / 2
    assert report["score_trust_correlation"] == pytest.approx(middle)


@pytest.mark.parametrize(
    ("cosine", "norm", "message"),
    [
        (0.02, 1.0, r'initialised apart from the reference\'s \(their cosine was 0.02\).*head_init="reference"'),
        (0.9, 0.1, r"has come close to the reference \(\|\|v\|\| is 10% of what it was\).*fewer epochs"),
        (0.9, 1.0, r'is no guide for these data.*strategy="ref_loss"'),
        (None, None, "is no guide for these data"),
    ],
)
def test_cause_and_remedy(cosine, norm, message):
    report = fed(20, link=-1.0).report()
    watch = HealthWatch("raise", lambda report: likely_cause(report, head_cosine=cosine, norm_share=norm))
    with pytest.raises(RuntimeError, match=message):
        watch.look(report)


def test_one_warning():
    watch = HealthWatch("warn", lambda report: "turned")
    watch.look({})
    watch.look({"unhealthy": 0.0})
    with pytest.warns(UserWarning, match="^turned$"):
        watch.look({"unhealthy": 1.0})
    watch.look({"unhealthy": 1.0})  # a second warning would be an error
