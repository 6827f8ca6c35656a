"""Padded rows: to give every process batches of one size, samples are repeated at the end of an epoch.

Read `EpochEnd`: it finds the repeated rows, so that they get no weight and no row in the score table. `EvenBatches` repeats
them where accelerate cannot: for a sampler whose batches change their size from epoch to epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard
from torch import Tensor
from torch.utils.data import IterableDataset


class EpochEnd:
    """Knows when the micro-batch under way is the last of its epoch, and which of its rows are repeated.

    The last batches of all processes, put after each other, begin with the samples that were left over and end with
    repeated ones. How many were left over is known from the sampler's length, or from the loader that hands out all
    batches (`dispatch_batches`). Where every process reads the same stream for itself, repeated samples are those of
    the epoch's first batches, found by their ids.

    NOTE: in the epoch in which a run is resumed, the first batches of such a stream are not seen again: there,
    repeated samples count twice.

    Args:
        accelerator: That prepared the loader.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._left_over: int | None = None  # in the last batch of all processes; 0 if it is full
        self._loader: Any = None
        self._even: Any = None
        self._ended = True  # before the first pass as after every other
        self._single = False  # whether the pass has one batch only
        self._first_ids: Tensor | None = None

    def prepared(self, loader: Any) -> None:
        """Take note of the training loader, before a resumed run skips a part of it."""
        self._left_over, self._first_ids, self._ended = None, None, True
        batches = loader.batch_sampler
        self._even = getattr(batches, "batch_sampler", batches)
        if isinstance(self._even, EvenBatches) or isinstance(loader.dataset, IterableDataset):
            return
        if not getattr(batches, "batch_size", None):
            return
        if getattr(batches, "num_processes", self.accelerator.num_processes) != self.accelerator.num_processes:
            self._left_over = 0  # batches that the Trainer balances over processes itself
            return
        try:
            rows = len(getattr(batches, "batch_sampler", batches).sampler)
        except TypeError:  # a sampler without a length
            return
        self._left_over = 0 if loader._drop_last else rows % _batch_size(loader, self.accelerator)

    def fetched(self, batches: list, ids: Tensor | None) -> None:
        """Take note of where the loader stands after the batches of one optimizer step were taken from it.

        Args:
            batches: Of this process.
            ids: Sample ids of the first one, if there are any.
        """
        if not batches:  # the Trainer asks a stream that has ended again
            return
        active = self.accelerator.gradient_state.active_dataloader
        if active is not None:
            self._loader = active
        begins, self._ended = self._ended, active is None or active.end_of_dataloader
        if begins:
            self._first_ids = ids
        self._single = begins and self._ended and len(batches) == 1

    def kept(self, size: int, ids: Tensor | None, *, last: bool) -> Tensor | None:
        """Return which rows of a micro-batch are no repetition (b,), or None if all.

        Args:
            size: b.
            ids: Sample ids (b,), if there are any.
            last: Whether the micro-batch is the last of those fetched.
        """
        if self.accelerator.num_processes == 1 or self._loader is None:
            return None
        left_over = self._even.left_over if isinstance(self._even, EvenBatches) else self._left_over
        if not (last and self._ended) or left_over == 0:
            return None
        if left_over is None and ids is not None and isinstance(self._loader.dataset, IterableDatasetShard):
            return self._by_id(ids)
        if left_over is None:  # a dispatching loader counts what it read
            left_over = self._loader.remainder
            if left_over <= 0:
                return None
        return self._position(size) < left_over

    def counted_in_evaluation(self, size: int) -> Tensor | None:
        """Return which rows of a batch of another loader are no repetition (b,), or None if all; b on every process."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return None
        return self._position(size) < state.remainder

    def _position(self, size: int) -> Tensor:
        """Return where the rows of this process stand among those of all (b,)."""
        accelerator = self.accelerator
        return accelerator.process_index * size + torch.arange(size, device=accelerator.device)

    def _by_id(self, ids: Tensor) -> Tensor:
        size, gathered = len(ids), self.accelerator.gather(ids)
        known = gathered[:0]
        if self._first_ids is not None and not self._single:
            known = self.accelerator.gather(self._first_ids.to(ids))
        start = self.accelerator.process_index * size
        return torch.stack(
            [~torch.isin(gathered[i], torch.cat([known, gathered[:i]])) for i in range(start, start + size)]
        )


def _batch_size(loader: Any, accelerator: Accelerator) -> int:
    """Return the batch size over all processes."""
    sampler = loader.batch_sampler
    if accelerator.split_batches:
        return sampler.batch_size
    return sampler.batch_size * accelerator.num_processes


class EvenBatches:
    """The batches of a sampler for one of P processes: as many for each, P at a time of one size.

    The last ones, of which there are too few or one is smaller, are put together and shared out again; their last rows
    repeat the first ones of the epoch.

    Args:
        batch_sampler: The same on every process; the batches of an epoch have one size, but for the last.
        processes: P.
        rank: Of this process.
    """

    def __init__(self, batch_sampler: Any, processes: int, rank: int) -> None:
        self.batch_sampler, self.processes, self.rank = batch_sampler, processes, rank
        self.drop_last, self.batch_size = batch_sampler.drop_last, None
        self.left_over = 0  # rows of the last batches of all processes that are no repetition; 0 if all are

    def __len__(self) -> int:
        full, rest = divmod(len(self.batch_sampler), self.processes)
        return full + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        self.left_over = 0
        first: list[int] = []
        batches = iter(self.batch_sampler)
        while turn := list(itertools.islice(batches, self.processes)):
            rows = [index for batch in turn for index in batch]
            first = first or rows
            if len(turn) == self.processes and len({len(batch) for batch in turn}) == 1:
                yield turn[self.rank]
            elif not self.drop_last:
                size = -(-len(rows) // self.processes)
                self.left_over = len(rows) % (size * self.processes)
                padded = itertools.chain(rows, itertools.cycle(first))
                yield list(itertools.islice(padded, self.rank * size, (self.rank + 1) * size))
