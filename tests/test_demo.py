"""The demo's table by hand, its data, a story of a few steps, and one whole seed (slow)."""

import dataclasses
import gc
import json

import numpy as np
import pytest
from datasets import Dataset

from hf_mimic import demo
from hf_mimic.data import load_rows
from hf_mimic.demo import ROWS, digits_story, format_table, run_demo, run_story, save_figure
from hf_mimic.scores import ScoreTable

gc.freeze()  # every training collects garbage: it need not walk what was imported

FILES = {"curated.parquet", "scores.png", "reference", "scores"}


def short_story(seed):
    """Return the digits story with 60 rows in each part and three steps per training."""
    story = digits_story(seed)
    parts = {name: getattr(story, name).select(range(60)) for name in ("base", "trusted", "noisy", "test")}
    options = {"num_train_epochs": 1, "per_device_train_batch_size": 20, "use_cpu": True}
    return dataclasses.replace(story, **parts, options=options, base_options={})


def test_table_by_hand():
    table = format_table([{"accuracy plain": 0.5, "f1": 1.0}, {"accuracy plain": 0.75, "f1": 1.0}])
    assert table.splitlines() == [
        "                            mean     std   each seed",
        "accuracy plain             0.625   0.125   0.500  0.750",
        "f1                         1.000   0.000   1.000  1.000",
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_parts_of_the_digits_do_not_overlap(seed):
    story = digits_story(seed)
    parts = [story.base, story.trusted, story.noisy, story.test]
    assert [len(part) for part in parts] == [500, 300, 600, 397]
    pixels = [np.asarray(part.with_format("numpy")["pixel_values"][:]).reshape(len(part), -1) for part in parts]
    assert [p.shape[1] for p in pixels] == [64] * 4
    together = np.concatenate(pixels)
    assert len(np.unique(together, axis=0)) == 1797
    assert (together.min(), together.max()) == (-1, 1)
    wrong = np.asarray(story.noisy["label"][:]) != np.asarray(story.noisy["clean_label"][:])
    assert wrong.sum() == 240
    assert story.noisy["sample_id"][:].tolist() == list(range(600))


def test_another_seed_is_another_split():
    first, again, other = (digits_story(seed) for seed in (0, 0, 1))
    assert first.noisy["label"][:].tolist() == again.noisy["label"][:].tolist()
    assert first.noisy["label"][:].tolist() != other.noisy["label"][:].tolist()


@pytest.mark.filterwarnings("ignore:the reference agrees")  # after three steps it knows nothing
@pytest.mark.filterwarnings("ignore:a filter must have scores that differ")  # so short a run has none
def test_a_short_story_leaves_everything_behind(tmp_path):
    told = []
    results = run_story(short_story(0), 0, tmp_path, told.append)
    assert told == [part for name in ROWS for part in (name, None)]
    assert {path.name for path in tmp_path.iterdir()} >= FILES
    expected = {*(f"accuracy {name}" for name in ROWS), "auroc mimic_score", "f1 filter"}
    assert set(results) == expected | {"auroc reference's loss", "f1 reference's argmax"}
    assert all(0 <= value <= 1 for value in results.values())
    curated = load_rows(str(tmp_path / "curated.parquet"))
    assert len(curated) == 60  # there is no evidence against any
    assert {"label", "clean_label", "sample_id", "mimic_score", "relative_weight", "n_visits", "keep"} <= set(
        curated.column_names
    )
    assert all(curated["keep"])
    assert len(ScoreTable.load(tmp_path / "scores")) == 60
    again = run_story(short_story(0), 0, tmp_path / "again")
    assert again == results


def test_the_demo_collects_the_seeds(tmp_path, monkeypatch):
    def story(made, seed, folder, tick):
        assert made == f"story {seed}"
        assert folder.is_dir()
        tick("base")
        tick(None)
        return {"accuracy plain": 0.5 + seed / 10}

    monkeypatch.setattr(demo, "run_story", story)
    table = run_demo(tmp_path, [0, 3], lambda seed: f"story {seed}")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == {"0": {"accuracy plain": 0.5}, "3": {"accuracy plain": 0.8}}
    assert table == format_table(list(results.values()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "seed-0", "seed-3"]


@pytest.mark.parametrize("epochs", [1, 7])
def test_the_figure_takes_any_number_of_epochs(tmp_path, epochs):
    table, generator = ScoreTable(), np.random.default_rng(0)
    for epoch in range(epochs):
        weights = generator.gamma(1.0, size=20)
        weights[0] = np.nan  # a visit without a weight
        table.record(np.arange(20), epoch=epoch, step=epoch, relative_weight=weights)
    save_figure(table, {i: i < 5 for i in range(20)}, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 5000


@pytest.mark.slow
def test_mimic_beats_plain_training_on_digits(tmp_path):
    run_demo(tmp_path, [0])
    (result,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert result["accuracy mimic"] >= result["accuracy plain"] + 0.03
    assert result["accuracy curated"] >= result["accuracy plain"]
    assert result["accuracy reference"] > result["accuracy base"]
    assert result["auroc trust"] >= 0.97
    assert result["f1 filter"] >= 0.93
    curated: Dataset = load_rows(str(tmp_path / "seed-0" / "curated.parquet"))
    wrong = np.asarray(curated["label"][:]) != np.asarray(curated["clean_label"][:])
    assert wrong.mean() < 0.1
