"""`DISSectBatchSampler`: batches of the samples that DISSect keeps, for a DataLoader of any training loop.

Read the class docstring for the two kinds of `refresh`, then `__iter__`; `dissect.py` has the rule.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from hf_mimic.checks import check_choice
from hf_mimic.dissect import DISSect, check_range, tie_keys

ScoreFn = Callable[[Mapping[str, Any]], Tensor]
Gather = Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]


class DISSectBatchSampler(Sampler[list[int]]):
    """Draw candidate batches of B indices from any sampler; train on the k = rate * B of each that DISSect keeps.

    refresh="step", the paper's way: yields candidates. `select` scores the loaded batch and keeps k of it. A step costs
    (1 + 3 rate) / 3 of one on all candidates, a backward pass being worth two forward passes.

    refresh="epoch": chooses before loading, so that what is dropped costs nothing, from each sample's last delta, frozen
    when the epoch begins. Feed `update` with the scores that training gives anyway; `due` and `rescore` score a
    random share of the others. Scores rise while a model trains, so a delta depends on when it was measured; in the
    paper's batches that cancels. Here the mean delta of the epoch of measuring is subtracted:
    r * mean(trained on) + (1 - r) * mean(re-scored), r the share trained on, as the ones that were trained on were
    chosen for their large deltas. Where nothing was re-scored, nothing is subtracted. This is ours, not the paper's.

    NOTE: with refresh="epoch" and a warm-up on full data, batches have B samples at first and k later. `batch_size` is
    then None, which makes accelerate hand out whole batches (the last ones of an epoch may differ in size between
    processes); given a number, it would drop those of another size.

    NOTE: after a pass that ended, the next one is the next epoch, unless `set_epoch` says otherwise. A loader of accelerate
    counts epochs for itself, and tells them only to a sampler that it has not wrapped (as it does on several processes).
    Where the count matters, before `due` and after resuming, call `set_epoch` of both, as `Trainer` does.

    Args:
        sampler: Yields indices, such as a `RandomSampler`; the same ones on every process.
        batch_size: B, the number of candidates.
        refresh: When current scores are taken, "step" or "epoch".
        sample_ids: Ids (N,) of the indices, for refresh="epoch"; by default 0 .. N - 1.
        score_fn: (batch) -> scores (B,), for `select` and `rescore`; called without gradient. Put the model in eval mode
            in it.
        rescore_share: Share of the data set to re-score before an epoch, for refresh="epoch".
        drop_last: Whether to leave out a last, smaller batch of candidates.
        **rule: Arguments of `DISSect`; or `rule`, a `DISSect`.

    Raises:
        ValueError: If an argument is out of its range, or ids are needed and not known.

    References:
        DISSect, arXiv 2507.12998.
    """

    def __init__(
        self,
        sampler: Iterable[int],
        batch_size: int,
        *,
        refresh: str = "step",
        sample_ids: Any = None,
        score_fn: ScoreFn | None = None,
        rescore_share: float = 0.1,
        drop_last: bool = False,
        **rule: Any,
    ) -> None:
        allowed = isinstance(batch_size, int) and batch_size >= 1
        check_range(allowed, "batch_size", "a whole number >= 1", batch_size, "It is the number of candidates.")
        check_choice("refresh", refresh, ("step", "epoch"))
        check_range(0 <= rescore_share <= 1, "rescore_share", "in [0, 1]", rescore_share, "Use 0.1 for a tenth.")
        self.rule: DISSect = rule["rule"] if set(rule) == {"rule"} else DISSect(**rule)
        self.sampler, self.candidate_batch_size, self.drop_last = sampler, batch_size, drop_last
        self.refresh, self.score_fn, self.rescore_share = refresh, score_fn, rescore_share
        kept = batch_size if refresh == "step" else self.rule.count(batch_size)
        varies = kept < batch_size and self.rule.variant == "warmup" and self.rule.warmup_data == "full"
        self.batch_size = None if varies else kept
        self.sample_ids = _ids_of(sampler, sample_ids) if refresh == "epoch" else torch.empty(0, dtype=torch.int64)
        self._frozen = torch.empty(0)  # deltas (N,) of the epoch `_frozen_epoch`, NaN where not known
        self._frozen_epoch = -1
        self._means = torch.zeros(0)  # of the deltas measured in each epoch, (epochs,)
        self._ended = False

    # ---- batches ---------------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes or is under way, from 0; the sampler is told too."""
        self.rule.set_epoch(epoch)
        self._ended = False
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        full, rest = divmod(len(self.sampler), self.candidate_batch_size)  # type: ignore[arg-type]
        return full + bool(rest and not self.drop_last)

    @property
    def samples_per_epoch(self) -> int:
        """How many indices this epoch's batches hold together."""
        full, rest = divmod(len(self.sampler), self.candidate_batch_size)  # type: ignore[arg-type]
        last = 0 if self.drop_last or not rest else self._yielded(rest)
        return full * self._yielded(self.candidate_batch_size) + last

    def __iter__(self) -> Iterator[list[int]]:
        self._next_epoch()
        if self.refresh == "epoch" and self._frozen_epoch != self.rule.epoch:
            self._freeze()
        return self._batches()

    def _batches(self) -> Iterator[list[int]]:
        indices = iter(self.sampler)
        while batch := list(itertools.islice(indices, self.candidate_batch_size)):
            if len(batch) == self.candidate_batch_size or not self.drop_last:
                yield self._kept(batch)
        self._ended = True

    def _kept(self, batch: list[int]) -> list[int]:
        if self._yielded(len(batch)) == len(batch):
            return batch
        rows = torch.tensor(batch)
        kept = self.rule.choose_by(self.sample_ids[rows], self._frozen[rows])
        return rows[kept].tolist()

    def _yielded(self, size: int) -> int:
        """Return how many of `size` candidates are yielded."""
        all_of_them = self.refresh == "step" or (self.rule.warming_up and self.rule.warmup_data == "full")
        return size if all_of_them else self.rule.count(size)

    def _next_epoch(self) -> None:
        if self._ended:  # whoever counts epochs for the sampler goes on doing so
            self.rule.set_epoch(self.rule.epoch + 1)
            self._ended = False

    # ---- refresh="step" --------------------------------------------------------------------------------------------

    def select(self, batch: Mapping[str, Any], *, gather: Gather | None = None) -> dict[str, Any]:
        """Score a candidate batch, take note of the scores, and return the samples to train on.

        Args:
            batch: Has `sample_id` (B,); what else has B rows, tensors and lists, is cut too.
            gather: On several processes `accelerator.gather`: all must learn the scores of all.

        Raises:
            ValueError: If there is no `score_fn` or no id, or refresh="epoch": the batch is chosen already.
        """
        if self.refresh != "step":
            raise ValueError('`select` is for refresh="step", got refresh="epoch": its batches are chosen already.')
        ids, scores = self._scored(batch)
        kept = self.rule.choose(ids, scores)
        self.update(*(gather((ids, scores)) if gather else (ids, scores)))
        return {name: _rows_of(value, kept, len(ids)) for name, value in batch.items()}

    def update(self, ids: Tensor, scores: Tensor, *, rescored: bool = False) -> None:
        """Take note of scores (B,) that training has given; on several processes of those of all processes.

        Args:
            ids: Sample ids (B,).
            scores: As `score_fn` would give them.
            rescored: Whether they are those that were due before this epoch.

        Raises:
            ValueError: If re-scored ones come after the epoch has begun.
        """
        if rescored and self._frozen_epoch == self.rule.epoch:
            raise ValueError(
                f"re-scoring must come before the first batch of its epoch, got epoch {self.rule.epoch}, which has begun. "
                "Call `set_epoch` with the next one first."
            )
        self.rule.update(ids, scores, time=self.rule.epoch - 0.5 if rescored else None)

    # ---- refresh="epoch" -------------------------------------------------------------------------------------------

    def due(self) -> list[int]:
        """Return the indices to re-score before this epoch: a random `rescore_share` * N, of those not trained on last.

        There are none in the first epoch and in the warm-up, and once the epoch has begun.
        """
        self._next_epoch()
        epoch = self.rule.epoch
        if self.refresh == "step" or epoch == 0 or self.rule.warming_up or self._frozen_epoch == epoch:
            return []
        behind = (self.rule.history.lookup(self.sample_ids)["epoch"] != epoch - 1).nonzero().flatten()
        keys = tie_keys(self.sample_ids[behind], seed=~self.rule.seed, epoch=epoch)  # not those that settle ties
        count = int(self.rescore_share * len(self.sample_ids) + 1e-9)
        return behind[keys.argsort()[:count]].sort().values.tolist()

    def rescore(self, batches: Iterable[Mapping[str, Any]], *, gather: Gather | None = None) -> None:
        """Score batches of what is `due`, with `sample_id` (B,); `gather` as in `select`."""
        self._next_epoch()
        for batch in batches:
            ids, scores = self._scored(batch)
            self.update(*(gather((ids, scores)) if gather else (ids, scores)), rescored=True)

    def _freeze(self) -> None:
        epoch, known = self.rule.epoch, self.rule.history.lookup(self.sample_ids)
        means = self._means.new_zeros(epoch + 1)
        means[: len(self._means)] = self._means[: epoch + 1]
        if epoch and not (known["epoch"] >= epoch - 1).any():
            warnings.warn(
                f"DISSect has no scores of epoch {epoch - 1}, so it chooses by older ones, or at random if there are none. "
                "Give the scores of every training step to `update`."
            )
        if epoch:
            means[epoch - 1] = _mean_delta(known["delta"], known["epoch"], epoch - 1)
        when = known["epoch"].nan_to_num(0.0).floor().long().clamp(0, epoch)
        self._frozen, self._frozen_epoch, self._means = known["delta"] - means[when], epoch, means

    def _scored(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        if self.score_fn is None:
            raise ValueError("`score_fn` must be given to score batches, got none. Pass a callable (batch) -> (B,).")
        if "sample_id" not in batch:
            raise ValueError(f"a batch must have `sample_id` (B,), got {', '.join(batch)}. See add_sample_ids.")
        with torch.no_grad():
            scores = self.score_fn(batch)
        return batch["sample_id"].to(scores.device), scores

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on anywhere in an epoch: tensors and integers."""
        frozen = {"frozen": self._frozen.clone(), "frozen_epoch": self._frozen_epoch, "means": self._means.clone()}
        return {"rule": self.rule.state_dict(), **frozen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; then say the epoch by `set_epoch`. A pass starts with the epoch's first batch.

        Raises:
            ValueError: If the state is that of a data set of another size.
        """
        if len(state["frozen"]) not in (0, len(self.sample_ids)):
            raise ValueError(
                f"the state must be that of {len(self.sample_ids)} samples, got one of {len(state['frozen'])}."
            )
        self.rule.load_state_dict(state["rule"])
        self._frozen, self._frozen_epoch = state["frozen"].to("cpu", copy=True), state["frozen_epoch"]
        self._means, self._ended = state["means"].to("cpu", copy=True), False


def _mean_delta(deltas: Tensor, times: Tensor, epoch: int) -> Tensor:
    """Return the mean over all N samples of the deltas of an epoch, from those that were trained on and those re-scored.

    Of the samples not trained on a random few were re-scored: each stands for (N - trained) / re-scored of them.

    Args:
        deltas: (N,); NaN for a sample whose first visit was the last.
        times: When they were measured (N,): `epoch`, `epoch` + 1/2 for those re-scored after it, anything else.
        epoch: Which.
    """
    trained, again, known = times == epoch, times == epoch + 0.5, deltas.isfinite()
    if not (again & known).any():
        return torch.zeros(())
    weights = trained.double() + again * (len(deltas) - trained.sum()) / again.sum()
    weights = weights * known
    return ((weights * deltas.nan_to_num(0.0)).sum() / weights.sum()).float()


def _ids_of(sampler: Any, sample_ids: Any) -> Tensor:
    """Return the id of each index (N,)."""
    if sample_ids is not None:
        ids = torch.as_tensor(sample_ids)
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() != 1:
            raise TypeError(f"`sample_ids` must be integers (N,), got {ids.dtype} of shape {tuple(ids.shape)}.")
        return ids.to("cpu", torch.int64)
    for name in ("data_source", "dataset"):
        if (source := getattr(sampler, name, None)) is not None:
            return torch.arange(len(source))
    raise ValueError(
        f'`sample_ids` must be given with refresh="epoch" and a {type(sampler).__name__}, which does not say its data set, '
        "got none. Use torch.arange(len(dataset))."
    )


def _rows_of(value: Any, kept: Tensor, size: int) -> Any:
    """Return the kept rows of what has `size` rows, anything else as it is."""
    if isinstance(value, Tensor) and value.dim() and len(value) == size:
        return value[kept.to(value.device)]
    if isinstance(value, (list, tuple)) and len(value) == size:
        return [value[i] for i in kept.tolist()]
    return value
