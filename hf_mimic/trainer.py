"""`MimicTrainer`: a `Trainer` whose loss weights each sample by its mimic score, and which records every score.

Wiring only: losses.py, mimic.py and selection.py compute. `compute_loss` is the story; read it first.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_mimic.arguments import MimicTrainingArguments
from hf_mimic.data import SampleIdCollator, SampleIdDataset, read_sample_ids
from hf_mimic.losses import PerSampleLoss, loss_for_model, model_inputs
from hf_mimic.mimic import MimicDirection, MimicForward, direction_norm, mimic_forward
from hf_mimic.reference import Reference
from hf_mimic.scores import ScoreTable
from hf_mimic.selection import STRATEGIES, BatchSignals, effective_sample_size


class MimicTrainer(Trainer):
    """Fine-tune on data that is partly wrong: every sample counts as much as its gradient pulls toward a reference.

    Takes what `Trainer` takes. Evaluation is unweighted. The log has, beside the weighted `loss`, `plain_loss`,
    `mimic_score_mean`, `mimic_score_std`, `negative_share` (of scores), `effective_sample_size` (1 / sum w^2, as a
    share of the batch), `direction_norm` (||v||) and, where there were any, `nonfinite_samples`.

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
        ValueError: If the reference does not fit, no layer matches, ids are missing, or the set-up (DataParallel,
            several processes, FSDP, DeepSpeed) would make the scores wrong.

    References:
        Mimic Score and Grad-Mimic, arXiv 2501.06708.
    """

    # Our loss is a mean per micro-batch: the Trainer divides by the accumulation steps, whatever the model accepts.
    loss_is_scaled_for_ga = False
    args: MimicTrainingArguments
    model: nn.Module

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
        reference = args.reference_model if reference_model is None else reference_model
        if reference is None:
            raise ValueError(
                "`reference_model` must be a Hub repo id, a folder, a model or a state dict, got none. "
                "Without one there is nothing to mimic; use the plain Trainer."
            )
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "`compute_loss_func` must be None: pass a per-sample `loss_fn`, (outputs, batch) -> (B,)."
            )
        column = args.sample_id_column
        if isinstance(train_dataset, datasets.Dataset):
            read_sample_ids(train_dataset, column)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        self._check_engine()
        self.data_collator = SampleIdCollator(self.data_collator, column)
        self.can_return_loss = True  # the evaluation loss is ours too, also for models that are called without labels
        smoothing = args.label_smoothing_factor if self.label_smoother else 0.0  # the Trainer may have switched it off
        self.loss_fn = loss_fn or loss_for_model(self.model, smoothing)
        self._reference = reference
        self.direction = self._make_direction()
        self.scores = ScoreTable(args.scores_dir if args.record_scores else None)
        self._sums: dict[str, Tensor] = {}
        self._summed_steps = 0
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
            outputs = model(**model_inputs(batch))
            loss = self.loss_fn(outputs, batch).mean()
            return (loss, outputs) if return_outputs else loss
        forward, valid = self._score(model, batch)
        if forward is None:
            weights, outputs = valid.new_zeros(0, dtype=torch.float32), None
            zeros = [0 * p.sum() for p in model.parameters() if p.requires_grad]
            loss = torch.stack(zeros).sum()  # an optimizer step without gradient
        else:
            signals = BatchSignals(forward.losses.detach(), forward.scores)
            weights = STRATEGIES[self.args.strategy](signals, temperature=self.args.tau)
            loss, outputs = self._weighted(forward.losses, weights.to(forward.losses.dtype)), forward.outputs
        self._record(inputs.get(self.args.sample_id_column), forward, weights, valid)
        return (loss, outputs) if return_outputs else loss

    def _score(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[MimicForward | None, Tensor]:
        """Return the scored forward pass of the samples with finite losses, and which these are (B,)."""
        direction, buffers = self.direction(), [buffer.clone() for buffer in model.buffers()]
        forward = mimic_forward(model, batch, direction, self.loss_fn)
        valid = _is_finite(forward)
        if bool(valid.all()):
            return forward, valid
        # NOTE: a weight of 0 does not stop a NaN (0 * NaN in backward): the forward pass must do without the sample.
        size = len(valid)
        if not valid.any():  # a contrastive loss or batch norm spreads one sample's NaN over the batch
            valid = _has_finite_inputs(batch, valid)
        _restore(model, buffers)
        if valid.any() and not valid.all():
            rest = {k: v[valid] if isinstance(v, Tensor) and v.shape[:1] == (size,) else v for k, v in batch.items()}
            forward = mimic_forward(model, rest, direction, self.loss_fn)
            if bool(_is_finite(forward).all()):
                return forward, valid
            _restore(model, buffers)
        return None, torch.zeros_like(valid)

    def _weighted(self, losses: Tensor, weights: Tensor) -> Tensor:
        """Return sum w l; with reweight="mimic_layers", a loss of that value whose other gradients are the mean's."""
        weighted = (weights * losses).sum()
        if self.args.reweight == "all":
            return weighted
        mean = losses.mean()
        chosen = [p for p in self.direction.parameters.values() if p.requires_grad]
        grads = torch.autograd.grad(weighted - mean, chosen, retain_graph=True, allow_unused=True) if chosen else ()
        # (p - p.detach()) is zero and has gradient one: it adds what the chosen layers' gradient lacks.
        extra = [((p - p.detach()) * g).sum() for p, g in zip(chosen, grads, strict=True) if g is not None]
        return mean + sum(extra) + (weighted - mean).detach()

    # ---- records and logs ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _record(self, ids: Tensor | None, forward: MimicForward | None, weights: Tensor, valid: Tensor) -> None:
        stats: dict[str, Tensor] = {"nonfinite_samples": (~valid).sum().float()}
        rows = {name: torch.full(valid.shape, torch.nan, device=valid.device) for name in ("loss", "mimic_score")}
        relative = torch.zeros(valid.shape, device=valid.device)
        if forward is not None:
            scores, losses = forward.scores.float(), forward.losses.float()
            rows["loss"][valid], rows["mimic_score"][valid] = losses, scores
            # A sample alone in its batch has no one to compare with: its weight says nothing.
            relative[valid] = weights.float() * len(weights) if len(weights) > 1 else torch.nan
            stats |= {
                "plain_loss": losses.mean(),
                "mimic_score_mean": scores.mean(),
                "mimic_score_std": scores.std(correction=0),
                "negative_share": (scores < 0).float().mean(),
                "effective_sample_size": effective_sample_size(weights.float()) / len(weights),
                "direction_norm": forward.norm.float(),
            }
            self._summed_steps += 1
        for name, value in stats.items():
            self._sums[name] = self._sums.get(name, 0) + value
        if self.args.record_scores:
            if ids is None:
                raise ValueError(
                    f"every example must have an integer `{self.args.sample_id_column}` to record scores by, got none. "
                    "Let the data set's items have it, or train with record_scores=False."
                )
            epoch, step = int(self.state.epoch or 0), self.state.global_step
            self.scores.record(ids, epoch=epoch, step=step, relative_weight=relative, **rows)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log to the training logs."""
        if "loss" in logs and self._sums:
            values = dict(zip(self._sums, torch.stack(list(self._sums.values())).tolist(), strict=True))
            bad = values.pop("nonfinite_samples")
            logs |= {name: value / self._summed_steps for name, value in values.items()}
            if bad:
                logs["nonfinite_samples"] = bad
            self._sums, self._summed_steps = {}, 0
        super().log(logs, start_time)

    # ---- set-up ----------------------------------------------------------------------------------------------------

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate without the sample id, which models do not take."""
        inputs = {key: value for key, value in inputs.items() if key != self.args.sample_id_column}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Keep the id, and the columns that a transform needs; name the row of an image that does not decode."""
        if isinstance(dataset, datasets.Dataset):
            column = self.args.sample_id_column
            ids = read_sample_ids(dataset, column) if kwargs.get("is_training") else None
            if dataset.format["type"] != "custom":
                dataset = self._remove_unused_columns(dataset, description)
            dataset = SampleIdDataset(dataset, ids, column)
        return super()._get_dataloader(dataset, description, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if self.args.sample_id_column not in columns:
            columns.append(self.args.sample_id_column)

    def _make_direction(self) -> MimicDirection:
        direction = MimicDirection(
            self.model,
            self._reference,
            self.args.mimic_layers,
            kind=self.args.direction,
            base=self.args.reference_base_model,
            revision=self.args.reference_revision,
        )
        norm = direction_norm(direction()).item()
        if not math.isfinite(norm):
            raise ValueError(
                f"reference and model must be finite in the chosen layers, got ||v|| = {norm}. Look for NaN in their "
                "weights: one of the two has diverged."
            )
        if not norm:
            warnings.warn(
                "the reference equals the model in the chosen layers (||v|| = 0): there is no direction, so all "
                "weights are uniform until they differ, and then point back to the start. Start from another "
                "checkpoint, or choose other `mimic_layers`.",
                stacklevel=3,
            )
        return direction

    def _check_engine(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process must use one device, got {self.args.n_gpu} GPUs (DataParallel), which would split the "
                "batch that weights are normalised over. Set CUDA_VISIBLE_DEVICES to one GPU."
            )
        if self.args.world_size > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                f"MimicTrainer must run in a single process without sharding for now, got {self.args.world_size} "
                "processes. Launch it with python on one device."
            )


class _ScoreCallback(TrainerCallback):
    """Writes the scores of each epoch, and keeps those of an earlier run apart."""

    def __init__(self, trainer: MimicTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            moved = self.trainer.scores.set_aside()
            if moved is not None:
                warnings.warn(f"{args.scores_dir} held the scores of an earlier run; they are now in {moved}.")
        self.trainer._sums, self.trainer._summed_steps = {}, 0
        parameters = dict(self.trainer.model.named_parameters(remove_duplicate=False))
        name, known = next(iter(self.trainer.direction.parameters.items()))
        if parameters.get(name) is not known:  # `model_init` made another model
            self.trainer.direction = self.trainer._make_direction()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.scores.flush(args.process_index)

    on_save = on_epoch_end


def _is_finite(forward: MimicForward) -> Tensor:
    return torch.isfinite(forward.losses) & torch.isfinite(forward.scores)


def _has_finite_inputs(batch: Mapping[str, Any], like: Tensor) -> Tensor:
    """Return which samples have no NaN or infinity among their inputs (B,)."""
    valid = torch.ones_like(like)
    for value in batch.values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape[:1] == like.shape:
            valid &= torch.isfinite(value).flatten(1).all(1)
    return valid


@torch.no_grad()
def _restore(model: nn.Module, buffers: list[Tensor]) -> None:
    """Undo what a forward pass did to running statistics."""
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)
