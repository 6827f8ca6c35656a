"""What a checkpoint must hold for a resumed run to go on as if nothing had happened, and how it is read back.

Read `last_complete` (which checkpoint), `read_state` and `write_state` (what it holds), `load_weights`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_mimic.files import write_atomically
from hf_mimic.reference import read_tensors

STATE_NAME = "mimic_state.json"
RUN_NAME = "mimic_run.json"
TRAINER_STATE_NAME = "trainer_state.json"
_KEYS = {"run", "step", "epoch", "pass", "batches_in_pass", "split", "phases"}


def write_state(folder: str | Path, state: Mapping[str, Any]) -> None:
    """Write `mimic_state.json`, as the last file of a checkpoint: its presence says that the others are whole."""
    _write(Path(folder) / STATE_NAME, state)


def unmark(folder: str | Path) -> None:
    """Take away what says that a checkpoint is whole, before it is written again."""
    for name in (STATE_NAME, TRAINER_STATE_NAME):
        (Path(folder) / name).unlink(missing_ok=True)


def write_run(output_dir: str | Path, run: str, superseded: list[str]) -> None:
    """Note which run the folder belongs to now, and which of its checkpoints are of a future that it left.

    Checkpoints of an earlier run may lie beside its own; a run that is resumed from an earlier checkpoint supersedes
    the later ones until it writes them anew.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    _write(Path(output_dir) / RUN_NAME, {"run": run, "superseded": superseded})


def last_run(output_dir: str | Path) -> str | None:
    """Return the name of the run that a folder belongs to, None if no training was begun in it."""
    return (_load(Path(output_dir) / RUN_NAME) or {}).get("run")


def later_than(output_dir: str | Path, step: int) -> list[str]:
    """Return the names of the checkpoints after a step."""
    return [path.name for path in Path(output_dir).glob("checkpoint-*") if (m := _number(path)) and int(m[1]) > step]


def renew(folder: Path) -> None:
    """Note that a checkpoint was written anew."""
    note = _load(folder.parent / RUN_NAME) or {}
    if folder.name in note.get("superseded", []):
        _write(folder.parent / RUN_NAME, {**note, "superseded": [n for n in note["superseded"] if n != folder.name]})


def read_state(folder: str | Path) -> dict[str, Any]:
    """Return what `write_state` wrote; empty, with a warning, for a checkpoint that a plain `Trainer` made.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the checkpoint was not written to its end.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"`resume_from_checkpoint` must be the folder of a checkpoint, {folder} does not exist. "
            "True takes the last one in output_dir."
        )
    if _load(Path(folder) / TRAINER_STATE_NAME) is None:
        raise ValueError(
            f"a checkpoint must hold a readable {TRAINER_STATE_NAME}, {folder} does not: the process that wrote it was "
            "stopped in the middle. Resume from an earlier one, or from the last complete one: "
            "resume_from_checkpoint=True."
        )
    if not list(Path(folder).glob("optimizer*")):
        warnings.warn(f"{folder} has no optimizer state (save_only_model?): the optimizer starts anew.", stacklevel=2)
    state = _marker(Path(folder))
    if state:
        return state
    warnings.warn(
        f"{folder} has no {STATE_NAME} that can be read: a plain Trainer made it, or its writing was interrupted at the "
        "very end. Weights, optimizer and order are resumed; the running temperature starts anew, and visits before it "
        "may be missing from the score table.",
        stacklevel=2,
    )
    return {}


def last_complete(output_dir: str | Path) -> str | None:
    """Return the newest checkpoint of the folder's last run that was written to its end, None if there is none.

    It warns of those passed over: torn ones, and those of an earlier run.
    """
    found = [(int(m[1]), path) for path in Path(output_dir).glob("checkpoint-*") if (m := _number(path))]
    newest_first = [path for _, path in sorted(found, reverse=True)]
    note = _load(Path(output_dir) / RUN_NAME) or {}
    run, superseded = note.get("run"), note.get("superseded", [])
    readable = [path for path in newest_first if _load(path / TRAINER_STATE_NAME) is not None]
    states = {path: _marker(path) for path in readable}
    earlier = [p for p in readable if run and states[p] and (states[p]["run"] != run or p.name in superseded)]
    own = [path for path in readable if path not in earlier]
    chosen = next((path for path in own if states[path]), next(iter(own), None))
    passed = newest_first[: newest_first.index(chosen) if chosen else None]
    if passed:
        torn = [path.name for path in passed if path not in earlier]
        reasons = [f"{', '.join(torn)} were not written to their end"] if torn else []
        old = [path.name for path in passed if path in earlier]
        reasons += [f"{', '.join(old)} are of an earlier run"] if old else []
        warnings.warn(
            f"in {output_dir}, {' and '.join(reasons)}; resuming from {chosen.name if chosen else 'nothing'}.",
            stacklevel=3,
        )
    return None if chosen is None else str(chosen)


def loads_by_name(model: Any, folder: str | Path) -> bool:
    """Return whether `load_weights` is for this model and checkpoint: no adapter, no shards of FSDP or DeepSpeed."""
    names = ("model.safetensors", "model.safetensors.index.json")
    return isinstance(model, PreTrainedModel) and any((Path(folder) / name).is_file() for name in names)


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load every parameter and buffer of a checkpoint, under whatever names transformers saved them.

    NOTE: `Trainer` itself loads with strict=False and the model's present names. Checkpoints have the names of older
    releases, so most tensors of a ViT would silently keep the values they had (transformers issues 43701, 48805).

    Raises:
        ValueError: If a tensor is missing or has another shape.
    """
    own = model.state_dict(keep_vars=True)
    tensors = read_tensors(folder, model, list(own))
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _number(path: Path) -> re.Match | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name) if path.is_dir() else None


def _marker(folder: Path) -> dict[str, Any]:
    """Return what `write_state` wrote, empty if there is nothing whole."""
    state = _load(folder / STATE_NAME) or {}
    return state if set(state) >= _KEYS else {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2)
    write_atomically(path, lambda file: file.write(text.encode()))


def _load(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, None if there is none or it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
