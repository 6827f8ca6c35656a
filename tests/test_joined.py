"""Tables of the same samples, joined by id."""

import numpy as np

from hf_mimic.joined import all_ids, means_of, named, trust_of
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
