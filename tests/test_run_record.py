import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_mimic.corpus_folder import SETTINGS
from hf_mimic.run_record import RECORD_NAME, RunRecord, hub_id, public_command, public_name, versions

SHA = "a" * 40
FULL = RunRecord(
    kind="training",
    model="google/vit-base",
    model_revision=SHA,
    reference_model="you/trusted",
    reference_revision=SHA,
    dataset="you/noisy",
    split="train",
    settings={"mimic_layers": ["head"], "temperature": "auto"},
    seeds={"seed": 1},
    health={"unhealthy": 0.0},
    results={"accuracy": 0.9},
    versions={"torch": "2.13.0"},
    command="hf-mimic train --model google/vit-base",
)


def test_a_record_survives_its_file(tmp_path):
    FULL.write(tmp_path)
    assert RunRecord.read(tmp_path) == FULL
    assert RunRecord.from_dict(json.loads((tmp_path / RECORD_NAME).read_text())) == FULL


def test_what_is_not_known_is_none():
    assert RunRecord.from_dict({}) == RunRecord()
    assert RunRecord().as_dict()["model"] is None
    assert RunRecord().kind == "unknown"


def test_keys_of_a_later_version_are_left_out():
    assert RunRecord.from_dict({"model": "a/b", "of_tomorrow": 1}) == RunRecord(model="a/b")


def test_numbers_become_those_of_json():
    record = RunRecord(
        settings={"a": np.float32(0.5), "b": torch.tensor(2), "c": (1, float("inf"))}, results={"x": float("nan")}
    )
    assert record.settings == {"a": 0.5, "b": 2, "c": [1, None]}
    assert record.results == {"x": None}
    json.dumps(record.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": 3}, "`model` must be a string or None, got 3"),
        ({"kind": "trianing"}, "Did you mean 'training'"),
        ({"seeds": {"seed": "1"}}, "`seeds` must have int values, got seed: '1'"),
        ({"seeds": {"seed": True}}, "`seeds` must have int values, got seed: True"),
        ({"versions": {"torch": 2}}, "`versions` must have str values"),
        ({"settings": [1]}, r"`settings` must be a dict, got \[1\]"),
        ({"settings": {"a": {"b": object()}}}, r"`settings\['a'\]\['b'\]` must hold JSON values, got a object"),
        ({"command": "hf-mimic 'train"}, "must be a line that a shell can read"),
        ([1], "a RunRecord must come from a dict"),
    ],
)
def test_wrong_types_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        RunRecord.from_dict(given)


def test_a_score_folder_has_the_record_of_the_run_it_lies_in(tmp_path):
    scores = tmp_path / "scores"
    scores.mkdir()
    assert RunRecord.read(scores) is None
    FULL.write(tmp_path)
    assert RunRecord.read(scores) == FULL
    own = RunRecord(kind="scoring", model="own/model")
    own.write(scores)
    assert RunRecord.read(scores) == own


def test_a_scoring_pass_is_nearer_than_the_run_around_it(tmp_path):
    scores = tmp_path / "frozen"
    scores.mkdir()
    FULL.write(tmp_path)
    settings = {"model": "a/b", "reference": str(tmp_path / "trusted"), "revision": SHA, "layers": ["head"]}
    (scores / SETTINGS).write_text(json.dumps({**settings, "data": "c/d", "split": "train", "batch_size": 32}))
    assert RunRecord.read(scores) == RunRecord(
        kind="scoring",
        model="a/b",
        reference_model="local folder trusted",
        reference_revision=SHA,
        dataset="c/d",
        split="train",
        settings={"mimic_layers": ["head"], "batch_size": 32},
    )


