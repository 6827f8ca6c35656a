"""`ThresholdFilter` on votes counted by hand, on tables, and as a scikit-learn estimator."""

import numpy as np
import pytest
from sklearn.base import clone

from hf_mimic.filters import ThresholdFilter
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
    with pytest.warns(UserWarning, match="must have weights that differ, got equal ones only"):
        assert ThresholdFilter().fit_predict(table_of(relative[:, None])).all()
    assert not ThresholdFilter(1.001).fit_predict(relative[:, None]).any()


def test_it_is_a_scikit_learn_estimator():
    fitted = ThresholdFilter(0.8).fit(np.ones(3))
    assert fitted.get_params() == {"threshold": 0.8}
    copied = clone(fitted)
    assert not hasattr(copied, "threshold_")
    assert copied.set_params(threshold=2.0).fit(np.ones(3)).predict(np.ones(3)).tolist() == [False] * 3
    assert repr(ThresholdFilter(0.8)) == "ThresholdFilter(threshold=0.8)"


@pytest.mark.parametrize("threshold", [-0.1, NAN, np.inf])
def test_threshold_must_be_a_number_at_least_zero(threshold):
    with pytest.raises(ValueError, match=f"`threshold` must be a number >= 0, got {threshold}. Use 1.0"):
        ThresholdFilter(threshold).fit(np.ones(2))


def test_scores_without_weights_cannot_be_thresholded():
    table = ScoreTable()
    table.record([0, 1], epoch=0, step=0, mimic_score=[0.1, 0.2])
    message = "must have relative weights, got none: they are recorded in training, .* only `mimic_score`"
    for scores in (table, np.full((3, 2), NAN), ScoreTable()):
        with pytest.raises(ValueError, match=message):
            ThresholdFilter().fit_predict(scores)
