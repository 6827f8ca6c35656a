"""The streaming reader of score tables against a plain twin on `ScoreTable.to_arrow`, on random tables."""

import math
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.preprocessing import QuantileTransformer

from hf_mimic import parts, visits
from hf_mimic.scores import SCHEMA, VALUES, ScoreTable
from hf_mimic.trust import _normal_scores, combine

NAN = float("nan")
COLUMNS = ("mimic_score", "relative_weight", "loss", "clip_score")  # the others stay null
IDS = {
    "dense": lambda size, rng: np.arange(size),
    "from 10**12": lambda size, rng: 10**12 + np.arange(size),
    "gaps": lambda size, rng: np.sort(rng.choice(50 * size, size, replace=False)),
    "hashes": lambda size, rng: rng.integers(-(2**63), 2**63 - 1, size, dtype=np.int64),
    "negative": lambda size, rng: np.arange(size) - size // 2,
}


def random_table(folder, seed, *, kind="dense", steps=6, ranks=2, every=3):
    """Return a table of up to five epochs with all that goes wrong in one.

    Some epochs are missing, samples are visited several times per epoch or not at all, padded rows repeat samples
    within a step with other values, also on another rank, ranks write at steps of their own, some steps were made
    again by a resumed run, the last rows are not written, and some values, and whole columns of an epoch, are null.
    """
    rng = np.random.default_rng(seed)
    ids, step = IDS[kind](40, rng), 0
    tables = [ScoreTable(folder) for _ in range(ranks)]
    for epoch in sorted(rng.choice(8, rng.integers(1, 6), replace=False).tolist()):
        absent = set(rng.choice(COLUMNS, 2)) if rng.random() < 0.3 else set()
        for _ in range(steps):
            for rank, table in enumerate(tables):
                chosen = rng.choice(ids, 8)  # repeats some of them
                values = rng.normal(size=(len(COLUMNS), 8)).astype(np.float32) * 10.0 ** rng.integers(-3, 4)
                values[rng.random(values.shape) < 0.15] = rng.choice([NAN, np.inf])
                known = {n: v for n, v in zip(COLUMNS, values, strict=True) if n not in absent}
                table.record(chosen, epoch=epoch, step=step, **known)
                if step % (every + rank) == every - 1:
                    table.flush(rank)
            step += 1
        if rng.random() < 0.5:
            for rank, table in enumerate(tables):
                table.flush(rank)
            step -= 2  # killed, and resumed from an earlier step
            tables[0].truncate(step)
    for rank, table in enumerate(tables[1:], start=1):
        table.flush(rank)
    return tables[0]


def known_values(rows, name, key):
    found = defaultdict(list)
    for row in rows:
        found[key(row)] += [row[name]] if row[name] is not None else []
    return found


def assert_means(table):
    """Compare `aggregate` with sums of Python, row by row."""
    rows, ours = table.to_arrow().to_pylist(), table.aggregate().to_pylist()
    assert [row["sample_id"] for row in ours] == sorted({row["sample_id"] for row in rows})
    for name in VALUES:
        expected = known_values(rows, name, lambda row: row["sample_id"])
        for row in ours:
            values = expected[row["sample_id"]]
            mean = math.fsum(values) / len(values) if values else None
            assert row[name] == (mean if mean is None else pytest.approx(mean, rel=1e-6, abs=1e-12)), name
    counts = [known_values(rows, name, lambda row: row["sample_id"]) for name in ("mimic_score", "clip_score")]
    assert [row["n_visits"] for row in ours] == [max(len(c[row["sample_id"]]) for c in counts) for row in ours]


def assert_matrix(table, name):
    """Compare `matrix` with sums of Python."""
    rows, ours = table.to_arrow().to_pylist(), table.matrix(name)
    expected = known_values(rows, name, lambda row: (row["sample_id"], row["epoch"]))
    assert ours.sample_id.tolist() == table.aggregate()["sample_id"].to_pylist()
    assert ours.epochs.tolist() == sorted({row["epoch"] for row in rows})
    assert (ours.sample_id.dtype, ours.epochs.dtype, ours.values.dtype) == (np.int64, np.int32, np.float32)
    for i, sample in enumerate(ours.sample_id.tolist()):
        for j, epoch in enumerate(ours.epochs.tolist()):
            values = expected[sample, epoch]
            mean = math.fsum(values) / len(values) if values else NAN
            assert ours.values[i, j] == pytest.approx(mean, rel=1e-6, abs=1e-12, nan_ok=True)


# ---- random tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("seed", range(4))
def test_random_tables(tmp_path, monkeypatch, kind, seed):
    monkeypatch.setattr(parts, "_FEW", 64)  # such that hashes and gaps are not taken for dense
    table = random_table(tmp_path, seed, kind=kind, every=1 + seed, ranks=1 + seed % 3)
    assert_means(table)
    for name in ("mimic_score", "loss", "kept"):
        assert_matrix(table, name)
    assert len(table) == len(table.to_arrow())


