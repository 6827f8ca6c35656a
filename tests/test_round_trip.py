"""The whole way over the Hub: train with scores, publish what is kept, load it again, train on it."""

import json
import re
import shutil
import types

import image_text
import models
import numpy as np
import pytest
import torch
import yaml
from datasets import DatasetDict, load_dataset
from test_cli import NAMES, cells, fails, images, save, taught
from transformers import ViTForImageClassification, ViTImageProcessorPil

from hf_mimic import (
    MimicTrainer,
    MimicTrainingArguments,
    ThresholdFilter,
    attach_scores,
    load_scores,
    push_curated_dataset,
)
from hf_mimic.cli import main
from hf_mimic.data import add_sample_ids, load_rows, with_image_transform
from hf_mimic.scores import ScoreTable

QUIET = {"use_cpu": True, "report_to": "none", "dataloader_pin_memory": False, "disable_tqdm": True}
QUIET |= {"per_device_train_batch_size": 8, "learning_rate": 1e-3}
PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16})


@pytest.fixture(autouse=True)
def _quick(api, monkeypatch):
    monkeypatch.setattr("hf_mimic.hub.time", types.SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder with `base` and `reference`, which knows the classes."""
    home = tmp_path_factory.mktemp("round_trip")
    known = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    save(models.make("vit", **known), home / "base")
    save(taught(models.make("vit", seed=1, **known)), home / "reference")
    return home


@pytest.fixture
def online(hub, home, request):
    """Return names on the Hub of this test's own: data (the first five labels are wrong), model, reference."""
    name = request.node.name.replace("[", "-").strip("]").replace("_", "-")[:60]
    names = {kind: f"user/{kind}-{name}" for kind in ("data", "base", "reference", "curated")}
    noisy = images(labels=[(i % 4 + (i < 5)) % 4 for i in range(24)])
    DatasetDict(train=noisy, test=images(8)).push_to_hub(names["data"])
    for kind in ("base", "reference"):
        hub.create(names[kind]).commit(home / kind)
    hub.log.clear()
    return names


def fit(names, output, dataset, **changes):
    """Train on rows with ids, against the reference on the Hub; return the trainer."""
    torch.manual_seed(0)
    given = {**QUIET, "save_strategy": "no", "num_train_epochs": 1, **changes}
    args = MimicTrainingArguments(str(output), reference_model=names["reference"], **given)
    trainer = MimicTrainer(ViTForImageClassification.from_pretrained(names["base"]), args, train_dataset=dataset)
    trainer.train()
    return trainer


def test_train_publish_load_train(hub, online, tmp_path):
    dataset = add_sample_ids(load_dataset(online["data"], split="train"))
    first = fit(online, tmp_path / "first", with_image_transform(dataset, PROCESSOR))
    reference = hub.repo(online["reference"]).resolve("main").oid
    assert first.run_settings()["reference_revision"] == reference  # pinned
    done = push_curated_dataset(
        dataset, online["curated"], scores=first.scores, rule=ThresholdFilter(top=0.75), figures=False
    )
    curated = load_dataset(done.repo_id, split="train", revision=done.commit)
    assert len(curated) == 18
    original = {row["sample_id"]: np.asarray(row["image"]) for row in dataset}
    assert all(np.array_equal(np.asarray(row["image"]), original[row["sample_id"]]) for row in curated)
    again = fit(online, tmp_path / "again", with_image_transform(curated, PROCESSOR))
    seen = again.scores.aggregate()["sample_id"].to_pylist()
    assert seen == sorted(curated["sample_id"])  # the names that the rows had before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_curated_stream_is_trained_on(hub, online, tmp_path, workers):
    rows = add_sample_ids(load_rows(online["data"]))
    keep = np.arange(24) % 3 > 0
    push_curated_dataset(
        attach_scores(rows, _scores(24), keep=keep), online["curated"], figures=False, max_shard_bytes=2_000
    )
    stream = load_dataset(online["curated"], split="train", streaming=True)
    assert stream.num_shards >= max(workers, 1)
    stream = stream.map(_inputs, batched=True, remove_columns=["image", "label"]).select_columns(
        ["pixel_values", "labels", "sample_id"]
    )
    trainer = fit(online, tmp_path, stream, max_steps=2, num_train_epochs=9, dataloader_num_workers=workers)
    seen = ScoreTable.load(tmp_path / "scores").to_arrow()["sample_id"].to_pylist()
    assert len(seen) == 16
    assert len(set(seen)) == 16
    assert set(seen) <= set(np.flatnonzero(keep).tolist())
    assert trainer.state.global_step == 2


def _inputs(batch):
    pixels = PROCESSOR([image.convert("RGB") for image in batch["image"]], return_tensors="np")["pixel_values"]
    return {"pixel_values": list(pixels), "labels": batch["label"]}


def _scores(size):
    table = ScoreTable()
    table.record(range(size), epoch=0, step=0, mimic_score=np.linspace(-1, 1, size))
    return table


def test_a_third_party_joins_the_scores(hub, online):
    """Who has the original data set makes the curated one from the scores alone."""
    rows, rule = add_sample_ids(load_rows(online["data"])), ThresholdFilter(top=0.5)
    push_curated_dataset(rows, online["curated"], scores=_scores(24), rule=rule, figures=False)
    curated = load_dataset(online["curated"], split="train")
    mine, table = add_sample_ids(load_rows(online["data"])), load_scores(online["curated"])
    joined = attach_scores(mine, table, keep=rule.fit_predict(table))
    joined = joined.filter(lambda keep: keep, input_columns="keep")
    assert joined.column_names == curated.column_names
    plain = [each.remove_columns("image").to_dict() for each in (joined, curated)]
    assert plain[0] == plain[1]
    assert [image.tobytes() for image in joined["image"]] == [image.tobytes() for image in curated["image"]]
    other = attach_scores(mine, table, keep=ThresholdFilter(top=0.25).fit_predict(table))  # negative control
    assert sum(other["keep"]) < len(curated)


# ---- hf-mimic run --------------------------------------------------------------------------------------------------


def recipe(folder, names, **changes):
    """Write a recipe with every step; return its path."""
    content = {**QUIET, "model": names["base"], "reference_model": names["reference"], "dataset": names["data"]}
    content |= {"output_dir": str(folder / "out"), "eval_split": "test", "num_train_epochs": 1}
    content |= {"train": {"save_strategy": "epoch"}, "filter": {"top": 0.75}, "report": {}, "evaluate": None}
    content |= {"push": {"repo_id": names["curated"]}, "retrain": {"save_strategy": "no"}, **changes}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in content.items() if value is not None}))
    return ["run", "--config", str(path)]


