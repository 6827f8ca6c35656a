"""What `hf-mimic run` does: the steps of a recipe in order, each once, and on from where a run was stopped.

Read `run_recipe`, then `_Run.plan`. What was done is noted in the output folder, see run_notes.py.
"""

from __future__ import annotations

import json
import os
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_mimic.checkpoints import last_complete, last_run
from hf_mimic.checks import check_choice
from hf_mimic.command_arguments import RunArguments
from hf_mimic.filter_command import check_output
from hf_mimic.hub_login import check_may_push
from hf_mimic.recipes import STEPS, TRAININGS, Recipe, read_recipe
from hf_mimic.report_figures import check_matplotlib
from hf_mimic.rules import chosen
from hf_mimic.run_notes import NOTES, Notes, state_of
from hf_mimic.scores import ScoreTable
from hf_mimic.tables import Table

_READS = {  # which of the steps before must be as they were for a step to count as done
    "filter": ("train", "score"),
    "report": ("train", "score"),
    "push": ("train", "score"),
    "retrain": ("filter",),
    "evaluate": ("train", "retrain"),
}
_VALUES = ("mimic_score", "relative_weight", "loss", "ref_loss", "ref_trust", "clip_score")
_DATA = ("dataset", "eval_dataset")
_MEASURED = ("accuracy", "rsum")  # the names of the measure in a training's table
Commands = Mapping[str, tuple[Callable[..., str], Callable[[], list[Any]]]]


