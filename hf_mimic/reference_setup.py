"""What a run takes from its reference: the head to start with, the direction, and what the reference says of the data.

Read `ReferenceSetup` in the order in which a run calls it.
"""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import IterableDataset, SequentialSampler

from hf_mimic.contrastive import couples
from hf_mimic.heads import head_cosine, init_head
from hf_mimic.health import likely_cause
from hf_mimic.layers import WORDS
from hf_mimic.losses import COUNTED, cross_entropy
from hf_mimic.micro_batch import MappedLoader, MicroBatch, batch_size
from hf_mimic.mimic import MimicDirection, direction_norm
from hf_mimic.pinned import PinnedReference
from hf_mimic.reference import Reference
from hf_mimic.reference_pass import ReferenceScores, reference_bar, runnable_tensors, score_reference
from hf_mimic.selection import RUN_THE_REFERENCE
from hf_mimic.sharding import units, whole

DIRECTION_NAME = "mimic_direction.safetensors"
SCORES_NAME = "reference_scores.parquet"
logger = logging.getLogger(__name__)


class NoDirection:
    """The direction of a run without a reference: there is none, and no score."""

    parameters: ClassVar[dict[str, Tensor]] = {}

    def __call__(self) -> None:
        """Return None."""


class ReferenceSetup:
    """The reference of one trainer.

    Args:
        trainer: The `MimicTrainer`.
        reference: A Hub repo id, a folder, a model or a state dict; None for a run that only chooses.
    """

    def __init__(self, trainer: Any, reference: Reference | None) -> None:
        self.trainer, self.args = trainer, trainer.args
        self.reference: Any = reference
        self.pinned = PinnedReference(reference, self.args)
        self.head_cosine: float | None = None
        self._first_norm: float | None = None

    @property
    def sha(self) -> str | None:
        """The commit at which all of the reference is read; None for what is not on the Hub."""
        return self.pinned.sha

    # ---- before training -------------------------------------------------------------------------------------------

    def init_head(self) -> None:
        """Do what `head_init` asks for.

        Raises:
            ValueError: If the model has no classification head to set to zero, or the reference's does not fit.
        """
        how, model = self.args.head_init, self.trainer.model
        if self.reference is None and how == "reference":
            raise ValueError('`head_init`="reference" needs a `reference_model`, got none. Use "keep" or "zero".')
        if self.trainer.is_fsdp_enabled:
            if how != "keep":
                raise ValueError(
                    f'`head_init` must be "keep" with FSDP, got {how!r}: some processes hold empty weights. Set the '
                    "head before (hf_mimic.heads.init_head) and save the checkpoint."
                )
            return
        if how != "keep":
            changed = init_head(model, self.reference, how, revision=self.sha)
            logger.warning("head_init=%r: %s of the model were replaced.", how, ", ".join(changed))

    def compare_heads(self) -> None:
        """Find out whether the two heads belong together, if the reference's is read anyway."""
        if self.reference is None:
            return
        trainer, head = self.trainer, set(WORDS["head"](self.trainer.model))
        if head and (trainer.strategy in RUN_THE_REFERENCE or head <= set(trainer.direction.names)):
            self.head_cosine = head_cosine(trainer.model, self.reference, revision=self.sha)

    def choose_strategy(self) -> str:
        """Return the strategy; for "auto", "trust" where the reference can judge labels, otherwise "mimic"."""
        given = self.args.strategy
        if self.reference is None and self.args.needs_reference:
            raise ValueError(
                f'`reference_model` must be a Hub repo id, a folder, a model or a state dict for strategy="{given}", got '
                "none. Without one there is nothing to mimic; choose a strategy that needs none (dissect, random, "
                "small_loss ...), or use the plain Trainer."
            )
        if given not in ("auto", *RUN_THE_REFERENCE):
            return given
        reason = self._cannot_run(given)
        if reason is None:
            return "trust" if given == "auto" else given
        if given != "auto":
            raise ValueError(f'strategy="{given}" runs the reference over the training data once, but {reason}.')
        logger.warning('strategy="auto" is "mimic": %s.', reason)
        return "mimic"

    def _cannot_run(self, strategy: str) -> str | None:
        trainer, rows = self.trainer, self.trainer.train_dataset
        remedy = 'use strategy="mimic", which only reads its weights'
        if rows is None:
            return None if strategy != "auto" else "there are no training data"
        if isinstance(rows, IterableDataset) or not hasattr(rows, "__len__"):
            return f"the data are a stream; {remedy}"
        if trainer.is_fsdp_enabled or units(trainer.model):
            return f"the model is sharded by FSDP; {remedy}"
        loss = getattr(trainer.loss_fn, "func", trainer.loss_fn)
        if strategy in ("auto", "trust") and loss is not cross_entropy:
            return f"the loss is not the cross-entropy of class labels; {remedy}" + ', or strategy="ref_loss"'
        if strategy.startswith("ref_clip") and not trainer.couples:
            return f"it chooses by CLIPScores of image-text pairs, and these are none; {remedy}"
        if not _has_ids(rows, self.args.sample_id_column):
            return f"the samples have no `{self.args.sample_id_column}`; {remedy}"
        try:
            runnable_tensors(trainer.model, self.reference, revision=self.sha)
        except ValueError as error:
            return f"it cannot be run ({error}); {remedy}"
        return None

    def direction(self, *, warn: bool = True) -> MimicDirection | NoDirection:
        """Return v, checked; without a reference, what gives no v."""
        if self.reference is None:
            return NoDirection()
        direction = MimicDirection(
            self.trainer.model,
            self.reference,
            self.args.mimic_layers,
            kind=self.args.direction,
            base=self.pinned.base,
            revision=self.sha,
            base_revision=self.pinned.base_sha,
        )
        norm = direction_norm(direction()).item()
        if not math.isfinite(norm):
            raise ValueError(
                f"reference and model must be finite in the chosen layers, got ||v|| = {norm}. Look for NaN in their "
                "weights: one of the two has diverged."
            )
        if warn and not norm:
            warnings.warn(
                "the reference equals the model in the chosen layers (||v|| = 0): there is no direction, so all "
                "weights are uniform until they differ, and then point back to the start. Start from another "
                "checkpoint, or choose other `mimic_layers`.",
                stacklevel=4,
            )
        self._first_norm = norm
        return direction

    # ---- when training begins --------------------------------------------------------------------------------------

    def scores(self, strategy: str, *, resumed: bool) -> ReferenceScores | None:
        """Return what the reference says of the training data, for strategies that use it.

        It is saved in `output_dir`, so that a resumed run sees the same; made anew if it is of another reference or of
        other data.
        """
        if strategy not in RUN_THE_REFERENCE:
            return None
        rows, path = self.trainer.train_dataset, Path(self.args.output_dir) / SCORES_NAME
        tensors = runnable_tensors(self.trainer.model, self.reference, revision=self.sha)
        fingerprint = _fingerprint(tensors, rows, self.args.sample_id_column)
        kept = [
            ReferenceScores.load(path, fingerprint=fingerprint) if resumed and not self.args.process_index else None
        ]
        scores = broadcast_object_list(kept)[0]
        if scores is None:
            scores = self._run(tensors)
            if self.args.process_index == 0:
                scores.save(path, fingerprint=fingerprint)
        return scores

    def _run(self, tensors: Mapping[str, Tensor]) -> ReferenceScores:
        trainer, args = self.trainer, self.args
        # A loss that couples samples depends on how many there are; others may take as many as fit.
        size = args.train_batch_size if couples(trainer.loss_fn) else max(args.train_batch_size, args.eval_batch_size)
        drops, args.dataloader_drop_last = args.dataloader_drop_last, False
        try:
            loader = trainer._get_dataloader(
                trainer.train_dataset, "Reference", size, sampler_fn=SequentialSampler, is_training=True
            )
        finally:
            args.dataloader_drop_last = drops
        scores = score_reference(
            trainer.model,
            tensors,
            reference_bar(MappedLoader(loader, self._told), show=args.process_index == 0 and not args.disable_tqdm),
            trainer.loss_fn,
            sample_id_column=args.sample_id_column,
            gather=gather_object if args.world_size > 1 else None,
            anywhere=trainer.engine.anywhere if self._shares else bool,
        )
        trainer.ledger.add(samples_reference=len(trainer.train_dataset) if args.process_index == 0 else 0)
        if scores.noise_rate is not None:
            logger.info(
                "by the reference's predictions about %.1f %% of the labels are wrong", 100 * scores.noise_rate
            )
        return scores

    @property
    def _shares(self) -> bool:
        return getattr(self.trainer.loss_fn, "processes", 1) > 1

    def _told(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch with a word on which rows count, for a loss over the pairs of all processes."""
        if not self._shares:
            return batch
        counted = self.trainer.epoch_end.counted_in_evaluation(batch_size(batch))
        return {**batch, COUNTED: counted} if counted is not None else dict(MicroBatch(batch).telling().inputs)

    def explain(self, report: Mapping[str, float]) -> str:
        """Say what is likely wrong with an unhealthy score."""
        norm = direction_norm(self.trainer.direction()).item()
        share = norm / self._first_norm if self._first_norm else None
        return likely_cause(report, head_cosine=self.head_cosine, norm_share=share)

    def save_direction(self, folder: str) -> None:
        """Write where direction="start" started."""
        if self.args.direction != "start" or self.reference is None:
            return
        tensors = {name: whole(v).cpu().contiguous() for name, v in self.trainer.direction().items()}
        if self.args.should_save:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(tensors, str(Path(folder) / DIRECTION_NAME))

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Go on with the commits of the interrupted run, where a branch has moved since; `saved` is its checkpoint's."""
        before = saved["phases"][-1]["settings"] if saved.get("phases") else {}
        if self.pinned.resume(before, saved.get("reference_asked")) and self.trainer.direction is not None:
            self.trainer.direction = self.direction(warn=False)
            self.compare_heads()

    def resume_direction(self, folder: str | None) -> None:
        """Take theta_0 from where the interrupted run started, not from the model that was given now."""
        path = Path(folder or "") / DIRECTION_NAME
        if self.args.direction != "start" or self.reference is None:
            return
        if path.is_file():
            self.trainer.direction.restart(load_file(str(path)))
        else:
            warnings.warn(
                f'{path} is missing: direction="start" now starts from the model that was given, not from where the '
                "interrupted run started."
            )


def _fingerprint(tensors: Mapping[str, Tensor], rows: Any, column: str) -> str:
    """Return a hash of the reference's weights, and of the number, the ids and the labels of the rows."""
    found = hashlib.sha256(str(len(rows)).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.double().sum().item()!r} {tensor.double().abs().sum().item()!r}".encode())
    if isinstance(rows, Dataset):
        plain = rows.with_format("numpy")
        for name in (column, "label", "labels"):
            if name in rows.column_names:
                found.update(np.asarray(plain.select_columns([name])[:][name]).tobytes())
    return found.hexdigest()


def _has_ids(rows: Any, column: str) -> bool:
    names = getattr(rows, "column_names", None)
    if names is not None:
        return column in names
    return len(rows) > 0 and isinstance(rows[0], Mapping) and column in rows[0]
