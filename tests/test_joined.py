"""Tables of the same samples, joined by id."""

import numpy as np
import pytest

from hf_mimic.joined import all_ids, has, means_of, named, rows_of, trust_of
from hf_mimic.scores import ScoreTable

NAN = np.nan


def two():
    first, second = ScoreTable(), ScoreTable()
    first.record([1, 2, 4], epoch=0, step=0, mimic_score=[1.0, 2.0, 4.0], ref_trust=[0.2, NAN, 0.4])
    first.record([1, 2, 4], epoch=1, step=1, mimic_score=[3.0, NAN, 4.0], ref_trust=[0.2, NAN, 0.4])
    second.record(
        [2, 3, 4], epoch=0, step=0, mimic_score=[0.0, 0.0, 0.0], loss=[2.5, 3.5, NAN], ref_trust=[NAN, 0.9, 0.6]
    )
    return {"a": first, "b": second}


def test_ids_trust_and_means_by_hand():
    tables = two()
    ids = all_ids(tables)
    assert ids.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(trust_of(tables, ids), [0.2, NAN, 0.9, 0.5], rtol=1e-6)
    means = means_of(tables, ids, [("a", "mimic_score"), ("b", "loss")])
    np.testing.assert_array_equal(means[:], [[2.0, NAN], [2.0, 2.5], [NAN, 3.5], [4.0, NAN]])
    assert means_of(tables, ids, []).shape == (4, 0)


def test_a_single_table_has_no_name():
    table = two()["a"]
    assert named(table) == {"": table}
    assert means_of(table, all_ids(table), [("", "mimic_score")])[:].T.tolist() == [[2.0, 2.0, 4.0]]


def table_of(ids, **values):
    table = ScoreTable()
    table.record(ids, epoch=0, step=0, **values)
    return table


def test_ids_and_rows_of_all():
    tables = {"one": table_of([3, 1], loss=1.0), "other": table_of([2, 3], loss=1.0)}
    ids = all_ids(tables)
    assert ids.tolist() == [1, 2, 3]
    assert rows_of(ids, np.array([2, 3])).tolist() == [1, 2]
    assert rows_of(ids, ids) == slice(None)
    assert [*named(tables["one"])] == [""]


def test_the_trust_is_the_mean_of_those_who_know_it():
    tables = {"a": table_of([1, 2, 3], ref_trust=[0.5, 1.0, np.nan]), "b": table_of([2, 3], ref_trust=[0.0, np.nan])}
    tables["c"] = table_of([1, 2, 3], loss=1.0)
    np.testing.assert_array_equal(trust_of(tables, all_ids(tables)), [0.5, 0.5, np.nan])
    assert [has(table, "ref_trust") for table in tables.values()] == [True, True, False]


def test_without_a_reference_nobody_has_a_trust():
    trust = trust_of(table_of([1, 2, 3], loss=1.0), np.array([1, 2, 3]))
    assert trust.shape == (3,)
    assert np.isnan(trust).all()


def test_what_is_no_table():
    with pytest.raises(ValueError, match="an ensemble takes a `ScoreTable`, or several by name, got ndarray"):
        named(np.zeros(3))
    with pytest.raises(ValueError, match="must be of the same samples, got 1 and 2 with no id in common"):
        all_ids({"a": table_of([1], loss=1.0), "b": table_of([2, 3], loss=1.0)})


def test_means_of_a_table_of_all_ids_are_not_copied():
    table = table_of([1, 2, 3], loss=[1.0, 2.0, 3.0])
    means = means_of(table, all_ids(table), [("", "loss")])
    assert np.shares_memory(means.parts[0], table.aggregate()["loss"].chunk(0).to_numpy())
    other = {"a": table, "b": table_of([3, 4], loss=1.0)}
    found = means_of(other, all_ids(other), [("a", "loss"), ("b", "loss")])
    np.testing.assert_array_equal(found[:], [[1.0, NAN], [2.0, NAN], [3.0, 1.0], [NAN, 1.0]])
