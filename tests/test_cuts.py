"""Votes in blocks against a loop over samples, with and without missing scores."""

import numpy as np
import pytest

from hf_mimic import blocks
from hf_mimic.filters import ThresholdFilter
from hf_mimic.scores import ScoreTable

NAN = float("nan")


def table_of(scores):
    """Return a table with these losses (N, T)."""
    table = ScoreTable()
    for epoch, column in enumerate(scores.T):
        table.record(np.arange(len(column)), epoch=epoch, step=epoch, loss=column)
    return table


def by_hand(scores, least):
    """Return the votes, the mean height and the decision of each sample, one after the other."""
    votes, heights, keep = [], [], []
    for row in scores.tolist():
        known = [value for value in row if value == value]
        above = [value - least for value in known]
        votes.append([-1 if value != value else int(value >= least) for value in row])
        heights.append(sum(above) / max(len(above), 1))
        favour = sum(value >= least for value in known) - len(known) / 2
        keep.append(favour > 0 or (favour == 0 and (not known or heights[-1] >= 0)))
    return np.array(votes), np.array(heights), np.array(keep)


@pytest.mark.parametrize("epochs", [1, 4, 5])
@pytest.mark.parametrize("missing", [0.0, 0.01, 0.5])
def test_votes_and_decisions_in_blocks(monkeypatch, epochs, missing):
    monkeypatch.setattr(blocks, "_BLOCK", 7)  # some blocks have all scores, others have not
    generator = np.random.default_rng(epochs)
    scores = np.round(4 * generator.normal(size=(60, epochs))).astype(np.float32) / 4  # some are the cut itself
    scores[generator.random(scores.shape) < missing] = NAN
    for given, sign, column in ((scores, 1, None), (table_of(-scores), -1, "loss")):
        model = ThresholdFilter(sign * 0.25, column=column).fit(given)
        votes, heights, keep = by_hand(scores, 0.25)
        heard = model.votes(given)
        np.testing.assert_array_equal(heard.votes, votes)
        np.testing.assert_allclose(heard.score, heights, atol=1e-5)
        np.testing.assert_array_equal(model.predict(given), keep)
        np.testing.assert_array_equal(model.filter(given).keep, keep)
        assert (by_hand(scores, 0.5)[2] != keep).any()  # the comparison can fail


def test_scores_in_memory_may_not_be_infinite(monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK", 7)
    scores = np.ones((20, 2))
    scores[19, 1] = np.inf
    with pytest.raises(ValueError, match="`score` must be finite or NaN"):
        ThresholdFilter().fit(scores)
