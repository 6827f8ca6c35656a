"""Score a whole data set with a frozen model: a `ScoreTable` without training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_mimic.data import SAMPLE_ID, SampleIdCollator, SampleIdDataset, read_sample_ids
from hf_mimic.losses import PerSampleLoss, clip_score, loss_for_model
from hf_mimic.micro_batch import MappedLoader
from hf_mimic.mimic import direction_norm, eval_mode, mimic_forward
from hf_mimic.reference import Reference
from hf_mimic.reference_pass import reference_bar, runnable_tensors, score_reference
from hf_mimic.scores import ScoreTable

if TYPE_CHECKING:
    from datasets import Dataset


@torch.no_grad()
def score_dataset(
    model: nn.Module,
    dataset: Dataset,
    direction: Mapping[str, Tensor],
    *,
    reference: Reference | None = None,
    loss_fn: PerSampleLoss | None = None,
    batch_size: int = 32,
    sample_id_column: str = SAMPLE_ID,
    **loader_options: Any,
) -> ScoreTable:
    """Score every sample with the model as it is, at about the cost of one forward pass over the data set.

    All samples see the same weights, so their scores can be ranked against each other; scores recorded in training
    cannot, across steps. There are no relative weights: nothing was trained.

    Args:
        model: The student, on its device; it runs in eval mode.
        dataset: Rows as the model takes them (or with a transform that makes them so), with unique integer ids.
        direction: Parameter name to v, from `reference_direction`.
        reference: Hub repo id, folder, model or state dict; if given, the reference is run too, for another forward pass
            over the data set: `ref_loss`, and `ref_trust` where the model classifies. Of another revision than `main`:
            what `hf_mimic.reference_pass.runnable_tensors` returns.
        loss_fn: (outputs, batch) -> (B,); by default the loss that the model is trained with.
        batch_size: Samples per forward pass; contrastive losses depend on it.
        sample_id_column: Name of the id column.
        **loader_options: Of the `DataLoader`, `num_workers` for instance; `collate_fn` is transformers'
            `default_data_collator` by default.

    Returns:
        One row per sample, in memory.

    Raises:
        ValueError: If ids are missing or repeated, an image does not decode (its row is named), or the reference lacks
            a tensor that it must have to be run.
        TypeError: If the data set is a stream.
    """
    from tqdm.auto import tqdm
    from transformers import default_data_collator

    check_rows(dataset)
    collate = SampleIdCollator(loader_options.pop("collate_fn", default_data_collator), sample_id_column)
    loader = torch.utils.data.DataLoader(
        SampleIdDataset(dataset, read_sample_ids(dataset, sample_id_column), sample_id_column),
        batch_size=batch_size,
        collate_fn=collate,
        **loader_options,
    )
    loss_fn = loss_fn or loss_for_model(model)
    device = next(model.parameters()).device
    if not direction_norm(direction):
        warnings.warn(
            "the reference equals the model in the chosen layers (||v|| = 0): every score is 0.", stacklevel=2
        )
    table, judged = ScoreTable(), None
    if reference is not None:
        tensors = runnable_tensors(model, reference)
        batches = reference_bar(MappedLoader(loader, partial(to_device, device=device)))
        judged = score_reference(model, tensors, batches, loss_fn, sample_id_column=sample_id_column)
    with eval_mode(model):
        for step, batch in enumerate(tqdm(loader, desc="scoring", unit="batch")):
            ids = batch.pop(sample_id_column)
            values = score_columns(model, to_device(batch, device), direction, loss_fn)
            if judged is not None:
                values |= dict(zip(("ref_loss", "ref_trust"), judged.lookup(ids), strict=True))
            table.record(ids, epoch=0, step=step, **values)
    return table


def check_rows(dataset: Any) -> None:
    """Raise if the data set is a stream.

    Raises:
        TypeError: Which says what to do.
    """
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"the data set must have rows that can be asked for by number, got a {type(dataset).__name__}: a pass that "
            "was killed could not find in a stream where to go on. Load it without streaming, or write the stream to "
            "Parquet (in several files if need be, one pass for each) and score that."
        )


def score_columns(
    model: nn.Module, batch: Mapping[str, Any], direction: Mapping[str, Tensor], loss_fn: PerSampleLoss
) -> dict[str, Tensor]:
    """Return the columns of a score table (B,) that a frozen model gives, in eval mode and without gradient.

    Args:
        model: On the device of the batch.
        batch: B samples without ids.
        direction: Parameter name to v.
        loss_fn: (outputs, batch) -> (B,).
    """
    forward = mimic_forward(model, batch, direction, loss_fn)
    values = {"loss": forward.losses, "mimic_score": forward.scores}
    if hasattr(forward.outputs, "image_embeds"):
        values["clip_score"] = clip_score(forward.outputs)
    return values


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the batch with its tensors on a device."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