def test_a_branch_is_no_commit(tmp_path):
    (tmp_path / SETTINGS).write_text(json.dumps({"reference": "a/b", "revision": "main"}))
    record = RunRecord.read(tmp_path)
    assert record.reference_revision is None
    assert record.settings == {"reference_revision": "main"}


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "other"}'])
def test_a_broken_record_is_an_error(tmp_path, text):
    (tmp_path / RECORD_NAME).write_text(text)
    with pytest.raises(ValueError, match=r"must hold the record of a run, it does not .* Restore or delete it"):
        RunRecord.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "public"),
    [
        (None, None),
        ("gpt2", "gpt2"),
        ("you/noisy-images", "you/noisy-images"),
        ("/home/ann/models/vit", "local folder vit"),
        ("/home/ann/models/vit/", "local folder vit"),
        ("~/vit", "local folder vit"),
        ("~nobody_there/vit", "local folder vit"),
        ("~", "local folder ~"),
        ("./out/vit", "local folder vit"),
        ("a/b/c", "local folder c"),
        (r"C:\Users\ann\vit", "local folder vit"),
        (Path("out") / "vit", "local folder vit"),
        ("data/train.parquet", "local file train.parquet"),
        ("local folder vit", "local folder vit"),
        ("https://ann:secret@host.org/data.csv?signature=1", "https://host.org/data.csv"),
        ("file:///home/ann/vit", "local folder vit"),
    ],
)
def test_public_name(name, public):
    assert public_name(name) == public
    assert public_name(public) == public
    assert RunRecord(model=public).model == public


def test_a_folder_that_exists_is_no_repo(tmp_path, monkeypatch):
    (tmp_path / "out" / "vit").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("out/vit") == "local folder vit"
    assert public_name(".") == f"local folder {tmp_path.name}"
    assert RunRecord.from_dict({"model": "out/vit"}).model == "out/vit"  # it was a repo where it was recorded


def test_absolute_paths_never_get_into_a_record():
    record = RunRecord(
        model="/home/ann/vit",
        settings={"warm": "/home/ann/x", "layers": [".*head", "~/y.csv"]},
        command="a /home/ann/b",
    )
    assert "ann" not in json.dumps(record.as_dict())
    assert RunRecord(settings={"hub": f"hf_{'a' * 34}"}).settings == {"hub": "hf_***"}
    assert record.settings == {"warm": "local folder x", "layers": [".*head", "local file y.csv"]}


@pytest.mark.parametrize(
    ("command", "public"),
    [
        ("hf-mimic train --model you/vit --lr=1e-3", "hf-mimic train --model you/vit --lr=1e-3"),
        ("hf-mimic train --config /home/ann/run.yaml", "hf-mimic train --config run.yaml"),
        ("hf-mimic train --config=/home/ann/run.yaml", "hf-mimic train --config=run.yaml"),
        ("hf-mimic push --token hf_abcdefghijk", "hf-mimic push --token 'hf_***'"),
        ("hf-mimic push --token=secret", "hf-mimic push '--token=hf_***'"),
        ("HF_TOKEN=hf_abc hf-mimic push", "'HF_TOKEN=hf_***' hf-mimic push"),
        ("hf-mimic push --repo_id you/hf_mimic_runs", "hf-mimic push --repo_id you/hf_mimic_runs"),
        (f"hf-mimic push --note hf_{'a1' * 17}", "hf-mimic push --note 'hf_***'"),
        ("a --max_new_tokens 5 b=/home/ann/c", "a --max_new_tokens 5 b=c"),
        ('hf-mimic filter --expression "top(a, 0.3)"', "hf-mimic filter --expression 'top(a, 0.3)'"),
        ("hf-mimic train --output_dir '/home/ann/my runs/a b'", "hf-mimic train --output_dir 'a b'"),
    ],
)
def test_a_command_tells_no_path_and_no_token(command, public):
    assert public_command(command) == public
    assert public_command(public) == public


@pytest.mark.parametrize("name", ["a/b", "gpt2"])
def test_hub_ids(name):
    assert hub_id(name) == name


@pytest.mark.parametrize("name", [None, "local folder x", "a/b/c", "a/b.csv", "a--b/c", "https://host.org/x", ""])
def test_what_is_no_hub_id(name):
    assert hub_id(name) is None


def test_versions_are_those_that_are_installed():
    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"transformers", "datasets", "python"} <= found.keys()
