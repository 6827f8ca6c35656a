"""What happens between the forward pass and the optimizer step: score, weigh, rescale, check, record.

Read `ScoredTraining.loss` (one micro-batch), then `finish` (one optimizer step).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_mimic.engine import rescale
from hf_mimic.finite import finite_forward, no_gradient, without_trace
from hf_mimic.health import Health, HealthWatch
from hf_mimic.mimic import MimicForward, mimic_forward
from hf_mimic.optimizer_step import OptimizerStep, Visit
from hf_mimic.selection import STRATEGIES, USE_THE_SCORE, BatchSignals, scaled_part
from hf_mimic.self_check import check_gradient, gradient_along
from hf_mimic.step_log import StepLog
from hf_mimic.temperature import temperature_of
from hf_mimic.weights import Weighed

_LOOK_EVERY = 10  # optimizer steps between two looks at the health: each waits for the device
_PATIENCE = 10  # optimizer steps in a row without one finite sample, after which training has diverged


class ScoredTraining:
    """The steps of one training run.

    Args:
        trainer: The `MimicTrainer` whose model, arguments, direction, loss and score table are used.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.args, self.engine = trainer, trainer.args, trainer.engine
        self.strategy: str = trainer.strategy
        self.temperature = temperature_of(self.strategy)
        self.log, self.health = StepLog(), Health()
        self._automatic = self.args.tau == "auto"
        self._leaves_out = self.strategy in USE_THE_SCORE and (self._automatic or self.args.on_unhealthy == "uniform")
        self.watch = HealthWatch(self.args.on_unhealthy, trainer.reference.explain, left_out=self._leaves_out)
        self._micro_batches: list[Mapping[str, Any]] = []
        self._taken = self._barren_steps = self._steps = 0
        self._barren: bool
        self._nonfinite: Any
        self._norm: Any
        self._new_step()

    def state(self) -> dict[str, Any]:
        """Return the running temperature and the health for a checkpoint; empty before the first step."""
        variance, shape = self.temperature.variance, self.temperature.shape
        known = variance is not None and shape is not None
        temperature = {"variance": float(variance), "shape": float(shape)} if known else {}  # type: ignore[arg-type]
        return {"strategy": self.strategy, "temperature": temperature, "health": self.health.state()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on with the health of a checkpoint, and with its temperature if that was of the same strategy."""
        parameter = next(self.trainer.model.parameters())
        like = torch.zeros((), dtype=torch.promote_types(parameter.dtype, torch.float32), device=parameter.device)
        same = self._automatic and state.get("strategy", "mimic") == self.strategy
        for name, value in state.get("temperature", {}).items() if same else ():
            setattr(self.temperature, name, like.new_tensor(value))
        self.health.resume(state.get("health", {}), like)

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
        if self._needs_temperature():
            self._measure(self._micro_batches or [batch])
        left = max(len(self._micro_batches) - self._taken, 1)
        self._taken += 1
        forward, first, valid = self._forward(model, batch)
        visit, losses = self._visit(ids, forward or first, valid)
        self._norm, self._barren = first.norm, self._barren and forward is None
        self._nonfinite = self._nonfinite + (~valid).sum()
        options: dict[str, Any] = {"left": left, "gather": self.engine.gather if self.engine.averages(model) else None}
        weights, factor = self._step.add(visit, **options)
        if self._plain_step is None:
            rescale(self.engine.parameters, factor)
            loss = (weights.to(losses.dtype) * losses).sum()
        else:
            loss = self._split_loss(losses, weights, factor, *self._plain_step.add(visit, **options))
        if forward is None:
            # Parameters that find_unused_parameters counted as unused must stay so.
            finds_unused = getattr(model, "find_unused_parameters", False)
            loss = no_gradient(self.engine.parameters, first.losses if finds_unused else None)
        return loss, None if forward is None else forward.outputs

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
        if self.args.record_scores:
            self._record()
        if self.args.weight_scope == "global" and self._automatic:
            sums = groups[0][0]
            size = sums.effective_sample_size / sums.count
            if self._leaves_out:  # then the weights say nothing about the temperature
                size = torch.where(self.health.unhealthy.to(size.device), torch.nan, size)
            self.temperature.update(sums.signal_variance, size, sums.count, self._believed(sums.count))
        self._look_after(groups)
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

    def health_report(self) -> dict[str, float]:
        """Return what the log says about the score's health."""
        apart = self.args.weight_scope == "device" and self.engine.processes > 1
        return self.health.report(self.engine.gather if apart else None)

    def _look_after(self, groups: list) -> None:
        self.health.update(groups)
        if self._steps % _LOOK_EVERY == _LOOK_EVERY - 1:
            self.look()

    def look(self) -> None:
        """Warn or raise, by `on_unhealthy`, if the weights use a score that is unhealthy."""
        if self.strategy in USE_THE_SCORE:
            self.watch.look(self.health_report())

    # ---- one micro-batch -------------------------------------------------------------------------------------------

    def _new_step(self) -> None:
        scope, processes = self.args.weight_scope, self.engine.processes
        only_mimic_layers = self.args.reweight == "mimic_layers"
        self._step = OptimizerStep(scope, processes)
        self._plain_step = OptimizerStep(scope, processes, weighted=False) if only_mimic_layers else None
        self._nonfinite, self._barren = 0, True

    def _forward(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[MimicForward | None, MimicForward, Tensor]:
        base, engine = self.trainer.model, self.engine
        run = partial(engine.forward, base=base, direction=self.trainer.direction(), loss_fn=self.trainer.loss_fn)
        return finite_forward(
            base,
            batch,
            partial(run, model),
            # A second pass through DistributedDataParallel would speak to processes that do not make one.
            partial(run, model if engine.sharded else base),
            anywhere=engine.anywhere if engine.sharded else bool,
        )

    def _visit(self, ids: Tensor | None, forward: MimicForward, valid: Tensor) -> tuple[Visit, Tensor]:
        """Return the micro-batch as weights see it, and the losses (b,) of its scored samples, with graph."""
        last = self._taken >= len(self._micro_batches)
        kept = self.trainer.epoch_end.kept(len(valid), ids, last=last)
        losses, scores = forward.losses, forward.scores
        if not valid.any():  # nothing but their kind matters: it must be that of the other processes
            losses, scores = losses[:0].detach(), scores[:0]
        elif kept is not None:
            losses, scores = losses[kept[valid]], scores[kept[valid]]
        everything = torch.ones_like(valid) if kept is None else kept
        scored = valid & everything
        signals = self._signals(losses.detach().to(scores.dtype), scores, ids, scored)
        part = scaled_part(self.strategy, signals)
        samples = Weighed(self._logits(signals), signals.losses, scores, part, signals.ref_trust)
        return Visit(self.trainer.current_pass, ids, everything, scored, samples, signals.ref_losses), losses

    def _signals(self, losses: Tensor, scores: Tensor, ids: Tensor | None, scored: Tensor) -> BatchSignals:
        """Join what the reference says of the scored ones among the samples `ids` (B,)."""
        reference = self.trainer.reference_scores
        if reference is None or ids is None:
            return BatchSignals(losses, scores)
        found = (values.to(scores) for values in reference.lookup(ids[scored] if len(losses) else ids[:0]))
        return BatchSignals(losses, scores, *found)

    def _logits(self, signals: BatchSignals) -> Tensor:
        tau: Any = self.args.tau
        if self._automatic:
            temperature = self.temperature
            if self.args.weight_scope == "device":
                temperature = temperature_of(self.strategy)
                temperature.start(scaled_part(self.strategy, signals))
            tau = temperature.value(self._believed(signals.mimic_scores))
        if self._leaves_out:
            tau = torch.where(self.health.unhealthy.to(signals.losses.device), torch.inf, tau)
        return STRATEGIES[self.strategy](signals, temperature=tau)

    def _believed(self, like: Tensor) -> Tensor:
        return self.health.believed(self.temperature.evidence, like)

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

    def _needs_temperature(self) -> bool:
        """Return whether the first step cannot do without its own scores: a belief of 0 needs no temperature."""
        automatic = self._automatic and self.args.weight_scope == "global" and self.strategy != "uniform"
        return automatic and self.temperature.variance is None and self.temperature.evidence is None

    def _measure(self, micro_batches: list[Mapping[str, Any]]) -> None:
        """Set the temperature of the first step from its own scores, before any of its gradients: one extra forward."""
        trainer, column = self.trainer, self.args.sample_id_column
        found = []
        with without_trace(trainer.model):
            for number, inputs in enumerate(micro_batches, 1):
                batch: Any = trainer._prepare_inputs(dict(inputs))
                ids = batch.pop(column, None)
                forward = mimic_forward(trainer.model, batch, trainer.direction(), trainer.loss_fn)
                scores, losses = forward.scores, forward.losses.to(forward.scores.dtype)
                kept = trainer.epoch_end.kept(len(scores), ids, last=number == len(micro_batches))
                signals = self._signals(losses, scores, ids, torch.ones_like(scores, dtype=torch.bool))
                parts = scaled_part(self.strategy, signals)
                found.append(parts if kept is None else parts[kept])
        every = self.engine.gather_unequal(torch.cat(found))
        self.temperature.start(every[every.isfinite()])

    def _check(self, share: Mapping[str, Any]) -> None:
        trainer, accelerator = self.trainer, self.trainer.accelerator
        direction, named = trainer.direction(), dict(trainer.model.named_parameters(remove_duplicate=False))
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
        for epoch, ids, values in self._step.visits():
            if ids is None:
                raise ValueError(
                    f"every example must have an integer `{self.args.sample_id_column}` to record scores by, got none. "
                    "Let the data set's items have it, or train with record_scores=False."
                )
            self.trainer.scores.record(ids, epoch=epoch, step=self.trainer.state.global_step, **values)