def run_recipe(options: RunArguments, commands: Commands) -> dict[str, Any]:
    """Do what a recipe asks for and is not done yet; print the table of every step, return the lines of the last one.

    Args:
        options: Which recipe, and from where.
        commands: Command to its function and dataclasses.

    Raises:
        ValueError: If the recipe is wrong, its settings changed after they were trained with, or this is one of several
            processes.
        HubError: If a data set is not there, or the login may not publish.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"`hf-mimic run` must be a single process, got WORLD_SIZE={os.environ['WORLD_SIZE']}. Launch the training by "
            "itself (accelerate launch -m hf_mimic.cli train ...), then run a recipe without `train:` whose `scores:` names "
            "the folder of its scores."
        )
    recipe = read_recipe(options.config, {name: types() for name, (_, types) in commands.items()})
    run = _Run(recipe, commands, _begin(options, recipe))
    run.check()
    for step in recipe.values:
        run.do(step)
    return run.summary()


def _begin(options: RunArguments, recipe: Recipe) -> str | None:
    """Return the step from which on all are done again, None if only what is not done is."""
    if options.from_step is not None:
        check_choice("--from", options.from_step, recipe.values)
        return options.from_step
    return next(iter(recipe.values)) if options.overwrite or recipe.overwrite else None


class _Plan(NamedTuple):
    """Whether a step is done now, why, and what it is told more than the recipe says."""

    now: bool
    why: str = ""
    more: Mapping[str, Any] = {}


class _Run:
    """The steps of a recipe, and what is known of those that were done."""

    def __init__(self, recipe: Recipe, commands: Commands, begin: str | None) -> None:
        self.recipe, self.commands, self.notes = recipe, commands, Notes(Path(recipe.output_dir) / NOTES)
        steps = list(recipe.values)
        if begin == steps[0]:
            self.notes.commits.clear()
        self.again = steps[steps.index(begin) :] if begin is not None else []
        self.earlier = steps[: steps.index(begin)] if begin is not None else []
        self.now: set[str] = set()  # what was done by this call
        self.states: dict[str, str] = {}  # of the data on this machine

    def check(self) -> None:
        """Find what would stop a later step, before the first one begins.

        Raises:
            ValueError: If something does not fit.
            HubError: If a data set is not there, or the login may not publish.
            ImportError: If there is to be a report, and matplotlib is missing.
        """
        for step in ("filter", "push"):
            if step in self.recipe.values:
                self._check_rule(step)
        for step in self.earlier:
            if not self._is_done(step, self._told(step)):
                raise ValueError(
                    f"{self.recipe.path}: {step} must be done before, as the recipe has it now, it is not. Run without --from."
                )
        for step in TRAININGS:
            self._check_unchanged(step)
        push = self.recipe.values.get("push", {"create_pr": True})  # who may read may open a pull request
        if not push.get("create_pr") and any(self.plan(step).now for step in self.recipe.values):
            check_may_push(str(push["repo_id"]))
        if "report" in self.recipe.values:
            check_matplotlib()

    def _check_rule(self, step: str) -> None:
        options, rule = self.recipe.options(step)
        try:
            wanted = chosen(rule)
            if (
                wanted is not None and rule.filter is None
            ):  # numbers, columns, an expression: told after a training else
                wanted.fit(_any_scores())
            if step == "filter":
                check_output(options)
        except ValueError as error:
            raise ValueError(f"{self.recipe.path}: {step}: {error}") from error

    def _check_unchanged(self, step: str) -> None:
        """Refuse to lose a training because a line was changed."""
        before = self.notes.of(step)
        if step not in self.recipe.values or step in self.again or before is None:
            return
        changed = self._changed(step, before["values"])
        if changed and (before["done"] or self._checkpoint(step)):
            said = ", ".join(f"`{k}` was {before['values'].get(k)!r}" for k in changed)
            raise ValueError(
                f"{self.recipe.path}: {step} must have the settings that it was begun with, {said}. Set it back, give "
                f"--from {step} to train anew, or name another output_dir."
            )

    def _changed(self, step: str, before: Mapping[str, Any]) -> list[str]:
        """Return the flags of a training that the recipe changes; that other rows were published is none of these."""
        found = {"dataset", "dataset_revision"} if step == "retrain" and self.recipe.retrains_from_hub else set()
        return [name for name in _differing(before, self._told(step)) if name not in found]

    # ---- what is to be done ----------------------------------------------------------------------------------------

    def plan(self, step: str) -> _Plan:
        """Return whether a step is done now: not if it was, with the same values, and so were those that it reads."""
        before, told = self.notes.of(step), self._told(step)
        if step in self.again:
            return _Plan(True, more={"overwrite": True} if step == "score" else {})
        if before is None:
            return _Plan(True)
        if self._is_done(step, told):
            return _Plan(False)
        changed = _differing(before["values"], told)
        begun = step in TRAININGS and not before["done"] and not changed and self._read_what_is_there(step)
        if begun and self._checkpoint(step):
            return _Plan(True, "goes on from its last checkpoint", {"resume_from_checkpoint": "true"})
        if not before["done"]:
            return _Plan(True)
        why = f"{', '.join(changed)} changed" if changed else "what it reads or wrote is not what it was"
        anew = step == "score" and any(name.endswith("on disk") for name in changed)
        return _Plan(True, f"again: {why}", {"overwrite": True} if anew else {})

    def _is_done(self, step: str, told: Mapping[str, Any]) -> bool:
        before = self.notes.of(step)
        if before is None or not before["done"] or before["values"] != told or not _is_there(self.recipe, step):
            return False
        return self._read_what_is_there(step)

    def _read_what_is_there(self, step: str) -> bool:
        """Return whether the steps that a step read are as they were: a call that was stopped may have done them anew."""
        read = (self.notes.of(step) or {}).get("read", {})
        return all(read.get(name) == made for name, made in self._reads(step).items())

    def _reads(self, step: str) -> dict[str, str | None]:
        """Return the steps of the recipe that a step reads, and which doing of each lies there now."""
        reads = () if step == "retrain" and self.recipe.retrains_from_hub else _READS.get(step, ())
        return {name: (self.notes.of(name) or {}).get("made") for name in reads if name in self.recipe.values}

    def _told(self, step: str) -> dict[str, Any]:
        """Return the values of a step, with the commit that it reads; tokens are nobody's business."""
        values = {**self.recipe.values[step], **self._found(step)}
        told = {name: value for name, value in values.items() if not name.endswith("token") and name != "overwrite"}
        told |= {
            f"{place} on disk": self._state(values[place]) for place in _DATA if self._is_given(values.get(place))
        }
        return json.loads(json.dumps(told, default=str))

    def _is_given(self, place: Any) -> bool:
        """Return whether a place is data on this machine that no step of the recipe writes."""
        outputs = map(self.recipe.output, self.recipe.values)
        return isinstance(place, str) and Path(place).exists() and Path(place) not in outputs

    def _state(self, place: str) -> str:
        if place not in self.states:
            self.states[place] = state_of(Path(place))
        return self.states[place]

    def _found(self, step: str) -> dict[str, Any]:
        """Return what the recipe does not say: the commits that the data sets have, and that was published."""
        values, found = self.recipe.values[step], {}
        for place in ("eval_dataset", "dataset"):
            if values.get(place) is not None and not (step == "retrain" and place == "dataset"):
                revision = f"{place}_revision"
                found[revision] = self.notes.commit(values[place], values.get(revision))
        push = self.notes.of("push")
        if step == "retrain" and self.recipe.retrains_from_hub and push is not None and push["done"]:
            found |= {"dataset": push["lines"]["repo"], "dataset_revision": push["lines"]["commit"]}
        return found

    def _checkpoint(self, step: str) -> str | None:
        """Return the last whole checkpoint of the training that was begun here, not of one before it in the folder."""
        begun_after = (self.notes.of(step) or {}).get("after")
        if begun_after is not None and begun_after == self._last_run(step):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the training says it
            return last_complete(self.recipe.values[step]["output_dir"])

    def _last_run(self, step: str) -> str | None:
        return last_run(self.recipe.values[step]["output_dir"]) if step in TRAININGS else None

    # ---- doing it --------------------------------------------------------------------------------------------------

    def do(self, step: str) -> None:
        """Do a step if it is not done; print its table."""
        now, why, more = self.plan(step)
        if not now:
            print(f"== {step}: done before\n", flush=True)
            return
        print(f"== {step}{': ' if why else ''}{why}", flush=True)
        told = self._told(step)
        options = self.recipe.options(step, **self._found(step), **more)
        after = (self.notes.of(step) or {}).get("after") if "resume_from_checkpoint" in more else self._last_run(step)
        read = {"read": self._reads(step)}
        self.notes.write(step, {"done": False, "values": told, "after": after, **read})
        try:
            table = self.commands[STEPS[step]][0](*options)
        except BaseException:
            hint = "without --from, --overwrite or `overwrite: true` the command" if self.again else "the same command"
            print(f"{step} did not come to its end; {hint} goes on from here", flush=True)
            raise
        lines = {name: str(value) for name, value in getattr(table, "lines", {}).items()}
        self.notes.write(step, {"done": True, "values": told, "lines": lines, "made": uuid.uuid4().hex, **read})
        self.now.add(step)
        print(f"{Table(lines)}\n", flush=True)

    def summary(self) -> dict[str, Any]:
        """Return what came of it all: the measure before and after, what was kept, where it is."""
        lines = {step: (self.notes.of(step) or {}).get("lines", {}) for step in self.recipe.values}
        told: dict[str, Any] = {}
        for step, when in zip(TRAININGS, ("before", "after"), strict=True):
            found = lines.get(step, {})
            told |= {f"{name} {when}": found[name] for name in _MEASURED if name in found}
        kept = lines.get("filter") or lines.get("push") or {}
        told |= {name: kept[name] for name in ("rows", "kept", "rule") if name in kept}
        push = lines.get("push", {})
        if push:
            url = next(value for value in push.values() if value.startswith("http"))
            told |= {"published": url, "commit": push["commit"]}
        told |= {f"{step}ed model": lines[step]["model"] for step in TRAININGS if "model" in lines.get(step, {})}
        told["done now"] = (
            ", ".join(step for step in self.recipe.values if step in self.now) or "nothing, all was done"
        )
        return told


def _any_scores() -> ScoreTable:
    """Return scores of two samples with a value in every column, to try a rule on."""
    table, two = ScoreTable(), np.array([0.25, 0.75])
    table.record(range(2), epoch=0, step=0, kept=two > 0, **dict.fromkeys(_VALUES, two))
    return table


def _is_there(recipe: Recipe, step: str) -> bool:
    """Return whether what a step wrote is where it was."""
    path = recipe.output(step)
    if path is None:
        return True
    if step in TRAININGS:
        return any(path.glob("*.safetensors"))
    if step == "score":
        return any(path.glob("*.parquet"))
    return (path / "report.html" if step == "report" else path).is_file()


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]
