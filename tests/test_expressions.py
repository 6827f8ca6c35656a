"""Set expressions against numpy written by hand; their reasons, and what cannot be read."""

import numpy as np
import pyarrow as pa
import pytest

from hf_mimic import expressions
from hf_mimic.expressions import CombinedFilter
from hf_mimic.scores import ScoreTable

NAN = np.nan


def columns(n=200, seed=0):
    generator = np.random.default_rng(seed)
    found = {name: generator.normal(size=n) for name in ("clip_score", "mimic_score", "loss")}
    found["mimic_score"][:20] = NAN
    return found


def top(values, share):
    """Return the best so many of the known values."""
    known = np.flatnonzero(~np.isnan(values))
    best = known[np.argsort(-values[known], kind="stable")[: round(share * len(known))]]
    return np.isin(np.arange(len(values)), best)


C = columns()
SETS = {
    "top(clip_score, 0.3)": top(C["clip_score"], 0.3),
    "bottom(mimic_score, 0.2)": top(-C["mimic_score"], 0.2),
    "top(loss, 0.25)": top(-C["loss"], 0.25),  # of losses the lowest are the best
    "bottom(loss, 0.25)": top(C["loss"], 0.25),
    "known(mimic_score)": ~np.isnan(C["mimic_score"]),
    "(mimic_score >= -0.5)": C["mimic_score"] >= -0.5,
    "mimic_score != 0": ~np.isnan(C["mimic_score"]),  # the unknown is in no comparison
    "top(clip_score, 0.3) - bottom(mimic_score, 0.2)": top(C["clip_score"], 0.3) & ~top(-C["mimic_score"], 0.2),
    "~top(clip_score, 0.3) | (loss < 0)": ~top(C["clip_score"], 0.3) | (C["loss"] < 0),
    "(loss < 1) & (clip_score > -1) & known(mimic_score)": (C["loss"] < 1)
    & (C["clip_score"] > -1)
    & ~np.isnan(C["mimic_score"]),
}


@pytest.mark.parametrize("expression", SETS)
def test_sets(expression):
    assert (CombinedFilter(expression).fit_predict(C) == SETS[expression]).all()
    assert 0 < SETS[expression].sum() < 200


def test_reasons_name_the_part():
    result = CombinedFilter("top(clip_score, 0.5) - bottom(mimic_score, 0.2)").filter(C)
    first, second = top(C["clip_score"], 0.5), top(-C["mimic_score"], 0.2)
    assert set(result.reason[~first]) == {"not in top(clip_score, 0.5)"}
    assert set(result.reason[first & second]) == {"in bottom(mimic_score, 0.2)"}
    assert set(result.reason[result.keep]) == {"in top(clip_score, 0.5) - bottom(mimic_score, 0.2)"}
    either = CombinedFilter("(loss < -9) | (loss > 9)").filter(C)
    assert set(either.reason) == {"not in (loss < -9) | (loss > 9)"}


def test_tables_and_boolean_columns():
    table = ScoreTable()
    table.record([7, 3], epoch=0, step=0, mimic_score=[1.0, -1.0], kept=[True, False])
    result = CombinedFilter("mimic_score > 0").filter(table)
    assert (result.sample_id.tolist(), result.keep.tolist()) == ([3, 7], [False, True])
    rows = pa.table({"keep": pa.array([True, None, False]), "name": ["a", "b", "c"], "good": [True, True, False]})
    assert CombinedFilter("good & (keep == 1)").fit_predict(rows).tolist() == [True, False, False]
    assert CombinedFilter("good - (keep == 1)").fit_predict(rows).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="must be one of keep, good, got 'name'"):
        CombinedFilter("top(name, 0.5)").fit(rows)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (
            "top(clp_score, 0.3)",
            "must be one of clip_score, mimic_score, loss, got 'clp_score'. Did you mean 'clip_score'",
        ),
        ("loss >", "`expression` must be readable, got 'loss >'"),
        ("", "`expression` must be readable"),
        ("~" * 100_000 + "loss", "`expression` must be readable"),
        ("loss > 1 & clip_score < 2", "Put each comparison in brackets"),
        ("0 < loss < 1", "Put each comparison in brackets"),
        ("loss < clip_score", "A number was expected there"),
        ("loss", "cannot have 'loss' there. An expression has sets"),
        ("top(loss, 2)", r"the share of `top` must be in \(0, 1\], got 2"),
        ("top(loss)", "got `top` with 1 arguments"),
        ("top(0.3, loss)", "A number was expected|A column was expected"),
        ("__import__('os').system('x')", "cannot have"),
        ("open('x')", "a set must be top, bottom or known, got `open`"),
        ("(loss < 1) and (loss > 0)", "cannot have"),
        ("loss.real > 1", "the column first"),
    ],
)
def test_what_cannot_be_read(expression, message):
    with pytest.raises(ValueError, match=message):
        CombinedFilter(expression).fit(C)


def test_a_cut_is_not_rounded_to_float32():
    values = {"trust": np.array([0.1, 0.10000001], dtype=np.float32)}
    assert CombinedFilter("trust > 0.1").fit_predict(values).tolist() == [True, True]  # 0.1 in float32 is above 0.1


def test_a_deep_expression_is_refused():
    with pytest.raises(ValueError, match=r"must not be nested so deeply|must be readable"):
        CombinedFilter("~" * 3_000 + "(loss < 1)").fit(C)


def test_columns_must_agree():
    with pytest.raises(ValueError, match="columns of one length, got none or several"):
        CombinedFilter("a > 1").fit({"a": np.ones(2), "b": np.ones(3)})


@pytest.mark.parametrize("expression", ["top(trust, 0.3)", "~(trust < 0)", "(loss > 0) - bottom(trust, 0.2)"])
def test_a_column_without_values_says_nothing(expression):
    columns = {"loss": np.ones(2), "trust": np.full(2, np.nan), "name": np.array(["a", "b"])}
    with pytest.raises(ValueError, match=r"must have values, `trust` has none\. There are: loss\."):
        CombinedFilter(expression).fit(columns)
    assert CombinedFilter("(loss > 0) - known(trust)").fit_predict(columns).all()  # who asks knows


def test_only_columns_of_the_expression_are_made(monkeypatch):
    made, numbers = [], expressions._numbers
    monkeypatch.setattr(expressions, "_numbers", lambda column: made.append(column) or numbers(column))
    table = pa.table({"a": [1.0, 2.0], "b": [1.0, None], "word": ["x", "y"]})
    assert CombinedFilter("top(a, 0.5)").predict(table).tolist() == [False, True]
    assert made
    assert all(column.equals(table["a"]) for column in made)
    with pytest.raises(ValueError, match="a column must be one of a, b, got 'word'"):
        CombinedFilter("known(word)").predict(table)


@pytest.mark.parametrize("known", [[1.0, 2.0, 3.0, 4.0], [NAN, 2.0, 3.0, 4.0, NAN, 1.0]])
def test_shares_are_of_the_known_values(known):
    values = {"a": np.float32(known)}
    kept = CombinedFilter("top(a, 0.5)").predict(values)
    assert sorted(values["a"][kept].tolist()) == [3, 4]
    assert sorted(values["a"][CombinedFilter("bottom(a, 0.5)").predict(values)].tolist()) == [1, 2]