def steps(text):
    """Return step to whether it was done by this run, of what was printed."""
    lines = [line.removeprefix("== ") for line in text.splitlines() if line.startswith("== ")]
    return {line.split(":")[0]: not line.endswith("done before") for line in lines}


def test_a_recipe_from_end_to_end(hub, online, tmp_path, capsys):
    run = recipe(tmp_path, online, hub_token="hf_" + "secret" * 6)
    assert main(run) == 0
    printed = capsys.readouterr().out
    assert steps(printed) == dict.fromkeys(["train", "filter", "report", "push", "retrain"], True)
    summary = cells(printed.split("\n\n")[-1])
    commit = hub.commits(online["curated"])[-1].oid
    assert (summary["kept"], summary["commit"]) == ("18 (75.0%)", commit)
    assert summary["published"] == f"{hub.url}/datasets/{online['curated']}"
    assert all(0 <= float(summary[name]) <= 1 for name in ("accuracy before", "accuracy after"))
    kept = load_rows(str(tmp_path / "out/curated.parquet"))["sample_id"][:]
    assert load_dataset(online["curated"], split="train")["sample_id"][:] == kept
    assert ScoreTable.load(tmp_path / "out/retrain/scores").aggregate()["sample_id"].to_pylist() == kept
    assert (tmp_path / "out/report/report.html").is_file()
    notes = json.loads((tmp_path / "out/mimic_recipe.json").read_text())["steps"]
    assert notes["retrain"]["values"]["dataset_revision"] == commit
    assert "secret" not in json.dumps(notes)

    before = (tmp_path / "out/retrain/model.safetensors").stat().st_mtime_ns
    hub.clear_log()
    assert main(run) == 0
    again = capsys.readouterr().out
    assert steps(again) == dict.fromkeys(steps(printed), False)
    assert cells(again.split("\n\n")[-1]) == summary | {"done now": "nothing, all was done"}
    assert hub.log == []
    assert (tmp_path / "out/retrain/model.safetensors").stat().st_mtime_ns == before


