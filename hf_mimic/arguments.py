"""`MimicTrainingArguments`: what a mimic run adds to `TrainingArguments`, and the checks on it."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from transformers import TrainingArguments

from hf_mimic.checks import check_choice
from hf_mimic.heads import HEAD_INITS
from hf_mimic.mimic import DIRECTIONS
from hf_mimic.selection import NEED_A_REFERENCE, ONLY_SELECT, STRATEGIES

_CHOICES: dict[str, tuple[str, ...]] = {
    "direction": DIRECTIONS,
    "reweight": ("all", "mimic_layers"),
    "weight_scope": ("global", "device"),
    "strategy": ("auto", *STRATEGIES),
    "head_init": HEAD_INITS,
    "on_unhealthy": ("warn", "uniform", "raise"),
    "refresh": ("step", "epoch"),
    "variant": ("warmup", "momentum"),
    "warmup_data": ("full", "selected"),
}

_RATES = {"scan": 0.7}  # where it is not half of the samples


@dataclass
class MimicTrainingArguments(TrainingArguments):
    """`TrainingArguments` of a run that scores its samples against a reference model.

    Args:
        reference_model: Hub repo id or folder of the reference. For scores only the chosen tensors are read; for
            strategies that run it, all of them.
        reference_revision: Branch, tag or commit of the reference's Hub repo. A branch is looked up once: a run, resumed
            or not, reads one commit.
        reference_base_model: The checkpoint that the reference was fine-tuned from, for direction="task_vector"; by
            default the one that the reference's card names.
        mimic_layers: Parameters to score with: "head", "last_mlp", "last_block", "all", names, suffixes or regular
            expressions.
        direction: "current" (reference minus present weights, the paper's), "start" (minus the weights at the start)
            or "task_vector" (reference minus its base).
        temperature: tau of softmax(score / tau): a positive number, or "auto", from the scores of earlier steps
            (weight_scope="device": of the micro-batch). The score then counts by how much it agreed with the trust
            (strategy="trust") or with the model's own fit ("mimic": down to an effective sample size of about half),
            not at all where it contradicted them. "ref_loss", "rho_loss", "small_loss": half of the samples.
        strategy: How samples get weights: "trust" (the probability that the label is right, by the reference's
            predictions and the mimic score; runs the reference once over the data), "mimic" (the paper's;
            the reference is only read), "ref_loss", "rho_loss" (both run the reference), "small_loss", "uniform" (train
            plainly and only record), or "auto": "trust" where the reference can judge labels, otherwise "mimic". Those
            that only choose: "random", "big_loss", "clip_score", "dissect", "dissect_mimic" (which also weighs what it
            chose), "scan", "info_batch", "ref_clip_score" and "ref_clip_loss" (a coreset, once). No reference is needed
            for "uniform", "small_loss" and those that only choose, but for the last two and "dissect_mimic".
        selection_rate: Share of each batch to train on, the best by the strategy, with equal weights; by default 0.5 for the
            strategies that only choose (0.7 for "scan") and 1 for the others.
        refresh: When DISSect and "random" choose: "step" (in the step, from the scores of the present model, as in the
            paper) or "epoch" (before loading, from scores of earlier epochs, so that the rest costs nothing).
        variant: Of DISSect: "warmup" (history is the score at the end of the warm-up) or "momentum" (a moving average).
        momentum: Of the moving average.
        warmup_epochs: Of variant="warmup".
        warmup_data: What to train on meanwhile: "full" batches or a random share "selected".
        rescore_share: Of the data set, scored again before each epoch with refresh="epoch".
        head_init: The head to start with: "keep" the model's, "zero", or the "reference"'s. Heads that were initialised
            apart turn the mimic score around in full fine-tuning.
        on_unhealthy: What happens when the mimic score says nothing or has turned around: "warn", "uniform" (warn, and
            leave it out of the weights as long as it does; the automatic temperature does so anyway) or "raise".
        reweight: Which parameters get the weighted gradient: "all", or "mimic_layers" (the others get the plain mean).
        weight_scope: The group over which weights are normalised: "global" (the whole optimizer step: all processes
            and accumulated micro-batches) or "device" (each micro-batch of each process, as in the papers).
        gather_negatives: Contrastive losses (CLIP, SigLIP): the pairs of all processes are each other's negatives, with
            gradient; False for those of the same process only, as the Trainer does.
        cache_negatives: The pairs of the whole optimizer step are each other's negatives (GradCache), with the memory of
            one micro-batch, for one more forward pass.
        multi_positive: Pairs with the same caption are right for each other, not negatives.
        max_logit_scale: After every step exp(logit_scale) of a softmax contrastive loss is at most this (CLIP's 100);
            0: no limit.
        sample_id_column: int64 column of the train data set that identifies a sample.
        record_scores: Write every visit to <output_dir>/scores.
        self_check_steps: Compare gradient and scores on the first step and then every so many steps; 0: on the first
            step only, -1: never. Not possible where a chosen parameter is frozen.
    """

    reference_model: str | None = field(default=None)
    reference_revision: str | None = field(default=None)
    reference_base_model: str | None = field(default=None)
    mimic_layers: list[str] = field(default_factory=lambda: ["head"])
    direction: str = field(default="current")
    temperature: str = field(default="auto")
    strategy: str = field(default="auto")
    selection_rate: float | None = field(default=None)
    refresh: str = field(default="step")
    variant: str = field(default="warmup")
    momentum: float = field(default=0.9)
    warmup_epochs: int = field(default=1)
    warmup_data: str = field(default="full")
    rescore_share: float = field(default=0.1)
    head_init: str = field(default="keep")
    on_unhealthy: str = field(default="warn")
    reweight: str = field(default="all")
    weight_scope: str = field(default="global")
    gather_negatives: bool = field(default=True)
    cache_negatives: bool = field(default=False)
    multi_positive: bool = field(default=False)
    max_logit_scale: float = field(default=100.0)
    sample_id_column: str = field(default="sample_id")
    record_scores: bool = field(default=True)
    self_check_steps: int = field(default=0)

    def __post_init__(self) -> None:
        self._join_processes()
        super().__post_init__()
        if isinstance(self.mimic_layers, str):
            self.mimic_layers = [self.mimic_layers]
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        if self.selection_rate is None:
            self.selection_rate = _RATES.get(self.strategy, 0.5) if self.strategy in ONLY_SELECT else 1.0
        if self.strategy == "uniform" and self.selection_rate < 1:
            raise ValueError(
                f'`selection_rate` must be 1 with strategy="uniform", which trains on everything, got {self.selection_rate}. '
                'Use strategy="random" to train on a random share.'
            )
        if not 0 < self.selection_rate <= 1:
            raise ValueError(
                f"`selection_rate` must be in (0, 1], got {self.selection_rate}. Use 1.0 to train on every sample."
            )
        self._check_temperature()
        self._check_smoothing()
        self._check_engine()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the token out: the Trainer pickles its arguments into training_args.bin, which it pushes to the Hub."""
        return {**self.__dict__, "hub_token": None}

    def __copy__(self) -> MimicTrainingArguments:
        """Copy with the token."""
        return self._with(dict(self.__dict__))

    def __deepcopy__(self, memo: dict[int, Any]) -> MimicTrainingArguments:
        """Copy with the token."""
        return self._with(copy.deepcopy(self.__dict__, memo))

    def _with(self, values: dict[str, Any]) -> MimicTrainingArguments:
        made = object.__new__(type(self))
        made.__dict__.update(values)
        return made

    def _join_processes(self) -> None:
        """Let `ddp_timeout` hold on the CPU too, where transformers 5.23 starts the process group without it."""
        launched = int(os.environ.get("WORLD_SIZE", 1)) > 1 and "MASTER_ADDR" in os.environ
        if self.use_cpu and launched and dist.is_available() and not dist.is_initialized():
            dist.init_process_group(self.ddp_backend or "gloo", timeout=timedelta(seconds=self.ddp_timeout))

    @property
    def tau(self) -> float | str:
        """The temperature as a number, or "auto"."""
        return self.temperature if self.temperature == "auto" else float(self.temperature)

    @property
    def chooses(self) -> bool:
        """Whether some samples are not trained on."""
        return self.rate < 1

    @property
    def rate(self) -> float:
        """The selection rate as a number."""
        return 1.0 if self.selection_rate is None else self.selection_rate

    @property
    def needs_reference(self) -> bool:
        """Whether the strategy can do nothing without a reference."""
        return self.strategy in NEED_A_REFERENCE

    @property
    def scores_dir(self) -> str:
        """The folder of the score table."""
        return os.path.join(str(self.output_dir), "scores")

    def _check_temperature(self) -> None:
        try:
            valid = self.temperature == "auto" or float(self.temperature) > 1e-30
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise ValueError(
                f'`temperature` must be a positive number or "auto", got {self.temperature!r}. '
                'Use "auto", or strategy="uniform" for equal weights.'
            )

    def _check_smoothing(self) -> None:
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(f"`label_smoothing_factor` must be in [0, 1), got {self.label_smoothing_factor}.")

    def _check_engine(self) -> None:
        if self.use_liger_kernel:
            raise ValueError(
                "`use_liger_kernel` must be False: its fused loss returns no logits, so there is no per-sample loss."
            )
        if self.torch_compile and self.reweight == "mimic_layers":
            raise ValueError(
                '`reweight`="mimic_layers" must have `torch_compile`=False, got True: compiled code cannot be '
                'differentiated twice. Use reweight="all".'
            )
        checkpointing: Any = self.activation_checkpointing_kwargs or {}
        if self.reweight == "mimic_layers" and checkpointing.get("use_reentrant"):
            raise ValueError(
                '`reweight`="mimic_layers" must have checkpointing with use_reentrant=False, got True, which hides the '
                'layers inside from `torch.autograd.grad`. Use the default checkpointing, or reweight="all".'
            )
        if self.cache_negatives and self.reweight == "mimic_layers":
            raise ValueError(
                '`cache_negatives` must be False with `reweight`="mimic_layers", got True: features have one gradient '
                'only. Use reweight="all".'
            )
        if self.max_logit_scale < 0:
            raise ValueError(f"`max_logit_scale` must be positive, or 0 for no limit, got {self.max_logit_scale}.")
        if self.self_check_steps < -1:
            raise ValueError(
                f"`self_check_steps` must be -1 (never), 0 (the first step) or a number of steps, got "
                f"{self.self_check_steps}."
            )
