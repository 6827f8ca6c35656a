"""`hf-mimic train | score | filter` in process, on a tiny ViT and 24 images; exit codes; configuration files; help."""

import dataclasses
import gc
import io
import itertools
import json

import datasets
import models
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessorPil

from hf_mimic.cli import main
from hf_mimic.command_arguments import EvaluateArguments
from hf_mimic.commands import COMMANDS, DataArguments, FilterArguments, ScoreArguments
from hf_mimic.data import load_rows, with_image_transform
from hf_mimic.data_arguments import evaluation_part
from hf_mimic.scores import ScoreTable

gc.freeze()  # every training collects garbage: it need not walk what was imported

NAMES = ["ant", "bee", "cat", "dog"]
QUIET = "--use_cpu --report_to none --dataloader_pin_memory False --disable_tqdm True --save_strategy no".split()
QUIET += "--per_device_train_batch_size 8 --num_train_epochs 2 --learning_rate 1e-3".split()


def images(size=24, corrupt=(), labels=None, kind=None):
    """Return encoded pictures whose brightness tells the class; the class of row i is i % 4."""
    generator, data = np.random.default_rng(0), []
    for i in range(size):
        pixels = generator.integers(0, 60, (20, 20, 3), dtype=np.uint8) + np.uint8(60 * (i % 4))
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        data.append({"bytes": file.getvalue()[: 100 if i in corrupt else None], "path": None})
    features = Features({"image": datasets.Image(), "label": kind or ClassLabel(names=NAMES)})
    labels = [i % 4 for i in range(size)] if labels is None else labels
    return Dataset.from_dict({"image": data, "label": labels}, features=features)


