"""`import hf_mimic`: the public names, and what importing it does not cost."""

import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_mimic

HEAVY = ("evaluate", "matplotlib", "sklearn", "transformers.trainer", "torch", "datasets")


def modules_after(statement):
    """Return which of the heavy modules a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("name", hf_mimic.__all__)
def test_public_names_are_importable_and_documented(name):
    value = getattr(hf_mimic, name)
    assert value.__doc__
    assert name in dir(hf_mimic)
    home = hf_mimic._HOMES.get(name)
    if home is None:
        assert value is importlib.import_module(f"hf_mimic.{name}")
    else:
        assert value is getattr(importlib.import_module(f"hf_mimic.{home}"), name)
        assert value.__module__ == f"hf_mimic.{home}"


def test_the_list_of_names_is_complete():
    assert sorted(hf_mimic.__all__) == sorted([*hf_mimic._HOMES, *hf_mimic._MODULES])


def test_star_import_gives_the_public_names():
    names = {}
    exec("from hf_mimic import *", names)
    assert set(hf_mimic.__all__) <= set(names)


def test_version():
    from importlib.metadata import version

    assert hf_mimic.__version__ == version("hf_mimic")


def test_unknown_attribute():
    with pytest.raises(
        AttributeError, match="module 'hf_mimic' has no attribute 'MimicTrayner'; it has CombinedFilter, "
    ):
        _ = hf_mimic.MimicTrayner
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from hf_mimic import nothing")


def test_importing_the_package_loads_nothing_heavy():
    assert modules_after("import hf_mimic") == set()


def test_a_name_loads_only_what_it_needs():
    loaded = modules_after(
        "from hf_mimic import mimic_scores, reference_direction, losses, selection, data, ScoreTable"
    )
    assert "torch" in loaded
    assert loaded.isdisjoint({"evaluate", "matplotlib", "sklearn", "transformers.trainer"})


def test_the_command_line_answers_without_loading_torch():
    assert modules_after("import hf_mimic.cli") == set()


def test_the_modules_of_the_design_are_importable():
    names = {}
    exec("from hf_mimic import losses, selection, metrics, data", names)
    assert names["metrics"].detection


@pytest.mark.slow
def test_the_trainer_does_not_load_what_it_does_not_need():
    assert modules_after("from hf_mimic import MimicTrainer").isdisjoint({"evaluate", "matplotlib", "sklearn"})


@pytest.mark.slow
def test_a_wheel_has_the_templates_of_cards_and_the_page_of_reports(tmp_path):
    root = Path(__file__).parent.parent
    for name in ("hf_mimic", "model_cards"):
        shutil.copytree(root / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    cards = {f"hf_mimic/model_cards/{path.name}" for path in (root / "model_cards").iterdir()}
    assert len(cards) == 3
    assert cards | {"hf_mimic/report_page/page.html", "hf_mimic/py.typed"} <= packed
    shutil.rmtree(tmp_path / "hf_mimic")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = (
        "from hf_mimic.cards import model_card; from hf_mimic.run_record import RunRecord; import hf_mimic; "
        "print(hf_mimic.__file__); print(model_card(RunRecord(), model_id='a/b'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(tmp_path / "installed"))
    assert "# a/b" in done.stdout
