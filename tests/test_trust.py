"""The noise model against labels whose noise is known, evidence of any sign, and the cut of the highest expected F1."""

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import f1_score, roc_auc_score

from hf_mimic.filters import ThresholdFilter, TrustFilter, default_filter
from hf_mimic.scores import ScoreTable
from hf_mimic.trust import LabelNoiseModel, agrees_beyond_chance, combine, most_f1


def draw(rate, *, size=3000, classes=5, sharpness=3.0, overconfidence=1.0, kind="sym", seed=0):
    """Return log-probabilities of a calibrated (times `overconfidence`) judge, noisy labels, and which are wrong."""
    generator = np.random.default_rng(seed)
    calibrated = log_softmax(sharpness * generator.normal(size=(size, classes)), axis=1)
    true = np.array([generator.choice(classes, p=p) for p in np.exp(calibrated)])
    wrong = generator.random(size) < rate
    step = 1 if kind == "pair" else generator.integers(1, classes, size)
    labels = np.where(wrong, (true + step) % classes, true)
    return log_softmax(overconfidence * calibrated, axis=1), labels, wrong


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.2, 0.4, 0.6])
@pytest.mark.parametrize("overconfidence", [0.5, 1.0, 3.0])
def test_noise_rate_and_calibration_are_found_from_noisy_labels(rate, overconfidence):
    log_probs, labels, _ = draw(rate, overconfidence=overconfidence)
    model = LabelNoiseModel().fit(log_probs, labels)
    assert model.noise_rate_ == pytest.approx(rate, abs=0.04)
    assert model.beta_ == pytest.approx(1 / overconfidence, rel=0.25)


@pytest.mark.parametrize("overconfidence", [1.0, 3.0])
def test_the_reference_errors_are_not_taken_for_noise(overconfidence):
    log_probs, labels, _ = draw(0.1, sharpness=1.0, overconfidence=overconfidence)
    disagrees = (log_probs.argmax(1) != labels).mean()
    assert disagrees > 0.4  # what a filter by argmax would call noise
    assert LabelNoiseModel().fit(log_probs, labels).noise_rate_ == pytest.approx(0.1, abs=0.07)


def test_trust_is_calibrated():
    log_probs, labels, wrong = draw(0.4, size=6000, overconfidence=2.0)
    trust = LabelNoiseModel().fit(log_probs, labels).predict_proba(log_probs, labels)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        bin_ = (trust >= low) & (trust < low + 0.2)
        assert (~wrong[bin_]).mean() == pytest.approx(trust[bin_].mean(), abs=0.1)


def test_trust_is_the_bayes_posterior_of_the_true_model():
    log_probs, labels, _ = draw(0.3, size=8000)
    transition = np.full((5, 5), 0.3 / 4) + np.eye(5) * (0.7 - 0.3 / 4)
    joint = np.exp(log_probs) * transition[:, labels].T
    exact = joint[np.arange(len(labels)), labels] / joint.sum(1)
    trust = LabelNoiseModel().fit(log_probs, labels).predict_proba(log_probs, labels)
    assert np.abs(trust - exact).max() < 0.1
    assert np.abs(trust - exact).mean() < 0.02
    assert np.abs(np.exp(log_probs)[np.arange(len(labels)), labels] - exact).mean() > 0.1  # control: without the noise


def test_systematic_confusion_is_learned():
    log_probs, labels, wrong = draw(0.4, kind="pair", sharpness=2.0)
    model = LabelNoiseModel().fit(log_probs, labels)
    trust = model.predict_proba(log_probs, labels)
    own = log_probs[np.arange(len(labels)), labels]
    assert roc_auc_score(~wrong, trust) > roc_auc_score(~wrong, own) + 0.01
    assert model.transition_[0, 1] == pytest.approx(0.4, abs=0.08)
    assert model.transition_[0, 2] < 0.05


