"""`MimicTrainingArguments`: every check with its message, and the round trips through parser and JSON."""

import json

import pytest
from transformers import HfArgumentParser

from hf_mimic.arguments import MimicTrainingArguments

QUIET = {"use_cpu": True, "report_to": "none"}


def make(tmp_path, **options):
    return MimicTrainingArguments(str(tmp_path), **QUIET, **options)


def test_defaults(tmp_path):
    args = make(tmp_path)
    assert (args.mimic_layers, args.direction, args.tau) == (["head"], "current", "auto")
    assert (args.strategy, args.reweight, args.weight_scope) == ("auto", "all", "global")
    assert (args.head_init, args.on_unhealthy) == ("keep", "warn")
    assert args.scores_dir == str(tmp_path / "scores")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("direction", "curent", "`direction` must be one of 'current', 'start', 'task_vector', got 'curent'. Did"),
        ("reweight", "mimic_layer", "`reweight` must be one of 'all', 'mimic_layers', got 'mimic_layer'. Did"),
        ("weight_scope", "globel", "`weight_scope` must be one of 'global', 'device', got 'globel'. Did"),
        (
            "strategy",
            "mimick",
            "`strategy` must be one of 'auto', 'mimic', 'trust', .*, 'dissect', .*'ref_clip_loss', got 'mimick'. Did",
        ),
    ],
)
def test_choice_errors_list_what_is_allowed_and_the_closest(tmp_path, name, value, message):
    close = {"curent": "current", "mimic_layer": "mimic_layers", "globel": "global", "mimick": "mimic"}[value]
    with pytest.raises(ValueError, match=f"{message} you mean '{close}'\\?"):
        make(tmp_path, **{name: value})


def test_choice_error_without_a_close_name_has_no_hint(tmp_path):
    with pytest.raises(ValueError, match=r"got 'xyz'\.$"):
        make(tmp_path, strategy="xyz")


@pytest.mark.parametrize("value", ["0", "-1", "abc", 0, -0.5, "nan", None, ""])
def test_temperature_must_be_positive_or_auto(tmp_path, value):
    with pytest.raises(ValueError, match=f'`temperature` must be a positive number or "auto", got {value!r}'):
        make(tmp_path, temperature=value)


@pytest.mark.parametrize(("value", "tau"), [("auto", "auto"), ("0.3", 0.3), (0.3, 0.3), (2, 2.0), ("1e12", 1e12)])
def test_temperature_is_text_or_number(tmp_path, value, tau):
    assert make(tmp_path, temperature=value).tau == tau


@pytest.mark.parametrize("value", ["last_block", ["last_block"]])
def test_mimic_layers_is_a_name_or_a_list(tmp_path, value):
    assert make(tmp_path, mimic_layers=value).mimic_layers == ["last_block"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_liger_kernel": True}, "`use_liger_kernel` must be False: its fused loss returns no logits"),
        (
            {"torch_compile": True, "reweight": "mimic_layers"},
            '"mimic_layers" must have `torch_compile`=False, got True: compiled code cannot be differentiated twice',
        ),
        ({"self_check_steps": -2}, r"`self_check_steps` must be -1 \(never\), 0 .* got -2"),
        (
            {"reweight": "mimic_layers", "activation_checkpointing_kwargs": {"use_reentrant": True}},
            '"mimic_layers" must have checkpointing with use_reentrant=False, got True',
        ),
    ],
)
def test_settings_that_would_make_the_scores_wrong_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


def test_parser_round_trip(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", "--reference_model", "me/ref"]
    flags += ["--mimic_layers", "head", "last_mlp", "--temperature", "0.3", "--direction", "start"]
    flags += ["--record_scores", "False", "--weight_scope", "device", "--learning_rate", "1e-3"]
    (args,) = HfArgumentParser(MimicTrainingArguments).parse_args_into_dataclasses(flags)
    assert (args.mimic_layers, args.tau, args.direction) == (["head", "last_mlp"], 0.3, "start")
    assert (args.record_scores, args.weight_scope, args.learning_rate) == (False, "device", 1e-3)
    (again,) = HfArgumentParser(MimicTrainingArguments).parse_dict({**QUIET, **ours(args)})
    assert ours(again) == ours(args)


def test_parser_defaults_are_the_class_defaults(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none"]
    (args,) = HfArgumentParser(MimicTrainingArguments).parse_args_into_dataclasses(flags)
    assert ours(args) == ours(make(tmp_path))


def test_json_has_our_fields(tmp_path):
    args = make(tmp_path, temperature=0.3, mimic_layers="all", reference_model="me/ref")
    stored = json.loads(args.to_json_string())
    assert {name: stored[name] for name in ours(args)} == ours(args)
    assert ours(MimicTrainingArguments(**{**args.to_dict(), **QUIET})) == ours(args)
    assert args.to_sanitized_dict()["temperature"] == 0.3


def ours(args):
    return {name: getattr(args, name) for name in MimicTrainingArguments.__annotations__} | {
        "output_dir": args.output_dir
    }
