"""The compute ledger: what a run did, so that no speed-up is quoted without its cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

COUNTS = ("samples_decoded", "samples_scored", "samples_forward", "samples_backward", "samples_reference")


class Ledger:
    """Counts of this process: samples decoded, scored without gradient, run forward and backward, and by the reference.

    A backward pass is worth two forward passes, so the cost of a run in units of plain training steps on one sample is

        compute = (samples_scored + samples_reference + samples_forward + 2 samples_backward) / 3.
    """

    def __init__(self) -> None:
        self.counts = dict.fromkeys(COUNTS, 0)

    def add(self, **counts: int) -> None:
        """Add to some of `COUNTS`."""
        for name, count in counts.items():
            self.counts[name] += count

    def state(self) -> dict[str, int]:
        """Return what a checkpoint must hold: the counts of this process."""
        return dict(self.counts)

    def resume(self, state: Mapping[str, int]) -> None:
        """Go on from a checkpoint."""
        self.counts = {name: int(state.get(name, 0)) for name in COUNTS}

    def report(self, gather: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Return the counts over all processes, and `compute`.

        Args:
            gather: (k,) -> (P, k).
            device: Of the tensor to gather.
        """
        mine = torch.tensor(list(self.counts.values()), dtype=torch.float64, device=device)
        total = dict(zip(COUNTS, gather(mine).sum(0).tolist(), strict=True))
        passes = total["samples_scored"] + total["samples_reference"] + total["samples_forward"]
        return {**total, "compute": (passes + 2 * total["samples_backward"]) / 3}
