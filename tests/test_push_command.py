"""`hf-mimic push`: the curated data set, or the scores alone, from the command line."""

import datasets
import pytest
from datasets import load_dataset
from publications import md5s, rows, scores

from hf_mimic.cli import main


@pytest.fixture(autouse=True)
def _logged_in(api):
    datasets.disable_progress_bars()


@pytest.fixture
def shards(tmp_path):
    scores(folder=tmp_path / "scores")
    return str(tmp_path / "scores")


def test_a_data_set_of_the_hub_and_its_scores(hub, shards, capsys):
    rows().push_to_hub("user/source")
    commit = hub.commits("user/source")[-1].oid
    push = ["push", "--repo_id", "user/target", "--dataset", "user/source", "--scores", shards, "--top", "0.5"]
    assert main(push) == 0
    printed = capsys.readouterr().out
    assert f"published  {hub.url}/datasets/user/target" in printed
    assert "the best 50.0% by mimic_score" in printed
    assert load_dataset("user/target", split="train").num_rows == 15
    card = hub.repo("user/target").files["README.md"].decode()
    assert f"user/source@{commit[:7]}" in card
    assert "hf-mimic push --repo_id user/target --dataset user/source --scores scores" in card
    assert main(push) == 0
    assert "nothing to do, it is there already" in capsys.readouterr().out
    assert len(hub.commits("user/target")) == 2


def test_scores_alone_are_filtered_by_others(hub, shards, tmp_path, capsys):
    assert main(["push", "--repo_id", "user/lone-scores", "--scores", shards, "--private"]) == 0
    assert "visits     60" in capsys.readouterr().out
    assert hub.repo("user/lone-scores").private
    rows().to_parquet(tmp_path / "rows.parquet")
    output = tmp_path / "kept.parquet"
    given = ["--dataset", str(tmp_path / "rows.parquet"), "--scores", "user/lone-scores", "--output", str(output)]
    assert main(["filter", *given]) == 0
    assert load_dataset("parquet", data_files=str(output), split="train").num_rows == 24


def test_a_filtered_file_holds_its_images(tmp_path, shards):
    for row in rows().cast_column("image", datasets.Image(decode=False)):
        (tmp_path / f"{row['sample_id']:02d}.png").write_bytes(row["image"]["bytes"])
    paths = [str(tmp_path / f"{i:02d}.png") for i in range(30)]
    given = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    given.save_to_disk(tmp_path / "saved")
    output = tmp_path / "kept.parquet"
    filtered = ["filter", "--dataset", str(tmp_path / "saved"), "--scores", shards, "--output", str(output)]
    assert main(filtered) == 0
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert md5s(load_dataset("parquet", data_files=str(output), split="train")).items() <= md5s(rows()).items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top", "0.5"], "--top must come with a --dataset to filter, got none"),
        (["--revision", "x", "--create_pr"], "`create_pr` must go to main, got the revision 'x'"),
        (["--dataset", "user/nowhere"], "user/nowhere"),
    ],
)
def test_what_is_refused(hub, shards, capsys, options, message):
    assert main(["push", "--repo_id", "user/refused", "--scores", shards, *options]) == 1
    told = capsys.readouterr().err
    assert told.startswith("hf-mimic push: ")
    assert message in told
    assert ("datasets", "user/refused") not in hub.repos


def test_a_token_that_may_not_write(hub, shards, capsys, monkeypatch):
    token = hub.token("user", role="read")
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", "--repo_id", "user/refused", "--scores", shards]) == 1
    told = capsys.readouterr().err
    assert "user/refused: create the repo failed: the token must not write to it" in told
    assert told.count("\n") == 1
    assert token not in told
