"""What happens between the forward pass and the optimizer step: score, weigh, rescale, check, record.

Read `ScoredTraining.loss` (one micro-batch), then `finish` (one optimizer step).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_mimic.cached_negatives import CachedStep
from hf_mimic.engine import rescale
from hf_mimic.finite import Forward, finite_forward, no_gradient, without_trace
from hf_mimic.losses import COUNTED, clip_score
from hf_mimic.micro_batch import MicroBatch, batch_size
from hf_mimic.mimic import MimicForward, mimic_forward
from hf_mimic.optimizer_step import OptimizerStep, Visit
from hf_mimic.selection import weighting
from hf_mimic.self_check import check_gradient, gradient_along
from hf_mimic.step_log import StepLog
from hf_mimic.weighing import Weighing
from hf_mimic.weights import Weighed

_PATIENCE = 10  # optimizer steps in a row without one finite sample, after which training has diverged


class ScoredTraining:
    """The steps of one training run.

    Args:
        trainer: The `MimicTrainer` whose model, arguments, direction, loss and score table are used.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.args, self.engine = trainer, trainer.args, trainer.engine
        self.weighing = Weighing(weighting(trainer.strategy, self.args.rate), trainer)
        self.log = StepLog(scored=trainer.direction is None or trainer.direction() is not None)
        self._cached: CachedStep | None = None
        if self.args.cache_negatives:
            self._cached = CachedStep(trainer.model, trainer.direction, trainer.loss_fn)
        self._micro_batches: list[Mapping[str, Any]] = []
        self._taken = self._barren_steps = self._steps = 0
        self._barren: bool
        self._nonfinite: Any
        self._norm: Any
        self._new_step()

    def begin(self, micro_batches: list[Mapping[str, Any]]) -> None:
        """Take note of the micro-batches that follow."""
        self._micro_batches, self._taken = micro_batches, 0

    def loss(self, model: nn.Module, batch: Mapping[str, Any], ids: Tensor | None) -> tuple[Tensor, Any]:
        """Return the weighted loss of a micro-batch and the outputs; put the gradient before it on the same scale.

        Args:
            model: As it is trained, wrappers included.
            batch: B samples, without ids.
            ids: Sample ids (B,).
        """
        number, self._taken = self._taken, self._taken + 1
        if self._cached is not None:
            if not number:
                self._begin_cached(self._cached, self._micro_batches or [{**batch, self.args.sample_id_column: ids}])
            loss, features = self._cached.loss(model, number)
            return self._without_samples(model, features) if loss is None else loss, None
        if self.weighing.needs_start():
            self._measure(self._micro_batches or [batch])
        part = self._part(batch, ids, last=self._taken >= len(self._micro_batches))
        self.trainer.ledger.add(samples_forward=len(part), samples_backward=len(part))
        forward, first, valid = self._forward(model, part)
        visit, losses = self._visit(part, forward or first, valid)
        self._note(first.norm, valid, barren=forward is None)
        left = max(len(self._micro_batches) - number, 1)
        # Where another process's loss reaches this one's gradient, both must stand on the same scale at any time.
        gather = self.engine.gather if self.engine.averages(model) or self._shares else None
        options: dict[str, Any] = {"left": left, "gather": gather}
        weights, factor = self._step.add(visit, **options)
        if self._plain_step is None:
            rescale(self.engine.parameters, factor)
            loss = (weights.to(losses.dtype) * losses).sum()
        else:
            loss = self._split_loss(losses, weights, factor, *self._plain_step.add(visit, **options))
        if forward is None:
            loss = self._without_samples(model, first.losses)
        return loss, None if forward is None else forward.outputs

    def _without_samples(self, model: nn.Module, found: Tensor) -> Tensor:
        """Return a loss without gradient, for a micro-batch of which no sample is finite."""
        # Parameters that find_unused_parameters counted as unused must stay so.
        finds_unused = getattr(model, "find_unused_parameters", False)
        return no_gradient(self.engine.parameters, found if finds_unused else None)

    def _begin_cached(self, cached: CachedStep, micro_batches: list[Mapping[str, Any]]) -> None:
        """Find losses, scores and weights of the whole step, before the first of its micro-batches is differentiated."""
        numbered = enumerate(map(self.trainer._prepare_inputs, micro_batches), 1)
        parts = [self._part(*self._split(batch), last=number == len(micro_batches)) for number, batch in numbered]
        forward, together, finite = cached.forward(parts)
        count = len(together)
        self.trainer.ledger.add(samples_scored=count, samples_forward=count, samples_backward=count)
        if self.weighing.needs_start():
            self.weighing.start(self._parts(together.rows(finite), forward))
        visit, losses = self._visit(together, forward, finite)
        self._note(forward.norm, finite, barren=not len(losses))
        weights, _ = self._step.add(visit, left=1, gather=self.engine.gather)
        cached.differentiate((weights.to(losses.dtype) * losses).sum())

    def _note(self, norm: Tensor, valid: Tensor, *, barren: bool) -> None:
        self._norm, self._barren = norm, self._barren and barren
        self._nonfinite = self._nonfinite + (~valid).sum()

    def finish(self) -> Tensor:
        """Check, record and log the optimizer step whose gradient is complete; return its weighted loss, 0-d."""
        groups = self._step.groups()
        share = {
            name: sum(part * torch.nan_to_num(getattr(sums, name) / sums.weight) for sums, part in groups)
            for name in ("weighted_loss", "weighted_score", "weighted_absolute_score")
        }
        every = self.args.self_check_steps
        if every >= 0 and (self._steps == 0 or (every and self._steps % every == 0)):
            self._check(share)
        self._record()
        self.weighing.update(groups, self._steps)
        self.log.add(groups, self._norm, self._nonfinite)
        # All processes see the same only where weights are shared: they must end together.
        shared = self.args.weight_scope == "global" or self.engine.processes == 1
        barren = self._barren and shared and not any(sums.count for sums, _ in groups)
        self._barren_steps = self._barren_steps + 1 if barren else 0
        if self._barren_steps >= _PATIENCE:
            raise FloatingPointError(
                f"losses and scores must be finite, got none for {_PATIENCE} optimizer steps in a row: training has "
                "diverged. Lower the learning rate, or go back to an earlier checkpoint."
            )
        self._steps += 1
        self._new_step()
        return torch.as_tensor(share["weighted_loss"]).float()

    # ---- one micro-batch -------------------------------------------------------------------------------------------

    def _new_step(self) -> None:
        scope, processes = self.args.weight_scope, self.engine.processes
        only_mimic_layers = self.args.reweight == "mimic_layers"
        self._step = OptimizerStep(scope, processes)
        self._plain_step = OptimizerStep(scope, processes, weighted=False) if only_mimic_layers else None
        self._nonfinite, self._barren = 0, True

    def _split(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        column = self.args.sample_id_column
        return {name: value for name, value in inputs.items() if name != column}, inputs.get(column)

    def _part(self, batch: Mapping[str, Any], ids: Tensor | None, *, last: bool) -> MicroBatch:
        part = MicroBatch(batch, ids, self.trainer.epoch_end.kept(batch_size(batch), ids, last=last))
        self.trainer.ledger.add(samples_decoded=len(part))
        return self.trainer.choice.keep(part, self._finite)

    def _forward(self, model: nn.Module, part: MicroBatch) -> tuple[MimicForward | None, MimicForward, Tensor]:
        base, engine, loss_fn = self.trainer.model, self.engine, self.trainer.loss_fn
        run = partial(engine.forward, base=base, direction=self.trainer.direction(), loss_fn=loss_fn)
        # A second pass through DistributedDataParallel would speak to processes that do not make one.
        return self._finite(part, partial(run, model), partial(run, model if engine.sharded else base))

    def _finite(
        self, part: MicroBatch, first: Forward, again: Forward
    ) -> tuple[MimicForward | None, MimicForward, Tensor]:
        """Run a micro-batch; run it again without the samples that are not finite; see `finite_forward`."""
        engine, shares = self.engine, self._shares
        part = self._told(part)

        def telling(rest: Mapping[str, Any]) -> MimicForward:
            return again(MicroBatch(rest).telling().inputs if shares and COUNTED not in rest else rest)

        return finite_forward(
            self.trainer.model,
            part.inputs,
            first,
            telling,
            anywhere=engine.anywhere if engine.sharded or shares else bool,
            indispensable=engine.sharded,
        )

    @property
    def _shares(self) -> bool:
        """Whether the samples of all processes are in each other's losses."""
        return getattr(self.trainer.loss_fn, "processes", 1) > 1

    def _told(self, part: MicroBatch) -> MicroBatch:
        """Return the micro-batch with a word to the loss on which rows count, if not all do on all processes."""
        return part.telling() if self._shares and (part.counted is not None or not self.engine.even) else part

    def _visit(self, part: MicroBatch, forward: MimicForward, valid: Tensor) -> tuple[Visit, Tensor]:
        """Return the micro-batch as weights see it, and the losses (b,) of its scored samples, with graph."""
        kept, losses, scores = part.counted, forward.losses, forward.scores
        if not valid.any():  # nothing but their kind matters: it must be that of the other processes
            losses, scores = losses[:0].detach() if len(losses) else losses, scores[:0]
        elif kept is not None:
            losses, scores = losses[kept[valid]], scores[kept[valid]]
        scored = valid & part.everything
        ids = None if part.ids is None else part.ids[scored] if len(losses) else part.ids[:0]
        signals = self.weighing.signals(losses, scores, ids)
        shared = self.weighing.scaled_part(signals)
        samples = Weighed(self.weighing.logits(signals), signals.losses, scores, shared, signals.ref_trust)
        return Visit(
            self.trainer.current_pass,
            part.ids,
            part.everything,
            scored,
            samples,
            signals.ref_losses,
            self._more(part, forward, valid),
            unscored=self.trainer.direction() is None,
        ), losses

    def _more(self, part: MicroBatch, forward: MimicForward, valid: Tensor) -> dict[str, Tensor]:
        """Return the columns that a selection or an image-text model adds to the score table (B,)."""
        more = dict(part.columns or {})
        if "clip_score" not in more and hasattr(forward.outputs, "image_embeds"):
            more["clip_score"] = scores = clip_score(forward.outputs)
            if len(scores) < len(valid):
                more["clip_score"] = scores.new_full(valid.shape, torch.nan).masked_scatter(valid, scores)
        if self.trainer.choice.candidates is not None:
            more["kept"] = torch.ones_like(valid, dtype=torch.float32)
        return more

    def _split_loss(self, losses: Tensor, weights: Tensor, factor: Any, plain: Tensor, plain_factor: Any) -> Tensor:
        """Return a loss with the weighted gradient for the mimic layers and the plain mean's for all others."""
        weights, plain = weights.to(losses.dtype), plain.to(losses.dtype)
        chosen = {id(p): p for p in self.trainer.direction.parameters.values()}
        rescale(chosen.values(), factor)
        rescale((p for p in self.engine.parameters if id(p) not in chosen), plain_factor)
        mean = (plain * losses).sum()
        trained = [p for p in chosen.values() if p.requires_grad]
        difference = ((weights - plain) * losses).sum()
        grads: Any = ()
        if trained and difference.requires_grad:
            grads = torch.autograd.grad(difference, trained, retain_graph=True, allow_unused=True)
        # (p - p.detach()) is zero and has gradient one: it adds what the chosen layers' gradient lacks.
        extra = [((p - p.detach()) * g).sum() for p, g in zip(trained, grads, strict=False) if g is not None]
        return mean + sum(extra)

    # ---- one optimizer step ----------------------------------------------------------------------------------------

    def _measure(self, micro_batches: list[Mapping[str, Any]]) -> None:
        """Set the temperature of the first step from its own scores, before any of its gradients: one extra forward."""
        trainer, found = self.trainer, []
        with without_trace(trainer.model):
            for number, inputs in enumerate(micro_batches, 1):
                batch, ids = self._split(trainer._prepare_inputs(dict(inputs)))
                counted = trainer.epoch_end.kept(batch_size(batch), ids, last=number == len(micro_batches))
                part = MicroBatch(batch, ids, counted)
                told = self._told(part).inputs
                forward = mimic_forward(trainer.model, told, trainer.direction(), trainer.loss_fn)
                found.append(self._parts(part, forward))
        self.weighing.start(torch.cat(found))

    def _parts(self, part: MicroBatch, forward: MimicForward) -> Tensor:
        """Return what the temperature divides, of the rows that count."""
        signals = self.weighing.signals(forward.losses, forward.scores, part.ids)
        return self.weighing.scaled_part(signals)[part.everything]

    def _check(self, share: Mapping[str, Any]) -> None:
        trainer, accelerator = self.trainer, self.trainer.accelerator
        direction, named = trainer.direction(), dict(trainer.model.named_parameters(remove_duplicate=False))
        if direction is None:
            return
        product = gradient_along(direction, named)
        sums = self.engine.gather(torch.stack(list(share.values()))).mean(0).tolist()
        if product is None:
            return
        if accelerator.scaler is not None:
            product = product / accelerator.scaler.get_scale()
        formats = {named[name].dtype for name in direction}
        formats |= {torch.bfloat16} if accelerator.mixed_precision != "no" else set()
        if product.isfinite():  # a scaled float16 gradient may overflow: that step is skipped
            eps = max(torch.finfo(dtype).eps for dtype in formats)
            check_gradient(product, dict(zip(share, sums, strict=True)), norm=float(self._norm), eps=eps)

    def _record(self) -> None:
        trainer = self.trainer
        for epoch, ids, values in self._step.visits():
            if ids is not None:
                trainer.choice.learn(ids, values)
            if not self.args.record_scores:
                continue
            if ids is None:
                raise ValueError(
                    f"every example must have an integer `{self.args.sample_id_column}` to record scores by, got none. "
                    "Let the data set's items have it, or train with record_scores=False."
                )
            trainer.scores.record(ids, epoch=epoch, step=trainer.state.global_step, **values)