@pytest.mark.parametrize("seed", range(3))
def test_row_groups_that_hold_several_epochs(tmp_path, seed):
    """As in a shard that was written at once, or by another writer: small row groups, no statistics."""
    rows = random_table(tmp_path / "made", seed).to_arrow()
    for number, statistics in enumerate((True, False)):
        folder = tmp_path / str(number)
        folder.mkdir()
        shuffled = rows.take(np.random.default_rng(seed).permutation(len(rows)))
        for rank, part in enumerate((rows, shuffled)):  # the second repeats the rows of the first
            path = folder / f"steps-00000000-00000099-rank-{rank:05d}.parquet"
            pq.write_table(part, path, row_group_size=37, write_statistics=statistics)
        table = ScoreTable.load(folder)
        assert len(table) == len(rows)
        assert_means(table)
        assert_matrix(table, "mimic_score")


def test_the_comparison_can_fail(tmp_path, monkeypatch):
    """The control: repeated rows count twice."""
    table = random_table(tmp_path, 0)
    monkeypatch.setattr(visits, "counted", lambda cell, places: [None] * len(cell))
    assert len(table) > len(table.to_arrow())
    with pytest.raises(AssertionError):
        assert_means(table)
    with pytest.raises(AssertionError):
        assert_matrix(table, "loss")


# ---- by hand -------------------------------------------------------------------------------------------------------


def test_the_last_of_repeated_rows_wins_across_ranks(tmp_path):
    for rank, values in enumerate(([1.0, 2.0], [10.0, 4.0])):
        table = ScoreTable(tmp_path)
        table.record([7], epoch=0, step=0, loss=values[:1])
        table.record([7 + rank], epoch=0, step=1, loss=values[1:])
        table.flush(rank)
    assert table.matrix("loss").values.tolist() == [[6.0], [4.0]]
    table.record([8], epoch=0, step=1, loss=[NAN])  # in memory, it wins over the shards
    assert table.aggregate()["loss"].to_pylist() == [6.0, None]


def test_a_matrix_by_hand():
    table = ScoreTable()
    table.record([3, 1], epoch=0, step=0, loss=[0.5, 1.0])
    table.record([1], epoch=0, step=1, loss=[2.0])
    table.record([3], epoch=4, step=2, loss=[NAN])
    ours = table.matrix("loss")
    assert (ours.sample_id.tolist(), ours.epochs.tolist()) == ([1, 3], [0, 4])
    np.testing.assert_array_equal(ours.values, np.float32([[1.5, NAN], [0.5, NAN]]))
    assert np.isnan(table.matrix("kept").values).all()
    assert not ours.values.flags.writeable


def test_an_unknown_column():
    with pytest.raises(ValueError, match=r"must be one of mimic_score, .*, kept, got 'score'"):
        ScoreTable().matrix("score")


def test_empty_tables(tmp_path):
    table = ScoreTable(tmp_path)
    table.record([], epoch=0, step=0, loss=[])
    assert len(table) == len(table.aggregate()) == 0
    assert table.matrix("loss").values.shape == (0, 0)


def test_rows_without_epoch_and_step_are_visits_of_one_epoch():
    table = ScoreTable.from_arrow(pa.table({"sample_id": [2, 2, 1], "loss": [1.0, 2.0, 4.0]}))
    assert len(table) == 3
    assert table.aggregate()["loss"].to_pylist() == [4.0, 1.5]
    assert table.matrix("loss").values.tolist() == [[4.0], [1.5]]


def test_rows_without_an_id():
    for rows in ({"loss": [1.0]}, {"sample_id": [1, None]}):
        with pytest.raises(ValueError, match="every row of a score table must have an integer `sample_id`, got rows"):
            ScoreTable.from_arrow(pa.table(rows))
    with pytest.raises(ValueError, match="must have an integer `sample_id`, got string ids"):
        ScoreTable.from_arrow(pa.table({"sample_id": ["a", "b"], "loss": [1.0, 2.0]}))


def test_shards_of_an_earlier_version_lack_columns(tmp_path):
    rows = ScoreTable.from_arrow(pa.table({"sample_id": [1, 2], "epoch": [0, 0], "step": [0, 0], "loss": [1.0, 2.0]}))
    path = tmp_path / "steps-00000000-00000000-rank-00000.parquet"
    pq.write_table(rows.to_arrow().select(["step", "loss", "epoch", "sample_id"]), path)
    table = ScoreTable.load(tmp_path)
    assert table.aggregate()["loss"].to_pylist() == [1.0, 2.0]
    assert table.aggregate()["kept"].null_count == 2
    pq.write_table(rows.to_arrow().select(["loss", "epoch"]), path)
    with pytest.raises(ValueError, match=r"must have the columns sample_id, epoch, step, .* has no sample_id, step"):
        ScoreTable.load(tmp_path).aggregate()


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: bytes(200) + raw[200:]]
)
def test_a_torn_shard_is_named(tmp_path, damage):
    table = random_table(tmp_path, 0, every=6)
    path = sorted(tmp_path.iterdir())[0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"(?s)must be a whole Parquet file, {path} is not .* delete it to go on"):
        table.aggregate()