def test_a_recipe_goes_on_after_the_hub_failed(hub, online, tmp_path, capsys):
    run = recipe(tmp_path, online, report=None)
    fault = hub.fail("POST", "/commit/", status=403, times=1)
    assert main(run) == 1
    out, err = capsys.readouterr()
    assert fault.hits == 1
    assert "push did not come to its end; the same command goes on from here" in out
    assert f"hf-mimic run: {online['curated']}: commit failed: the token must not write to it" in err
    assert main(run) == 0
    out = capsys.readouterr().out
    assert steps(out) == {"train": False, "filter": False, "push": True, "retrain": True}
    assert len(hub.commits(online["curated"])) == 2


def test_every_step_reads_the_commit_of_the_first(hub, online, tmp_path, capsys):
    short = {"report": None, "push": None, "retrain": None}
    commit = hub.commits(online["data"])[-1].oid
    assert main(recipe(tmp_path, online, **short, filter=None)) == 0
    images(40).push_to_hub(online["data"], split="train")  # the branch moves: ids are row numbers of another set
    assert main(recipe(tmp_path, online, **short)) == 0
    assert steps(capsys.readouterr().out.split("done now")[-2]) == {"train": False, "filter": True}
    assert len(load_rows(str(tmp_path / "out/curated.parquet"))) == 18
    notes = json.loads((tmp_path / "out/mimic_recipe.json").read_text())
    assert notes["commits"] == {f"{online['data']}@main": commit}
    assert notes["steps"]["filter"]["values"]["dataset_revision"] == commit
    with pytest.warns(UserWarning, match="held the scores of an earlier run"):
        assert main([*recipe(tmp_path, online, **short), "--overwrite"]) == 0  # reads it anew
    assert len(load_rows(str(tmp_path / "out/curated.parquet"))) == 30


def test_a_data_set_that_is_not_there_stops_a_run_at_once(hub, online, tmp_path, capsys):
    assert main(recipe(tmp_path, online, dataset="user/nowhere")) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(
        "hf-mimic run: user/nowhere: looking up the main branch failed: there is no data set of this"
    )


