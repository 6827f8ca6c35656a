"""The ensemble: better than its members where they are independent, never fooled by copies, silent where it knows nothing."""

import pickle
import warnings

import numpy as np
import pytest
from sklearn.base import clone

from hf_mimic.ensembles import EnsembleFilter
from hf_mimic.filters import MixtureFilter, ThresholdFilter, TrustFilter, TwoMeansFilter
from hf_mimic.scores import ScoreTable
from hf_mimic.trust import most_f1

NAN = np.nan
N = 1_500


def drawn(seed, *, apart=2.0, epochs=3, own=1.0, trust=None, good=None):
    """Return a table whose scores are `apart` for good samples, and who is good; epochs share part of their error."""
    generator = np.random.default_rng(seed)
    good = np.random.default_rng(99).random(N) < 0.6 if good is None else good
    common = generator.normal(size=N) * np.sqrt(1 - own)
    table = ScoreTable()
    for epoch in range(epochs):
        values = np.where(good, apart, -apart) + common + generator.normal(size=N) * np.sqrt(own)
        more = {} if trust is None else {"ref_trust": trust}
        table.record(np.arange(N), epoch=epoch, step=epoch, mimic_score=values, **more)
    return table, good


def errors(keep, good):
    return int((keep != good).sum())


@pytest.mark.parametrize("vote", ["correlated", "dawid_skene", "majority"])
def test_it_is_better_than_its_members(vote):
    tables = {f"layer {k}": drawn(k, apart=1.5)[0] for k in range(3)}
    good = drawn(0)[1]
    model = EnsembleFilter([("two_means", TwoMeansFilter(check=False))], vote=vote)
    alone = [errors(TwoMeansFilter(check=False).fit_predict(table), good) for table in tables.values()]
    assert errors(model.fit_predict(tables), good) <= min(alone)
    assert model.voters_ == [f"layer {k}/two_means/{epoch}" for k in range(3) for epoch in range(3)]


def test_epochs_that_repeat_each_other_do_not_outvote_the_rest():
    wrong = drawn(0)[1].copy()
    wrong[:400] = ~wrong[:400]
    tables = {"one": drawn(1, epochs=20, own=0.01, good=wrong)[0]}  # 20 epochs make the same 400 mistakes
    tables |= {f"layer {k}": drawn(k, epochs=1)[0] for k in (2, 3)}
    good = drawn(0)[1]
    members = [("two_means", TwoMeansFilter(check=False))]
    assert errors(EnsembleFilter(members, vote="correlated").fit_predict(tables), good) < 50
    assert errors(EnsembleFilter(members, vote="dawid_skene").fit_predict(tables), good) > 300  # the control


@pytest.mark.parametrize(("apart", "share"), [(1.5, 0.8), (-1.5, 0.8), (0.0, 1.1)])
def test_what_is_learned_from_the_trust_helps(apart, share):
    good = drawn(0)[1]
    generator = np.random.default_rng(5)
    trust = 1 / (1 + np.exp(-(np.where(good, 1.2, -1.2) + 1.5 * generator.normal(size=N)) * 1.07))
    table, _ = drawn(1, apart=apart, trust=trust)  # votes that point the wrong way are found out
    model = EnsembleFilter().fit(table)
    assert model.vote_ == "trust"
    assert errors(model.predict(table), good) < share * errors(trust >= most_f1(trust), good)


@pytest.mark.parametrize("informative", ["mimic_score", "loss"])
def test_every_filter_is_heard_beside_the_trust(informative):
    """The first and the last of them, too."""
    good = drawn(0)[1]
    generator = np.random.default_rng(5)
    trust = np.clip(np.where(good, 0.6, 0.4) + 0.15 * generator.normal(size=N), 0.01, 0.99)
    table = ScoreTable()
    told = np.where(good, 2.0, -2.0) + generator.normal(size=N)
    noise = generator.normal(size=N)
    values = (
        {"mimic_score": told, "loss": noise} if informative == "mimic_score" else {"mimic_score": noise, "loss": -told}
    )
    table.record(np.arange(N), epoch=0, step=0, ref_trust=trust, **values)
    members = [(name, TwoMeansFilter(name, check=False)) for name in ("mimic_score", "loss")]
    assert errors(EnsembleFilter(members).fit_predict(table), good) < 0.9 * errors(trust >= most_f1(trust), good)


def test_tables_are_not_added_but_averaged():
    """They judge by the same reference: the same table twice says no more than once; who is not in one has the other's word."""
    trust = np.clip(np.where(drawn(0)[1], 0.7, 0.3) + 0.2 * np.random.default_rng(5).normal(size=N), 0.05, 0.95)
    table, _ = drawn(1, apart=1.0, trust=trust)
    alone = EnsembleFilter().fit(table).predict_proba(table)
    twice = EnsembleFilter().fit({"a": table, "b": table}).predict_proba({"a": table, "b": table})
    np.testing.assert_allclose(twice, alone)
    rows = drawn(2, apart=1.0)[0].to_arrow()
    tables = {"a": table, "b": ScoreTable.from_arrow(rows.filter(rows["sample_id"].to_numpy() % 2 == 0))}
    both = EnsembleFilter().fit(tables).predict_proba(tables)
    np.testing.assert_allclose(both[1::2], alone[1::2])
    assert abs(both[::2] - alone[::2]).max() > 0.05  # the control


