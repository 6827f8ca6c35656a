"""`MimicTrainer`: a `Trainer` whose loss weights each sample by its mimic score, and which records every score.

Wiring only: mimic.py scores, selection.py and optimizer_step.py weigh, finite.py and padding.py say which samples
count, engine.py knows the processes, resuming.py and hub_trainer.py the checkpoints; the step is in scored_training.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_mimic.arguments import MimicTrainingArguments
from hf_mimic.batch_selection import BatchSelection
from hf_mimic.contrastive import NOT_FEATURES, clamp_scale, contrastive_loss, couples
from hf_mimic.data import SampleIdCollator, SampleIdDataset, read_sample_ids
from hf_mimic.engine import Engine, check_engine
from hf_mimic.hub_trainer import HubTrainer
from hf_mimic.ledger import Ledger
from hf_mimic.losses import COUNTED, PerSampleLoss, loss_for_model, model_inputs
from hf_mimic.micro_batch import batch_size
from hf_mimic.padding import EpochEnd
from hf_mimic.reference import Reference
from hf_mimic.reference_pass import ReferenceScores
from hf_mimic.reference_setup import ReferenceSetup
from hf_mimic.scored_training import ScoredTraining
from hf_mimic.scores import ScoreTable


class MimicTrainer(HubTrainer):
    """Fine-tune on data that is partly wrong: every sample counts as much as its gradient pulls toward a reference.

    Takes what `Trainer` takes. Evaluation is unweighted. The log has, beside the weighted `loss`, `plain_loss`,
    `mimic_score_mean`, `mimic_score_std`, `negative_share` (of scores), `effective_sample_size` (1 / sum w^2, as a
    share of the samples), `direction_norm` (||v||), where there were any `nonfinite_samples`, and the score's health:
    `score_fit_correlation`, `score_trust_correlation`, `unhealthy` (0 or 1), each absent where it is not known.

    Args:
        model: The student.
        args: A `MimicTrainingArguments`.
        data_collator: Any collator; it need not know the sample id.
        train_dataset: With an int64 column of unique ids; see `hf_mimic.data.add_sample_ids`.
        eval_dataset: As in `Trainer`.
        reference_model: A model or state dict in place of `args.reference_model`.
        loss_fn: (outputs, batch) -> (B,); by default the loss that the model is trained with.
        **kwargs: Of `Trainer`.

    Raises:
        ValueError: If the reference does not fit, no layer matches, ids are missing, or the engine (DataParallel,
            FSDP1, DeepSpeed, tensor parallelism) would make the scores wrong.

    References:
        Mimic Score and Grad-Mimic, arXiv 2501.06708.
    """

    # The weights of a whole optimizer step sum to one: nothing is left for the Trainer to divide by.
    loss_is_scaled_for_ga = True
    args: MimicTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: MimicTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        reference_model: Reference | None = None,
        loss_fn: PerSampleLoss | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, MimicTrainingArguments):
            raise TypeError(f"`args` must be a MimicTrainingArguments, got {type(args).__name__}.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "`compute_loss_func` must be None: pass a per-sample `loss_fn`, (outputs, batch) -> (B,)."
            )
        if isinstance(train_dataset, datasets.Dataset):
            _ids_of(train_dataset, args)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        check_engine(self, reweight=args.reweight)
        self.engine, self.epoch_end = Engine(self), EpochEnd(self.accelerator)
        self.data_collator = SampleIdCollator(self.data_collator, args.sample_id_column)
        self.can_return_loss = True  # the evaluation loss is ours too, also for models that are called without labels
        smoothing = args.label_smoothing_factor if self.label_smoother else 0.0  # the Trainer may have switched it off
        self.loss_fn = contrastive_loss(loss_fn or loss_for_model(self.model, smoothing), self.model, self)
        self.couples, self.ledger = couples(self.loss_fn), Ledger()
        self.reference = ReferenceSetup(self, args.reference_model if reference_model is None else reference_model)
        self.reference_scores: ReferenceScores | None = None
        self.reference.init_head()
        self.strategy = self.reference.choose_strategy()
        self.choice = BatchSelection(self)
        # NOTE: before FSDP has prepared the model, some processes may hold empty weights.
        self.direction: Any = None if self.is_fsdp_enabled else self.reference.direction()
        if self.direction is not None:
            self.reference.compare_heads()
        self.scores = ScoreTable(args.scores_dir if args.record_scores else None)
        self.training = ScoredTraining(self)
        self._ledger: dict[str, float] = {}
        self._runs = 0
        self.add_callback(_ScoreCallback(self))

    # ---- the step --------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return sum_i w_i l_i in training, the plain mean in evaluation."""
        batch = {key: value for key, value in inputs.items() if key != self.args.sample_id_column}
        if not model.training:
            return self._evaluation_loss(model, batch, return_outputs)
        loss, outputs = self.training.loss(model, batch, inputs.get(self.args.sample_id_column))
        return (loss, outputs) if return_outputs else loss

    def _evaluation_loss(self, model: nn.Module, batch: dict[str, Any], return_outputs: bool) -> Any:
        outputs = model(**model_inputs({k: v for k, v in batch.items() if k == "labels" or k not in self.label_names}))
        counted = self.epoch_end.counted_in_evaluation(batch_size(batch))
        if counted is None:
            loss = self.loss_fn(outputs, batch).mean()
        else:  # of a process that has repeated rows only, the Trainer leaves the loss out
            loss = self.loss_fn(outputs, {**batch, COUNTED: counted})[counted].mean()
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Run one micro-batch; return what the optimizer step's loss is once it is known, until then 0."""
        loss = super().training_step(model, *args, **kwargs)
        return self.training.finish() if self.accelerator.sync_gradients else torch.zeros_like(loss)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, None]:
        """Return the micro-batches of one optimizer step; how many labels they have does not matter here."""
        micro_batches, _ = super().get_batch_samples(*args, **kwargs)
        first = micro_batches[0] if micro_batches else {}
        self.epoch_end.fetched(micro_batches, first.get(self.args.sample_id_column))
        self.training.begin(micro_batches)
        return micro_batches, None

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> None:
        return None  # the Trainer would wait for all processes to count labels

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log to the training logs."""
        if "loss" in logs and "learning_rate" in logs:  # the Trainer's own: all processes are here
            logs |= self.training.log.pop(self.engine.gather) | self.training.weighing.report()
            if self.args.chooses or self.args.cache_negatives:
                logs |= self.ledger.report(self.engine.gather, self.args.device)
        super().log(logs, start_time)

    # ---- data ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """Return the Trainer's loader; take note of how its epochs end."""
        loader = super().get_train_dataloader()
        self.epoch_end.prepared(loader)
        return loader

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate without the sample id, which models do not take; an image-text model predicts its features."""
        inputs = {key: value for key, value in inputs.items() if key != self.args.sample_id_column}
        if not self.couples:
            return super().prediction_step(model, inputs, *args, **kwargs)
        kwargs["ignore_keys"] = [*(kwargs.pop("ignore_keys", None) or ()), *NOT_FEATURES]
        loss, features, labels = super().prediction_step(model, inputs, *args, **kwargs)
        return loss, features and features[::-1], labels  # the models have the text first

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Keep the id, and the columns that a transform needs; name the row of an image that does not decode."""
        if isinstance(dataset, datasets.Dataset):
            column = self.args.sample_id_column
            ids = _ids_of(dataset, self.args) if kwargs.get("is_training") else None
            if kwargs.get("sampler_fn") is not None:  # it may look at columns that are removed below
                kwargs["sampler_fn"] = partial(
                    lambda sampler_fn, rows, _: sampler_fn(rows), kwargs["sampler_fn"], dataset
                )
            if dataset.format["type"] != "custom":
                dataset = self._remove_unused_columns(dataset, description)
            dataset = SampleIdDataset(dataset, ids, column)
        if self.choice.in_epochs and description == "Training":
            return self.choice.loader(
                dataset, kwargs["sampler_fn"](dataset), args[0] if args else kwargs["batch_size"]
            )
        return super()._get_dataloader(dataset, description, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if self.args.sample_id_column not in columns:
            columns.append(self.args.sample_id_column)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def run_settings(self) -> dict[str, Any]:
        """Return what scores depend on."""
        names = ("direction", "weight_scope", "reweight", "on_unhealthy")
        settings = {"strategy": self.strategy} | {name: getattr(self.args, name) for name in names}
        if self.args.chooses:
            more = ("selection_rate", "refresh", "variant", "momentum", "warmup_epochs", "warmup_data")
            settings |= {name: getattr(self.args, name) for name in more}
        settings |= {"temperature": self.args.tau, "mimic_layers": list(self.args.mimic_layers)}
        return settings | self.reference.pinned.settings()

    def run_state(self) -> dict[str, Any]:
        """Return the running temperature, the health, the ledger, and how many rows of scores must be there."""
        state = {"ledger": self._ledger, "score_rows": self.scores.count_stored()}
        return {**self.training.weighing.state(), **state, "reference_asked": self.args.reference_revision}

    def before_resuming(self) -> None:
        """Read the reference where the interrupted run did."""
        self.reference.resume(self._saved)

    def before_save(self, folder: str) -> None:
        """Write the scores up to the checkpoint, and where direction="start" started."""
        self.scores.flush(self.args.process_index)
        self.reference.save_direction(folder)
        self.choice.save(folder)
        self._ledger = self.ledger.report(self.engine.gather, self.args.device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer` does; see `ResumingTrainer` for what a resumed run keeps."""
        self._runs = 0
        return super().train(*args, **kwargs)

    def begin_run(self) -> None:
        """Start from `state.global_step`: bind the direction to the prepared model, forget later scores."""
        step = self.state.global_step
        self.engine.prepared(self.model_wrapped)
        parameters = {id(p) for p in self.model.parameters()}
        known, restarts = self.direction is not None, self.args.direction == "start" and not step and not self._runs
        replaced = known and not parameters >= set(map(id, self.direction.parameters.values()))
        if not known or restarts or replaced:
            # FSDP replaced the parameters, `model_init` made others, or theta_0 is where they are now
            if replaced and not step:
                self.reference.init_head()
            self.direction = self.reference.direction(warn=not known)
        self.ledger.resume(self._saved.get("ledger", {}) if step and self.args.process_index == 0 else {})
        self.reference_scores = self.reference.scores(self.strategy, resumed=bool(step))
        self.choice.begin_run(resumed=bool(step))
        self.training = ScoredTraining(self)
        if step:
            self.training.weighing.resume(self._saved)
            self.reference.resume_direction(self.resumed_from)
            self.choice.resume(self.resumed_from)
        self.scores.forget()
        if self.args.process_index == 0:
            self._clear_scores(step)
        self._runs += 1
        self.accelerator.wait_for_everyone()

    def _clear_scores(self, step: int) -> None:
        if step or self._runs:  # resumed, or started again with a smaller batch by auto_find_batch_size
            self.scores.truncate(step)
            stored, expected = self.scores.count_stored(), self._saved.get("score_rows", 0)
            if step and stored < expected and self.args.record_scores:
                warnings.warn(
                    f"{expected - stored} of {expected} score rows of the steps before {step} are missing from "
                    f"{self.args.scores_dir}: shards were deleted, or the run goes on in another folder."
                )
        elif (moved := self.scores.set_aside()) is not None:
            warnings.warn(f"{self.args.scores_dir} held the scores of an earlier run; they are now in {moved}.")


def _ids_of(dataset: datasets.Dataset, args: MimicTrainingArguments) -> Any:
    """Return the ids (N,); None if there are none and none are needed."""
    needed = args.record_scores or args.sample_id_column in dataset.column_names
    return read_sample_ids(dataset, args.sample_id_column) if needed else None


class _ScoreCallback(TrainerCallback):
    """Begins a run, writes the scores of each epoch, and keeps those of an earlier run apart."""

    def __init__(self, trainer: MimicTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_run()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.choice.begin_epoch()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        clamp_scale(self.trainer.loss_fn, self.trainer.model, args.max_logit_scale)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.scores.flush(args.process_index)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.training.weighing.look()
        self.trainer.scores.flush(args.process_index)
        self.trainer.accelerator.wait_for_everyone()  # from here on every process reads the rows of all
