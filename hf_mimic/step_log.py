"""What the log says about scores: sums over the steps since the last log, means over all processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_mimic.weights import StepSums


class StepLog:
    """Collects on the device, without waiting for it, and adds up over processes only when the log is written.

    Args:
        scored: Whether there is a reference; without one nothing is said of scores.
    """

    def __init__(self, *, scored: bool = True) -> None:
        self.scored = scored
        self._sums: Tensor | None = None
        self._steps = 0

    def add(self, groups: list[tuple[StepSums, float]], norm: Tensor, nonfinite: Tensor) -> None:
        """Take in one optimizer step.

        Args:
            groups: The sums of each group of weights, and its share of the loss.
            norm: ||v||, 0-d.
            nonfinite: How many samples of this process were left out, 0-d.
        """
        rows = []
        for sums, share in groups:
            count = sums.count.clamp_min(1)
            size = torch.where(sums.count > 0, sums.effective_sample_size / count, 0)
            spread = (sums.score_square / count - (sums.score / count).square()).clamp_min(0).sqrt()
            rows.append([sums.count, sums.loss, sums.score, sums.negative, share * spread, share * size])
        row = torch.stack([torch.stack(column) for column in zip(*rows, strict=True)]).sum(1)
        row = torch.cat([row, torch.stack([norm.to(row), nonfinite.to(row)])])
        self._sums = row if self._sums is None else self._sums + row
        self._steps += 1

    def pop(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means since the last call, empty if there was no step.

        Args:
            gather: (k,) -> (P, k).
        """
        if self._sums is None:
            return {}
        rows = gather(self._sums)
        count, loss, score, negative, spread, size, norm, nonfinite = rows.sum(0).tolist()
        steps, self._sums, self._steps = self._steps * len(rows), None, 0
        values = {"effective_sample_size": size / steps, "direction_norm": norm / steps}
        if count:
            values |= {
                "plain_loss": loss / count,
                "mimic_score_mean": score / count,
                "mimic_score_std": spread / steps,
                "negative_share": negative / count,
            }
        if nonfinite:
            values["nonfinite_samples"] = nonfinite
        return values if self.scored else {name: v for name, v in values.items() if name not in _OF_SCORES}


_OF_SCORES = ("direction_norm", "mimic_score_mean", "mimic_score_std", "negative_share")
