"""The noise rate against known noise, its interval, data sets ranked; what is said where nothing is known."""

import json

import numpy as np
import pytest

from hf_mimic.quality import QualityReport, compare_datasets, noise_rate
from hf_mimic.scores import ScoreTable

N = 2_000


def judged(rate, *, seed=0, sure=3.0):
    """Return a table with calibrated trust of labels of which `rate` are wrong."""
    generator = np.random.default_rng(seed)
    wrong = generator.random(N) < rate
    odds = np.where(wrong, -sure, sure) + generator.normal(size=N) * np.sqrt(2 * sure)  # log likelihood ratio
    trust = 1 / (1 + np.exp(-odds) * rate / max(1 - rate, 1e-9))
    table = ScoreTable()
    table.record(np.arange(N), epoch=0, step=0, ref_trust=trust, mimic_score=np.where(wrong, -1.0, 1.0))
    return table, wrong


def unjudged(apart, *, share=0.4, seed=0):
    """Return a table with scores of two groups that are so far apart, without a reference's judgement."""
    generator = np.random.default_rng(seed)
    low = generator.random(N) < share
    table = ScoreTable()
    for step in range(3):
        values = np.where(low, -apart, apart) + generator.normal(size=N)
        table.record(np.arange(N), epoch=step, step=step, mimic_score=values, loss=3 - values)
    return table, low


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.4, 0.7])
def test_the_rate_is_found_and_covered(rate):
    table, wrong = judged(rate)
    report = QualityReport.from_scores(table)
    assert report.evidence == "trust"
    assert report.noise_rate == pytest.approx(wrong.mean(), abs=0.03)
    assert report.noise_low <= wrong.mean() <= report.noise_high
    assert report.noise_high - report.noise_low < 0.25
    assert report.mean_score == pytest.approx(1 - 2 * wrong.mean(), abs=1e-6)
    assert report.retained == pytest.approx(1 - wrong.mean(), abs=0.08)


def test_a_clean_set_is_kept():
    report = QualityReport.from_scores(judged(0.0)[0])
    assert (report.noise_rate, report.noise_low) == (pytest.approx(0, abs=1e-3), pytest.approx(0, abs=1e-3))
    assert report.retained > 0.999


def test_the_bootstrap_is_that_of_a_mean():
    right = np.random.default_rng(0).beta(2, 1, size=5_000)
    rate, low, high = noise_rate(right)
    unsure = (right * (1 - right)).mean()
    error = right.std() / np.sqrt(len(right))
    assert rate == pytest.approx(1 - right.mean())
    assert low == pytest.approx(rate - 1.96 * error - unsure, abs=0.2 * error)
    assert high == pytest.approx(rate + 1.96 * error + unsure, abs=0.2 * error)
    narrow = noise_rate(right, level=0.5)
    assert low < narrow[1] < rate < narrow[2] < high


def test_two_groups_of_scores_are_evidence_too():
    table, low = unjudged(2.0)
    report = QualityReport.from_scores(table)
    assert report.evidence == "votes"
    assert report.noise_rate == pytest.approx(low.mean(), abs=0.02)
    assert report.retained == pytest.approx(1 - low.mean(), abs=0.02)


def test_nothing_is_made_up_where_nothing_is_known():
    report = QualityReport.from_scores(unjudged(0.0)[0])
    assert (report.evidence, report.noise_rate, report.noise_low, report.noise_high) == ("none", None, None, None)
    assert report.retained == 1.0
    assert json.dumps(report.as_dict())


def test_an_own_filter_and_unscored_samples_are_counted():
    table, _ = judged(0.3)
    table.record([9_999], epoch=0, step=5, mimic_score=np.nan)
    report = QualityReport.from_scores(table, keep=np.arange(N + 1) < 500)
    assert (report.n_samples, report.n_scored) == (N + 1, N)
    assert report.retained == pytest.approx(500 / (N + 1))
    with pytest.raises(ValueError, match=f"`keep` must have one value per scored sample, {N + 1}, got 3"):
        QualityReport.from_scores(table, keep=np.ones(3, bool))


def test_data_sets_are_ranked():
    tables = {"bad": judged(0.5)[0], "good": judged(0.1)[0], "silent": unjudged(0.0)[0], "middle": judged(0.3)[0]}
    assert list(compare_datasets(tables)) == ["good", "middle", "bad", "silent"]
    assert list(compare_datasets(tables, by="mean_score"))[-1] in ("silent", "bad")
    assert next(iter(compare_datasets(tables, by="retained"))) == "silent"


def test_other_references_are_not_compared(tmp_path):
    tables = {}
    for name, reference in (("a", "you/one"), ("b", "you/two")):
        tables[name] = ScoreTable(tmp_path / name)
        tables[name].extend(judged(0.2)[0])
        tables[name].flush()
        settings = {"reference": reference, "revision": None, "model": name, "layers": "head"}
        (tmp_path / name / "scoring.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="got the reference 'you/one' for a and 'you/two' for b"):
        compare_datasets(tables)
    settings["reference"] = "you/one"
    (tmp_path / "b" / "scoring.json").write_text(json.dumps(settings))
    assert list(compare_datasets(tables)) == ["a", "b"]
    with pytest.raises(ValueError, match="got the model 'a' for a and 'b' for b"):
        compare_datasets(tables, by="mean_score")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QualityReport.from_scores(ScoreTable()), "a quality report must have scores, got an empty table"),
        (lambda: noise_rate(np.ones(3), level=95), r"`level` must be in \(0, 1\), got 95"),
        (lambda: compare_datasets({}), "at least one data set must be given to compare, got none"),
        (lambda: compare_datasets({"a": judged(0.1)[0]}, by="noise"), "Did you mean 'noise_rate'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_which_data_set_has_no_scores_is_said():
    empty = ScoreTable()
    empty.record(np.arange(5), epoch=0, step=0)
    with pytest.raises(ValueError, match="photographs: an ensemble must have a filter, got none"):
        compare_datasets({"drawings": judged(0.2)[0], "photographs": empty})


def test_ids_are_no_decisions():
    with pytest.raises(ValueError, match="`keep` must be booleans, got int64"):
        QualityReport.from_scores(judged(0.2)[0], keep=np.arange(N))


@pytest.mark.parametrize("text", ["nonsense", "[1]"])
def test_broken_settings_are_named(tmp_path, text):
    table = ScoreTable(tmp_path)
    table.record([0, 1], epoch=0, step=0, mimic_score=[1.0, 2.0])
    (tmp_path / "scoring.json").write_text(text)
    with pytest.raises(ValueError, match=r"scoring\.json must hold the settings of a scoring pass, it does not"):
        compare_datasets({"a": table})
