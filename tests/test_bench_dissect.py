"""The study of DISSect: its noise, its budgets, its tables and limits; one short run where the data are."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def line(method, rsum, *, rate=0.5, seed=0, clean=0.6, compute=1.0):
    place = {"kind": "training", "data": "icons", "noise": 0.4, "method": method, "budget": "steps", "seed": seed}
    result = {"rsum": rsum, "clean": [0.6] * 4 + [clean] * 12, "compute": compute, "seconds": 1.0}
    return {**place, "rate": 1.0 if method == "full" else rate, "result": result}


def test_captions_are_shuffled_inside_their_category():
    from dissect_settings import _shuffled

    text = np.array([f"{kind} {i}" for kind in "ab" for i in range(50)])
    category = np.array([caption[0] for caption in text])
    found = _shuffled(text, category, 0.4, seed=0)
    assert (found != text).sum() == 40  # none drew its own
    assert sorted(found) == sorted(text)
    assert all(new[0] == old[0] for new, old in zip(found, text, strict=True))
    assert (_shuffled(text, category, 0.0, seed=0) == text).all()


def test_epochs_at_the_cost_of_full_training():
    """A step that scores costs (1 + 3 r) / 3; four epochs of warm-up are on everything, the last of them scored."""
    from bench_dissect import epochs_for

    assert epochs_for("random", 0.5) == 32
    assert epochs_for("small loss", 0.5) == 19
    assert epochs_for("DISSect warm-up", 0.5) == int(4 + (12 - 1 / 3) / (0.5 + 1 / 3))
    assert epochs_for("DISSect warm-up, epoch", 0.5) == int(4 + (12 - 1 / 3) / (0.5 + 0.05 / 3))


def test_limits_can_fail():
    from dissect_tables import limits

    good = [line("full", 100.0), line("random", 95.0), line("DISSect warm-up", 101.0, clean=0.7)]
    assert limits(good) == []
    assert len(limits([*good[:2], line("DISSect warm-up", 96.0, clean=0.61)])) == 3
    assert limits(good[:2]) == []  # nothing is said without runs


def test_tables_have_a_row_per_method_and_the_cost():
    from dissect_tables import tables

    results = [line("full", 100.0 + s, seed=s, compute=90) for s in (0, 2)]
    told = tables([*results, line("random", 80.0, compute=45.0)])
    assert "| full | 101.0 ± 1.4 (1.00) |" in told
    assert "| random | 80.0 (0.50) |" in told


@pytest.mark.data
def test_one_short_run(tmp_path):
    from dissect_runs import train
    from dissect_settings import load_pairs

    data = Path(os.environ.get("HF_MIMIC_DATA", "../shared/data"))
    if not (data / "icons").is_dir():
        pytest.skip(f"HF_MIMIC_DATA must have the data set icons, got {data}")
    study = load_pairs("icons", 0.4, 0, data, tmp_path)
    assert (len(study.train), len(study.test)) == (6048, 1512)
    assert (~study.train.clean).float().mean().item() == pytest.approx(0.4, abs=0.01)
    assert torch.equal(study.train.images, study.right.images)
    task = {"data": "icons", "noise": 0.4, "seed": 0, "method": "DISSect momentum", "rate": 0.5, "epochs": 1}
    result = train(task, data, tmp_path)["result"]
    assert result["samples_backward"] == 3024 == result["samples_scored"] / 2
    assert result["rsum"] > 5
