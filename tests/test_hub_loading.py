"""Data sets and student models that cannot be loaded from the Hub: one line with repo, step and remedy, in each command."""

import pyarrow as pa
import pytest
from publications import rows

from hf_mimic.cli import main
from hf_mimic.data import load_rows
from hf_mimic.evaluation import load_image_text_model
from hf_mimic.hub_errors import HubError
from hf_mimic.hub_loading import loading


@pytest.fixture(autouse=True)
def _quick(api, monkeypatch):
    monkeypatch.setattr("hf_mimic.hub_files.time.sleep", lambda seconds: None)


def test_a_commit_and_a_configuration_are_loaded(hub):
    rows(3).push_to_hub("user/versions")
    first = hub.commits("user/versions")[-1].oid
    rows(5).push_to_hub("user/versions")
    rows(7).push_to_hub("user/versions", "more")
    assert len(load_rows("user/versions")) == 5
    assert len(load_rows("user/versions", revision=first)) == 3
    assert len(load_rows("user/versions", config="more", revision="main")) == 7
    with pytest.raises(ValueError, match=r"BuilderConfig 'most' not found. Available: "):
        load_rows("user/versions", config="most")
    with pytest.raises(ValueError, match="Unknown split"):
        load_rows("user/versions", "dev")


def test_one_of_several_configurations_must_be_named(hub, tmp_path, capsys):
    for config in ("big", "small"):
        rows(3).push_to_hub("user/several", config)
    command = [
        "filter",
        "--dataset",
        "user/several",
        "--scores",
        str(tmp_path),
        "--output",
        str(tmp_path / "a.parquet"),
    ]
    assert main(command) == 1
    told = (
        "user/several: one of its configurations must be named, 'big', 'small', got none. Give it as `dataset_config`."
    )
    assert capsys.readouterr().err == f"hf-mimic filter: {told}\n"
    with pytest.raises(ValueError, match=r"^other$"), loading("user/several", repo_type="dataset"):  # negative control
        raise ValueError("other")


def _unknown(hub, name):
    return r"no data set of this name, or it is private and not open to this login\. Check the name"


def _private(hub, name):
    hub.create(name, "datasets", private=True)
    return r"no data set of this name, or it is private and not open to this login\. Check the name"


def _gated(hub, name):
    hub.create(name, "datasets", gated="manual").commit({"a.csv": b"x\n1\n"})
    return rf"access to this repo must be granted\. Ask for access at http.*/datasets/{name}"


def _a_model(hub, name):
    hub.create(name).commit({"config.json": b"{}"})
    return r"it is a model, not a data set\. Give the repo of a data set"


def _down(hub, name):
    hub.fail(None, name, status=503, times=None)
    return r"the Hub answered 503 \(scripted fault 503\)\. Try again later"


def _reset(hub, name):
    hub.fail(None, name, reset=True, times=None)
    return "Check the connection and try again"


def _file_refused(hub, name):
    rows(3).push_to_hub(name)
    hub.fail("GET", "resolve/.*parquet", status=403, times=None)
    return rf"the token must not read it .*Log in with one that may read {name}"


@pytest.mark.parametrize("cause", [_unknown, _private, _gated, _a_model, _down, _reset, _file_refused])
def test_a_data_set_that_the_hub_refuses(hub, cause):
    name = f"other/refuses{cause.__name__}" if cause is not _file_refused else "user/refuses"
    message = cause(hub, name)
    with pytest.raises(HubError, match=rf"^{name}: .* failed: .*{message}") as error:
        load_rows(name)
    assert "\n" not in str(error.value)


def test_a_revision_that_is_not_there(hub):
    rows(3).push_to_hub("user/few")
    with pytest.raises(HubError, match=r"user/few: .* failed: there is no such branch, tag or commit. Take one that"):
        load_rows("user/few", revision="v9")


def test_offline(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        HubError, match="user/offline: loading the data set failed: HF_HUB_OFFLINE is set, and it is not"
    ):
        load_rows("user/offline")


