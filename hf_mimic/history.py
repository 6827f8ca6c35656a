"""`ScoreHistory`: a few numbers per sample, found by sample id, on the device of the ids.

Two sorted parts: a big one with every id once, and a small one with the latest writes. Read `lookup`, `write`, `_merge`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_mimic.checks import check_choice

_SMALL = 4096  # rows; sorting so few costs next to nothing


class ScoreHistory:
    """Keep some float32 numbers for every sample id: int64, of any value (row numbers, hashes), in any order.

    There is no loop over samples and no dict. A write only adds rows to the small part. When that has outgrown the
    square root of (rows of the big part x rows of a write), it is merged, so that both parts cost about the same per
    write; only there does the host wait for the device. The table lives where the ids of the last write were.

    Args:
        names: Of the numbers, such as ("history", "delta").
    """

    def __init__(self, names: Sequence[str]) -> None:
        if not names or len(set(names)) < len(names) or "ids" in names:
            raise ValueError(f'`names` must be different names, none of them "ids", got {list(names)}.')
        self.names = tuple(names)
        self._ids, self._rows = self._empty()  # (N,) sorted, every id once; (N, len(names))
        self._new_ids, self._new_rows = self._empty()  # (M,) sorted, of an id the latest last; (M, len(names))

    def lookup(self, ids: Tensor) -> dict[str, Tensor]:
        """Return every number of some samples, on the device of `ids`: (B,) each; NaN where nothing was written.

        Args:
            ids: Sample ids (B,).

        Raises:
            TypeError: If the ids are not integers.
        """
        ids = _checked(ids)
        if not len(self._ids) + len(self._new_ids):
            self._move(ids.device)
        wanted = ids.to(self._ids.device)
        rows = self._rows.new_full((len(wanted), len(self.names)), torch.nan)  # (B, len(names))
        for known, values in ((self._ids, self._rows), (self._new_ids, self._new_rows)):  # the newer part wins
            if len(known):
                place, found = _find(known, wanted)
                rows = torch.where(found[:, None], values[place], rows)
        return dict(zip(self.names, rows.to(ids.device).unbind(1), strict=True))

    def write(self, ids: Tensor, **values: Tensor) -> None:
        """Set numbers of some samples; those not given stay as they are. Of a repeated id the last row wins.

        Args:
            ids: Sample ids (B,), known ones and new ones.
            **values: Name to numbers (B,); stored as float32, without graph.

        Raises:
            TypeError: If the ids are not integers.
            ValueError: If a name is not known, or there are not as many numbers as ids.
        """
        ids = _checked(ids)
        self._move(ids.device)
        for name, value in values.items():
            check_choice("name", name, self.names)
            if value.shape != ids.shape:
                raise ValueError(
                    f"`{name}` must have one number per id, got shape {tuple(value.shape)} for {len(ids)} ids."
                )
        values = values if len(values) == len(self.names) else {**self.lookup(ids), **values}
        rows = torch.stack([values[name].detach().to(self._rows) for name in self.names], 1)
        new_ids, order = torch.cat([self._new_ids, ids]).sort(stable=True)
        self._new_ids, self._new_rows = new_ids, torch.cat([self._new_rows, rows])[order]
        if len(new_ids) > max(_SMALL, math.isqrt(len(self._ids) * len(ids))):
            self._merge()

    def __len__(self) -> int:
        self._merge()
        return len(self._ids)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the ids (N,), sorted, as "ids", and of each number (N,) by its name."""
        self._merge()
        numbers = zip(self.names, self._rows.unbind(1), strict=True)
        return {"ids": self._ids.clone(), **{name: number.clone() for name, number in numbers}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the place of whatever was there.

        Raises:
            ValueError: If the state has other names.
        """
        if set(state) != {"ids", *self.names}:
            raise ValueError(f"the state must have ids, {', '.join(self.names)}, got {', '.join(state)}.")
        self._ids, self._rows = self._empty()
        self._new_ids, self._new_rows = self._empty()
        self.write(state["ids"], **{name: state[name] for name in self.names})
        self._merge()

    def _empty(self) -> tuple[Tensor, Tensor]:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, len(self.names))

    def _move(self, device: torch.device) -> None:
        self._ids, self._rows = self._ids.to(device), self._rows.to(device)
        self._new_ids, self._new_rows = self._new_ids.to(device), self._new_rows.to(device)

    def _merge(self) -> None:
        """Bring the small part into the big one, in O(N) and only where an id is new."""
        if not len(self._new_ids):
            return
        last = torch.ones_like(self._new_ids, dtype=torch.bool)
        last[:-1] = self._new_ids[1:] != self._new_ids[:-1]
        ids, rows = self._new_ids[last], self._new_rows[last]
        place, found = _find(self._ids, ids)
        self._rows[place[found]] = rows[found]
        ids, rows = ids[~found], rows[~found]
        if len(ids):
            # an unknown id comes behind the known ones that are smaller and the unknown ones before it
            spot = torch.searchsorted(self._ids, ids) + torch.arange(len(ids), device=ids.device)
            known = torch.ones(len(self._ids) + len(ids), dtype=torch.bool, device=ids.device)
            known[spot] = False
            self._ids = _interleaved(known, self._ids, ids)
            self._rows = _interleaved(known, self._rows, rows)
        self._new_ids, self._new_rows = self._new_ids[:0], self._new_rows[:0]


def _find(known: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each id (B,) comes last among the sorted known ones, and whether it is there at all."""
    if not len(known):
        return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    place = (torch.searchsorted(known, ids, right=True) - 1).clamp_min(0)
    return place, known[place] == ids


def _interleaved(first: Tensor, these: Tensor, those: Tensor) -> Tensor:
    """Return one tensor with the rows of `these` where `first` (N,) is true and those of `those` elsewhere."""
    merged = these.new_empty((len(first), *these.shape[1:]))
    merged[first], merged[~first] = these, those
    return merged


def _checked(ids: Tensor) -> Tensor:
    if not isinstance(ids, Tensor) or ids.dtype == torch.bool or ids.is_floating_point() or ids.dim() != 1:
        what = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(
            f"sample ids must be an integer tensor (B,), got {what}. Keep other names in a column of text."
        )
    return ids.to(torch.int64)


def finite_last(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return both (B,) with the scores that are not finite first: of a repeated id the last row wins in `write`."""
    order = scores.isfinite().long().argsort(stable=True)
    return ids[order], scores[order]
