"""What a hurried user does wrong, each refused before anything is lost."""

import models
import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_mimic import MimicTrainer, MimicTrainingArguments, ScoreTable, data, score_dataset
from hf_mimic.cli import main
from hf_mimic.data import load_rows
from hf_mimic.mimic import reference_direction


@pytest.fixture
def folder(tmp_path):
    """Return a folder with 8 rows and scores of the first 6, of which every second weighs more than the average."""
    Dataset.from_dict({"text": list("abcdefgh")}).to_parquet(tmp_path / "rows.parquet")
    table, ids = ScoreTable(tmp_path / "scores"), np.arange(6)
    table.record(ids, epoch=0, step=0, mimic_score=ids / 10, relative_weight=0.5 + ids % 2)
    table.flush()
    return tmp_path


def filtered(folder, *flags, dataset="rows.parquet", output="curated.parquet"):
    place = ["--dataset", str(folder / dataset), "--scores", str(folder / "scores"), "--output", str(folder / output)]
    with pytest.warns(UserWarning, match="have no score"):
        return main(["filter", *place, *flags])


def refused(folder, capsys, *flags, **places):
    place = {"dataset": "rows.parquet", "output": "curated.parquet", **places}
    assert main(
        ["filter", "--scores", str(folder / "scores"), *flags]
        + [f"--{name}={folder / value}" for name, value in place.items()]
    ) == 1  # fmt: skip
    return capsys.readouterr().err


def test_rows_without_a_score_are_kept_and_counted(folder, capsys):
    assert filtered(folder) == 0
    assert "without a score  2 (kept)" in capsys.readouterr().out
    assert load_rows(str(folder / "curated.parquet"))["text"] == list("bdfgh")


def test_rows_without_a_score_can_be_left_out(folder, capsys):
    assert filtered(folder, "--drop_unscored") == 0
    assert "2 (left out)" in capsys.readouterr().out
    assert load_rows(str(folder / "curated.parquet"))["text"] == list("bdf")


def test_the_data_set_is_never_overwritten(folder, capsys):
    before = (folder / "rows.parquet").read_bytes()
    assert "must not overwrite the data set" in refused(folder, capsys, output="rows.parquet")
    assert "must be a .parquet file" in refused(folder, capsys, output="curated.csv")
    assert (folder / "rows.parquet").read_bytes() == before


def test_another_data_set_is_noticed_by_its_row_numbers(folder, capsys):
    Dataset.from_dict({"text": list("abc")}).to_parquet(folder / "few.parquet")
    assert "up to 2, but the scores have an id 5" in refused(folder, capsys, dataset="few.parquet")


def test_nothing_kept_is_a_failure(folder, capsys):
    with pytest.warns(UserWarning, match="have no score"):
        assert "at least one row must be kept" in refused(folder, capsys, "--threshold", "9", "--drop_unscored")


def test_a_filtered_data_set_can_be_filtered_again(folder):
    assert filtered(folder, "--keep_all") == 0
    assert filtered(folder, dataset="curated.parquet", output="again.parquet") == 0
    assert load_rows(str(folder / "again.parquet"))["text"] == list("bdfgh")


def test_a_folder_with_other_files_is_not_moved(folder):
    (folder / "scores" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"must hold nothing but scores to be set aside, got mine\.txt"):
        ScoreTable(folder / "scores").set_aside()
    Dataset.from_dict({"x": [1]}).to_parquet(folder / "data.parquet")
    assert ScoreTable(folder).set_aside() is None
    assert (folder / "data.parquet").is_file()


def test_a_loss_that_is_not_per_sample_is_refused(tmp_path):
    args = MimicTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    model = models.make("vit")
    with pytest.raises(ValueError, match="`compute_loss_func` must be None"):
        MimicTrainer(model, args, reference_model=model, compute_loss_func=lambda *_: torch.zeros(()))


def test_label_smoothing_must_be_a_share(tmp_path):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got 1.5"):
        MimicTrainingArguments(str(tmp_path), label_smoothing_factor=1.5)


def test_scoring_with_itself_warns():
    model, batch = models.make("vit"), models.make_batch("vit", size=4)
    rows = data.add_sample_ids(Dataset.from_dict({k: v.numpy() for k, v in batch.items()}).with_format("torch"))
    with pytest.warns(UserWarning, match="the reference equals the model"):
        table = score_dataset(model, rows, reference_direction(model, model))
    assert table.aggregate()["mimic_score"].to_pylist() == [0.0] * 4


def test_the_demo_needs_a_seed(capsys):
    assert main(["demo", "--seeds", "0"]) == 1
    assert "--seeds must be at least 1, got 0" in capsys.readouterr().err
