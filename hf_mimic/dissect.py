"""DISSect's rule, without a model: of a batch, train on the samples whose score has fallen most.

Read `DISSect`; `samplers.py` says when it is asked, and for which scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_mimic.checks import check_choice
from hf_mimic.history import ScoreHistory, finite_last


def tie_keys(ids: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Return a random-looking number per sample (B,), int64: the same on every process and device, in every order.

    Args:
        ids: Sample ids (B,).
        seed: Other seeds give other numbers.
        epoch: So do other epochs.

    References:
        The mixing is that of splitmix64: Steele, Lea and Flood, OOPSLA 2014.
    """
    start = _mixed(torch.tensor(_signed(seed * 0x9E3779B97F4A7C15)))
    return _mixed(ids.to(torch.int64) + _mixed(start + epoch))


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)  # int64 wraps around, which is what is wanted
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Return x >> bits with zeros from the left: torch's own repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """Return the int64 with the same last 64 bits."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def keep_count(size: int, rate: float, least: int = 1) -> int:
    """Return how many of `size` samples a share of `rate` is: rounded down as in the official code, `least` at least."""
    return min(size, max(least, math.floor(size * rate + 1e-9)))  # 100 * 0.29 is 28.999999999999996


def top(scores: Tensor, keys: Tensor, count: int) -> Tensor:
    """Return the positions of the largest scores, in ascending order: (count,), or all if there are fewer.

    Args:
        scores: (B,); NaN counts as lower than any number.
        keys: Among equal scores the smallest of these (B,) come first.
        count: How many.
    """
    order = keys.argsort(stable=True)
    order = order[(0.0 - scores[order]).argsort(stable=True)]  # 0 - x: no -0.0; a sort puts NaN last
    return order[:count].sort().values


