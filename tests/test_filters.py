"""Filters on votes counted by hand, on tables, as scikit-learn estimators; what they say, and their bad input."""

import numpy as np
import pyarrow as pa
import pytest
from sklearn.base import clone

from hf_mimic.filters import MixtureFilter, ThresholdFilter, TrustFilter, TwoMeansFilter, default_filter, top_p
from hf_mimic.scores import ScoreTable

NAN = np.nan


def table_of(weights, ids=None):
    """Return a table with visit t of sample i at step t, as training would record it."""
    table = ScoreTable()
    ids = np.arange(len(weights)) if ids is None else np.asarray(ids)
    for step, column in enumerate(np.asarray(weights, dtype=float).T):
        table.record(ids, epoch=step, step=step, relative_weight=column)
    return table


@pytest.mark.parametrize(
    ("visits", "kept"),
    [
        ([1.5, 1.2, 0.1], True),  # 2 of 3
        ([0.5, 0.9, 3.0], False),  # 1 of 3, although the mean is above 1
        ([1.0, 1.0, 0.0], True),  # the threshold itself is kept
        ([NAN, 1.2, NAN], True),  # who abstains has no vote
        ([NAN, 0.2, NAN], False),
        ([NAN, 1.9, 0.2], True),  # a tie goes to the mean, 1.05
        ([NAN, 1.1, 0.2], False),  # 0.65
        ([NAN, 1.5, 0.5], True),  # a mean of exactly 1
        ([NAN, NAN, NAN], True),  # nothing is known against it
        ([0.0, 0.0, 0.0], False),  # a sample whose loss was not finite
    ],
)
def test_votes_by_hand(visits, kept):
    assert ThresholdFilter().fit_predict(np.array([visits, [1.0, 1.0, 1.0]])).tolist() == [kept, True]


def test_one_visit_is_a_plain_threshold():
    weights = np.array([0.2, 1.0, 1.3, NAN, 0.99])
    assert ThresholdFilter().fit_predict(weights).tolist() == [False, True, True, True, False]
    assert ThresholdFilter(1.2).fit_predict(weights).tolist() == [False, False, True, True, False]
    assert ThresholdFilter(0).fit_predict(weights).tolist() == [True] * 5


def test_table_and_matrix_agree():
    generator = np.random.default_rng(0)
    weights = generator.gamma(1.0, size=(40, 6)).astype(np.float32)
    weights[generator.random(weights.shape) < 0.3] = NAN
    weights[7] = NAN
    keep = ThresholdFilter().fit_predict(weights)
    assert 5 < keep.sum() < 35
    assert (ThresholdFilter().fit_predict(table_of(weights)) == keep).all()
    assert (ThresholdFilter(0.5).fit_predict(table_of(weights)) != keep).any()


def test_the_order_is_that_of_the_aggregated_table():
    ids = [30, 10, 20]
    table = table_of([[2.0], [0.1], [3.0]], ids)
    assert table.aggregate()["sample_id"].to_pylist() == [10, 20, 30]
    assert ThresholdFilter().fit_predict(table).tolist() == [False, True, True]


@pytest.mark.parametrize("batch", [32, 41, 47, 55, 110])  # float32: 1/41 * 41 < 1
def test_uniform_weights_are_all_kept(batch):
    relative = np.full(batch, np.float32(1 / batch) * np.float32(batch))
    with pytest.warns(UserWarning, match="must have scores that differ, got equal ones only in `relative_weight`"):
        assert ThresholdFilter().fit_predict(table_of(relative[:, None])).all()
    assert not ThresholdFilter(1.001).fit_predict(relative[:, None]).any()


def test_it_is_a_scikit_learn_estimator():
    fitted = ThresholdFilter(0.8).fit(np.ones(3))
    assert fitted.get_params()["threshold"] == 0.8
    copied = clone(fitted)
    assert not hasattr(copied, "threshold_")
    assert copied.set_params(threshold=2.0).fit(np.ones(3)).predict(np.ones(3)).tolist() == [False] * 3
    assert repr(ThresholdFilter(0.8)) == "ThresholdFilter(threshold=0.8)"


@pytest.mark.parametrize("threshold", [NAN, np.inf, "a"])
def test_threshold_must_be_a_finite_number(threshold):
    with pytest.raises(ValueError, match=f"`threshold` must be a finite number, got {threshold!r}. Use 1.0"):
        ThresholdFilter(threshold).fit(np.ones(2))
    with pytest.raises(ValueError, match=r"`top` must be in \(0, 1\], got '0.3'. Use 0.3"):
        ThresholdFilter(top="0.3").fit(np.ones(2))


def test_scores_without_weights_cannot_be_thresholded():
    table = ScoreTable()
    table.record([0, 1], epoch=0, step=0, mimic_score=[0.1, 0.2])
    message = (
        "must have a `relative_weight`, got none. Relative weights are recorded in training; .* only `mimic_score`"
    )
    for scores in (table, ScoreTable()):
        with pytest.raises(ValueError, match=message):
            ThresholdFilter().fit_predict(scores)