def save(model, folder):
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def taught(model):
    """Return the model after it has learned the classes: a reference must know them."""
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    rows = with_image_transform(images(48), processor)[:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        model(pixel_values=rows["pixel_values"], labels=torch.tensor(rows["labels"])).loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder with `base`, `reference` (both know the classes), `bare` (three classes) and `rows.parquet`."""
    home = tmp_path_factory.mktemp("home")
    known = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    save(models.make("vit", **known), home / "base")
    save(taught(models.make("vit", seed=1, **known)), home / "reference")
    save(models.make("vit", seed=2, num_labels=3), home / "bare")
    images().to_parquet(home / "rows.parquet")
    return home


def train(home, output, *flags, model="base", dataset="rows.parquet", quiet=QUIET):
    shared = ["--model", str(home / model), "--dataset", str(home / dataset), "--output_dir", str(output)]
    return main(["train", *shared, "--reference_model", str(home / "reference"), *quiet, *flags])


def score(home, output, *flags, model="base", dataset="rows.parquet"):
    shared = ["--model", str(home / model), "--dataset", str(home / dataset), "--output_dir", str(output)]
    return main(["score", *shared, "--reference_model", str(home / "reference"), *flags])


def cells(text):
    """Return the table that a command printed."""
    pairs = [line.split("  ", 1) for line in text.strip().splitlines() if "  " in line]
    return {name.strip(): value.strip() for name, value in pairs}


def fails(capsys, code, message, run):
    """Check the exit code and the message; a failure is one line, whatever went wrong."""
    if code == 2:
        with pytest.raises(SystemExit) as error:
            run()
        assert error.value.code == 2
        text = capsys.readouterr().err
    else:
        assert run() == 1
        text = capsys.readouterr().err
        assert "Traceback" not in text
    assert message in text


# ---- the three commands --------------------------------------------------------------------------------------------


def test_train_then_filter(home, tmp_path, capsys):
    data = tmp_path / "noisy.parquet"
    images(labels=[(i % 4 + (i < 5)) % 4 for i in range(24)]).to_parquet(data)  # the first five are wrong
    flags = ["--temperature", "0.3", "--mimic_layers", "head", "last_mlp"]
    assert train(home, tmp_path / "run", *flags, dataset=data) == 0
    printed = capsys.readouterr().out
    table = cells(printed)
    assert (table["samples"], table["visits"]) == ("24", "48")
    assert f"next: hf-mimic filter --dataset {data} --scores {tmp_path / 'run' / 'scores'}" in printed
    assert table["strategy"] == "trust"
    assert table["score's health"].startswith("not known")
    trained = ViTForImageClassification.from_pretrained(tmp_path / "run")
    assert trained.config.id2label == dict(enumerate(NAMES))
    scores = ScoreTable.load(tmp_path / "run" / "scores").to_arrow()
    assert sorted(scores["sample_id"].to_pylist()) == sorted([*range(24)] * 2)

    output = tmp_path / "out" / "curated.parquet"
    flags = ["--dataset", str(data), "--scores", str(tmp_path / "run" / "scores")]
    assert main(["filter", *flags, "--output", str(output)]) == 0
    table, curated = cells(capsys.readouterr().out), load_rows(str(output))
    assert curated["sample_id"][:] == list(range(5, 24))
    assert table["rule"].startswith("trust >= 0.")
    assert table["kept"] == f"{len(curated)} ({len(curated) / 24:.1%})"
    assert set(curated.column_names) == {
        *("image", "label", "sample_id", "mimic_score", "relative_weight", "loss", "n_visits", "keep"),
        *("trust", "ref_loss", "ref_trust"),
    }
    assert curated["keep"][:] == [True] * len(curated)
    assert curated["n_visits"][:] == [2] * len(curated)
    original = images()
    for row in curated:
        assert np.array_equal(np.asarray(row["image"]), np.asarray(original[row["sample_id"]]["image"]))

    assert main(["filter", *flags, "--output", str(output), "--keep_all"]) == 0
    everything = load_rows(str(output))
    assert len(everything) == 24
    assert sum(everything["keep"]) == len(curated)
    for rule in (["--threshold", "0"], ["--min_trust", "0"]):
        assert main(["filter", *flags, "--output", str(output), *rule]) == 0
        assert len(load_rows(str(output))) == 24
    capsys.readouterr()
    message = "one rule must decide, got --min_trust and --threshold"
    fails(capsys, 1, message, lambda: main(["filter", *flags, "--threshold", "1", "--min_trust", "0.5"]))


def test_score_then_filter(home, tmp_path, capsys):
    assert score(home, tmp_path / "scores", "--batch_size", "5", "--mimic_layers", "all") == 0
    table = cells(capsys.readouterr().out)
    assert (
        table["labels probably wrong"]
        == f"{1 - ScoreTable.load(tmp_path / 'scores').aggregate()['trust'].to_numpy().mean():.1%}"
    )
    assert table["samples"] == "24"
    samples = ScoreTable.load(tmp_path / "scores").aggregate()
    values = samples["mimic_score"].to_numpy()
    assert table["mean score"] == f"{values.mean():.4g}"
    assert table["negative"] == f"{(values < 0).mean():.1%}"
    assert table["layers"].startswith("40 tensors")
    flags = ["--dataset", str(home / "rows.parquet"), "--scores", str(tmp_path / "scores")]
    output = str(tmp_path / "curated.parquet")
    middle = float(np.median(values))
    assert main(["filter", *flags, "--output", output, "--min_score", repr(middle)]) == 0
    assert load_rows(output)["sample_id"][:] == np.flatnonzero(values >= middle).tolist()
    assert score(home, tmp_path / "scores", "--run_reference", "False") == 0  # again: earlier scores are moved aside
    assert len(ScoreTable.load(tmp_path / "scores-1")) == len(ScoreTable.load(tmp_path / "scores")) == 24
    capsys.readouterr()
    message = "must have a `relative_weight`, got none"
    fails(capsys, 1, message, lambda: main(["filter", *flags, "--output", output]))


@pytest.mark.parametrize(
    ("rule", "kept", "said"),  # of 96
    [
        (["--filter", "two_means"], 64, "mimic_score, cut at "),
        (["--filter", "mixture", "--column", "loss"], 64, "loss, cut at 1."),
        (["--filter", "threshold"], 64, "relative weight >= 1 in most epochs"),
        (["--filter", "ensemble"], 64, "8 votes (majority), P(good) >= "),
        (["--top", "0.25"], 24, "the best 25.0% by mimic_score (>= "),
        (
            ["--expression", "top(mimic_score, 0.5) - bottom(loss, 0.9)"],
            10,
            "top(mimic_score, 0.5) - bottom(loss, 0.9)",
        ),
    ],
)
def test_rules_of_the_filter(tmp_path, capsys, rule, kept, said):
    generator, good = np.random.default_rng(0), np.arange(96) % 3 > 0
    table = ScoreTable(tmp_path / "scores")
    for step in range(2):
        score = np.where(good, 1.0, -1.0) + 0.1 * generator.normal(size=96)
        table.record(
            range(96), epoch=step, step=step, mimic_score=score, loss=2 - score, relative_weight=1 + score / 2
        )
    table.flush()
    Dataset.from_dict({"text": [str(row) for row in range(96)]}).to_parquet(tmp_path / "rows.parquet")
    flags = ["--dataset", str(tmp_path / "rows.parquet"), "--scores", str(tmp_path / "scores")]
    flags += ["--output", str(tmp_path / "out.parquet"), *rule]
    assert main(["filter", *flags]) == 0
    shown = cells(capsys.readouterr().out)
    assert shown["rule"].startswith(said)
    assert shown["kept"].startswith(f"{kept} (")
    assert main(["filter", *flags, "--keep_all"]) == 0
    rows = load_rows(str(tmp_path / "out.parquet"))
    assert sum(rows["keep"]) == kept
    assert all(rows["reason"])


def test_filtering_again_keeps_columns_of_the_user(tmp_path, capsys):
    scores, files = tmp_path / "scores", [str(tmp_path / f"{name}.parquet") for name in ("rows", "first", "second")]
    table = ScoreTable(scores)
    table.record(range(8), epoch=0, step=0, mimic_score=np.arange(8.0))
    table.flush()
    Dataset.from_dict({"reason": ["mine"] * 8, "clip_score": [0.3] * 8, "n": range(8)}).to_parquet(files[0])
    for dataset, output in itertools.pairwise(files):
        assert main(["filter", "--dataset", dataset, "--scores", str(scores), "--output", output, "--top", "0.5"]) == 0
    assert "are replaced: mimic_score, n_visits, keep\n" in capsys.readouterr().out.replace(
        "relative_weight, loss, ", ""
    )
    again = load_rows(files[2])
    assert again["reason"][:] == ["mine"] * 4
    assert again["clip_score"][:] == pytest.approx([0.3] * 4)


def test_an_ensemble_of_several_scores(home, tmp_path, capsys):
    for name in ("a", "b"):
        table = ScoreTable(tmp_path / name)
        table.record(range(24), epoch=0, step=0, mimic_score=np.arange(24) % 3 - 1.0, relative_weight=[1.0] * 24)
        table.flush()
    flags = [
        "--dataset",
        str(home / "rows.parquet"),
        "--scores",
        str(tmp_path / "a"),
        "--output",
        str(tmp_path / "o.parquet"),
    ]
    more = ["--more_scores", str(tmp_path / "b")]
    with pytest.warns(UserWarning, match="no filter of the ensemble sees evidence"):
        assert main(["filter", *flags, "--filter", "ensemble", *more]) == 0
    assert len(load_rows(str(tmp_path / "o.parquet"))) == 24
    capsys.readouterr()
    fails(
        capsys,
        1,
        "--more_scores must come with --filter ensemble",
        lambda: main(["filter", *flags, *more, "--top", "0.5"]),
    )
    fails(capsys, 1, "`--filter` must be one of 'trust'", lambda: main(["filter", *flags, "--filter", "gmm"]))
    fails(capsys, 1, "--column must come with", lambda: main(["filter", *flags, "--column", "loss"]))
    fails(capsys, 1, "Did you mean 'mimic_score'", lambda: main(["filter", *flags, "--expression", "top(mimic, 0.5)"]))


def test_scores_name_the_commit_of_the_reference(home, tmp_path, hub, capsys):
    repo = hub.create("user/scored")
    commit = repo.commit(home / "reference")
    flags = ["--reference_model", "user/scored", "--reference_revision", "main"]
    assert score(home, tmp_path / "scores", *flags) == 0
    settings = json.loads((tmp_path / "scores" / "scoring.json").read_text())
    assert (settings["reference"], settings["revision"]) == ("user/scored", commit)
    fails(
        capsys,
        1,
        "hf-mimic score: user/scored: looking up v9 failed: there is no such branch, tag or commit. Take one that",
        lambda: score(home, tmp_path / "scores", *flags[:3], "v9"),
    )
    hub.create("user/labels", "datasets")
    message = "user/labels: looking up the main branch failed: it is a data set, not a model. Give the repo of a model"
    fails(capsys, 1, message, lambda: score(home, tmp_path / "scores", "--reference_model", "user/labels"))


def test_score_in_shards_then_go_on(home, tmp_path, capsys):
    assert score(home, tmp_path / "whole", "--batch_size", "4") == 0
    capsys.readouterr()
    shard = ["--batch_size", "4", "--num_shards", "2", "--shard"]
    assert score(home, tmp_path / "shards", *shard, "1") == 0
    table = cells(capsys.readouterr().out)
    assert table["shard"] == "1 of 2 (from 0), 3 parts"
    assert (table["samples"], table["not there yet"]) == ("12", "3 parts of other shards")
    assert score(home, tmp_path / "shards", *shard, "0") == 0
    capsys.readouterr()
    assert score(home, tmp_path / "shards", "--batch_size", "4") == 0
    assert cells(capsys.readouterr().out)["were there already"].startswith("6 of 6 parts")
    rows = [ScoreTable.load(tmp_path / name).to_arrow().to_pydict() for name in ("whole", "shards")]
    assert rows[0] == rows[1]
    message = "`shard` must be (index, count) with 0 <= index < count, got (2, 2)"
    fails(capsys, 1, message, lambda: score(home, tmp_path / "shards", *shard, "2"))
    fails(
        capsys,
        1,
        "`layers` was ['head'] and is ['all']",
        lambda: score(home, tmp_path / "shards", *shard, "0", "--mimic_layers", "all"),
    )


def test_a_column_of_the_user_s_own_is_not_replaced(home, tmp_path, capsys):
    table, own = ScoreTable(tmp_path / "scores"), tmp_path / "own.parquet"
    table.record(range(24), epoch=0, step=0, mimic_score=[1.0] * 24, ref_loss=[1.0] * 24, ref_trust=[0.5] * 24)
    table.flush()
    images().add_column("trust", ["high"] * 24).to_parquet(own)
    flags = ["--scores", str(tmp_path / "scores"), "--min_score", "0", "--keep_all", "--output"]
    message = "the data set must not have the columns trust yet"
    fails(capsys, 1, message, lambda: main(["filter", "--dataset", str(own), *flags, "out.parquet"]))
    first, second = str(tmp_path / "first.parquet"), str(tmp_path / "second.parquet")
    assert main(["filter", "--dataset", str(home / "rows.parquet"), *flags, first]) == 0
    assert main(["filter", "--dataset", first, *flags, second]) == 0  # its own columns are replaced
    assert load_rows(first).column_names == load_rows(second).column_names


def test_ids_of_the_data_set_are_used(home, tmp_path):
    rows = images().add_column("row", list(range(50, 74)))
    rows.shuffle(seed=0).to_parquet(tmp_path / "rows.parquet")
    flags = ["--dataset", str(tmp_path / "rows.parquet"), "--sample_id_column", "row"]
    assert score(home, tmp_path / "scores", *flags) == 0
    assert ScoreTable.load(tmp_path / "scores").aggregate()["sample_id"].to_pylist() == list(range(50, 74))
    flags += ["--scores", str(tmp_path / "scores"), "--output", str(tmp_path / "out.parquet"), "--min_score=-1e9"]
    assert main(["filter", *flags]) == 0
    assert sorted(load_rows(str(tmp_path / "out.parquet"))["row"]) == list(range(50, 74))


def test_samples_without_a_score_are_kept(home, tmp_path):
    table = ScoreTable(tmp_path / "scores")
    table.record([0, 1, 2], epoch=0, step=0, mimic_score=[1.0, -1.0, float("nan")])
    table.flush()
    flags = ["--dataset", str(home / "rows.parquet"), "--scores", str(tmp_path / "scores"), "--min_score", "0"]
    with pytest.warns(UserWarning, match="22 of 24 rows have no score"):
        assert main(["filter", *flags, "--output", str(tmp_path / "out.parquet")]) == 0
    assert load_rows(str(tmp_path / "out.parquet"))["sample_id"][:] == [0, *range(2, 24)]


def test_evaluation_during_training(home, tmp_path, capsys):
    images(8).to_parquet(tmp_path / "test.parquet")
    assert train(home, tmp_path / "run", "--eval_split", str(tmp_path / "test.parquet")) == 0
    assert 0 <= float(cells(capsys.readouterr().out)["accuracy"]) <= 1


def test_evaluation_labels_have_the_training_order(home, tmp_path, capsys):
    """Strings are numbered by the data set at hand: an evaluation part without ants must not shift the rest."""
    for name, labels in (("train", [NAMES[i % 4] for i in range(24)]), ("test", ["cat"] * 12 + ["dog"] * 12)):
        images(labels=labels, kind=Value("string")).to_parquet(tmp_path / f"{name}.parquet")
    flags = ["--eval_split", str(tmp_path / "test.parquet"), "--strategy", "uniform", "--num_train_epochs", "8"]
    assert train(home, tmp_path / "run", *flags, dataset=tmp_path / "train.parquet") == 0
    accuracy = float(cells(capsys.readouterr().out)["accuracy"])
    model = ViTForImageClassification.from_pretrained(tmp_path / "run")
    processor = ViTImageProcessorPil.from_pretrained(tmp_path / "run")
    rows = load_rows(str(tmp_path / "test.parquet"))
    predicted = model(**processor(rows["image"][:], return_tensors="pt")).logits.argmax(-1)
    expected = np.mean([NAMES[p] == label for p, label in zip(predicted, rows["label"], strict=True)])
    assert accuracy == pytest.approx(expected, abs=1e-4)
    wrong = np.mean(
        [sorted({"cat", "dog"}).index(label) == p for p, label in zip(predicted, rows["label"], strict=True)]
    )
    assert accuracy != pytest.approx(wrong, abs=1e-2)


def test_a_new_head_depends_on_the_seed_alone(home, tmp_path):
    heads = {}
    for name, flags in {"first": [], "again": [], "other": ["--seed", "7"]}.items():
        torch.manual_seed(len(heads))
        assert train(home, tmp_path / name, "--max_steps", "1", *flags, model="bare") == 0
        heads[name] = ViTForImageClassification.from_pretrained(tmp_path / name).classifier.weight
    assert heads["first"].shape == (4, 32)
    assert torch.equal(heads["first"], heads["again"])
    assert not torch.allclose(heads["first"], heads["other"])


def test_a_frozen_model_needs_a_head_of_its_own(home, tmp_path, capsys):
    """Scores of a head that was made up on the spot say nothing."""
    message = "must have a trained head for the data set's 4 labels; "
    fails(capsys, 1, message, lambda: score(home, tmp_path / "scores", model="bare"))


# ---- images that do not decode -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(home):
    images(corrupt=[3, 17]).to_parquet(home / "damaged.parquet")
    return "damaged.parquet"


def test_a_corrupt_image_stops_with_its_row(home, damaged, tmp_path, capsys):
    message = "every image must decode; row 3 (sample_id 3) does not"
    fails(capsys, 1, message, lambda: score(home, tmp_path / "scores", dataset=damaged))
    fails(capsys, 1, "every image must decode; row", lambda: train(home, tmp_path / "run", dataset=damaged))


def test_an_error_of_a_worker_is_one_line(monkeypatch, capsys):
    def fail(options):
        raise ValueError(
            "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            '  File "data.py", line 1, in f\n    raise g()\nValueError: every image must decode; row 3 does not\n'
        )

    monkeypatch.setitem(COMMANDS, "demo", (fail, COMMANDS["demo"][1]))
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "hf-mimic demo: ValueError: every image must decode; row 3 does not\n"


def test_corrupt_images_are_skipped_and_counted(home, damaged, tmp_path, capsys):
    assert score(home, tmp_path / "scores", "--on_error", "skip", dataset=damaged) == 0
    assert "2 images do not decode and are skipped: rows 3, 17" in capsys.readouterr().out
    ids = ScoreTable.load(tmp_path / "scores").aggregate()["sample_id"].to_pylist()
    assert ids == [i for i in range(24) if i not in (3, 17)]
    assert train(home, tmp_path / "run", "--on_error", "skip", dataset=damaged) == 0
    assert cells(capsys.readouterr().out)["samples"] == "22"


# ---- wrong use and failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "invalid choice: 'trian'"),
        (["filter"], "the following arguments are required: --dataset, --scores"),
        (
            ["filter", "--dataset", "x", "--scores", "y", "--treshold", "1"],
            "unknown --treshold 1, did you mean '--threshold'?",
        ),
        (["filter", "--dataset", "x", "--scores", "y", "--threshold", "abc"], "invalid float value: 'abc'"),
        (
            ["train", "--model", "m", "--dataset", "d", *QUIET, "--temperature", "0"],
            "`temperature` must be a positive",
        ),
        (["train", "--model", "m", "--dataset", "d", *QUIET, "--direction", "curent"], "Did you mean 'current'?"),
    ],
)
def test_wrong_use_is_2(argv, message, capsys):
    fails(capsys, 2, message, lambda: main(argv))


def test_no_argument_prints_the_commands(capsys):
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 0
    printed = capsys.readouterr().out
    for name, (run, _) in COMMANDS.items():
        assert f"{name:<10}{run.__doc__}" in printed


def test_failures_are_1(home, tmp_path, capsys):
    def filtered(dataset, scores="scores"):
        return lambda: main(["filter", "--dataset", str(dataset), "--scores", str(tmp_path / scores)])

    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not a parquet file PAR1")
    (tmp_path / "rows.txt").write_text("x")
    fails(capsys, 1, "must hold the score shards (steps-*-rank-*.parquet)", filtered(home / "rows.parquet"))
    fails(capsys, 1, "a data file must end in", filtered(tmp_path / "rows.txt"))
    fails(
        capsys,
        1,
        "broken.parquet must be a .parquet file with rows: Parquet file size is",
        filtered(tmp_path / "broken.parquet"),
    )
    fails(capsys, 1, "nobody/nothing", filtered("nobody/nothing"))
    flags = ["--label_column", "kind"]
    fails(capsys, 1, "must have the column 'kind', got image, label", lambda: train(home, tmp_path, *flags))
    fails(capsys, 1, "must have the columns 'picture'", lambda: train(home, tmp_path, "--image_column", "picture"))
    fails(
        capsys,
        1,
        "`on_error` must be one of 'raise', 'skip', got 'skp'",
        lambda: score(home, tmp_path, "--on_error", "skp"),
    )
    message = "do not match:\n  classifier.weight: (4, 32) here, (3, 32) in the reference"
    fails(capsys, 1, message, lambda: train(home, tmp_path, "--reference_model", str(home / "bare")))
    fails(capsys, 1, "absent", lambda: train(home, tmp_path, "--reference_model", str(home / "absent")))
    fails(capsys, 1, "absent", lambda: train(home, tmp_path, model="absent"))


def test_training_without_a_reference(home, tmp_path, capsys):
    argv = ["train", "--model", str(home / "base"), "--dataset", str(home / "rows.parquet"), *QUIET]
    argv += ["--output_dir", str(tmp_path)]
    fails(capsys, 1, "`reference_model` must be a Hub repo id, a folder", lambda: main(argv))


# ---- configuration files -------------------------------------------------------------------------------------------


def test_values_from_a_file(home, tmp_path, capsys):
    config = tmp_path / "score.yaml"
    config.write_text(
        f"""\
model: {home / "base"}
dataset: {home / "rows.parquet"}
reference_model: {home / "reference"}
mimic_layers: [head, last_mlp]
batch_size: 7
output_dir: {tmp_path / "from_file"}
"""
    )
    assert main(["score", "--config", str(config)]) == 0
    assert cells(capsys.readouterr().out)["layers"].startswith("4 tensors")
    steps = ScoreTable.load(tmp_path / "from_file").to_arrow()["step"].to_pylist()
    assert np.bincount(steps).tolist() == [7, 7, 7, 3]
    flags = ["--batch_size", "12", "--output_dir", str(tmp_path / "from_flag"), "--mimic_layers", "head"]
    assert main(["score", *flags, "--config", str(config)]) == 0
    assert cells(capsys.readouterr().out)["layers"].startswith("2 tensors")
    assert max(ScoreTable.load(tmp_path / "from_flag").to_arrow()["step"].to_pylist()) == 1


def test_training_arguments_from_a_file(home, tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text("temperature: 0.3\nlearning_rate: 1e-3\nmax_steps: 2\nmimic_layers: last_mlp\n")
    assert train(home, tmp_path / "run", "--config", str(config)) == 0
    args = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert (args.tau, args.learning_rate, args.max_steps, args.mimic_layers) == (0.3, 1e-3, 2, ["last_mlp"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("treshold: 2", "unknown key 'treshold', did you mean 'threshold'?"),
        ("zzz: 2", "unknown key 'zzz'"),
        ("- threshold\n- output", "must hold `key: value` lines, got a list"),
        ("threshold", "must hold `key: value` lines, got a str"),
        ("threshold: [", "line 1: expected the node content"),
        ("threshold: abc", "invalid float value: 'abc'"),
    ],
)
def test_bad_configuration_is_wrong_use(text, message, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(text)
    argv = ["filter", "--dataset", "x", "--scores", "y", "--config", str(tmp_path / "config.yaml")]
    fails(capsys, 2, message, lambda: main(argv))


def test_a_configuration_that_is_not_there(tmp_path, capsys):
    argv = ["filter", "--dataset", "x", "--scores", "y", "--config", str(tmp_path / "none.yaml")]
    fails(capsys, 2, "No such file", lambda: main(argv))


# ---- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_flag_of_ours(command, capsys):
    with pytest.raises(SystemExit) as error:
        main([command, "--help"])
    assert error.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    run, types = COMMANDS[command]
    assert run.__doc__ in printed
    for kind in types():
        for name in kind.__annotations__:
            assert f"--{name}" in printed
            described = kind.__doc__.split(f" {name}: ", 1)[1].split("\n")[0].strip()
            assert described in printed, name


def test_an_interruption_is_no_traceback(capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_mimic.quality_command.run_compare", interrupted)
    assert main(["compare", "--scores", "a"]) == 130
    assert capsys.readouterr().err == "hf-mimic compare: interrupted\n"


def test_every_field_is_documented():
    for kind in (DataArguments, ScoreArguments, FilterArguments, EvaluateArguments):
        for field in dataclasses.fields(kind):
            assert any(f"        {field.name}: " in (each.__doc__ or "") for each in kind.__mro__)


def test_compare_ranks_data_sets(tmp_path, capsys):
    generator = np.random.default_rng(0)
    for name, rate in (("worse", 0.4), ("better", 0.1)):
        wrong = generator.random(500) < rate
        table = ScoreTable(tmp_path / name)
        trust = np.where(wrong, 0.02, 0.98)
        table.record(range(500), epoch=0, step=0, mimic_score=0.5 - wrong, ref_trust=trust)
        table.flush()
    folders = [str(tmp_path / name) for name in ("worse", "better")]
    output = tmp_path / "new" / "quality.json"
    assert main(["compare", "--scores", *folders, "--names", "a", "b", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["data", "set", "samples", "noise", "interval", "kept", "mean", "score", "evidence"]
    assert [line.split()[0] for line in lines[1:3]] == ["b", "a"]
    assert list(json.loads(output.read_text())) == ["b", "a"]
    fails(
        capsys,
        1,
        "different name for each of the 2 folders",
        lambda: main(["compare", "--scores", *folders, "--names", "a"]),
    )
    fails(capsys, 1, "`by` must be one of", lambda: main(["compare", "--scores", *folders, "--by", "size"]))
    fails(capsys, 1, "must hold the score shards", lambda: main(["compare", "--scores", str(tmp_path)]))


def test_evaluation_on_another_data_set():
    options = DataArguments("m", "user/curated", dataset_revision="c1", eval_split="test", eval_dataset="user/data")
    options.eval_dataset_revision = "c0"
    part = evaluation_part(options)
    assert (part.dataset, part.split, part.place) == ("user/data", "test", {"config": None, "revision": "c0"})
    part = evaluation_part(DataArguments("m", "user/data", dataset_revision="c1", eval_split="test"))
    assert (part.dataset, part.split, part.dataset_revision) == ("user/data", "test", "c1")
    part = evaluation_part(DataArguments("m", "user/data", dataset_revision="c1", eval_split=__file__))
    assert (part.dataset, part.split, part.dataset_revision) == (__file__, "train", None)
