"""Health: does the mimic score say anything? Told from signals that need no clean label.

A good score is high where the reference trusts the label, or, if the reference is not run, where the model itself fits
it. A score that has turned around is high where they do not. `Health` averages both correlations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_mimic.weights import StepSums

# Below these a score is unhealthy: calibrated by examples/benchmarks/bench_trust.py.
LEAST_TRUST_CORRELATION = 0.1
LEAST_FIT_CORRELATION = 0.0
_WINDOW = 1024.0  # samples that an average reaches back
_ENOUGH = 256.0  # samples before anything is said
_NAMES = ("fit", "fit_seen", "trust", "trust_seen")


class Health:
    """Running correlations of the mimic score, within steps, with the model's fit -loss and with the trust.

    The trust decides where there is one: a model that was trained by a wrong score fits what that score prefers.

    Everything stays on the device; a step in which a correlation cannot be computed (one sample, equal scores) counts
    as no evidence, neither for nor against.
    """

    def __init__(self) -> None:
        self._state: Tensor | None = None  # the two averages, each with the number of samples behind it

    def update(self, groups: list[tuple[StepSums, float]]) -> None:
        """Take in the groups of weights of one optimizer step."""
        for sums, _ in groups:
            if self._state is None:
                self._state = sums.count.new_zeros(len(_NAMES))
            fit, fit_seen, trust, trust_seen = self._state.unbind()
            fits = _average(fit, fit_seen, sums.fit_correlation, sums.count)
            trusts = _average(trust, trust_seen, sums.trust_correlation, sums.known)
            self._state = torch.stack([*fits, *trusts])

    @property
    def unhealthy(self) -> Tensor:
        """Whether there is evidence that the score is uninformative or has turned around: a boolean, 0-d."""
        if self._state is None:
            return torch.tensor(False)
        fit, fit_seen, trust, trust_seen = self._state.unbind()
        by_fit = (fit < LEAST_FIT_CORRELATION) & (fit_seen >= _ENOUGH)
        return torch.where(trust_seen >= _ENOUGH, trust < LEAST_TRUST_CORRELATION, by_fit)

    def believed(self, evidence: str | None, like: Tensor) -> Tensor:
        """Return how much the score agrees with "fit" or "trust", 0-d.

        Of n samples' correlation rho the part 1 / (n rho^2) is chance, and is taken off (the positive-part James-Stein
        rule): nothing is left of what is within one standard error of 0.

        Args:
            evidence: Which correlation; None: 0.
            like: Has the device and kind of the scores.
        """
        if self._state is None or evidence is None:
            return like.new_zeros(())
        place = _NAMES.index(evidence)
        rho, seen = self._state[place], self._state[place + 1].clamp_max(_WINDOW)
        return torch.nan_to_num(rho - 1 / (seen * rho)).where(seen * rho.square() > 1, 0).to(like)

    def report(self, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Return what the log says; a signal that could not be computed is absent, and so is a verdict without one.

        Args:
            gather: (k,) -> (P, k), where processes see different samples.
        """
        if self._state is None:
            return {}
        rows = self._state[None] if gather is None else gather(self._state)
        fit, fit_seen, trust, trust_seen = rows.mean(0).tolist()
        values = {}
        if fit_seen:
            values["score_fit_correlation"] = fit
        if trust_seen:
            values["score_trust_correlation"] = trust
        if trust_seen >= _ENOUGH:
            values["unhealthy"] = float(trust < LEAST_TRUST_CORRELATION)
        elif fit_seen >= _ENOUGH:
            values["unhealthy"] = float(fit < LEAST_FIT_CORRELATION)
        return values

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must hold."""
        return {} if self._state is None else dict(zip(_NAMES, self._state.tolist(), strict=True))

    def resume(self, state: Mapping[str, float], like: Tensor) -> None:
        """Go on from a checkpoint; `like` has the device and kind of the scores."""
        self._state = like.new_tensor([state[name] for name in _NAMES]) if state else None


def _average(mean: Tensor, seen: Tensor, value: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    told = value.isfinite() & (count > 1)
    count = torch.where(told, count, 0)
    rate = (count / (seen + count).clamp(1, _WINDOW)).clamp_max(1)
    return mean + rate * (torch.nan_to_num(value) - mean), seen + count


def likely_cause(report: Mapping[str, float], *, head_cosine: float | None, norm_share: float | None) -> str:
    """Say what is likely wrong with an unhealthy score, and what to do.

    Args:
        report: From `Health.report`.
        head_cosine: Between the heads of reference and student at the start; None if not known.
        norm_share: ||v|| now over ||v|| at the start.
    """
    signals = ", ".join(f"{name} {value:.2f}" for name, value in report.items() if name != "unhealthy")
    if head_cosine is not None and head_cosine < 0.3:
        cause = (
            f"the student's head was initialised apart from the reference's (their cosine was {head_cosine:.2f}), and "
            'features follow the head. Use head_init="reference" or "zero", or start from the checkpoint that the '
            "reference was fine-tuned from, head included"
        )
    elif norm_share is not None and norm_share < 0.3:
        cause = (
            f"the student has come close to the reference (||v|| is {norm_share:.0%} of what it was), and beyond it "
            "the direction says little. Train for fewer epochs, or judge by the scores up to here"
        )
    else:
        cause = (
            "the reference, or its chosen layers, is no guide for these data. Look at the reference's accuracy on data "
            'that you trust, try mimic_layers="all", or strategy="ref_loss", which does not use the score'
        )
    return f"the mimic score is uninformative or has turned around ({signals}). Likely cause: {cause}."


class HealthWatch:
    """Decides what happens when a score is unhealthy: `on_unhealthy` is "warn", "uniform" or "raise".

    Args:
        on_unhealthy: What to do.
        explain: report -> the message.
        left_out: Whether an unhealthy score has no weight: by "uniform", or by the automatic temperature.
    """

    def __init__(
        self, on_unhealthy: str, explain: Callable[[Mapping[str, float]], str], *, left_out: bool = False
    ) -> None:
        self.on_unhealthy, self.explain, self.left_out, self.told = on_unhealthy, explain, left_out, False

    def look(self, report: Mapping[str, Any]) -> None:
        """Warn once, or raise.

        Raises:
            RuntimeError: If the score is unhealthy and on_unhealthy="raise".
        """
        if not report.get("unhealthy") or self.told:
            return
        message = self.explain(report)
        if self.on_unhealthy == "raise":
            raise RuntimeError(f'{message} (on_unhealthy="raise")')
        self.told = True
        warnings.warn(message + (" It is left out of the weights as long as that is so." if self.left_out else ""))