CUTS = [TwoMeansFilter, MixtureFilter]


def two_groups(seed=0, n=600, epochs=3):
    """Return scores (n, epochs) of bad and good samples, and who is good."""
    generator = np.random.default_rng(seed)
    good = generator.random(n) < 0.6
    return np.where(good, 2.0, -2.0)[:, None] + generator.normal(size=(n, epochs)), good


@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("over", ["epochs", "pooled", "mean"])
def test_two_groups_are_told_apart(kind, over):
    values, good = two_groups()
    fitted = kind(over=over).fit(values)
    assert (fitted.predict(values) == good).mean() > 0.98
    assert np.shape(fitted.threshold_) == ((3,) if over == "epochs" else ())
    assert np.abs(fitted.threshold_).max() < 0.6
    assert (kind(over=over).fit_predict(-values) == good).mean() < 0.02  # the direction counts


@pytest.mark.parametrize("kind", CUTS)
def test_losses_are_better_when_low(kind):
    values, good = two_groups()
    table = ScoreTable()
    for step, column in enumerate(values.T):
        table.record(np.arange(len(values)), epoch=step, step=step, loss=-column, mimic_score=column)
    by_loss = kind("loss").fit(table)
    assert (by_loss.predict(table) == kind().fit_predict(table)).all()
    assert by_loss.threshold_ == pytest.approx(-kind().fit(table).threshold_, abs=1e-6)
    assert "is above its cut at 3 of 3 visits" in " ".join(by_loss.filter(table).reasons)
    assert (by_loss.predict(table) == good).mean() > 0.98


@pytest.mark.parametrize("kind", [*CUTS, lambda **options: ThresholdFilter(0.0, check=True, **options)])
def test_one_group_is_kept_whole(kind):
    values = np.random.default_rng(0).lognormal(size=(500, 2))
    with pytest.warns(UserWarning, match="no evidence of two groups in `score`: everything is kept"):
        fitted = kind().fit(values)
    assert not fitted.two_groups_
    assert fitted.predict(values).all()
    assert fitted.filter(values).reasons == ("`score` has no two groups",)


@pytest.mark.parametrize("kind", CUTS)
def test_without_the_check_a_cut_is_made(kind):
    values = np.random.default_rng(0).lognormal(size=(500, 2))
    assert 0.01 < kind(check=False).fit_predict(values).mean() < 0.99


@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("values", [[1.0, 2.0], [3.0] * 200, [5.0]])
def test_two_rows_or_equal_scores_are_kept(kind, values):
    with pytest.warns(UserWarning, match="no evidence of two groups"):
        assert kind().fit_predict(np.array(values)).all()


@pytest.mark.parametrize("kind", [ThresholdFilter, *CUTS])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([NAN, NAN], "at least one sample must have a `score`, got none"),
        ([], r"scores must be \(N,\) or \(N, T\) with N, T > 0, got \(0,\)"),
        ([1.0, np.inf], "`score` must be finite or NaN"),
        ([[[1.0]]], r"got \(1, 1, 1\)"),
    ],
)
def test_scores_that_are_none(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind().fit(np.array(values))


def test_an_unknown_column_is_named():
    with pytest.raises(ValueError, match="Did you mean 'mimic_score'"):
        TwoMeansFilter("mimic_scores").fit(table_of(np.ones((3, 1))))
    with pytest.raises(ValueError, match="`over` must be one of 'epochs', 'pooled', 'mean', got 'epoch'"):
        TwoMeansFilter(over="epoch").fit(np.ones(3))


def test_epochs_must_be_those_of_the_fit():
    values, good = two_groups()
    with pytest.raises(ValueError, match="must have the 3 epochs of the fit, got 2"):
        TwoMeansFilter().fit(values).predict(values[:, :2])
    assert (TwoMeansFilter(over="pooled").fit(values).predict(values[:, :2]) == good).mean() > 0.95


def test_a_missing_epoch_abstains():
    values, good = two_groups()
    holes = values.copy()
    holes[np.random.default_rng(1).random(values.shape) < 0.4] = NAN
    holes[:5] = NAN
    result = TwoMeansFilter().fit(holes).filter(holes)
    assert result.keep[:5].all()
    assert set(result.reason[:5]) == {"no `score`"}
    assert (result.keep[5:] == good[5:]).mean() > 0.9


def test_a_result_tells_both_halves_and_why():
    result = ThresholdFilter(0.0, column="mimic_score").fit(np.array([[1.0, 2.0], [-1.0, -2.0], [2.0, -1.0]]))
    result = result.filter(np.array([[1.0, 2.0], [-1.0, -2.0], [2.0, -1.0]]))
    assert result.kept.tolist() == [0, 2]
    assert result.dropped.tolist() == [1]
    assert result.reason.tolist() == [
        "`mimic_score` is below its cut at 0 of 2 visits",
        "`mimic_score` is below its cut at 2 of 2 visits",
        "`mimic_score` is below its cut at 1 of 2 visits, and not in the mean",
    ]
    assert result.to_arrow()["reason"].to_pylist() == result.reason.tolist()
    assert len(result) == 3


def test_trust_has_its_reasons():
    trust = np.array([0.9, 0.1, NAN])
    result = TrustFilter(0.5).fit(trust).filter(trust)
    assert result.reason.tolist() == ["trust of 0.5 or more", "trust below 0.5", "no trust"]
    assert result.keep.tolist() == [True, False, True]


@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_a_top_share(share):
    values = np.random.default_rng(0).normal(size=(200, 3))
    keep = ThresholdFilter(top=share).fit_predict(values)
    assert keep.sum() == round(share * 200)
    assert (keep == top_p(values.mean(1), share)).all()
    assert values.mean(1)[keep].min() > values.mean(1)[~keep].max(initial=-9)


def test_a_share_of_each_class():
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.repeat(["a", "b", "c"], [100, 40, 10]))
    values = generator.normal(size=150) + (labels == "a")
    balanced = top_p(values, 0.5, labels=labels)
    assert [balanced[labels == name].sum() for name in "abc"] == [50, 20, 5]
    assert top_p(values, 0.5)[labels == "a"].sum() > 55  # the control
    for name in "abc":
        mine = labels == name
        assert values[mine & balanced].min() > values[mine & ~balanced].max()


