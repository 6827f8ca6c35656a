"""The study of trust on scikit-learn's digits: it runs, is resumed, prints its tables and checks its limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "examples" / "benchmarks"
sys.path.insert(0, str(BENCH))

import trust_tables  # noqa: E402


def line(method="default", kind="training", setting="digits-sym-0.4", seed=0, reference=0.95, **result):
    place = {"kind": kind, "setting": setting, "seed": seed, "regime": "full", "head": "independent"}
    return {**place, "method": method, "reference accuracy": reference, "result": result}


def test_limits_of_the_default():
    plain = line("plain", accuracy=0.80)
    good = line(accuracy=0.90, **{"trust auroc": 0.95, "trust filter f1": 0.9})
    assert trust_tables.limits([plain, good]) == []
    weak = line(accuracy=0.79, **{"trust auroc": 0.85})
    broken = trust_tables.limits([plain, weak])
    assert broken[0].endswith("AUROC 0.850, the reference is 15.0 points above plain training")
    assert broken[1].endswith("accuracy 0.790, plain training 0.800")
    near = {**weak, "reference accuracy": 0.84}  # not 5 points above: 0.5 is enough
    assert len(trust_tables.limits([{**plain, "reference accuracy": 0.84}, near])) == 1


def test_limits_of_the_filter():
    results = []
    for setting, ours in (("digits-sym-0.4", 0.8), ("cifar-worse", 0.7), ("clothing-crowd", 0.9)):
        results += [line("plain", setting=setting, accuracy=0.5, reference=0.5)]
        results += [line(setting=setting, accuracy=0.5, reference=0.5, **{"trust filter f1": ours})]
        results += [line("argmax", "selection", setting, accuracy=0.5, **{"filter f1": 0.75})]
    assert trust_tables.limits(results[3:]) == []  # one loss is allowed
    results[1]["result"]["trust filter f1"] = 0.7
    assert trust_tables.limits(results) == ["the default filter's F1 loses on digits, cifar"]


def test_limits_of_health_and_temperature():
    def scored(setting, auroc, value):
        figures = {"mimic_score auroc": auroc, "score_trust_correlation": value}
        return line("", "trajectory", setting, **{"head current": figures})

    good = [scored("digits-sym-0.4", 0.9, 0.5), scored("digits-sym-0.4", 0.3, -0.5)]
    assert trust_tables.limits(good) == []
    bad = [scored("digits-sym-0.4", 0.9, -0.5), scored("digits-sym-0.4", 0.3, 0.5)]
    assert trust_tables.limits(bad) == ["health: AUROC 0.000 on digits"]
    warm = [line(f"default {tau}", "temperature", accuracy=value) for tau, value in (("1", 0.9), ("auto", 0.89))]
    assert trust_tables.limits(warm) == ["digits-sym-0.4, default: tau auto 0.890, best 0.900"]


def test_a_threshold_is_chosen_on_other_data_sets():
    assert trust_tables.best_cut([(True, 0.6), (True, 0.4), (False, 0.1), (False, -0.5)]) == pytest.approx(0.25)
    assert trust_tables.best_cut([(True, 0.6)]) == 0.0
    assert trust_tables.separation([(True, 0.6), (False, 0.7)]) == 0.0
    assert trust_tables.separation([(True, 0.6)]) is None


@pytest.mark.slow
def test_the_quick_study_of_the_digits(tmp_path):
    command = [
        sys.executable,
        str(BENCH / "bench_trust.py"),
        "--quick",
        "--seeds",
        "1",
        "--settings",
        "digits-sym-0.4",
    ]
    command += ["--output_dir", str(tmp_path), "--json", str(tmp_path / "out.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(2):  # the second time, everything is there
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "every limit holds" in done.stdout
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3
    assert json.loads((tmp_path / "out.json").read_text())["broken"] == []