class DISSect:
    """Keep the samples of a batch with the largest fall of the score, delta = history - current.

    A pair that fits scores high early and is then forgotten a little; one that does not fit is learned by heart late. Each
    batch is chosen by the old history, then all its samples change the history. What the paper leaves open is decided
    here: a sample without a history gets the median delta of those in its batch that have one, never a comparison with
    0; ties, and so a batch without any history, are settled at random by `seed`, epoch and id.

    Args:
        selection_rate: Share of each batch to keep, in (0, 1].
        variant: "warmup": history is the last score of the warm-up, and stays. "momentum": history is a running mean.
        momentum: beta of history <- beta history + (1 - beta) current.
        warmup_epochs: How long the warm-up lasts.
        warmup_data: What to train on meanwhile: "full" batches, or a random share "selected" (the official code).
        least: How many to keep at least: a pair alone in a contrastive loss has no negative.
        seed: Settles ties.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        DISSect, arXiv 2507.12998.
    """

    def __init__(
        self,
        selection_rate: float = 0.5,
        *,
        variant: str = "warmup",
        momentum: float = 0.9,
        warmup_epochs: int = 1,
        warmup_data: str = "full",
        least: int = 1,
        seed: int = 0,
    ) -> None:
        check_range(
            0 < selection_rate <= 1, "selection_rate", "in (0, 1]", selection_rate, "Use 1.0 to train on every sample."
        )
        check_choice("variant", variant, ("warmup", "momentum"))
        check_range(0 <= momentum < 1, "momentum", "in [0, 1)", momentum, "Use 0.9, as in the paper.")
        first = 1 if variant == "warmup" else 0
        allowed = isinstance(warmup_epochs, int) and warmup_epochs >= first
        hint = 'variant="momentum" needs no warm-up.'
        check_range(
            allowed, "warmup_epochs", f'a whole number >= {first} with variant="{variant}"', warmup_epochs, hint
        )
        check_choice("warmup_data", warmup_data, ("full", "selected"))
        self.selection_rate, self.variant, self.momentum = selection_rate, variant, momentum
        self.warmup_epochs, self.warmup_data, self.seed = warmup_epochs, warmup_data, seed
        self.least = least
        self.epoch = 0
        # By id: the history; the delta of the last visit that had one to compare with; the epoch of the last visit.
        self.history = ScoreHistory(("history", "delta", "epoch"))

    @property
    def warming_up(self) -> bool:
        """Whether this epoch only makes the history."""
        return self.variant == "warmup" and self.epoch < self.warmup_epochs

    def count(self, size: int) -> int:
        """Return how many of `size` candidates are kept."""
        return keep_count(size, self.selection_rate, self.least)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is, from 0."""
        check_range(
            isinstance(epoch, int) and epoch >= 0, "epoch", "a whole number >= 0", epoch, "The first one is 0."
        )
        self.epoch = epoch

    def forget(self) -> None:
        """Begin anew: no sample has a history."""
        self.epoch, self.history = 0, ScoreHistory(self.history.names)

    def choose(self, ids: Tensor, scores: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """Return the positions to train on, ascending (k,); the history stays as it is, `update` comes after.

        Args:
            ids: Sample ids (B,).
            scores: Current scores (B,), CLIPScore for instance; one that is not finite comes last.
            valid: False for rows that only pad the batch (B,): they come after all others.
        """
        ids, scores = _checked(ids, scores)
        delta = self.history.lookup(ids)["history"] - scores
        return self.choose_by(ids, delta.masked_fill(~scores.isfinite(), -torch.inf), valid=valid)

    def choose_by(self, ids: Tensor, deltas: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """Return the positions to train on, ascending (k,), by deltas (B,) that are known already; NaN where not."""
        if self.warming_up and self.warmup_data == "full":
            return torch.arange(len(ids), device=ids.device)
        if self.warming_up:
            deltas = torch.where(deltas.isneginf(), deltas, torch.nan)
        valid = torch.ones_like(deltas, dtype=torch.bool) if valid is None else valid
        known = torch.where(valid & deltas.isfinite(), deltas, torch.nan)
        median = (known.nanmedian() - (-known).nanmedian()) / 2  # torch's is the lower of the two in the middle
        deltas = torch.where(deltas.isnan(), median.nan_to_num(0.0), deltas).masked_fill(~valid, torch.nan)
        keys = tie_keys(ids, seed=self.seed, epoch=self.epoch)
        return top(deltas, keys, self.count(len(ids)))

    def update(self, ids: Tensor, scores: Tensor, *, time: float | None = None) -> None:
        """Take note of the scores of all candidates, chosen or not; on several processes of those of all processes.

        Args:
            ids: Sample ids (B,); of a repeated one the last row with a finite score counts, once.
            scores: Scores (B,); one that is not finite is left out.
            time: When they were measured, in epochs; by default in the epoch under way.
        """
        ids, scores = finite_last(*_checked(ids, scores))
        old = self.history.lookup(ids)
        if self.warming_up:
            history, delta = scores, torch.full_like(scores, torch.nan)
        else:
            blended = self.momentum * old["history"] + (1 - self.momentum) * scores
            moved = blended if self.variant == "momentum" else old["history"]
            history, delta = torch.where(moved.isnan(), scores, moved), old["history"] - scores
        new = {
            "history": history,
            "delta": delta,
            "epoch": torch.full_like(scores, self.epoch if time is None else time),
        }
        self.history.write(ids, **{name: torch.where(scores.isfinite(), new[name], old[name]) for name in new})

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and what is known of every sample."""
        return {"epoch": self.epoch, "scores": self.history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.set_epoch(state["epoch"])
        self.history.load_state_dict(state["scores"])


def check_range(ok: bool, name: str, must: str, value: Any, hint: str) -> None:
    """Raise a `ValueError` that says what must hold, what came and what to do, unless `ok`."""
    if not ok:
        raise ValueError(f"`{name}` must be {must}, got {value!r}. {hint}")


def _checked(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    if ids.shape != scores.shape:
        raise ValueError(
            f"`scores` must have one score per id, got shape {tuple(scores.shape)} for ids of shape {tuple(ids.shape)}."
        )
    return ids, scores.detach().to(ids.device, torch.float32)
