"""On real images and labels (marked `data`): the example, the benchmark's story, scores as columns without decoding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

from hf_mimic import ScoreTable, attach_scores
from hf_mimic.data import add_label_noise, add_sample_ids, load_rows

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("HF_MIMIC_DATA", ROOT.parent / "shared" / "data")).resolve()

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not (DATA / "cifar10n").is_dir(), reason=f"no data sets in HF_MIMIC_DATA ({DATA})"),
]


def run(script, *arguments, folder):
    """Run an example as a user would; return what it printed."""
    environment = {**os.environ, "HF_MIMIC_DATA": str(DATA), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_story_on_human_label_noise(tmp_path):
    out = run("benchmarks/bench_story.py", "--quick", "--seeds", 1, "--json", tmp_path / "out.json", folder=tmp_path)
    results = json.loads((tmp_path / "out.json").read_text())["results"]["0"]
    assert "accuracy mimic" in out
    # Quick models are hardly trained; still the score must know more than chance.
    assert results["auroc trust"] > 0.55
    assert (tmp_path / "outputs/story/seed-0/curated.parquet").is_file()


@pytest.mark.parametrize(("name", "column"), [("clothing/validation", "label"), ("cifar10n/test", "label")])
def test_the_example_on_real_photographs(tmp_path, name, column):
    few = load_rows(str(DATA / f"{name}.parquet")).select(range(160))
    few.to_parquet(tmp_path / "few.parquet")
    common = ("--dataset", "few.parquet", "--trusted_dataset", "few.parquet", "--label_column", column)
    quick = ("--noise", 0.4, "--pretrain_epochs", 10, "--num_train_epochs", 2, "--report_to", "none")
    out = run("finetune_vit_noisy.py", "--tiny", *common, *quick, "--output_dir", "out", folder=tmp_path)
    assert "of 160 rows" in out
    curated = load_rows(str(tmp_path / "out/curated.parquet"))
    assert {"mimic_score", "relative_weight", "n_visits", "keep", "clean_label"} <= set(curated.column_names)
    assert 0 < len(curated) < 160
    assert set(curated["n_visits"]) == {2}


def test_scores_become_columns_of_real_images_without_decoding(monkeypatch):
    rows = add_sample_ids(load_rows(str(DATA / "clothing/train.parquet")))
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("an image was decoded"))
    table, scores = ScoreTable(), np.random.default_rng(0).normal(size=len(rows))
    table.record(np.arange(len(rows)), epoch=0, step=0, mimic_score=scores)
    shuffled = attach_scores(rows.shuffle(seed=0), table)
    kept = shuffled.filter(lambda score: score > 0, input_columns="mimic_score")
    assert len(kept) == (scores.astype("float32") > 0).sum()
    assert set(kept["sample_id"]) == set(np.flatnonzero(scores > 0))


def test_noise_is_added_to_real_labels():
    rows = add_label_noise(load_rows(str(DATA / "fashion_mnist/test.parquet")), 0.2, seed=0)
    wrong = np.array(rows["label"]) != np.array(rows["clean_label"])
    assert wrong.sum() == 2000
    assert rows.features["label"].names == rows.features["clean_label"].names