# ---- what is read, and when ----------------------------------------------------------------------------------------


def test_what_is_null_or_not_asked_for_is_not_read(tmp_path, monkeypatch):
    """Without repeated samples in an epoch, the steps are not read, and of null columns nothing is."""
    read, load = [], parts._load
    monkeypatch.setattr(parts, "_load", lambda *given: read.extend(given[-1]) or load(*given))
    for epoch in range(2):
        table = ScoreTable(tmp_path)
        table.record(range(10), epoch=epoch, step=epoch, loss=range(10), mimic_score=1.0)
        table.flush()
    assert table.matrix("loss").values.shape == (10, 2)
    assert sorted(read) == ["loss"] * 2 + ["sample_id"] * 2
    read.clear()
    table.aggregate()
    assert sorted(read) == ["loss"] * 2 + ["mimic_score"] * 2 + ["sample_id"] * 2
    read.clear()
    table.aggregate(), table.matrix("loss")
    assert read == []  # they are kept until rows come or go


def test_what_was_read_is_read_again_after_a_change(tmp_path):
    table, other = ScoreTable(tmp_path), ScoreTable(tmp_path)
    table.record([0, 1], epoch=0, step=0, loss=1.0)
    for change in (
        table.flush,
        lambda: table.record([0], epoch=0, step=1, loss=2.0),
        lambda: table.extend(
            ScoreTable.from_arrow(pa.table({"sample_id": [9], "epoch": [0], "step": [1], "loss": [7.0]}))
        ),
        table.forget,
        lambda: other.record([5], epoch=0, step=1, loss=2.0),
        lambda: other.flush(rank=1),  # of another process
        lambda: table.truncate(1),
    ):
        assert_means(table)
        assert_matrix(table, "loss")
        change()
    assert table.aggregate()["sample_id"].to_pylist() == [0, 1]


def test_cells_are_parts_whose_steps_overlap():
    spans = [(0, 4), (9, 9), (3, 6), (7, 8), (9, 12)]
    made = [parts.Part(1, {"step": span}, frozenset(), list) for span in spans]
    assert [[made.index(part) for part in cell] for cell in parts.cells(made)] == [[0, 2], [3], [1, 4]]


def test_cells_of_an_epoch_are_joined():
    epochs = [(0, 0), (0, 0), (0, 0), (1, 1), (1, 2), (1, 2)]
    found = [[parts.Part(2, {"epoch": epoch}, frozenset(), list)] for epoch in epochs]
    made = [id(cell[0]) for cell in found]
    joined = [[made.index(id(part)) for part in cell] for cell in parts.by_epoch(found, most=4)]
    assert joined == [[0, 1], [2], [3], [4, 5]]


@pytest.mark.parametrize("block", [1, 7, 300, 10**6])
def test_trust_is_combined_block_by_block(monkeypatch, block):
    rng = np.random.default_rng(0)
    trust, evidence = rng.random(500), rng.normal(size=(500, 2))
    trust[::9], evidence[::7, 0] = NAN, NAN
    whole = combine(trust, evidence)
    monkeypatch.setattr("hf_mimic.trust._BLOCK", block)
    np.testing.assert_allclose(combine(trust, evidence), whole, rtol=1e-12)
    assert not np.allclose(whole, trust, equal_nan=True)


@pytest.mark.parametrize("ties", [False, True])
def test_normal_scores_are_those_of_scikit_learn(ties):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3000, 2)).round(1 if ties else 20)
    scale = QuantileTransformer(output_distribution="normal", n_quantiles=300, random_state=0).fit(values)
    seen = np.concatenate([values, 3 * rng.normal(size=(1000, 2))])
    np.testing.assert_allclose(_normal_scores(scale, seen), scale.transform(seen), atol=1e-8)
    small = QuantileTransformer(output_distribution="normal", n_quantiles=300, random_state=0).fit(values * 1e-9)
    np.testing.assert_allclose(_normal_scores(small, seen * 1e-9), scale.transform(seen), atol=1e-8)
    assert np.abs(small.transform(seen * 1e-9) - scale.transform(seen)).max() > 1


def test_trust_of_a_table_is_that_of_its_means():
    rng = np.random.default_rng(0)
    table = ScoreTable()
    known = {"ref_trust": rng.random(300), "loss": rng.random(300), "mimic_score": rng.random(300)}
    table.record(np.arange(300), epoch=0, step=0, **known)
    expected = combine(np.float32(known["ref_trust"]), np.float32([known["mimic_score"], -known["loss"]]).T)
    np.testing.assert_allclose(table.aggregate()["trust"].to_numpy(), expected, rtol=1e-6)
    assert table.aggregate().column_names == ["sample_id", "trust", *VALUES, "n_visits"]
    assert table.to_arrow().schema == SCHEMA
