"""`ScoreTable`: rows, shards, means by hand; `attach_scores`: joined by id, without decoding an image."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hf_mimic.data import add_sample_ids
from hf_mimic.filters import ThresholdFilter
from hf_mimic.scores import SCHEMA, ScoreTable, attach_scores

NAN = float("nan")


def two_epochs(folder=None):
    """Return a table of samples 3, 1, 2 and then 1, 2; the loss of 2 is never known."""
    table = ScoreTable(folder)
    table.record([3, 1, 2], epoch=0, step=0, mimic_score=[0.3, 0.1, NAN], relative_weight=[1.5, 1.5, 0], loss=1.0)
    table.record([1, 2], epoch=1, step=1, mimic_score=[0.5, -0.2], relative_weight=[1.2, 0.8], loss=[3.0, NAN])
    return table


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_rows_are_what_was_recorded():
    rows = two_epochs().to_arrow()
    assert rows.schema == SCHEMA
    assert rows["sample_id"].to_pylist() == [1, 2, 3, 1, 2]  # by step, then by id
    assert rows["epoch"].to_pylist() == [0, 0, 0, 1, 1]
    assert rows["step"].to_pylist() == [0, 0, 0, 1, 1]
    assert rows["mimic_score"].to_pylist() == [pytest.approx(0.1), None, pytest.approx(0.3), 0.5, pytest.approx(-0.2)]
    assert len(two_epochs()) == 5


@pytest.mark.parametrize(
    "convert",
    [list, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.bfloat16), lambda x: torch.tensor(x).half()],
    ids=["list", "numpy", "float32", "bfloat16", "float16"],
)
def test_values_of_any_kind(convert):
    table = ScoreTable()
    table.record(torch.tensor([5, 7, 9]), epoch=0, step=2, mimic_score=convert([0.5, NAN, -0.25]))
    rows = table.to_arrow()
    assert rows["mimic_score"].to_pylist() == [0.5, None, -0.25]
    assert rows["loss"].to_pylist() == [None] * 3


def test_values_with_a_graph_are_stored():
    table = ScoreTable()
    table.record([0], epoch=0, step=0, loss=torch.ones(1, requires_grad=True) * 2)
    assert table.to_arrow()["loss"].to_pylist() == [2.0]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), NAN])
def test_a_value_that_is_not_finite_is_null(value):
    table = ScoreTable()
    table.record([0, 1], epoch=0, step=0, loss=[value, 1.0], mimic_score=torch.tensor([value, 1.0]))
    assert table.to_arrow()["loss"].to_pylist() == table.to_arrow()["mimic_score"].to_pylist() == [None, 1.0]


def test_unknown_column():
    with pytest.raises(
        ValueError,
        match="must be one of mimic_score, relative_weight, loss, ref_loss, ref_trust, clip_score, kept, got clip, score",
    ):
        ScoreTable().record([0], epoch=0, step=0, score=[1.0], clip=[1.0])


def test_the_last_of_repeated_rows_wins():
    table = ScoreTable()
    table.record([1, 2], epoch=0, step=0, loss=[1.0, 2.0])
    table.record([1], epoch=0, step=1, loss=[3.0])
    table.record([2, 1], epoch=0, step=0, loss=[20.0, 10.0])
    assert table.to_arrow()["loss"].to_pylist() == [10.0, 20.0, 3.0]


def test_padding_repeats_a_sample_within_a_step():
    table = ScoreTable()
    table.record([4, 4, 5], epoch=0, step=0, loss=[1.0, 1.0, 2.0])
    assert table.to_arrow()["sample_id"].to_pylist() == [4, 5]


def test_to_dataset():
    rows = two_epochs().to_dataset()
    assert isinstance(rows, datasets.Dataset)
    assert rows.column_names == SCHEMA.names
    assert rows["mimic_score"][1] is None


def test_from_arrow_fills_absent_columns_with_null():
    table = ScoreTable.from_arrow(pa.table({"mimic_score": [0.5, 0.25], "sample_id": pa.array([1, 2], pa.int32())}))
    assert table.aggregate()["mimic_score"].to_pylist() == [0.5, 0.25]
    assert table.to_arrow().schema == SCHEMA


def test_from_arrow_gives_back_a_table():
    assert ScoreTable.from_arrow(two_epochs().to_arrow()).to_arrow().equals(two_epochs().to_arrow())


def test_extend_adds_all_rows():
    table, other = two_epochs(), ScoreTable()
    other.record([8], epoch=0, step=5, mimic_score=[1.0])
    table.extend(other)
    assert table.to_arrow()["sample_id"].to_pylist() == [1, 2, 3, 1, 2, 8]
    assert len(other) == 1


# ---- means ---------------------------------------------------------------------------------------------------------


def test_aggregate_by_hand():
    samples = two_epochs().aggregate()
    assert samples["sample_id"].to_pylist() == [1, 2, 3]
    assert samples["mimic_score"].to_pylist() == [pytest.approx(0.3), pytest.approx(-0.2), pytest.approx(0.3)]
    assert samples["relative_weight"].to_pylist() == [pytest.approx(1.35), pytest.approx(0.4), 1.5]
    assert samples["loss"].to_pylist() == [2.0, 1.0, 1.0]
    assert samples["n_visits"].to_pylist() == [2, 1, 1]


def test_a_sample_that_was_never_scored_is_null():
    table = ScoreTable()
    table.record([1, 2], epoch=0, step=0, mimic_score=[NAN, 0.0])
    samples = table.aggregate()
    assert samples["mimic_score"].to_pylist() == [None, 0.0]
    assert samples["n_visits"].to_pylist() == [0, 1]


def test_an_empty_table():
    table = ScoreTable()
    assert len(table) == len(table.aggregate()) == 0
    assert table.flush() is None
    assert len(table.to_dataset()) == 0


# ---- files ---------------------------------------------------------------------------------------------------------


def test_shards_are_parquet_and_nothing_else_is_left(tmp_path):
    table = two_epochs(tmp_path / "scores")
    path = table.flush()
    assert [p.name for p in (tmp_path / "scores").iterdir()] == [path.name]
    assert path.name == "steps-00000000-00000001-rank-00000.parquet"
    assert pq.read_table(path).schema == SCHEMA
    assert len(pq.read_table(path)) == 5
    assert table.flush() is None
    assert table.to_arrow().equals(two_epochs().to_arrow())


def test_several_shards_are_one_table(tmp_path):
    table = ScoreTable(tmp_path)
    for step in range(3):
        table.record([0, 1], epoch=step, step=step, loss=[float(step), 0.0])
        table.flush()
    table.record([0], epoch=3, step=3, loss=[9.0])  # not written yet
    assert len(list(tmp_path.glob("*.parquet"))) == 3
    assert len(table) == 7
    loaded = ScoreTable.load(tmp_path)
    assert loaded.to_arrow()["step"].to_pylist() == [0, 0, 1, 1, 2, 2]
    assert loaded.aggregate()["loss"].to_pylist() == [1.0, 0.0]


def test_ranks_write_shards_of_their_own(tmp_path):
    for rank in range(2):
        table = ScoreTable(tmp_path)
        table.record([rank], epoch=0, step=0, loss=[1.0])
        table.flush(rank)
    assert ScoreTable.load(tmp_path).to_arrow()["sample_id"].to_pylist() == [0, 1]


def test_shards_of_the_same_steps_do_not_replace_each_other(tmp_path):
    for sample in range(3):
        table = ScoreTable(tmp_path)
        table.record([sample], epoch=0, step=0, loss=[1.0])
        table.flush()
    assert ScoreTable.load(tmp_path).to_arrow()["sample_id"].to_pylist() == [0, 1, 2]


@pytest.mark.parametrize("step", [0, 2, 3, 4, 9])
def test_truncating_forgets_later_steps(tmp_path, step):
    """A resumed run makes the steps after its checkpoint again."""
    for steps in ((0, 1), (2, 3)):
        table = ScoreTable(tmp_path)
        for number in steps:
            table.record([number], epoch=0, step=number, loss=[1.0])
        table.flush(rank=steps[0])  # of another process, too
    table.record([4], epoch=0, step=4, loss=[1.0])  # not written yet
    table.forget()
    table.truncate(step)
    assert table.to_arrow()["step"].to_pylist() == list(range(min(step, 4)))
    assert table.count_stored() == min(step, 4)
    assert len(list(tmp_path.iterdir())) == min((step + 1) // 2, 2)


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"x" * len(raw)])
def test_a_torn_shard_is_named(tmp_path, damage):
    table = two_epochs(tmp_path)
    path = table.flush()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"must be a whole Parquet file, {path} is not .* delete it to go on"):
        ScoreTable.load(tmp_path).to_arrow()


def test_what_an_interrupted_write_left_is_not_read(tmp_path):
    path = two_epochs(tmp_path / "scores").flush()
    left = path.with_name(f"{path.name}.123.tmp")
    left.write_bytes(path.read_bytes()[:50])
    table = ScoreTable.load(tmp_path / "scores")
    assert len(table) == 5
    table.truncate(9)
    assert not left.exists()
    left.write_bytes(b"")
    assert table.set_aside() == tmp_path / "scores-1"


def test_no_rows_make_no_shard(tmp_path):
    """What a process has whose rows were all repeated ones."""
    table = ScoreTable(tmp_path)
    table.record([], epoch=0, step=3, loss=[])
    assert table.flush() is None
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_no_shard(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    table = two_epochs(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", fail)
        message = r"scores of 5 visits could not be written to .* \(disk full\)\. Earlier shards are whole\. Make room"
        with pytest.raises(OSError, match=message):
            table.flush()
    assert list(tmp_path.iterdir()) == []
    assert len(table) == 5
    table.flush()
    assert len(ScoreTable.load(tmp_path)) == 5


@pytest.mark.parametrize("make", [lambda p: p / "absent", lambda p: p])
def test_load_needs_shards(tmp_path, make):
    with pytest.raises(
        FileNotFoundError, match=r"must hold the score shards \(steps-\*-rank-\*.parquet\) of a run, found none. Give"
    ):
        ScoreTable.load(make(tmp_path))


def test_set_aside_numbers_the_folders(tmp_path):
    folder = tmp_path / "scores"
    assert ScoreTable(folder).set_aside() is None
    for number in (1, 2):
        table = two_epochs(folder)
        table.flush()
        table.record([9], epoch=0, step=0, loss=[1.0])  # unwritten rows belong to the earlier run too
        assert table.set_aside() == tmp_path / f"scores-{number}"
        assert len(table) == 0
        assert not folder.exists()
    assert len(ScoreTable.load(tmp_path / "scores-1")) == 5


# ---- columns -------------------------------------------------------------------------------------------------------


def images(size):
    """Return `size` rows with an image column, `sample_id` and a name."""
    pictures = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(size)]
    features = datasets.Features({"image": datasets.Image(), "name": datasets.Value("string")})
    rows = datasets.Dataset.from_dict(
        {"image": pictures, "name": [f"row {i}" for i in range(size)]}, features=features
    )
    return add_sample_ids(rows)


def scored(ids):
    table = ScoreTable()
    table.record(ids, epoch=0, step=0, mimic_score=np.asarray(ids) / 10 - 0.35, relative_weight=1.0, loss=2.0)
    return table


@pytest.fixture
def no_decoding(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(datasets.Image, "decode_example", fail)
    monkeypatch.setattr(Image, "open", fail)


def test_scores_follow_the_ids_without_decoding_an_image(no_decoding):
    rows = images(8)
    rows = rows.shuffle(seed=1).filter(lambda i: i != 5, input_columns="sample_id")
    result = attach_scores(rows, scored([7, 0, 2, 1, 3, 4, 6, 5]))
    assert result.column_names == ["image", "name", "sample_id", "mimic_score", "relative_weight", "loss", "n_visits"]
    ids = result["sample_id"][:]
    assert sorted(ids) == [0, 1, 2, 3, 4, 6, 7]
    assert ids != sorted(ids)
    assert result["mimic_score"][:] == pytest.approx([i / 10 - 0.35 for i in ids])
    assert result["name"][:] == [f"row {i}" for i in ids]
    assert result["n_visits"][:] == [1] * 7
    with pytest.raises(AssertionError, match="an image was decoded"):
        result[0]


def test_images_are_as_before():
    rows = images(4)
    result = attach_scores(rows.shuffle(seed=3), scored(range(4)))
    assert result.features["image"] == datasets.Image()
    assert [row["image"].getpixel((0, 0))[0] for row in result] == result["sample_id"][:]


def test_filtering_by_score_decodes_nothing(no_decoding):
    kept = attach_scores(images(8), scored(range(8))).filter(lambda s: s > 0, input_columns="mimic_score")
    assert kept["sample_id"][:] == [4, 5, 6, 7]


def test_the_keep_mask_of_a_filter_becomes_a_column():
    table = ScoreTable()
    table.record([2, 0, 1], epoch=0, step=0, mimic_score=[0.0] * 3, relative_weight=[2.0, 0.4, 0.6])
    keep = ThresholdFilter().fit_predict(table)
    result = attach_scores(images(3).select([2, 1, 0]), table, keep=keep)
    assert result["keep"][:] == [True, False, False]
    assert result.features["keep"] == datasets.Value("bool")


def test_rows_without_a_score_are_null_with_a_warning():
    table = scored([0, 2])
    table.record([1], epoch=0, step=0, mimic_score=[NAN], relative_weight=[0.0])
    with pytest.warns(UserWarning, match="2 of 4 rows have no score: null, not 0. A filter must say") as caught:
        result = attach_scores(images(4), table, keep=[True, False, True])
    assert caught[0].filename == __file__
    assert result["mimic_score"][:] == [pytest.approx(-0.35), None, pytest.approx(-0.15), None]
    assert result["relative_weight"][:] == [1.0, 0.0, 1.0, None]
    assert result["n_visits"][:] == [1, 0, 1, 0]
    assert result["keep"][:] == [True, False, True, None]


def test_another_name_of_the_id_column():
    rows = images(3).rename_column("sample_id", "row")
    assert attach_scores(rows, scored([2, 1, 0]), sample_id_column="row")["mimic_score"][:] == pytest.approx(
        [-0.35, -0.25, -0.15]
    )


def test_reserved_columns():
    rows = attach_scores(images(3), scored(range(3)))
    with pytest.raises(
        ValueError, match=r"must not have the columns mimic_score, relative_weight, loss, n_visits yet"
    ):
        attach_scores(rows, scored(range(3)))
    assert attach_scores(rows.remove_columns(["mimic_score", "relative_weight", "loss", "n_visits"]), scored(range(3)))


def test_no_id_matches():
    with pytest.raises(ValueError, match=r"no `sample_id` of the data set is in the score table \(3 rows, 2 scored"):
        attach_scores(images(3), scored([10, 11]))
    with pytest.raises(ValueError, match=r"\(3 rows, 0 scored"):
        attach_scores(images(3), ScoreTable())


def test_keep_of_another_length():
    with pytest.raises(ValueError, match="`keep` must have one value per scored sample, 3, got 2"):
        attach_scores(images(3), scored(range(3)), keep=[True, False])
