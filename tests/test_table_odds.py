"""What a table says beside a trust: scores and the votes cast by them count once, silence counts nothing."""

import numpy as np
import pytest

from hf_mimic.table_odds import TableOdds
from hf_mimic.trust import combine, with_odds

N = 3_000


def drawn(seed=0):
    """Return a trust, scores (N, 1) that know more, and the votes (N, 1) that are cast by those scores."""
    generator = np.random.default_rng(seed)
    good = generator.random(N) < 0.7
    trust = 1 / (1 + np.exp(-(np.where(good, 2.0, -1.0) + generator.normal(size=N))))
    means = (np.where(good, 1.0, -1.0) + generator.normal(size=N))[:, None]
    return trust, means, (means > 0).astype(np.int8)


def spread(trust, means, votes):
    model = TableOdds(np.zeros(votes.shape[1], int)).fit(trust, means, votes)
    return float(np.std(model.odds(means, votes)))


def test_scores_and_the_votes_cast_by_them_count_once():
    trust, means, votes = drawn()
    both, scores, alone = (
        spread(trust, means, votes),
        spread(trust, means, votes * 0),
        spread(trust, means[:, :0], votes),
    )
    assert both == pytest.approx(max(scores, alone), rel=0.1)
    assert scores + alone > 1.7 * both  # the control: what each says by itself, added


def test_one_table_says_what_combine_says():
    trust, means, _ = drawn()
    votes = (means + np.random.default_rng(1).normal(size=(N, 3)) > 0).astype(np.int8)
    shares = np.stack([votes[:, :2].mean(1), votes[:, 2]], 1)
    for shown in (means, means[:, :0]):
        model = TableOdds(np.array([4, 4, 7])).fit(trust, shown, votes)  # the table's two filters of many
        expected = combine(trust, np.column_stack([shown, shares]))
        np.testing.assert_allclose(with_odds(trust, model.odds(shown, votes)), expected, atol=1e-4)
        assert abs(expected - trust).max() > 0.1


def test_the_sign_and_scale_of_scores_do_not_matter():
    trust, means, votes = drawn()
    one, other = (TableOdds(np.zeros(1, int)).fit(trust, sign * means, votes) for sign in (1, -1))
    np.testing.assert_allclose(one.odds(means, votes), other.odds(-means, votes), atol=1e-3)
    assert np.corrcoef(one.odds(means, votes), means[:, 0])[0, 1] > 0.9


def test_who_says_nothing():
    trust, means, votes = drawn()
    votes[:5] = -1
    means[5:10] = np.nan
    model = TableOdds(np.zeros(1, int)).fit(trust, means, votes)
    odds = model.odds(means, votes)
    assert np.isnan(odds[:5]).all()
    assert np.isfinite(odds[5:]).all()
    assert abs(odds[5:10]).max() < abs(odds[10:]).max()  # their votes speak
    assert TableOdds(np.zeros(1, int)).fit(trust[:99], means[:99], votes[:99]) is None
    assert TableOdds(np.zeros(1, int)).fit(trust * np.nan, means, votes) is None
