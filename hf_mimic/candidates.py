"""refresh="step": of every micro-batch that was loaded, the share to train on.

Read `Candidates.keep`: score the candidates without gradient in eval mode, choose by the old history, then update it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_mimic.dissect import DISSect, keep_count, tie_keys, top
from hf_mimic.finite import Forward, without_trace
from hf_mimic.losses import clip_score
from hf_mimic.micro_batch import MicroBatch
from hf_mimic.mimic import MimicForward, eval_mode, mimic_forward
from hf_mimic.selection import RANKINGS, BatchSignals

FiniteForward = Callable[[MicroBatch, Forward, Forward], tuple[MimicForward | None, MimicForward, Tensor]]


class Candidates:
    """Chooses from the micro-batches of one training run.

    Args:
        trainer: The `MimicTrainer`.
        rule: Of DISSect; None for a ranking.
        least: How many to keep of a batch at least.
    """

    def __init__(self, trainer: Any, rule: DISSect | None, *, least: int) -> None:
        self.trainer, self.args, self.engine, self.rule = trainer, trainer.args, trainer.engine, rule
        self.least = least
        self.strategy: str = trainer.strategy

    def keep(self, part: MicroBatch, finite: FiniteForward) -> MicroBatch:
        """Return the micro-batch that is trained on; the rest goes into the score table.

        Args:
            part: The candidates, B of them on every process.
            finite: Runs a micro-batch, without the samples that are not finite.
        """
        size, epoch = len(part), self.trainer.current_pass
        if part.ids is None:
            raise ValueError(
                f'strategy="{self.strategy}" with a selection_rate below 1 needs an integer `{self.args.sample_id_column}` '
                "with every example, got none. See hf_mimic.data.add_sample_ids."
            )
        if self._history_comes_later(epoch):
            return part
        columns = self._columns(part, finite)
        if "clip_score" not in columns and (self.rule is not None or self.strategy == "clip_score"):
            raise ValueError(
                f'strategy="{self.strategy}" needs image-text pairs: a model whose outputs have `image_embeds` and '
                f"`text_embeds`, got {type(self.trainer.model).__name__}. For labels use small_loss, trust or mimic."
            )
        if self.rule is not None:
            self.rule.set_epoch(epoch)
            scores = columns["clip_score"]
            kept = self.rule.choose(part.ids, scores, valid=part.counted)
            self.rule.update(*self.engine.gather_columns(part.ids, scores.where(part.everything, torch.nan)))
        else:
            ranks = RANKINGS[self.strategy](self._signals(part, columns)).where(part.everything, torch.nan)
            count = keep_count(size, self.args.rate, self.least)
            kept = top(ranks, tie_keys(part.ids, seed=self.args.seed, epoch=epoch), count)
        self._record_rest(part, columns, kept)
        self.trainer.ledger.add(samples_scored=size if columns else 0)
        known = {name: column for name, column in columns.items() if name == "clip_score"}
        return MicroBatch(part.inputs, part.ids, part.counted, known).rows(kept)

    def _history_comes_later(self, epoch: int) -> bool:
        """Return whether this epoch's scores would be overwritten unread: in a warm-up on all of the data before its last."""
        rule = self.rule
        if rule is None or rule.variant != "warmup" or rule.warmup_data != "full" or self.args.dataloader_drop_last:
            return False
        return epoch < rule.warmup_epochs - 1

    def _columns(self, part: MicroBatch, finite: FiniteForward) -> dict[str, Tensor]:
        """Return what the ranking needs to know, by a forward pass of the candidates if it needs one: (B,) each."""
        model = self.trainer.model
        if self.strategy in ("random", "ref_loss", "trust"):
            return {}
        direction = self.trainer.direction() if self.strategy == "mimic" else None
        run = partial(mimic_forward, model, direction=direction, loss_fn=self.trainer.loss_fn)
        with without_trace(model), eval_mode(model):
            second, forward, valid = finite(part, run, run)
        columns = {}
        if hasattr(forward.outputs, "image_embeds"):  # of each pair alone: one that is broken spoils no other
            columns["clip_score"] = clip_score(forward.outputs)
        for name in ("loss",) if direction is None else ("loss", "mimic_score"):
            columns[name] = forward.scores.new_full(valid.shape, torch.nan)
            if second is not None:
                columns[name][valid] = (second.losses if name == "loss" else second.scores).to(columns[name])
        return columns

    def _signals(self, part: MicroBatch, columns: dict[str, Tensor]) -> BatchSignals:
        nothing = torch.zeros(len(part), device=part.everything.device)
        losses, scores = columns.get("loss", nothing), columns.get("mimic_score", nothing)
        signals = self.trainer.training.weighing.signals(losses, scores.to(losses.dtype), part.ids)
        return replace(signals, clip_scores=columns.get("clip_score"))

    def _record_rest(self, part: MicroBatch, columns: dict[str, Tensor], kept: Tensor) -> None:
        if not self.args.record_scores or part.ids is None:
            return
        rest = part.everything.clone()
        rest[kept] = False
        step, epoch = self.trainer.state.global_step, self.trainer.current_pass
        values = {name: column[rest] for name, column in columns.items()}
        self.trainer.scores.record(part.ids[rest], epoch=epoch, step=step, kept=0.0, **values)
