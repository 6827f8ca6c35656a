"""Values of a YAML file become what the same words on the command line would, or an error that names the file."""

import dataclasses

import pytest

from hf_mimic.arguments import MimicTrainingArguments
from hf_mimic.cli import parse
from hf_mimic.command_arguments import FilterArguments, PushArguments, RuleArguments, ScoreArguments
from hf_mimic.commands import COMMANDS
from hf_mimic.flags import from_values, names, read_yaml

PUSH = [PushArguments, RuleArguments]


@pytest.mark.parametrize(
    ("given", "name", "expected"),
    [
        ({"learning_rate": "1e-4"}, "learning_rate", 1e-4),
        ({"num_train_epochs": 2}, "num_train_epochs", 2.0),
        ({"temperature": 0.5}, "temperature", "0.5"),
        ({"mimic_layers": "all"}, "mimic_layers", ["all"]),
        ({"mimic_layers": ["head", "all"]}, "mimic_layers", ["head", "all"]),
        ({"record_scores": False}, "record_scores", False),
        ({"record_scores": "no"}, "record_scores", False),
        ({"save_strategy": False}, "save_strategy", "no"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs", {"num_cycles": 2}),
        ({"reference_model": None}, "reference_model", None),
        ({"report_to": ["none"]}, "report_to", []),
    ],
)
def test_types(given, name, expected):
    (args,) = from_values([MimicTrainingArguments], {"use_cpu": True, "output_dir": "x", **given}, "here")
    found = getattr(args, name)
    assert found == expected
    assert type(found) is type(expected) or name == "save_strategy"


def test_the_same_as_flags():
    given = {"dataset": "d", "scores": "s", "repo_id": "user/x", "top": "0.5", "group_columns": ["a", "b"]}
    flags = "--dataset d --scores s --repo_id user/x --top 0.5 --group_columns a b".split()
    assert from_values(PUSH, given, "here") == parse("push", flags)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_default_may_be_written_down(command):
    """A value equal to the default changes nothing, whatever its type."""
    types = COMMANDS[command][1]()
    needed = {f.name: "x" for kind in types for f in dataclasses.fields(kind) if _required(f)}
    needed = {name: ["x"] if name == "scores" and command == "compare" else value for name, value in needed.items()}
    quiet = {"use_cpu": True, "output_dir": "x"} if command == "train" else {}
    before = from_values(types, needed | quiet, "here")
    given = {
        f.name: f.default for kind in types for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING
    }
    given = {name: value for name, value in given.items() if value != ""}  # of debug, for which no flag has a word
    after = from_values(types, given | needed | quiet, "here")
    for one, other in zip(after, before, strict=True):
        for entry in dataclasses.fields(one):
            assert getattr(one, entry.name) == getattr(other, entry.name), entry.name


def _required(entry):
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING and entry.init


@pytest.mark.parametrize(
    ("types", "given", "message"),
    [
        ([FilterArguments], {"dataset": "x"}, "here: it must have `scores`, got none"),
        ([FilterArguments], {"dataset": None, "scores": "s"}, "here: `dataset` must have a value, got null"),
        ([FilterArguments], {"datset": "x"}, "here: unknown key 'datset', did you mean 'dataset'?"),
        ([RuleArguments], {"top": "half"}, "here: `top`: invalid float value: 'half'"),
        ([RuleArguments], {"top": [0.5]}, "here: `top`: invalid float value: '[0.5]'"),
        ([FilterArguments], {"dataset": {"a": 1}}, "here: `dataset` must be one text, got {'a': 1}. Put what YAML"),
        ([FilterArguments], {"split": ["a", "b"]}, "here: `split` must be one text, got ['a', 'b']"),
        (
            [FilterArguments],
            {"dataset_revision": 1.10},
            "here: `dataset_revision` must be one text, got 1.1. Put what YAML",
        ),
        ([RuleArguments], {"column": False}, "here: `column` must be one text, got False. Put what YAML reads"),
        ([RuleArguments], {"drop_unscored": "perhaps"}, "here: `drop_unscored`: Truthy value expected"),
        ([MimicTrainingArguments], {"save_strategy": "never"}, "here: `save_strategy`: invalid choice: 'never'"),
        ([MimicTrainingArguments], {"temperature": 0}, "here: `temperature` must be a positive number"),
        (
            [ScoreArguments],
            {"batch_size": 1.5, "reference_model": "r"},
            "here: `batch_size`: invalid int value: '1.5'",
        ),
    ],
)
def test_errors_begin_with_the_place(types, given, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared below, as it stands
        from_values(types, given, "here")
    assert message in str(error.value)


def test_a_key_that_is_there_twice(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("top: 0.5\nfilter: trust\ntop: 0.1\n")
    with pytest.raises(ValueError, match=r"a.yaml: line 3: 'top' is there twice$"):
        read_yaml(path, str(path))
    path.write_text("base: &base {a: 1}\nmore: {<<: *base, a: 2}\n")  # negative control: to override is no mistake
    assert read_yaml(path, "here")["more"] == {"a": 2}
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"here: .*decode"):
        read_yaml(path, "here")
    path.write_text("")
    assert read_yaml(path, "here") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top: 1\n\tfilter: trust\n", "here: line 2: found character '\\t' that cannot start any token"),
        ("top: [1\nfilter: trust\n", "here: line 2: expected ',' or ']', but got ':'"),
        ("? [a, b]\n: 1\n", "here: line 1: found unhashable key"),
        (
            "top: \x07\n",
            'here: unacceptable character #x0007: special characters are not allowed in "<unicode string>"',
        ),
    ],
)
def test_what_is_no_yaml_is_told_in_one_line(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared below, as it stands
        read_yaml(tmp_path / "a.yaml", "here")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_yes_and_a_number_where_they_are_meant():
    """Negative control: flags that take true or a folder, a number or a word, a table or a text."""
    given = {
        "resume_from_checkpoint": True,
        "temperature": 0.5,
        "lr_scheduler_kwargs": {"min_lr": 0.1},
        "report_to": ["none"],
    }
    (args,) = from_values([MimicTrainingArguments], {**given, "output_dir": "x", "use_cpu": True}, "here")
    assert (args.resume_from_checkpoint, args.temperature) == ("True", "0.5")
    assert args.lr_scheduler_kwargs == {"min_lr": 0.1}


def test_names():
    assert {"threshold", "more_scores"} <= names([RuleArguments])
    assert "help" not in names([RuleArguments])
    assert "dataset_revision" in names(PUSH)