def test_errors_of_this_machine_keep_their_words(hub, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no PAR1")
    (tmp_path / "empty").mkdir()
    hub.create("user/bad-bytes", "datasets").commit({"a.parquet": b"PAR1xxx"})
    hub.create("user/no-rows", "datasets")
    for name, kind, message in (
        (str(tmp_path / "broken.parquet"), ValueError, "must be a .parquet file with rows"),
        (str(tmp_path / "absent.parquet"), FileNotFoundError, "absent.parquet does not exist"),
        (str(tmp_path / "absent"), FileNotFoundError, "Couldn't find any data file at"),
        (str(tmp_path / "empty"), FileNotFoundError, "doesn't contain any data files"),
        ("a/b/absent", FileNotFoundError, "Couldn't find any data file at"),
        ("user/bad-bytes", pa.ArrowInvalid, "smaller than the minimum file footer"),
        ("user/no-rows", FileNotFoundError, "user/no-rows.*doesn't contain any data files"),
    ):
        with pytest.raises(kind, match=message) as error:
            load_rows(name)
        assert not isinstance(error.value, HubError)
    with pytest.raises(
        ValueError, match=r"only a Hub data set has a configuration or revision, got 'v1' for .*broken"
    ):
        load_rows(str(tmp_path / "broken.parquet"), revision="v1")
    with pytest.raises(ValueError, match=r"only a Hub data set has a configuration or revision, got 'v1' for .*empty"):
        load_rows(str(tmp_path / "empty"), config="v1")


def test_a_student_that_the_hub_refuses(hub):
    hub.create("other/gate", gated="manual").commit({"config.json": b"{}"})
    with pytest.raises(HubError, match="other/gate: loading the model failed: access to this repo must be granted"):
        load_image_text_model("other/gate")
    hub.create("user/rows-only", "datasets")
    with pytest.raises(HubError, match="user/rows-only: loading the model failed: it is a data set, not a model"):
        load_image_text_model("user/rows-only")
    hub.create("user/empty-model").commit({"x.txt": b"1"})
    with pytest.raises(ValueError, match="Unrecognized model in user/empty-model"):
        load_image_text_model("user/empty-model")


def test_an_error_inside_that_has_nothing_to_do_with_the_hub(hub):
    hub.create("user/there")
    with pytest.raises(RuntimeError, match="size mismatch"), loading("user/there", repo_type="model"):
        raise RuntimeError("size mismatch")
    with pytest.raises(OSError, match="no space"), loading("user/there", repo_type="model"):
        raise OSError("no space")


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--model", "user/nobody", "--output_dir", "{home}/out", "--use_cpu", "--report_to", "none"],
        ["score", "--model", "user/nobody", "--reference_model", "user/nobody", "--output_dir", "{home}/scores"],
        ["filter", "--scores", "{home}"],
        ["report", "--scores", "{home}"],
        ["push", "--scores", "{home}", "--repo_id", "user/never"],
        ["evaluate", "--model", "user/nobody"],
    ],
)
def test_each_command_says_it_in_a_line(hub, tmp_path, capsys, argv):
    argv = [word.format(home=tmp_path) for word in argv]
    assert main([*argv, "--dataset", "user/nowhere", "--dataset_revision", "v1"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith(f"hf-mimic {argv[0]}: user/nowhere: ")
    assert "there is no data set of this name" in told[-1]


def test_commands_say_which_model(hub, tmp_path, capsys):
    rows(4).to_parquet(tmp_path / "rows.parquet")
    flags = ["--dataset", str(tmp_path / "rows.parquet"), "--model", "user/nobody", "--output_dir", str(tmp_path)]
    for command in (["train", "--use_cpu", "--report_to", "none"], ["score", "--reference_model", "user/nobody"]):
        assert main([*command, *flags]) == 1
        expected = f"hf-mimic {command[0]}: user/nobody: loading the model failed: there is no model of this name"
        assert expected in capsys.readouterr().err