def test_pairs_without_a_push(tmp_path, capsys):
    """An image-text model without a reference: what is kept is trained on from Parquet, and evaluated."""
    clip = image_text.save(tmp_path / "clip")
    texts = [f"a {'dark' if i % 2 else 'bright'} {image_text.COLOURS[i % 3]} picture" for i in range(24)]
    for name, rows in (("rows", texts), ("held", texts[:6])):
        image_text.rows(rows).to_parquet(tmp_path / f"{name}.parquet")
    content = {**QUIET, "model": clip, "dataset": str(tmp_path / "rows.parquet"), "output_dir": str(tmp_path / "out")}
    content |= {"text_column": "text", "eval_split": str(tmp_path / "held.parquet"), "save_strategy": "no"}
    content |= {"train": {"strategy": "dissect", "num_train_epochs": 2}, "retrain": {"strategy": "uniform"}}
    content |= {"filter": {"top": 0.5, "column": "clip_score"}, "evaluate": {}, "num_train_epochs": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert main(["run", "--config", str(tmp_path / "recipe.yaml")]) == 0
    summary = cells(capsys.readouterr().out.split("\n\n")[-1])
    assert summary["kept"] == "12 (50.0%)"
    assert {"rsum before", "rsum after"} <= summary.keys()
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert found["model"] == str(tmp_path / "out/retrain")
    assert f"{found['rsum']:.1f}" == summary["rsum after"]


def scoring(folder, home, **changes):
    """Write a recipe that scores a file and filters it, off the Hub; return its command."""
    if not (folder / "rows.parquet").exists():
        images().to_parquet(folder / "rows.parquet")
    content = {
        "model": str(home / "base"),
        "reference_model": str(home / "reference"),
        "output_dir": str(folder / "out"),
    }
    content |= {"dataset": str(folder / "rows.parquet"), "score": {}, "filter": {"top": 0.5}, **changes}
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return ["run", "--config", str(folder / "recipe.yaml")]


def test_what_changed_is_done_again(home, tmp_path, capsys):
    assert main(scoring(tmp_path, home)) == 0
    assert main(scoring(tmp_path, home, filter={"top": 0.25})) == 0
    out = capsys.readouterr().out
    assert "== score: done before\n" in out
    assert "== filter: again: top changed" in out
    assert len(load_rows(str(tmp_path / "out/curated.parquet"))) == 6
    shutil.rmtree(tmp_path / "out/scores")
    assert main(scoring(tmp_path, home, filter={"top": 0.25})) == 0
    assert steps(capsys.readouterr().out) == {"score": True, "filter": True}


def test_other_rows_under_the_same_name_are_scored_anew(home, tmp_path, capsys):
    assert main(scoring(tmp_path, home)) == 0
    before = load_rows(str(tmp_path / "out/curated.parquet"))["sample_id"][:]
    rows = images()
    rows.select(range(len(rows) - 1, -1, -1)).to_parquet(tmp_path / "rows.parquet")
    capsys.readouterr()
    assert main(scoring(tmp_path, home)) == 0
    assert "== score: again: dataset on disk changed" in capsys.readouterr().out
    kept = load_rows(str(tmp_path / "out/curated.parquet"))["sample_id"][:]
    assert sorted(len(rows) - 1 - i for i in kept) == sorted(before)
    assert main(scoring(tmp_path, home)) == 0
    assert steps(capsys.readouterr().out) == {"score": False, "filter": False}


def test_what_an_interruption_left_behind_is_done_again(home, tmp_path, capsys, monkeypatch):
    """The report was done, from scores that were made anew by a call that did not come as far as the report."""
    run = scoring(tmp_path, home, report={})
    assert main(run) == 0
    with monkeypatch.context() as patched:
        patched.setattr("hf_mimic.filter_command.filter_data", _stopped)
        assert main([*run, "--from", "score"]) == 1
    capsys.readouterr()
    assert main(run) == 0
    assert steps(capsys.readouterr().out) == {"score": False, "filter": True, "report": True}
    assert main(run) == 0
    assert not any(steps(capsys.readouterr().out).values())  # negative control


def _stopped(*_):
    raise OSError("stopped")


def test_from_and_overwrite(home, tmp_path, capsys):
    run = scoring(tmp_path, home)
    fails(
        capsys,
        1,
        "score must be done before, as the recipe has it now, it is not. Run without --from",
        lambda: main([*run, "--from", "filter"]),
    )
    fails(capsys, 1, "`--from` must be one of 'score', 'filter', got 'push'", lambda: main([*run, "--from", "push"]))
    assert main(run) == 0
    capsys.readouterr()
    assert main([*run, "--from", "filter"]) == 0
    assert steps(capsys.readouterr().out) == {"score": False, "filter": True}
    assert main([*run, "--overwrite"]) == 0
    out = capsys.readouterr().out
    assert steps(out) == {"score": True, "filter": True}
    assert "were there already" not in out
    assert main(scoring(tmp_path, home, overwrite=True)) == 0
    assert steps(capsys.readouterr().out) == {"score": True, "filter": True}


def test_a_killed_training_goes_on_and_a_changed_one_is_not_lost(home, tmp_path, capsys, monkeypatch):
    class Killed(BaseException):
        """What nobody catches."""

    def die(trainer, *args, **kwargs):
        save(trainer, *args, **kwargs)
        raise Killed

    def die_at_once(trainer, **kwargs):
        raise Killed

    save = MimicTrainer._save_checkpoint
    settings = {**QUIET, "save_strategy": "epoch", "num_train_epochs": 2}
    run = scoring(tmp_path, home, score=None, train=settings)
    with monkeypatch.context() as patched:
        patched.setattr(MimicTrainer, "_save_checkpoint", die)
        with pytest.raises(Killed):
            main(run)
    assert _checkpoints(tmp_path) == ["checkpoint-3"]
    message = "train must have the settings that it was begun with, `learning_rate` was 0.001. Set it back, give --from train"
    changed = {**settings, "learning_rate": 0.5}
    fails(capsys, 1, message, lambda: main(scoring(tmp_path, home, score=None, train=changed)))
    assert main(scoring(tmp_path, home, score=None, train=settings)) == 0
    assert "== train: goes on from its last checkpoint" in capsys.readouterr().out
    assert _checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-6"]
    assert len(ScoreTable.load(tmp_path / "out/train/scores")) == 48  # as without the interruption
    fails(capsys, 1, message, lambda: main(scoring(tmp_path, home, score=None, train=changed)))
    anew = [*scoring(tmp_path, home, score=None, train=changed), "--from", "train"]
    with monkeypatch.context() as patched:  # killed before its first step: the checkpoints there are not its own
        patched.setattr(MimicTrainer, "train", die_at_once)
        with pytest.raises(Killed):
            main(anew)
    assert "without --from, --overwrite or `overwrite: true` the command goes on" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="held the scores of an earlier run; they are now in"):
        assert main(anew[:-2]) == 0
    assert "goes on from its last checkpoint" not in capsys.readouterr().out