def test_more_rows_than_are_fitted():
    log_probs, labels, _ = draw(0.3, size=30_000)
    model = LabelNoiseModel().fit(log_probs, labels)
    assert model.noise_rate_ == pytest.approx(0.3, abs=0.02)
    assert model.predict_proba(log_probs, labels).shape == (30_000,)
    assert clone(model).get_params() == model.get_params()


@pytest.mark.parametrize("size", [1, 2, 7])
def test_few_rows_and_missing_classes(size):
    log_probs, labels, _ = draw(0.3, size=size)
    trust = LabelNoiseModel().fit(log_probs, labels).predict_proba(log_probs, labels)
    assert ((trust >= 0) & (trust <= 1)).all()


@pytest.mark.parametrize(
    ("log_probs", "labels", "message"),
    [
        (np.zeros((3, 2)), np.array([0, 1, 2]), "must be in 0 .. 1, got 0 .. 2"),
        (np.zeros((3, 2)), np.array([0, -100, 1]), "must be in 0 .. 1, got -100 .. 1"),
        (np.full((2, 2), np.nan), np.array([0, 1]), "must be finite"),
        (np.zeros((3, 2)), np.array([0, 1]), r"must be \(N, C\)"),
        (np.zeros((0, 2)), np.zeros(0, int), "N > 0"),
    ],
)
def test_bad_predictions(log_probs, labels, message):
    with pytest.raises(ValueError, match=message):
        LabelNoiseModel().fit(log_probs, labels)


def test_a_reference_no_better_than_chance_is_found_out():
    log_probs, labels, _ = draw(0.4)
    shuffled = np.random.default_rng(1).permutation(labels)
    assert agrees_beyond_chance(log_probs, labels)
    assert not agrees_beyond_chance(log_probs, shuffled)
    constant = np.tile(log_softmax([3.0, 0, 0, 0, 0]), (len(labels), 1))  # always right about one class
    assert not agrees_beyond_chance(constant, labels)


# ---- evidence ------------------------------------------------------------------------------------------------------


def judged(seed=0):
    log_probs, labels, wrong = draw(0.4, sharpness=1.0, seed=seed)
    return LabelNoiseModel().fit(log_probs, labels).predict_proba(log_probs, labels), wrong


@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-6, -1e6])
def test_evidence_counts_whatever_its_scale_and_sign(scale):
    trust, wrong = judged()
    evidence = scale * (np.random.default_rng(1).normal(size=len(wrong)) + 2 * ~wrong)[:, None]
    better = combine(trust, evidence)
    assert roc_auc_score(~wrong, better) > roc_auc_score(~wrong, trust) + 0.03
    assert better.mean() == pytest.approx((~wrong).mean(), abs=0.1)


def test_evidence_that_says_nothing_changes_little():
    trust, wrong = judged()
    noise = np.random.default_rng(2).normal(size=(len(wrong), 2))
    assert roc_auc_score(~wrong, combine(trust, noise)) == pytest.approx(roc_auc_score(~wrong, trust), abs=0.01)


def test_what_is_not_known_stays_unknown():
    trust, wrong = judged()
    evidence = np.where(wrong, -1.0, 1.0)[:, None] + np.zeros((1, 2))
    evidence[:, 1] = np.nan  # a column that was never recorded
    trust[:5], evidence[5:9] = np.nan, np.nan
    better = combine(trust, evidence)
    assert np.isnan(better[:5]).all()
    assert (better[5:9] == trust[5:9]).all()
    assert (better[9:] != trust[9:]).mean() > 0.9


@pytest.mark.parametrize("evidence", [np.zeros((3000, 1)), np.full((3000, 2), np.nan), np.zeros((3000, 0))])
def test_without_evidence_trust_is_the_reference_s(evidence):
    trust, _ = judged()
    assert (combine(trust, evidence) == trust).all()


# ---- the cut -------------------------------------------------------------------------------------------------------


