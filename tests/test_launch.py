"""The configurations of examples/accelerate: accelerate knows every key; two CPU processes run the CLI by them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import models
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from test_cli import NAMES, images, save

from hf_mimic.scores import ScoreTable

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))


def test_there_are_four():
    assert [path.stem for path in CONFIGS] == ["cpu", "fsdp2", "multi_gpu", "multi_node"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    loaded, given = load_config_from_file(str(path)), yaml.safe_load(path.read_text())
    assert all(str(getattr(loaded, key)).lower().endswith(str(value).lower()) for key, value in given.items())
    flags = {action.dest for action in launch_command_parser()._actions}
    assert set(given.get("fsdp_config", {})) <= flags


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_launch_line_is_one_that_accelerate_takes(path):
    comment = " ".join(
        line.lstrip("# ").rstrip("\\ ") for line in path.read_text().splitlines() if line.startswith("#")
    )
    line = re.search(r"accelerate launch (.*)", comment)[1].replace("MAIN_IP", "127.0.0.1").split()
    parsed = launch_command_parser().parse_args(line)
    assert Path(parsed.config_file).name == path.name
    assert (ROOT / parsed.config_file).is_file()
    script = parsed.training_script
    assert script == "hf-mimic" or (ROOT / script).is_file()


@pytest.mark.slow
def test_two_processes_run_the_command_line(tmp_path):
    known = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    save(models.make("vit", **known), tmp_path / "base")
    save(models.make("vit", seed=1, **known), tmp_path / "reference")
    images(22).to_parquet(tmp_path / "rows.parquet")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "examples/accelerate/cpu.yaml"),
    ]
    command += ["-m", "hf_mimic.cli", "train", "--use_cpu", "--report_to", "none", "--model", str(tmp_path / "base")]
    command += ["--reference_model", str(tmp_path / "reference"), "--dataset", str(tmp_path / "rows.parquet")]
    command += ["--output_dir", str(tmp_path / "out"), "--num_train_epochs", "2", "--per_device_train_batch_size", "4"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    rows = ScoreTable.load(tmp_path / "out" / "scores").to_arrow().to_pydict()
    assert sorted(rows["sample_id"]) == sorted([*range(22)] * 2), done.stderr[-3000:]
    assert done.stdout.count("next: hf-mimic filter") == 1
    assert "44" in done.stdout
    assert len(list((tmp_path / "out" / "scores").glob("*-rank-*.parquet"))) >= 2


@pytest.mark.slow
def test_two_processes_score_a_corpus(tmp_path):
    known = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    save(models.make("vit", **known), tmp_path / "base")
    save(models.make("vit", seed=1, **known), tmp_path / "reference")
    images(22).to_parquet(tmp_path / "rows.parquet")
    command = ["-m", "hf_mimic.cli", "score", "--run_reference", "False", "--batch_size", "4"]
    for name in ("model", "reference_model", "dataset", "output_dir"):
        place = {"model": "base", "reference_model": "reference", "dataset": "rows.parquet"}.get(name, "launched")
        command += [f"--{name}", str(tmp_path / place)]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "examples/accelerate/cpu.yaml")]
    options = {"capture_output": True, "text": True, "check": False, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    done = subprocess.run([sys.executable, *launch, *command], **options)
    rows = ScoreTable.load(tmp_path / "launched").to_arrow().to_pydict()
    assert sorted(rows["sample_id"]) == list(range(22)), done.stderr[-3000:]
    assert done.stdout.count("mean score") == 1
    alone = subprocess.run([sys.executable, *command[:-1], str(tmp_path / "alone")], **options)
    assert alone.returncode == done.returncode == 0
    assert ScoreTable.load(tmp_path / "alone").to_arrow().to_pydict() == rows
