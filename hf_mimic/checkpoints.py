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
TRAINER_STATE_NAME = "trainer_state.json"


def write_state(folder: str | Path, state: Mapping[str, Any]) -> None:
    """Write `mimic_state.json`, as the last file of a checkpoint: its presence says that the others are whole."""
    text = json.dumps(state, indent=2)
    write_atomically(Path(folder) / STATE_NAME, lambda file: file.write(text.encode()))


def read_state(folder: str | Path) -> dict[str, Any]:
    """Return what `write_state` wrote; empty, with a warning, for a checkpoint that a plain `Trainer` made.

    Raises:
        ValueError: If the checkpoint was not written to its end.
    """
    if not _is_readable(Path(folder) / TRAINER_STATE_NAME):
        raise ValueError(
            f"a checkpoint must hold a readable {TRAINER_STATE_NAME}, {folder} does not: the process that wrote it was "
            "stopped in the middle. Resume from an earlier one, or from the last complete one: "
            "resume_from_checkpoint=True."
        )
    path = Path(folder) / STATE_NAME
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    warnings.warn(
        f"{folder} has no {STATE_NAME}: a plain Trainer made it, or its writing was interrupted at the very end. "
        "Weights, optimizer and order are resumed; the running temperature starts anew, and visits before it may "
        "be missing from the score table.",
        stacklevel=2,
    )
    return {}


def last_complete(output_dir: str | Path) -> str | None:
    """Return the newest checkpoint that was written to its end, None if there is none; warn of those passed over."""
    found = [(int(m[1]), path) for path in Path(output_dir).glob("checkpoint-*") if (m := _number(path))]
    newest_first = [path for _, path in sorted(found, reverse=True)]
    readable = [path for path in newest_first if _is_readable(path / TRAINER_STATE_NAME)]
    marked = [path for path in readable if (path / STATE_NAME).is_file()]
    chosen = next(iter(marked or readable), None)
    torn = [path.name for path in newest_first[: newest_first.index(chosen) if chosen else None]]
    if torn:
        warnings.warn(
            f"{', '.join(torn)} in {output_dir} were not written to their end and are passed over; "
            f"resuming from {chosen.name if chosen else 'nothing'}.",
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


def _is_readable(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False
