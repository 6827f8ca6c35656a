"""A micro-batch on its way through a step: what the model takes, the ids, and which rows count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_mimic.losses import COUNTED


@dataclass(frozen=True)
class MicroBatch:
    """B samples of one process.

    Args:
        inputs: What the model takes, and labels.
        ids: Sample ids (B,), if there are any.
        counted: Booleans (B,), false for a row that accelerate repeated to fill a batch; None if all rows count.
        columns: What is known of the samples already, (B,) each, by name of the score table.
    """

    inputs: Mapping[str, Any]
    ids: Tensor | None = None
    counted: Tensor | None = None
    columns: Mapping[str, Tensor] | None = None

    def __len__(self) -> int:
        return batch_size(self.inputs)

    @property
    def everything(self) -> Tensor:
        """`counted` (B,), also where all rows count."""
        if self.counted is not None:
            return self.counted
        device = next(x.device for x in self.inputs.values() if isinstance(x, Tensor))
        return torch.ones(len(self), dtype=torch.bool, device=device)

    def rows(self, which: Tensor) -> MicroBatch:
        """Return some of the rows.

        Args:
            which: Positions (b,), or booleans (B,).
        """
        ids, counted = (None if x is None else x[which] for x in (self.ids, self.counted))
        columns = None if self.columns is None else {name: x[which] for name, x in self.columns.items()}
        return MicroBatch(rows_of(self.inputs, which, len(self)), ids, counted, columns)

    def telling(self) -> MicroBatch:
        """Return it with `COUNTED` among the inputs, for a loss that looks at the rows of all processes."""
        return MicroBatch({**self.inputs, COUNTED: self.everything}, self.ids, self.counted, self.columns)


def batch_size(inputs: Mapping[str, Any]) -> int:
    """Return B, from the first tensor."""
    return len(next(x for x in inputs.values() if isinstance(x, Tensor) and x.dim()))


def rows_of(inputs: Mapping[str, Any], which: Tensor, size: int) -> dict[str, Any]:
    """Return the rows `which` (positions or booleans) of every tensor that has `size` of them."""
    return {k: v[which] if isinstance(v, Tensor) and v.shape[:1] == (size,) else v for k, v in inputs.items()}


def joined(parts: Iterable[Tensor | None]) -> Tensor | None:
    """Return the concatenation, None if one of them is."""
    found = list(parts)
    return None if any(x is None for x in found) else torch.cat(found)  # type: ignore[arg-type]


class MappedLoader:
    """A loader whose batches go through a function; it has its length for a progress bar."""

    def __init__(self, loader: Any, function: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.loader, self.function = loader, function

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.function, self.loader)

    def __len__(self) -> int:
        return len(self.loader)
