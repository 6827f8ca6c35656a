"""`ResumingTrainer`: a `Trainer` that goes on after an interruption as if nothing had happened.

Read `train` (which checkpoint, and does it fit), `_save_checkpoint` (what is written, in which order), then the hooks
that put a resumed run where the interrupted one was.
"""

from __future__ import annotations

import math
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length, rotate_checkpoints

from hf_mimic.checkpoints import (
    last_complete,
    later_than,
    load_weights,
    loads_by_name,
    read_state,
    renew,
    unmark,
    write_run,
    write_state,
)


class ResumingTrainer(Trainer):
    """Resumes exactly, or says what it cannot resume.

    Weights are loaded under whatever names they were saved; a checkpoint counts once it is whole; a stream goes on in
    the pass and at the batch where it was; other processes or batch sizes restart the epoch.
    """

    model: nn.Module
    resumed_from: str | None
    _saved: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._saved, self.resumed_from = {}, None
        self._phases: list[dict[str, Any]] = []
        self._pass = self._batches_in_pass = self._skipped = 0
        self._place: tuple[int, int] | None = None
        self._run = ""
        self._pass_ended = False
        self.add_callback(_PassCallback(self))

    @property
    def current_pass(self) -> int:
        """How many passes over the data were begun before this one."""
        return max(self._pass, 0)

    def run_settings(self) -> dict[str, Any]:
        """Return the settings whose change makes a new phase of a run."""
        return {}

    def run_state(self) -> dict[str, Any]:
        """Return what else a checkpoint must hold, as JSON values."""
        return {}

    def before_resuming(self) -> None:
        """Take from `_saved` what a resumed run must go on with."""

    def before_save(self, folder: str) -> None:
        """Write what must be on the disk before the checkpoint in `folder` counts."""

    # ---- which checkpoint ------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint=True` takes the last checkpoint that was written to its end."""
        named = resume_from_checkpoint and not isinstance(resume_from_checkpoint, bool)
        self.resumed_from = str(resume_from_checkpoint) if named else None
        if resume_from_checkpoint is True:
            choice = [last_complete(str(self.args.output_dir)) if self.args.process_index == 0 else None]
            self.resumed_from = broadcast_object_list(choice)[0]
            if self.resumed_from is None:
                raise ValueError(f"{self.args.output_dir} must hold a complete checkpoint to resume from, found none.")
        self._saved = read_state(self.resumed_from) if self.resumed_from else {}
        self._run = self._saved.get("run") or uuid.uuid4().hex
        self._phases = list(self._saved.get("phases", []))
        if self._saved:
            self.before_resuming()
        self._compare_phase()
        return super().train(self.resumed_from, *args, **kwargs)

    def _compare_phase(self) -> None:
        settings, before = self.run_settings(), self._phases[-1]["settings"] if self._phases else None
        if before is not None:
            names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
            if not names:
                return
            changed = [f"{name}: {before.get(name)!r} -> {settings.get(name)!r}" for name in names]
            warnings.warn(
                f"the run is resumed with other settings ({'; '.join(changed)}): a new phase from step "
                f"{self._saved['step']} on. Scores of different phases cannot be ranked against each other; "
                "the phases are listed in mimic_state.json.",
                stacklevel=4,
            )
        self._phases.append({"step": self._saved.get("step", 0), "settings": settings})

    def _split(self) -> dict[str, int]:
        return {
            "processes": self.args.world_size,
            "batch_size": self._train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
        }

    @property
    def _restart_reason(self) -> str | None:
        """Why the epoch of the checkpoint must start over, if it must."""
        if not self._saved:
            return None
        if self._saved["split"] != self._split():
            return f"the checkpoint was made with {self._saved['split']}, the run goes on with {self._split()}"
        config = self.accelerator.dataloader_config
        skips_too_few = config.dispatch_batches and not config.split_batches and self.args.world_size > 1
        if skips_too_few and self._saved["batches_in_pass"] and has_length(self.train_dataset):
            return "with dispatch_batches=True accelerate skips the batches of one process only"
        return None

    # ---- where the run was -----------------------------------------------------------------------------------------

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple:
        """Return the Trainer's numbers; of a resumed run, with as many steps as are left to do after the checkpoint.

        NOTE: the Trainer takes `global_step // steps_per_epoch` for the epoch, which is wrong for the rest of a run
        whose steps ever had another size.
        """
        values = super().set_initial_training_values(args, dataloader)
        num_train_epochs, per_epoch, steps_in_epoch = args.num_train_epochs, values[1], values[5]
        self._place = None
        if not self._saved or (args.ignore_data_skip and self._restart_reason is None):
            return values
        begun, batches = self._saved["pass"], self._saved["batches_in_pass"]
        if self._restart_reason is not None:
            begun, batches = int(self._saved["epoch"]), 0
        elif batches >= steps_in_epoch:
            begun, batches = begun + 1, 0
        self._place = begun, batches
        if args.max_steps > 0:
            left = args.max_steps - self._saved["step"] + math.ceil(batches / args.gradient_accumulation_steps)
            return (max(values[0], begun + math.ceil(left / per_epoch)), *values[1:])
        done = begun * per_epoch + math.ceil(batches / args.gradient_accumulation_steps)
        return (*values[:-1], self._saved["step"] + max(math.ceil(num_train_epochs * per_epoch) - done, 0))

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        trained, skipped = super()._init_training_state(*args, **kwargs)
        if self._place is not None:
            trained, skipped = self._place
        if self._restart_reason is not None:
            warnings.warn(
                f"{self._restart_reason}: batches cannot be the same, so epoch {trained} starts over; scores so far are "
                "kept."
            )
        self._pass, self._skipped = trained - 1, skipped
        return trained, skipped

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Return the micro-batches of an optimizer step; counts them."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._batches_in_pass += len(batches)
        return batches, items

    # ---- the checkpoint --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        if self.args.should_save:
            unmark(folder)
        self.accelerator.wait_for_everyone()
        try:
            self.before_save(str(folder))
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        write_state(folder, self._state())
        renew(folder)
        # Only now may an older checkpoint go: until here it was the last complete one.
        rotate_checkpoints(
            output_dir=str(folder.parent),
            save_total_limit=limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def _state(self) -> dict[str, Any]:
        ended = self._pass_ended
        return {
            "run": self._run,
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            "pass": self._pass + ended,
            "batches_in_pass": 0 if ended else self._batches_in_pass,
            "split": self._split(),
            "phases": self._phases,
            **self.run_state(),
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled and loads_by_name(model or self.model, resume_from_checkpoint):
            load_weights(model or self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        folder = self.state.best_model_checkpoint
        if folder is not None and not self.is_fsdp_enabled and loads_by_name(self.model, folder):
            load_weights(self.model, folder)
        else:
            super()._load_best_model()


class _PassCallback(TrainerCallback):
    """Counts the passes over the data, and tells every sampler which one begins.

    NOTE: accelerate's `set_epoch` does not reach a sampler through `SkipBatchSampler(BatchSamplerShard(...))`: on
    several processes a run resumed in its second epoch would repeat the order of the first.
    """

    def __init__(self, trainer: ResumingTrainer) -> None:
        self.trainer, self._begun_at = trainer, (0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            write_run(args.output_dir, self.trainer._run, later_than(args.output_dir, state.global_step))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer._pass += 1
        trainer._pass_ended = False
        trainer._batches_in_pass, trainer._skipped = trainer._skipped, 0
        self._begun_at = state.global_step, trainer._batches_in_pass
        sampler = kwargs.get("train_dataloader")
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(trainer._pass)
            if isinstance(sampler, LengthGroupedSampler):  # would draw from the global generator
                seed = args.seed if args.data_seed is None else args.data_seed
                sampler.generator = torch.Generator().manual_seed(seed + trainer._pass)
            inner = getattr(sampler, "batch_sampler", None)
            sampler = getattr(sampler, "sampler", None) if inner is None else inner

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._pass_ended = True
        stops = control.should_training_stop or control.should_epoch_stop
        if self._begun_at == (state.global_step, 0) and self.trainer._batches_in_pass and not stops:
            raise ValueError(
                f"a pass over the data must fill one optimizer step, got {self.trainer._batches_in_pass} batches and "
                f"gradient_accumulation_steps={args.gradient_accumulation_steps}. Accumulate fewer, or repeat the stream."
            )
