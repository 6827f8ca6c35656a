"""From what is known of samples to their log-weights: temperature and health, kept up over a training run.

Read `Weighing.logits`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_mimic.health import Health, HealthWatch
from hf_mimic.selection import STRATEGIES, USE_THE_SCORE, BatchSignals, scaled_part
from hf_mimic.temperature import temperature_of

_LOOK_EVERY = 10  # optimizer steps between two looks at the health: each waits for the device


class Weighing:
    """The weights of one training run.

    Args:
        strategy: Of `STRATEGIES`.
        trainer: The `MimicTrainer` whose arguments, engine and reference are used.
    """

    def __init__(self, strategy: str, trainer: Any) -> None:
        self.strategy, self.trainer, self.args, self.engine = strategy, trainer, trainer.args, trainer.engine
        self.temperature, self.health = temperature_of(strategy), Health()
        self.automatic = self.args.tau == "auto"
        self.leaves_out = strategy in USE_THE_SCORE and (self.automatic or self.args.on_unhealthy == "uniform")
        self.watch = HealthWatch(self.args.on_unhealthy, trainer.reference.explain, left_out=self.leaves_out)

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
        same = self.automatic and state.get("strategy", "mimic") == self.strategy
        for name, value in state.get("temperature", {}).items() if same else ():
            setattr(self.temperature, name, like.new_tensor(value))
        self.health.resume(state.get("health", {}), like)

    # ---- one micro-batch -------------------------------------------------------------------------------------------

    def signals(self, losses: Tensor, scores: Tensor, ids: Tensor | None) -> BatchSignals:
        """Join what the reference says of the samples `ids` (b,) with their losses and scores (b,)."""
        reference = self.trainer.reference_scores
        losses = losses.detach().to(scores.dtype)
        if ids is None:
            return BatchSignals(losses, scores)
        said: Any = (None, None) if reference is None else [values.to(scores) for values in reference.lookup(ids)]
        return BatchSignals(losses, scores, said[0], said[1], importance=self.trainer.choice.importance(ids))

    def scaled_part(self, signals: BatchSignals) -> Tensor:
        """Return what the strategy divides by the temperature (b,)."""
        return scaled_part(self.strategy, signals)

    def logits(self, signals: BatchSignals) -> Tensor:
        """Return the log-weights (b,)."""
        tau: Any = self.args.tau
        if self.automatic:
            temperature = self.temperature
            if self.args.weight_scope == "device":
                temperature = temperature_of(self.strategy)
                temperature.start(self.scaled_part(signals))
            tau = temperature.value(self._believed(signals.mimic_scores))
        if self.leaves_out:
            tau = torch.where(self.health.unhealthy.to(signals.losses.device), torch.inf, tau)
        return STRATEGIES[self.strategy](signals, temperature=tau)

    def _believed(self, like: Tensor) -> Tensor:
        return self.health.believed(self.temperature.evidence, like)

    # ---- one optimizer step ----------------------------------------------------------------------------------------

    def needs_start(self) -> bool:
        """Return whether the first step cannot do without its own scores: a belief of 0 needs no temperature."""
        automatic = self.automatic and self.args.weight_scope == "global" and self.strategy != "uniform"
        return automatic and self.temperature.variance is None and self.temperature.evidence is None

    def start(self, parts: Tensor) -> None:
        """Set the temperature of the first step from what it is to divide (n,), on all processes."""
        every = self.engine.gather_unequal(parts)
        self.temperature.start(every[every.isfinite()])

    def update(self, groups: list, step: int) -> None:
        """Take in the groups of weights of an optimizer step; look after the score's health."""
        if self.args.weight_scope == "global" and self.automatic:
            sums = groups[0][0]
            size = sums.effective_sample_size / sums.count
            if self.leaves_out:  # then the weights say nothing about the temperature
                size = torch.where(self.health.unhealthy.to(size.device), torch.nan, size)
            self.temperature.update(sums.signal_variance, size, sums.count, self._believed(sums.count))
        self.health.update(groups)
        if step % _LOOK_EVERY == _LOOK_EVERY - 1:
            self.look()

    def report(self) -> dict[str, float]:
        """Return what the log says about the score's health."""
        apart = self.args.weight_scope == "device" and self.engine.processes > 1
        return self.health.report(self.engine.gather if apart else None)

    def look(self) -> None:
        """Warn or raise, by `on_unhealthy`, if the weights use a score that is unhealthy."""
        if self.strategy in USE_THE_SCORE:
            self.watch.look(self.report())
