"""One optimizer step: the weights of its micro-batches, and the visits that wait for their final weights.

`OptimizerStep.add` weighs a micro-batch, `visits` and `groups` tell what the step was once its last one was added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_mimic.weights import Gather, OnlineSoftmax, StepSums, Weighed


@dataclass(frozen=True)
class Visit:
    """The samples of one micro-batch; `kept` (B,) marks those that are no repetition, `valid` (B,) the scored ones.

    `samples` and `ref_losses` have one value per scored sample (b,), without graph; `more` are further columns (B,).
    `unscored` is for runs without a reference: no mimic score is written.
    """

    epoch: int
    ids: Tensor | None
    kept: Tensor
    valid: Tensor
    samples: Weighed
    ref_losses: Tensor | None = None
    more: Mapping[str, Tensor] = field(default_factory=dict)
    unscored: bool = False

    def values(self, softmax: OnlineSoftmax) -> dict[str, Tensor]:
        """Return the columns of the score table for the kept samples; not a number where a value is not known."""
        count = softmax.sums.count
        # A sample alone in its group has no one to compare with: its weight says nothing.
        samples = self.samples
        relative = torch.where(count > 1, softmax.normalise(samples.logits) * count, torch.nan)
        columns = {"loss": samples.losses, "mimic_score": samples.scores, "relative_weight": relative}
        reference = {"ref_loss": self.ref_losses, "ref_trust": samples.trust}
        columns |= {name: value for name, value in reference.items() if value is not None}
        filled = {}
        for name, value in columns.items():
            missing = 0.0 if name == "relative_weight" else torch.nan  # a sample that was left out weighed nothing
            column = value.new_full(self.valid.shape, missing, dtype=torch.float32)
            column[self.valid] = value.float()
            filled[name] = column[self.kept]
        if self.unscored:
            del filled["mimic_score"]
        return filled | {name: column[self.kept] for name, column in self.more.items()}


class OptimizerStep:
    """Weighs the micro-batches of one optimizer step.

    Args:
        scope: "global": one softmax over all micro-batches and processes; "device": one per micro-batch, averaged.
        processes: Over which gradients are averaged.
        weighted: False for equal weights (the mean of each group).
    """

    def __init__(self, scope: str, processes: int, *, weighted: bool = True) -> None:
        self.scope, self.weighted = scope, weighted
        self._softmax = OnlineSoftmax(processes)
        self._visits: list[tuple[Visit, OnlineSoftmax]] = []
        self._expected = 0  # micro-batches

    def add(self, visit: Visit, *, left: int, gather: Gather | None) -> tuple[Tensor, Tensor | float | None]:
        """Return the weights (b,) of a micro-batch, and the factor for the gradient accumulated before it, if any.

        Args:
            visit: The micro-batch.
            left: How many micro-batches of the step are left, this one included, as far as is known: a stream that
                ends in the middle of a step goes on with a whole step's worth.
            gather: See `OnlineSoftmax.add`.
        """
        samples = visit.samples
        samples = samples if self.weighted else replace(samples, logits=torch.zeros_like(samples.logits))
        factor: Tensor | float | None
        if self.scope == "global":
            weights, factor = self._softmax.add(samples, gather=gather)
            self._visits.append((visit, self._softmax))
            return weights, factor
        softmax, before, self._expected = OnlineSoftmax(), self._expected, len(self._visits) + left
        weights, _ = softmax.add(samples, gather=alone)
        self._visits.append((visit, softmax))
        return weights / self._expected, before / self._expected if before not in (0, self._expected) else None

    def visits(self) -> Iterator[tuple[int, Tensor | None, dict[str, Tensor]]]:
        """Yield the epoch, ids and columns of every micro-batch of this process."""
        for visit, softmax in self._visits:
            yield visit.epoch, (None if visit.ids is None else visit.ids[visit.kept]), visit.values(softmax)

    def groups(self) -> list[tuple[StepSums, float]]:
        """Return the sums of every group of weights that this process knows, and the group's share of the loss."""
        if self.scope == "global":
            return [(self._softmax.sums, 1.0)]
        return [(softmax.sums, 1 / self._expected) for _, softmax in self._visits]


def alone(row: Tensor) -> Tensor:
    """Gather from one process: (k,) -> (1, k)."""
    return row[None]