def test_a_killed_second_training_does_not_go_on_with_other_rows(home, tmp_path, capsys, monkeypatch):
    def die(trainer, *args, **kwargs):
        save(trainer, *args, **kwargs)
        raise OSError("stopped")

    save = MimicTrainer._save_checkpoint
    sections = {
        "score": {},
        "retrain": {**QUIET, "strategy": "uniform", "save_strategy": "epoch", "num_train_epochs": 2},
    }
    with monkeypatch.context() as patched:
        patched.setattr(MimicTrainer, "_save_checkpoint", die)
        assert main(scoring(tmp_path, home, **sections)) == 1
    with pytest.warns(UserWarning, match="held the scores of an earlier run; they are now in"):
        assert main(scoring(tmp_path, home, **sections, filter={"top": 0.25})) == 0
    out = capsys.readouterr().out
    assert "goes on from its last checkpoint" not in out
    kept = load_rows(str(tmp_path / "out/curated.parquet"))["sample_id"][:]
    seen = ScoreTable.load(tmp_path / "out/retrain/scores").to_arrow()["sample_id"].to_pylist()
    assert sorted(seen) == sorted(2 * kept)


def _checkpoints(folder):
    return sorted(path.name for path in (folder / "out/train").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter": {"top": 0.5, "threshold": 1}}, "filter: one rule must decide, got --threshold and --top"),
        ({"filter": {"top": 50}}, "filter: `top` must be in .0, 1., got 50.0"),
        ({"filter": {"min_trust": 2}}, "filter: `min_trust` must be in"),
        ({"filter": {"top": 0.5, "column": "los"}}, "filter: `column` must be one of .* Did you mean 'loss'"),
        ({"filter": {"expression": "top(los, 0.5)"}}, "filter: a column must be one of .*, got 'los'"),
        ({"filter": {"expression": "top(trust, 0.5"}}, "filter: `expression` must be readable"),
        ({"filter": {"filter": "trsut"}}, "filter: `--filter` must be one of .* Did you mean 'trust'"),
        ({"filter": {"output": "x.csv"}}, "filter: --output must be a .parquet file, got x.csv"),
        ({"push": {"repo_id": "u/x", "top": 1}}, "push: `top` comes from a step before it"),
    ],
)
def test_nothing_begins_before_all_is_checked(home, tmp_path, capsys, changes, message):
    assert main(scoring(tmp_path, home, **changes)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(message, err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (None, "user/never", "looking up the login failed: .*hf auth login"),
        ({"role": "read"}, "user/never", "the token may only read. Log in with one that may write to user/never"),
        (
            {},
            "other/never",
            "it is not there, and other is neither this login nor an organization of it. Take one of user",
        ),
        ({}, "other/there", "the token must not write to it"),
    ],
)
def test_who_may_not_publish_is_told_before_anything_begins(
    hub, home, tmp_path, monkeypatch, capsys, token, repo_id, message
):
    hub.create("other/there", "datasets")
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", hub.token("user", **token))
    assert main(scoring(tmp_path, home, push={"repo_id": repo_id})) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(f"^hf-mimic run: {repo_id}: looking up the login failed: ", err)
    assert re.search(message, err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "rule",
    [
        {"top": 0.01, "column": "clip_score"},
        {"threshold": -3},
        {"min_score": 1e9},
        {"min_trust": 0},
        {"expression": "(trust >= 0.5) | (kept > 0) - bottom(n_visits, 0.5) & known(ref_loss)"},
        {"filter": "ensemble", "more_scores": ["elsewhere"]},
    ],
)
def test_a_rule_that_may_be_right_is_not_refused(home, tmp_path, capsys, rule):
    """Negative control: what is tried before there are scores keeps nothing, or has columns that they may not have."""
    run = scoring(tmp_path, home, filter=rule, dataset=str(tmp_path / "none.parquet"))
    fails(capsys, 1, "none.parquet does not exist", lambda: main(run))  # the first step began


def test_several_processes_are_refused(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "`hf-mimic run` must be a single process, got WORLD_SIZE=2. Launch the training by itself"
    fails(capsys, 1, message, lambda: main(scoring(tmp_path, home)))


def test_notes_that_cannot_be_read(home, tmp_path, capsys):
    run = scoring(tmp_path, home)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mimic_recipe.json").write_text("[]")
    fails(capsys, 1, "mimic_recipe.json must hold the notes of a run, it does not", lambda: main(run))


def test_a_recipe_that_is_not_there(tmp_path, capsys):
    fails(capsys, 1, "none.yaml", lambda: main(["run", "--config", str(tmp_path / "none.yaml")]))
    fails(capsys, 2, "the following arguments are required: --config", lambda: main(["run"]))