def test_a_share_keeps_exactly_so_many_at_ties_and_takes_the_unknown_last():
    assert top_p(np.array([1.0, 1.0, 1.0, 1.0]), 0.5).tolist() == [True, True, False, False]
    assert top_p(np.array([1.0, 3.0, 2.0]), 0.1).tolist() == [False, True, False]  # one at least
    assert top_p(np.array([]), 0.1).tolist() == []
    assert top_p(np.array([NAN, 1.0, NAN, 2.0]), 0.75).tolist() == [True, True, False, True]
    with pytest.raises(ValueError, match=r"`share` must be in \(0, 1\], got 0"):
        top_p(np.ones(3), 0)
    with pytest.raises(ValueError, match="`labels` must have one value per score, 3, got 2"):
        top_p(np.ones(3), 0.5, labels=np.array([0, 1]))
    with pytest.raises(ValueError, match=r"`top` must be in \(0, 1\], got 1.5"):
        ThresholdFilter(top=1.5).fit(np.ones(3))


def test_the_posterior_moves_the_cut():
    values, _ = two_groups(n=3_000)
    low, high = (MixtureFilter(over="mean", posterior=p).fit(values).threshold_ for p in (0.01, 0.99))
    assert low < MixtureFilter(over="mean").fit(values).threshold_ < high
    with pytest.raises(ValueError, match=r"`posterior` must be in \(0, 1\), got 1"):
        MixtureFilter(posterior=1).fit(values)


def test_the_default_is_the_trust_where_there_is_one():
    table = table_of([[1.0], [2.0]])
    assert isinstance(default_filter(table), ThresholdFilter)
    table.record([5], epoch=0, step=9, ref_trust=0.5)
    assert isinstance(default_filter(table), TrustFilter)


@pytest.mark.parametrize("kind", [ThresholdFilter, TrustFilter, *CUTS])
def test_filters_are_estimators(kind):
    assert clone(kind()).get_params() == kind().get_params()
    assert repr(kind()) == f"{kind.__name__}()"


@pytest.mark.parametrize("model", [TwoMeansFilter(), MixtureFilter()])
def test_an_epoch_of_equal_scores_does_not_vote(model):
    generator = np.random.default_rng(0)
    good = generator.random(400) < 0.6
    scores = np.stack([np.zeros(400), np.where(good, 3.0, -3.0) + generator.normal(size=400)], 1)
    assert (model.fit_predict(scores) == good).mean() > 0.99  # not kept by a tie
    assert {*model.filter(scores).reason} == {f"`score` is below its cut at {k} of 1 visits" for k in (0, 1)}
    scores[0, 1] = np.nan
    assert model.fit(scores).filter(scores).reason[0] == "no `score` at a visit that has a cut"


def test_a_sample_without_a_trust_abstains():
    heard = TrustFilter(0.5).fit(np.array([0.2, 0.9])).votes(np.array([0.2, 0.9, np.nan]))
    assert heard.votes[:, 0].tolist() == [0, 1, -1]
    assert heard.score.tolist() == pytest.approx([-0.3, 0.4, 0.0])


@pytest.mark.parametrize("trust", [[0.1, np.inf], [-3.0, 0.2, 5.0], [[0.1], [0.9]]])
def test_a_trust_is_a_probability(trust):
    with pytest.raises(ValueError, match=r"trust must be probabilities \(N,\), NaN where there is none, got"):
        TrustFilter().fit(np.array(trust))


def test_a_reference_that_said_nan_is_no_judge():
    rows = pa.table({"sample_id": [0, 1], "relative_weight": [0.5, 1.5], "ref_trust": [np.nan, np.nan]})
    assert isinstance(default_filter(ScoreTable.from_arrow(rows)), ThresholdFilter)
