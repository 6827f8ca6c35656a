"""The processes that share a piece of work, as `accelerate launch` starts them; alone, all of this does nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class Processes:
    """All processes of a launch: `rank` of `count`, each with a `device`.

    NOTE: they may be far apart: who is done waits up to a week for the others; `accelerate launch` ends all of them when
    one fails.
    """

    def __init__(self) -> None:
        self.rank, self.count = 0, 1
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            # NOTE: without `cpu`, torchrun's processes on a machine without accelerator would not know of each other.
            on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
            on_cpu = on_cpu or not torch.accelerator.is_available()
            state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
            self.rank, self.count, self.device = state.process_index, state.num_processes, state.device

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def once(self, function: Callable[[], Result]) -> Result:
        """Let the first process call the function; return its result, or raise its error, in all."""
        if self.count == 1:
            return function()
        from accelerate.utils import broadcast_object_list

        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = function()
            except Exception as error:
                told[1] = error
        broadcast_object_list(told)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def gather(self, own: list[Any]) -> list[Any]:
        """Return the items of all processes, in the order of their ranks."""
        if self.count == 1:
            return own
        from accelerate.utils import gather_object

        return gather_object(own)

    def wait(self) -> None:
        """Return when all processes are here."""
        self.gather([None])

    def share(self, items: list[Any]) -> list[Any]:
        """Return this process's contiguous share of the items."""
        first, last = (len(items) * rank // self.count for rank in (self.rank, self.rank + 1))
        return items[first:last]