def test_nobody_sees_two_groups():
    table, _ = drawn(0, apart=0.0)
    with pytest.warns(UserWarning, match="no filter of the ensemble sees evidence of two groups: everything is kept"):
        model = EnsembleFilter().fit(table)
    result = model.filter(table)
    assert result.keep.all()
    assert result.reasons == ("no votes",)
    assert np.isnan(model.predict_proba(table)).all()


def test_a_sample_without_scores_is_kept_and_ids_are_joined():
    good = drawn(0)[1]
    first, second = drawn(1)[0], ScoreTable()
    rows = drawn(2)[0].to_arrow()
    second.extend(ScoreTable.from_arrow(rows.filter(rows["sample_id"].to_numpy() % 2 == 0)))
    second.record([5_000], epoch=0, step=9, mimic_score=NAN)
    result = EnsembleFilter().fit({"a": first, "b": second}).filter({"a": first, "b": second})
    assert result.sample_id.tolist() == [*range(N), 5_000]
    assert result.keep[-1]
    assert result.reason[-1] == "no votes"
    assert errors(result.keep[:-1], good) < 30
    assert "6 of 6 votes against" in result.reasons


def test_few_voters_decide_by_majority():
    table, _ = drawn(0, epochs=1)
    model = EnsembleFilter([("two_means", TwoMeansFilter())]).fit(table)
    assert model.vote_ == "majority"
    assert (model.predict(table) == TwoMeansFilter().fit_predict(table)).all()
    with pytest.raises(ValueError, match="at least 3 voters must vote, got 1 that do not abstain"):
        EnsembleFilter([("two_means", TwoMeansFilter())], vote="correlated").fit(table)


def test_majority_by_hand():
    table = ScoreTable()
    for step, values in enumerate([[2.0, 2.0, 0.0, 3.0], [2.0, 0.5, 0.0, 0.5]]):
        table.record(np.arange(4), epoch=step, step=step, relative_weight=values)
    keep = EnsembleFilter([("threshold", ThresholdFilter())], vote="majority").fit_predict(table)
    assert keep.tolist() == [True, True, False, True]  # ties go to the mean: 1.25 and 1.75


def test_filters_of_all_kinds_vote():
    good = drawn(0)[1]
    table, _ = drawn(1, trust=np.where(good, 0.9, 0.2))
    members = [("trust", TrustFilter()), ("two_means", TwoMeansFilter(over="mean")), ("mixture", MixtureFilter())]
    model = EnsembleFilter(members, vote="dawid_skene").fit(table)
    assert model.voters_ == ["trust", "two_means", "mixture/0", "mixture/1", "mixture/2"]
    assert errors(model.predict(table), good) < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vote": "average"}, "`vote` must be one of 'auto', 'trust'"),
        ({"least": 1.5}, r"`least` must be in \(0, 1\) or \"f1\", got 1.5"),
        ({"vote": "trust"}, 'vote="trust" must have a trust, got none'),
        ({"filters": []}, "an ensemble must have a filter, got none"),
    ],
)
def test_bad_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        EnsembleFilter(**options).fit(drawn(0)[0])


def test_it_takes_tables_only():
    for wrong in (np.ones((3, 2)), {}, {"a": np.ones(3)}):
        with pytest.raises(ValueError, match="an ensemble takes a `ScoreTable`, or several by name"):
            EnsembleFilter().fit(wrong)


def test_it_is_an_estimator():
    model = EnsembleFilter([("a", TwoMeansFilter())], vote="majority", least=0.3)
    assert clone(model).get_params()["least"] == 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert EnsembleFilter().fit(drawn(0)[0]).vote_ == "majority"  # one column: nobody to tell who is right
        assert EnsembleFilter().fit({f"layer {k}": drawn(k)[0] for k in range(3)}).vote_ == "correlated"


def test_a_sample_without_a_trust_is_not_voted_out():
    good = drawn(0)[1]
    trust = np.where(good, 0.9, 0.2)
    trust[:100] = np.nan
    model = EnsembleFilter([("trust", TrustFilter()), ("two_means", TwoMeansFilter(over="mean"))], vote="majority")
    assert errors(model.fit_predict(drawn(1, trust=trust)[0]), good) < 10
    assert (model.votes(drawn(1, trust=trust)[0]).votes[:100, 0] == -1).all()


def test_a_fitted_ensemble_can_be_pickled():
    table, _ = drawn(1, trust=np.where(drawn(0)[1], 0.9, 0.2))
    model = EnsembleFilter().fit(table)
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict(table), model.predict(table))


def test_what_is_judged_must_be_like_what_was_fitted():
    table, good = drawn(1, trust=np.where(drawn(0)[1], 0.9, 0.2))
    with pytest.raises(ValueError, match=r"must have the names of the fit, \['a', 'b'\], got \['a'\]"):
        EnsembleFilter().fit({"a": table, "b": table}).predict({"a": table})
    with pytest.raises(ValueError, match="must have one to decide, got none: the reference was not run"):
        EnsembleFilter().fit(table).predict(drawn(1)[0])
    other = ScoreTable()
    other.record(np.arange(N) + N, epoch=0, step=0, mimic_score=np.where(good, 1.0, -1.0))
    with pytest.raises(ValueError, match=f"must be of the same samples, got {N} and {N} with no id in common"):
        EnsembleFilter().fit({"a": table, "b": other})