def test_the_cut_is_the_best_for_calibrated_trust():
    generator = np.random.default_rng(0)
    trust = generator.beta(0.5, 0.5, 20_000)
    wrong = generator.random(len(trust)) > trust
    grid = np.linspace(0.01, 0.99, 99)
    best = max(f1_score(wrong, trust < cut) for cut in grid)
    assert f1_score(wrong, trust < most_f1(trust)) > best - 0.003
    assert f1_score(wrong, trust < 0.5) < best - 0.003  # control: not simply one half


def test_the_cut_by_hand():
    # wrong with .9, .2: rejecting the first has F1 2 * .9 / (1 + 1.1) = .857, both 2 * 1.1 / (2 + 1.1) = .71
    assert most_f1(np.array([0.1, 0.8])) == pytest.approx(1 - 0.9 / 2.1)


def table_of(trust):
    table = ScoreTable()
    table.record(np.arange(len(trust)), epoch=0, step=0, ref_trust=np.asarray(trust), mimic_score=0.5, loss=1.0)
    return table


def test_trust_filter_on_tables_and_arrays():
    trust = np.array([0.1, 0.8, np.nan, 0.95, 0.3])
    assert TrustFilter(0.5).fit_predict(trust).tolist() == [False, True, True, True, False]
    assert TrustFilter(0.5).fit_predict(table_of(trust)).tolist() == [False, True, True, True, False]
    fitted = TrustFilter().fit(trust)
    assert fitted.threshold_ == pytest.approx(most_f1(trust[~np.isnan(trust)]))
    assert clone(fitted).get_params() == {"min_trust": "f1"}
    assert isinstance(default_filter(table_of(trust)), TrustFilter)
    assert isinstance(default_filter(table_of([np.nan])), ThresholdFilter)


def test_equal_trust_is_no_reason_to_reject():
    for trust in (0.7, 0.9, 0.999):
        assert TrustFilter().fit_predict(np.full(50, trust)).all()
    assert TrustFilter().fit_predict([0.97]).all()


@pytest.mark.parametrize(("size", "classes"), [(300, 100), (2000, 100), (1000, 10)])
def test_few_rows_per_class_are_not_taken_for_noise(size, classes):
    log_probs, labels, _ = draw(0.0, size=size, classes=classes, sharpness=2.5)
    trust = LabelNoiseModel().fit(log_probs, labels).predict_proba(log_probs, labels)
    assert 1 - trust.mean() < 0.08
    assert TrustFilter().fit_predict(trust).mean() > 0.93
    assert (log_probs.argmax(1) == labels).mean() < 0.85  # the reference errs


@pytest.mark.parametrize("size", [24, 90])
def test_few_rows_of_evidence_are_not_believed(size):
    trust = np.random.default_rng(0).random(size)
    assert (combine(trust, np.random.default_rng(1).normal(size=(size, 2))) == trust).all()


def test_predict_before_fit():
    with pytest.raises(NotFittedError):
        TrustFilter().predict(np.array([0.5]))


@pytest.mark.parametrize("bad", [1.5, -0.1, "best", None])
def test_bad_min_trust(bad):
    with pytest.raises(ValueError, match=r"`min_trust` must be in \[0, 1\] or \"f1\", got"):
        TrustFilter(bad).fit(np.array([0.5]))


def test_no_trust_to_filter_by():
    with pytest.raises(ValueError, match="must have a trust, got none: the reference was not run"):
        TrustFilter().fit(table_of([np.nan, np.nan]))


def test_many_rows_are_combined_by_a_sample_of_them(monkeypatch):
    generator = np.random.default_rng(0)
    trust = generator.random(5000)
    evidence = np.stack([trust + generator.normal(size=5000), generator.normal(size=5000)], 1)
    evidence[::10, 0] = np.nan
    whole = combine(trust, evidence)
    monkeypatch.setattr("hf_mimic.trust._FITTED_ROWS", 2000)
    sampled = combine(trust, evidence)
    np.testing.assert_array_equal(sampled[::10], trust[::10])
    assert 0 < np.abs(sampled - whole).max() < 0.05
    assert np.abs(whole - trust).max() > 0.1
