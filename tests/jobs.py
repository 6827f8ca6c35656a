"""What worker.py runs in two processes: every function takes a folder of its own and returns plain tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import splits
import torch


def step_gradients(
    folder: Path, *, family: str, split: str, double: bool = False, plain: bool = False, **options: Any
):
    """Return the gradients of every optimizer step, and the score table's rows."""
    dtype = torch.float64 if double else torch.float32
    trainer = splits.train(family, split, folder, dtype=dtype, plain=plain, **options)
    rows = {} if plain else trainer.scores.to_arrow().to_pydict()
    return {"gradients": splits.steps_of(trainer), "rows": rows, "log": trainer.state.log_history}
