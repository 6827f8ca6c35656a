"""A recipe: a data set's whole way in one YAML file, from the first training to the second; checked before it begins.

Read `read_recipe`, then `_wired`: what a step takes from those before it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hf_mimic.command_arguments import RuleArguments
from hf_mimic.flags import closest, from_values, mapping, names, read_yaml

STEPS = {  # in this order, whatever the file's; each with the command that does it
    "train": "train",
    "score": "score",
    "filter": "filter",
    "report": "report",
    "push": "push",
    "retrain": "train",
    "evaluate": "evaluate",
}
TRAININGS = ("train", "retrain")
_OUTPUTS = {  # the flag that says where a step writes, and what it is by default, in the recipe's output_dir
    "train": ("output_dir", "train"),
    "score": ("output_dir", "scores"),
    "filter": ("output", "curated.parquet"),
    "report": ("output_dir", "report"),
    "retrain": ("output_dir", "retrain"),
    "evaluate": ("output", "evaluation.json"),
}
_OWN = {"output_dir", "overwrite"}
_PLACE = ("dataset", "dataset_config", "dataset_revision", "split")
_RULE = tuple(entry.name for entry in fields(RuleArguments))


@dataclass(frozen=True)
class Recipe:
    """What is to be done, in order.

    Args:
        path: Of the file.
        output_dir: Folder of everything that is written.
        overwrite: Whether steps that are done are done again.
        values: Step to the values of its flags.
        kinds: Command to its dataclasses.
    """

    path: str
    output_dir: str
    overwrite: bool
    values: Mapping[str, Mapping[str, Any]]
    kinds: Mapping[str, Sequence[type]]

    def options(self, step: str, **found: Any) -> list[Any]:
        """Return the dataclasses of a step.

        Args:
            step: Its name.
            **found: Values that only the steps before it know.
        """
        return from_values(self.kinds[STEPS[step]], {**self.values[step], **found}, f"{self.path}: {step}")

    def output(self, step: str) -> Path | None:
        """Return where a step writes; None for one that writes nothing here."""
        flag = _OUTPUTS.get(step, ("", ""))[0]
        return Path(self.values[step][flag]) if flag else None

    @property
    def retrains_from_hub(self) -> bool:
        """Whether the second training reads what was published."""
        return "retrain" in self.values and _published(self.values) is not None


def read_recipe(path: str, kinds: Mapping[str, Sequence[type]]) -> Recipe:
    """Read a recipe, and check all of it.

    Keys at the top are shared by the steps: each takes those that it has a flag for. A section has the flags of one step,
    and wins; a step without a section is not done.

    Args:
        path: Of the YAML file.
        kinds: Command to its dataclasses.

    Raises:
        ValueError: If a key is unknown, a value is missing or has another type, or two of them contradict each other.
    """
    content = read_yaml(path, path)
    sections = {step: mapping(content[step], f"{path}: {step}") for step in STEPS if step in content}
    shared = {name: value for name, value in content.items() if name not in STEPS}
    known = {step: names(kinds[command]) for step, command in STEPS.items()}
    _check_names(path, sections, shared, known)
    _check_steps(path, sections)
    folder = shared.get("output_dir")
    if not isinstance(folder, str) or not folder:
        raise ValueError(f"{path}: `output_dir` must name the folder that everything goes to, got {folder!r}.")
    if not isinstance(shared.get("overwrite", False), bool):
        raise ValueError(f"{path}: `overwrite` must be true or false, got {shared['overwrite']!r}.")
    values: dict[str, dict[str, Any]] = {}
    for step, own in sections.items():
        taken = {name: value for name, value in shared.items() if name in known[step] - {"output_dir"}}
        if step in _OUTPUTS:
            flag, name = _OUTPUTS[step]
            taken = {flag: os.path.join(folder, name)} | taken
        if step == "evaluate":
            taken = _to_evaluate_on(taken, shared)
        fixed = _wired(step, values)
        given = [name for name in own if name in fixed or (step == "push" and "filter" in values and name in _RULE)]
        if given:
            raise ValueError(
                f"{path}: {step}: `{given[0]}` comes from a step before it, got {own[given[0]]!r}. Leave the line out."
            )
        values[step] = {**_evaluated(step, taken | own, values), **taken, **own, **fixed}
    recipe = Recipe(path, folder, bool(shared.get("overwrite", False)), values, kinds)
    _check_together(recipe)
    return recipe


# ---- what comes from where -----------------------------------------------------------------------------------------


def _wired(step: str, before: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a step takes from the steps before it."""
    trained = [before[name]["output_dir"] for name in TRAININGS if name in before]
    fixed: dict[str, Any] = {}
    if step in ("filter", "report", "push"):
        if "train" in before:
            fixed["scores"] = os.path.join(before["train"]["output_dir"], "scores")
        elif "score" in before:
            fixed["scores"] = before["score"]["output_dir"]
    if step == "push" and "filter" in before:
        fixed |= {name: value for name, value in before["filter"].items() if name in _RULE}
    if step == "retrain":
        there = _published(before)
        fixed |= there or dict(zip(_PLACE, (before["filter"]["output"], None, None, "train"), strict=True))
    if step == "evaluate" and trained:
        fixed["model"] = trained[-1]
    return fixed


