"""Recipes: which step gets what, and everything that can be told to be wrong before the first step."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from hf_mimic.commands import COMMANDS
from hf_mimic.recipes import STEPS, read_recipe

KINDS = {name: types() for name, (_, types) in COMMANDS.items()}
TOP = {"model": "user/vit", "reference_model": "user/trusted", "dataset": "user/data", "output_dir": "out"}
QUIET = {"use_cpu": True, "report_to": "none"}
EXAMPLE = Path(__file__).parent.parent / "examples" / "recipe.yaml"


def read(tmp_path, **content):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**TOP, **content}))
    return read_recipe(str(path), KINDS)


def options(recipe, step, **found):
    """Return all flags of a step."""
    return {f.name: getattr(o, f.name) for o in recipe.options(step, **found) for f in dataclasses.fields(o)}


def whole(**changes):
    sections = {"train": QUIET, "filter": {"top": "0.5"}, "report": {}, "push": {"repo_id": "user/clean"}}
    return {**sections, "retrain": QUIET, **changes}


def test_outputs_are_the_inputs_of_later_steps(tmp_path):
    recipe = read(tmp_path, **whole(), seed=7, eval_split="test", dataset_revision="v1")
    assert list(recipe.values) == ["train", "filter", "report", "push", "retrain"]
    train, rule, push = (options(recipe, step) for step in ("train", "filter", "push"))
    assert (train["output_dir"], train["seed"], train["eval_split"]) == ("out/train", 7, "test")
    assert {options(recipe, step)["scores"] for step in ("filter", "report", "push")} == {"out/train/scores"}
    assert (rule["output"], rule["top"], push["top"]) == ("out/curated.parquet", 0.5, 0.5)
    assert {options(recipe, step)["dataset_revision"] for step in ("train", "filter", "report", "push")} == {"v1"}
    retrain = options(recipe, "retrain", dataset_revision="c0ffee")
    assert retrain["output_dir"] == "out/retrain"
    places = [retrain[f"{prefix}{name}"] for prefix in ("", "eval_") for name in ("dataset", "dataset_revision")[:1]]
    assert places == ["user/clean", "user/data"]
    assert (retrain["dataset_config"], retrain["dataset_revision"], retrain["split"]) == ("default", "c0ffee", "train")
    assert (retrain["eval_split"], retrain["eval_dataset_revision"]) == ("test", "v1")
    assert options(recipe, "report")["seed"] == 7


def test_the_order_is_fixed_and_an_absent_section_is_not_run(tmp_path):
    recipe = read(tmp_path, filter=None, score={"batch_size": "8"})
    assert list(recipe.values) == ["score", "filter"]
    assert options(recipe, "score")["batch_size"] == 8
    assert options(recipe, "filter")["scores"] == "out/scores"


def test_without_push_the_second_training_reads_parquet(tmp_path):
    sections = whole()
    del sections["push"]
    recipe = read(tmp_path, **sections, dataset_revision="v1", split="train")
    retrain = options(recipe, "retrain")
    assert (retrain["dataset"], retrain["dataset_revision"]) == ("out/curated.parquet", None)
    assert not recipe.retrains_from_hub
    recipe = read(tmp_path, **whole(push={"repo_id": "user/clean", "dataset": None, "split": "x"}, filter={}))
    assert options(recipe, "retrain")["dataset"] == "out/curated.parquet"  # the scores alone were published


def test_a_section_wins_and_types_are_those_of_the_flags(tmp_path):
    recipe = read(tmp_path, **whole(train={**QUIET, "learning_rate": "1e-4", "seed": 1}), seed=2, num_train_epochs=3)
    train, retrain = options(recipe, "train"), options(recipe, "retrain")
    assert (train["learning_rate"], train["seed"], retrain["seed"]) == (1e-4, 1, 2)
    assert train["num_train_epochs"] == 3.0
    assert isinstance(train["num_train_epochs"], float)


def test_scores_of_another_run(tmp_path):
    recipe = read(tmp_path, scores="elsewhere/scores", filter={}, push={"repo_id": "user/clean"})
    assert options(recipe, "push")["scores"] == "elsewhere/scores"


def test_evaluate_takes_the_last_model_and_the_evaluation_split(tmp_path):
    pairs = {"text_column": "caption"}
    recipe = read(tmp_path, **whole(evaluate={"label_column": "label"}), **pairs, eval_split="dev", split="train")
    evaluate = options(recipe, "evaluate")
    assert (evaluate["model"], evaluate["dataset"], evaluate["split"]) == ("out/retrain", "user/data", "dev")
    assert evaluate["output"] == "out/evaluation.json"
    recipe = read(tmp_path, evaluate={}, split="train")  # never on what was trained on, unless it is said there
    assert options(recipe, "evaluate")["split"] == "test"
    assert options(recipe, "evaluate")["model"] == "user/vit"
    file = read(tmp_path, evaluate={}, eval_split=__file__)
    assert (options(file, "evaluate")["dataset"], options(file, "evaluate")["split"]) == (__file__, "test")
    other = read(tmp_path, evaluate={}, train=QUIET, **pairs, eval_dataset="user/other", eval_split="dev")
    assert options(other, "evaluate")["dataset"] == "user/other"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tran": {}}, "unknown key or section 'tran', did you mean 'train'?"),
        ({"train": {**QUIET, "learnig_rate": 1}}, "train: unknown key 'learnig_rate', did you mean 'learning_rate'?"),
        ({"train": {**QUIET, "learning_rate": "fast"}}, "train: `learning_rate`: invalid float value: 'fast'"),
        ({"train": {**QUIET, "temperature": 0}}, "train: `temperature` must be a positive number"),
        ({"filter": "trust"}, "filter: it must hold `key: value` lines, got a str"),
        ({}, "a recipe must have a section, one of train, score"),
        ({"train": QUIET, "score": {}}, "one step must make the scores, got the sections train and score"),
        ({"filter": {}}, "filter: it must have `scores`, got none"),
        ({"train": QUIET, "push": {}}, "push: it must have `repo_id`, got none"),
        ({"retrain": QUIET}, "retrain must have a curated data set, got neither"),
        (
            {"train": QUIET, "push": {"repo_id": "u/x", "dataset": None}, "retrain": QUIET},
            "retrain must have a curated data set",
        ),
        ({"train": QUIET, "filter": {"scores": "x"}}, "filter: `scores` comes from a step before it, got 'x'"),
        (whole(push={"repo_id": "u/x", "threshold": 1}), "push: `threshold` comes from a step before it, got 1"),
        (whole(retrain={"dataset_revision": "v1"}), "retrain: `dataset_revision` comes from a step before it"),
        (
            whole(filter={"split": "dev"}),
            "`split` must be the same in every step, got 'train' in train, 'dev' in filter",
        ),
        (whole(train={**QUIET, "output_dir": "out/retrain"}), "every step must write to a place of its own, got "),
        (whole(train={**QUIET, "record_scores": False}), "train must have `record_scores: true`"),
        ({"score": {"num_shards": 4}}, "score must have `num_shards: 1`"),
        (
            whole(evaluate={}),
            "evaluate must have an image-text model, and without `text_column` a classifier is trained",
        ),
        ({"train": QUIET, "filter": {"keep_all": True}, "retrain": QUIET}, "filter must not have `keep_all: true`"),
        (whole(push={"repo_id": "user/data"}), "push must not go onto the data set that is filtered, user/data"),
        ({**whole(), "push_to_hub": True, "hub_model_id": "u/m"}, "train and retrain must not push to the same model"),
        ({"train": {**QUIET, "resume_from_checkpoint": "x"}}, "train: `resume_from_checkpoint` must be left out"),
        ({"score": {}, "eval_batch": 3}, "unknown key or section 'eval_batch'"),
        ({"score": {}, "resume_from_checkpoint": True}, "`resume_from_checkpoint` must be left out"),
        ({"score": {}, "output_dir": None}, "`output_dir` must name the folder that everything goes to, got None"),
        ({"score": {}, "overwrite": "yes please"}, "`overwrite` must be true or false, got 'yes please'"),
    ],
)
def test_what_is_wrong_is_said_with_the_file(tmp_path, content, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared below, as it stands
        read(tmp_path, **content)
    assert str(error.value).startswith(f"{tmp_path / 'recipe.yaml'}: {message}")


def test_the_example():
    recipe = read_recipe(str(EXAMPLE), KINDS)
    assert list(recipe.values) == ["train", "filter", "report", "push", "retrain"]
    assert options(recipe, "train")["learning_rate"] == 5e-5
    assert options(recipe, "push")["private"] is True


def test_every_step_is_a_command():
    assert set(STEPS.values()) <= COMMANDS.keys()
