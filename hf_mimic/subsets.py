"""Strategies that choose once an epoch, before anything is loaded: what is kept of N samples, and batches of it.

Read `KEEPERS` at the end, each against its paper; `SubsetBatchSampler` makes batches of what they keep.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from hf_mimic.dissect import tie_keys, top
from hf_mimic.history import ScoreHistory, finite_last


@dataclass(frozen=True)
class EpochSignals:
    """What is known of N samples when an epoch begins.

    `losses` (N,) of the last visit, NaN where there was none; `reference` (N,), higher is better, what the reference says;
    `keys` (N,), a seeded hash of id and epoch.
    """

    epoch: int
    losses: Tensor
    reference: Tensor
    keys: Tensor


Kept = tuple[Tensor, Tensor | None]  # booleans (N,), and 1 / P(kept) (N,)


def random(signals: EpochSignals, *, rate: float, epochs: float) -> Kept:
    """Keep a random share, another one each epoch."""
    return _largest(torch.zeros_like(signals.losses), signals, rate), None


def coreset(signals: EpochSignals, *, rate: float, epochs: float) -> Kept:
    """Keep the best share by the reference's loss or CLIPScore, the same one in every epoch: an oracle's coreset.

    References:
        The rows "coreset, CLIPScore / CLIPLoss" of DISSect, arXiv 2507.12998.
    """
    return _largest(signals.reference, signals, rate), None


def scan(signals: EpochSignals, *, rate: float, epochs: float) -> Kept:
    """Drop some of what was easiest and of what was hardest in the last epoch, ever more until all returns.

    Half of the candidates have the smallest losses (redundant), half the largest (ill-matched). The share of them that is
    dropped, at random, follows a cosine from none to all within 4 epochs, and starts again. `rate` is the mean share
    kept over these 4 epochs; it cannot be less than .55, when a tenth is kept in the last of them.

    References:
        SCAN, arXiv 2411.09126.
    """
    phase = signals.epoch % (_SCAN_EPOCHS + 1)
    pruned = 0.5 * (1 + math.cos((_SCAN_EPOCHS - phase) / _SCAN_EPOCHS * math.pi))
    known = signals.losses.isfinite()
    half = min(1 - rate, _SCAN_MOST / 2) * known.sum()  # half of the candidates, of which half is dropped in the mean
    order = torch.where(known, signals.losses, torch.inf).argsort(stable=True)[: int(known.sum())]
    ends = torch.cat([order[: int(half)], order[len(order) - int(half) :]])
    dropped = ends[top(torch.zeros(len(ends)), signals.keys[ends], round(pruned * len(ends)))] if len(ends) else ends
    kept = torch.ones_like(known)
    kept[dropped] = False
    return kept, None


def info_batch(signals: EpochSignals, *, rate: float, epochs: float) -> Kept:
    """Drop some of what has less than the mean loss at random; who stays counts for those who went.

    The chance to go is what leaves the share `rate`, at most 3/4: beyond that the bound rises above the mean. A sample that
    has no loss yet stays; the last eighth of the epochs is on everything.

    References:
        InfoBatch, arXiv 2303.04947.
    """
    known, size = signals.losses.isfinite(), len(signals.losses)
    everything = torch.ones_like(known)
    if not known.any() or signals.epoch >= epochs * (1 - _INFO_BATCH_ANNEALED):
        return everything, None
    wanted = round((1 - rate) * size)
    bound = signals.losses[known].mean()
    least = min(1.0, wanted / _INFO_BATCH_MOST / int(known.sum()))
    bound = torch.maximum(bound, signals.losses[known].sort().values[max(int(least * int(known.sum())) - 1, 0)])
    below = (known & (signals.losses <= bound)).nonzero().flatten()
    gone = below[top(torch.zeros(len(below)), signals.keys[below], min(wanted, len(below)))]
    kept = everything.clone()
    kept[gone] = False
    importance = torch.ones(size)
    importance[below] = len(below) / max(len(below) - len(gone), 1)
    return kept, importance


_SCAN_EPOCHS, _SCAN_MOST = 3, 0.9
LEAST_SCAN_RATE = 0.55  # 1 - _SCAN_MOST / 2
_INFO_BATCH_ANNEALED, _INFO_BATCH_MOST = 0.125, 0.75

KEEPERS: dict[str, Callable[..., Kept]] = {
    "random": random,
    "scan": scan,
    "info_batch": info_batch,
    "ref_clip_score": coreset,
    "ref_clip_loss": coreset,
}


def _largest(values: Tensor, signals: EpochSignals, rate: float) -> Tensor:
    """Return the share `rate` with the largest values (N,); ties are settled at random."""
    kept = torch.zeros_like(signals.losses, dtype=torch.bool)
    kept[top(values, signals.keys, max(1, round(rate * len(values))))] = True
    return kept


class SubsetBatchSampler(Sampler[list[int]]):
    """Batches of the share of a data set that is kept in an epoch, as many as all of it would make.

    With N samples and batches of B there are N / B batches in every epoch. Where n < N samples are kept, each has n B / N
    of them, rounded down: up to one per batch is left out, at random.

    Args:
        sampler: Yields the indices 0 .. N - 1 in the order of the epoch; the same on every process.
        batch_size: B.
        keeper: One of `KEEPERS`, with `rate` (the share to keep) and `epochs` (of the run) given.
        sample_ids: Ids (N,) of the indices.
        seed: Of what is random.
        drop_last: Whether to leave out a last, smaller batch.
    """

    signal = "loss"  # what `update` wants

    def __init__(
        self,
        sampler: Iterable[int],
        batch_size: int,
        *,
        keeper: Callable[[EpochSignals], Kept],
        sample_ids: Tensor,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.sampler, self.candidate_batch_size, self.keeper = sampler, batch_size, keeper
        self.sample_ids, self.seed, self.drop_last, self.epoch = sample_ids, seed, drop_last, 0
        self.history = ScoreHistory(("loss",))
        self.reference = torch.full((len(sample_ids),), torch.nan)
        self._kept, self._frozen_epoch = torch.ones(len(sample_ids), dtype=torch.bool), -1
        self._importance = ScoreHistory(("importance",))

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes or is under way, from 0; the sampler is told too."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        full, rest = divmod(len(self.sample_ids), self.candidate_batch_size)
        return full + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        if self._frozen_epoch != self.epoch:
            self._freeze()
        kept = [index for index in self.sampler if self._kept[index]]
        size = max(1, len(kept) * self.candidate_batch_size // len(self.sample_ids))
        return itertools.islice(_chunks(kept, size), len(self))

    def importance(self, ids: Tensor) -> Tensor | None:
        """Return 1 / P(kept) of samples (B,) in this epoch; None if all count alike."""
        if not len(self._importance):
            return None
        return self._importance.lookup(ids)["importance"].nan_to_num(1.0)

    def update(self, ids: Tensor, losses: Tensor) -> None:
        """Take note of the losses (B,) of a batch; on several processes of those of all processes."""
        ids, losses = finite_last(ids, losses)
        old = self.history.lookup(ids)["loss"]
        self.history.write(ids, loss=torch.where(losses.isfinite(), losses.float(), old))

    def _freeze(self) -> None:
        keys = tie_keys(self.sample_ids, seed=self.seed, epoch=self.epoch)
        losses = self.history.lookup(self.sample_ids)["loss"]
        signals = EpochSignals(self.epoch, losses, self.reference, keys)
        self._kept, importance = self.keeper(signals)
        self._frozen_epoch, self._importance = self.epoch, ScoreHistory(("importance",))
        if importance is not None:
            self._importance.write(self.sample_ids, importance=importance)

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on anywhere in an epoch."""
        importance = self._importance.state_dict()
        frozen = {"kept": self._kept.clone(), "frozen_epoch": self._frozen_epoch, "importance": importance}
        return {"losses": self.history.state_dict(), **frozen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; then say the epoch by `set_epoch`."""
        self.history.load_state_dict(state["losses"])
        self._importance.load_state_dict(state["importance"])
        self._kept, self._frozen_epoch = state["kept"].clone(), state["frozen_epoch"]


def _chunks(indices: list[int], size: int) -> Iterator[list[int]]:
    return (indices[first : first + size] for first in range(0, len(indices), size))
