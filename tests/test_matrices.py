"""All columns by sample and epoch in one pass, against one pass for each column and sums over all visits."""

import numpy as np
import pytest

from hf_mimic import blocks, matrices, parts, scores
from hf_mimic.matrices import read_matrices
from hf_mimic.scores import ScoreTable

NAN = float("nan")
ROOM = 1 << 20
IDS = {
    "dense": lambda rng: np.arange(40),
    "gaps": lambda rng: 7 + 3 * np.arange(40),
    "hashes": lambda rng: rng.integers(-(2**63), 2**63 - 1, 40, dtype=np.int64),
}


def table_of_epochs(folder, seed, *, kind="dense", epochs=(4, 0, 2), ranks=2):
    """Return a table with one visit per epoch of most samples, some of whose values are not known."""
    rng = np.random.default_rng(seed)
    ids = IDS[kind](rng)
    for step, epoch in enumerate(epochs):
        order = rng.permutation(ids)[: 40 - 5 * step]
        names = ("mimic_score", "loss", "clip_score")[step == 1 :]
        for rank in range(ranks):
            table, own = ScoreTable(folder), order[rank::ranks]
            values = rng.normal(size=(3, len(own))) * 10.0 ** rng.integers(-3, 4)
            values[rng.random(values.shape) < 0.1] = rng.choice([NAN, np.inf])
            table.record(own, epoch=epoch, step=step, **dict(zip(names, values, strict=False)))
            table.flush(rank)
    return table


def assert_same(table):
    """Compare with a pass of its own for each column, and with sums over visits."""
    visits = table._visits()
    found = read_matrices(visits, ROOM)
    assert [*found] == ["mimic_score", "loss", "clip_score"]
    for name, ours in found.items():
        expected = visits.matrix(name)
        for one, other in zip(ours, expected, strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
        assert not ours.values.flags.writeable
    ours, expected = matrices.means_of(found), visits.means()
    np.testing.assert_array_equal(ours.sample_id, expected.sample_id)
    for name in found:
        np.testing.assert_array_equal(ours.counts[name], expected.counts[name])
        np.testing.assert_allclose(ours.values[name], expected.values[name], rtol=1e-6)
        assert ours.values[name].dtype == np.float32


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("seed", range(3))
def test_one_pass_for_all_columns(tmp_path, monkeypatch, kind, seed):
    monkeypatch.setattr(parts, "_FEW", 64)  # such that hashes and gaps are not taken for dense
    monkeypatch.setattr(blocks, "_BLOCK", 7)
    assert_same(table_of_epochs(tmp_path, seed, kind=kind, ranks=1 + seed))


def test_the_comparison_can_fail(tmp_path, monkeypatch):
    """The control: infinity taken for a value."""
    table = table_of_epochs(tmp_path, 1)
    monkeypatch.setattr(matrices.np, "isfinite", lambda values: np.ones(len(values), bool))
    with pytest.raises(AssertionError):
        assert_same(table)


def test_the_table_is_read_once_for_means_and_matrices(tmp_path, monkeypatch):
    read, load = [], parts._load
    monkeypatch.setattr(parts, "_load", lambda *given: read.extend(given[-1]) or load(*given))
    table = table_of_epochs(tmp_path, 0, ranks=1)
    table.aggregate(), table.matrix("loss"), table.matrix("clip_score")
    assert sorted(read) == ["clip_score"] * 3 + ["loss"] * 3 + ["mimic_score"] * 2 + ["sample_id"] * 3
    table.matrix("kept")  # without values
    assert len(read) == 11 + 3


@pytest.mark.parametrize("spoil", ["two visits", "two epochs in a step", "an epoch goes on later"])
def test_other_tables_are_summed(tmp_path, spoil):
    """A sample has two visits in an epoch, or it cannot be told without sums."""
    table = table_of_epochs(tmp_path, 0)
    again = {"two visits": (2, 3), "two epochs in a step": (1, 2), "an epoch goes on later": (4, 3)}
    epoch, step = again[spoil]
    assert read_matrices(table._visits(), ROOM)
    table.record(np.arange(10), epoch=epoch, step=step, loss=3.0)
    assert read_matrices(table._visits(), ROOM) == {}
    rows = table.to_arrow().to_pylist()
    known = [row["loss"] for row in rows if row["sample_id"] == 3 and row["loss"] is not None]
    assert table.aggregate()["loss"][3].as_py() == pytest.approx(np.mean(known), rel=1e-6)


def test_without_room_no_matrix_is_made(tmp_path, monkeypatch):
    table = table_of_epochs(tmp_path, 0)
    most = 3 * 3 * 40 * 4  # columns, epochs, samples, bytes
    assert read_matrices(table._visits(), most)
    assert read_matrices(table._visits(), most - 1) == {}
    expected = table.aggregate()
    monkeypatch.setattr(scores, "_KEPT_BYTES", most - 1)
    again = ScoreTable.load(tmp_path)
    assert again.aggregate().equals(expected)
    assert not again._matrices


def test_samples_that_no_row_has_are_left_out(tmp_path):
    table = ScoreTable(tmp_path)
    table.record([5, 9, 6], epoch=1, step=0, loss=[1.0, NAN, 2.0])
    table.flush()
    table.record([6, 5], epoch=3, step=1, loss=[4.0, NAN])
    rows = table.aggregate()
    assert rows["sample_id"].to_pylist() == [5, 6, 9]
    assert rows["loss"].to_pylist() == [1.0, 3.0, None]
    assert table._matrices  # it did not come from sums
    np.testing.assert_array_equal(table.matrix("loss").values, [[1, NAN], [2, 4], [NAN, NAN]])