def _published(before: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return where the curated data set is on the Hub, None if it is not; its commit is not known before."""
    push = before.get("push", {})
    if push.get("dataset") is None or "repo_id" not in push:
        return None
    found = (push["repo_id"], push.get("config_name", "default"), None, push.get("split", "train"))
    return dict(zip(_PLACE, found, strict=True))


def _evaluated(step: str, given: Mapping[str, Any], before: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return where the second training finds the split to evaluate on: in the data set of the first one."""
    if step != "retrain" or not given.get("eval_split") or given.get("eval_dataset") is not None:
        return {}
    first = before.get("train") or before.get("score") or before.get("filter") or before["push"]
    return {f"eval_{name}": first.get(name) for name in _PLACE[:3]}


def _to_evaluate_on(taken: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shared keys with the data to evaluate on in place of those to train on."""
    rest = {name: value for name, value in taken.items() if name != "split"}
    if shared.get("eval_dataset") is not None:
        rest |= {name: shared.get(f"eval_{name}") for name in _PLACE[:3]}
    if shared.get("eval_split") is None:
        return rest
    if Path(str(shared["eval_split"])).exists():
        return rest | {"dataset": shared["eval_split"], "dataset_config": None, "dataset_revision": None}
    return rest | {"split": shared["eval_split"]}


# ---- what cannot be ------------------------------------------------------------------------------------------------


def _check_names(
    path: str, sections: Mapping[str, Any], shared: Mapping[str, Any], known: Mapping[str, set[str]]
) -> None:
    for step, own in sections.items():
        for name in own:
            if name not in known[step]:
                raise ValueError(f"{path}: {step}: unknown key {name!r}{closest(name, known[step])}")
    every = set().union(*known.values()) | _OWN | STEPS.keys()
    for name in shared:
        if name not in every:
            raise ValueError(f"{path}: unknown key or section {name!r}{closest(name, every)}")
    for step, own in {"": shared, **sections}.items():
        if "resume_from_checkpoint" in own:
            where = f"{path}: {step}" if step else path
            raise ValueError(f"{where}: `resume_from_checkpoint` must be left out: a run goes on by itself.")


def _check_steps(path: str, sections: Mapping[str, Any]) -> None:
    if not sections:
        raise ValueError(f"{path}: a recipe must have a section, one of {', '.join(STEPS)}, got none.")
    if "train" in sections and "score" in sections:
        raise ValueError(
            f"{path}: one step must make the scores, got the sections train and score. Leave score out: training scores "
            "what it trains on."
        )
    pushes = "push" in sections and sections["push"].get("dataset", True) is not None
    if "retrain" in sections and not ("filter" in sections or pushes):
        raise ValueError(f"{path}: retrain must have a curated data set, got neither a section filter nor push.")


def _check_together(recipe: Recipe) -> None:
    """Check the types of all values, and what no step can see alone.

    Raises:
        ValueError: If something does not fit.
    """
    steps = {step: _joined(recipe.options(step)) for step in recipe.values}
    of = {step: steps.get(step, {}) for step in STEPS}
    for name in (*_PLACE, "sample_id_column"):
        said = {step: of[step][name] for step in ("train", "score", "filter", "push") if name in of[step]}
        if of["push"].get("dataset") is None:
            said.pop("push", None)  # the scores alone
        if len(set(said.values())) > 1:
            told = ", ".join(f"{value!r} in {step}" for step, value in said.items())
            raise ValueError(
                f"{recipe.path}: `{name}` must be the same in every step, got {told}. Give it once, at the top."
            )
    places = [path.resolve() for path in (recipe.output(step) for step in steps) if path is not None]
    twice = [path for path in places if places.count(path) > 1]
    push, target = of["push"], of["push"].get("repo_id")
    onto_itself = target is not None and target == push["dataset"] and not (push["revision"] or push["create_pr"])
    repos = [of[step]["hub_model_id"] for step in TRAININGS if of[step].get("push_to_hub")]
    captionless = [step for step in TRAININGS if step in steps and of[step]["text_column"] is None]
    for wrong, message in (
        (
            "evaluate" in steps and captionless,
            "evaluate must have an image-text model, and without `text_column` a classifier is trained. Leave evaluate out: "
            "with `eval_split` the trainings tell the accuracy",
        ),
        (twice, f"every step must write to a place of its own, got {twice and twice[0]} for two of them"),
        (
            not of["train"].get("record_scores", True) and {"filter", "report", "push"} & steps.keys(),
            "train must have `record_scores: true`: the steps after it need the scores",
        ),
        (
            of["score"].get("num_shards", 1) != 1,
            "score must have `num_shards: 1`: one run scores all. Score shards by `hf-mimic score`, each with its --shard",
        ),
        (
            of["filter"].get("keep_all") and "retrain" in steps and not recipe.retrains_from_hub,
            "filter must not have `keep_all: true` where retrain reads what it writes",
        ),
        (onto_itself, f"push must not go onto the data set that is filtered, {target}. Choose another `repo_id`"),
        (
            len(repos) > 1 and len(set(repos)) == 1,
            "train and retrain must not push to the same model. Give each a `hub_model_id` of its own",
        ),
    ):
        if wrong:
            raise ValueError(f"{recipe.path}: {message}.")


def _joined(options: Sequence[Any]) -> dict[str, Any]:
    return {entry.name: getattr(each, entry.name) for each in options for entry in fields(each)}
