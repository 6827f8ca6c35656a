"""One pass of the reference over a data set, without gradient: its loss of every sample, and its trust in the label.

Read `as_reference` (a model that computes with the reference's weights), then `score_reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from hf_mimic.files import write_atomically
from hf_mimic.finite import finite_forward, without_trace
from hf_mimic.hub_files import pin
from hf_mimic.losses import PerSampleLoss, clip_score
from hf_mimic.mimic import eval_mode, mimic_forward
from hf_mimic.reference import Reference, read_config, read_tensors, stored_tensors

_COLUMNS = ["sample_id", "ref_loss", "ref_trust", "ref_clip_score"]
_PARTS = ("vision_config", "text_config")
_SHAPE = ("model_type", "num_hidden_layers", "depths", "num_attention_heads", "patch_size", "hidden_act")


def runnable_tensors(model: nn.Module, reference: Reference, *, revision: str | None = None) -> dict[str, Tensor]:
    """Return the reference's tensors by the model's names: all that it has, and at least all that are trained.

    Frozen parameters and buffers that the reference lacks are the model's own. A LoRA that it lacks, because it was
    fine-tuned without one, counts as 0.

    Raises:
        ValueError: If a trained tensor is missing or has another shape.
        FileNotFoundError: If there is no safetensors file.
    """
    own = stored_tensors(model)
    revision = pin(reference, revision)
    _check_architecture(model, reference, revision)
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    lora = {name for name in trained if ".lora_A." in name or ".lora_B." in name}
    found = read_tensors(reference, model, own, revision=revision, optional={*own} - trained | lora)
    if not lora & found.keys():
        found |= {name: torch.zeros_like(own[name]) for name in lora}
    statistics = {name for name in own if name.endswith(("running_mean", "running_var"))}
    if missing := (lora | statistics) - found.keys():
        raise ValueError(
            f"the reference must have every tensor that its outputs depend on, {min(missing)} is not in it. Give it as a "
            "folder, a Hub repo id or a whole state dict."
        )
    if not found:
        raise ValueError("the reference must have tensors of the model, got none.")
    return found


def _check_architecture(model: nn.Module, reference: Reference, revision: str | None) -> None:
    """Raise if the reference has more to it than the model has a place for: it would be another model that is run."""
    if isinstance(reference, nn.Module):
        if hasattr(reference, "peft_config") and not hasattr(model, "peft_config"):
            raise ValueError(
                "the reference must have no adapter that the model has not, got a PEFT model. Merge it: "
                "reference.merge_and_unload()."
            )
        theirs: Any = getattr(getattr(reference, "config", None), "to_dict", dict)()
    else:
        theirs = read_config(reference, revision=revision) if isinstance(reference, (str, Path)) else {}
    own: Any = getattr(getattr(model, "config", None), "to_dict", dict)()
    for mine, other in ((own, theirs), *((own.get(n) or {}, theirs.get(n) or {}) for n in _PARTS)):
        for name in _SHAPE:
            if name in mine and name in other and _plain(mine[name]) != _plain(other[name]):
                raise ValueError(
                    f"the reference must have the model's architecture to be run, got {name}={other[name]} instead of "
                    f"{mine[name]}."
                )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


@contextmanager
def as_reference(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Within the context the model has the reference's weights, in eval mode and without gradient.

    Args:
        model: Whose architecture it is; every tensor is put back afterwards.
        tensors: From `runnable_tensors`.
    """
    own = stored_tensors(model)
    before = {name: own[name].data for name in tensors}
    with without_trace(model), eval_mode(model):
        try:
            for name, tensor in tensors.items():
                own[name].data = tensor.to(own[name].device, own[name].dtype)
            yield model
        finally:
            for name, data in before.items():
                own[name].data = data


class ReferenceScores:
    """What the reference says of N samples, float32: its loss, P(the label is right), CLIPScore of a pair.

    Args:
        ids: Sample ids (N,), any order; a repeated one counts once.
        losses: (N,); NaN where it is not finite.
        trust: (N,); NaN where it is not known.
        clip_scores: (N,); None where samples are no pairs.
        noise_rate: Estimated share of wrong labels; None without a trust.
    """

    def __init__(
        self,
        ids: np.ndarray,
        losses: np.ndarray,
        trust: np.ndarray,
        *,
        clip_scores: np.ndarray | None = None,
        noise_rate: float | None = None,
    ) -> None:
        self.ids, first = np.unique(ids, return_index=True)
        self.losses = np.where(np.isfinite(losses), losses, np.nan)[first].astype(np.float32)
        self.trust = trust[first].astype(np.float32)
        clip_scores = np.full(len(ids), np.nan) if clip_scores is None else clip_scores
        self.clip_scores = clip_scores[first].astype(np.float32)
        self.noise_rate = noise_rate
        self._tensors: tuple[Tensor, ...] | None = None

    def lookup(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return `ref_loss` and `ref_trust` of samples (B,), on the device of `ids`; NaN for unknown ones."""
        losses, trust, _ = self.find(ids)
        return losses, trust

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `ref_loss`, `ref_trust` and the CLIPScore of samples (B,), as `lookup` does."""
        if self._tensors is None or self._tensors[0].device != ids.device:
            columns = (self.ids, self.losses, self.trust, self.clip_scores)
            self._tensors = tuple(torch.from_numpy(column).to(ids.device) for column in columns)
        known, *values = self._tensors
        place = torch.searchsorted(known, ids).clamp_max(len(known) - 1)
        there = known[place] == ids
        losses, trust, clip_scores = (torch.where(there, column[place], torch.nan) for column in values)
        return losses, trust, clip_scores

    def save(self, path: str | Path, *, fingerprint: str = "") -> None:
        """Write the columns as Parquet, whole or not at all; see `load`."""
        known = (self.losses, self.trust, self.clip_scores)
        table = pa.table([pa.array(self.ids)] + [pa.array(c, mask=np.isnan(c)) for c in known], names=_COLUMNS)
        table = table.replace_schema_metadata({"fingerprint": fingerprint})
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), lambda file: pq.write_table(table, file, compression="zstd"))

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str = "") -> ReferenceScores | None:
        """Read what `save` wrote; None if there is no whole file, or it is of another reference or other data."""
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowInvalid):
            return None
        if (table.schema.metadata or {}).get(b"fingerprint") != fingerprint.encode():
            return None
        if table.column_names != _COLUMNS:
            return None
        ids, losses, trust, clip_scores = (table[name].to_numpy() for name in _COLUMNS)
        return cls(ids, losses.astype(float), trust.astype(float), clip_scores=clip_scores.astype(float))


def reference_bar(batches: Any, *, show: bool = True) -> Any:
    """Return the batches with a progress bar."""
    from tqdm.auto import tqdm

    return tqdm(batches, desc="running the reference", unit="batch", disable=not show)


def score_reference(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    batches: Iterable[Mapping[str, Any]],
    loss_fn: PerSampleLoss,
    *,
    sample_id_column: str = "sample_id",
    gather: Any = None,
    anywhere: Callable[[bool], bool] = bool,
) -> ReferenceScores:
    """Run the reference once over all samples.

    Args:
        model: The student; see `as_reference`.
        tensors: From `runnable_tensors`.
        batches: Collated, on the model's device, with ids; see `reference_bar`.
        loss_fn: (outputs, batch) -> (B,).
        sample_id_column: Name of the id column.
        gather: list -> list of all processes' items, where each process has some of the batches.
        anywhere: Whether something is true on any of the processes that are in each other's losses.

    Returns:
        Losses of all samples; a trust where the model classifies and the sample has a label.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("ids", "losses", "clip_scores", "log_probs", "labels")}
    with as_reference(model, tensors):
        for given in batches:
            batch = dict(given)
            found["ids"].append(batch.pop(sample_id_column).cpu().numpy())
            for name, column in reference_columns(model, batch, loss_fn, anywhere=anywhere).items():
                found[name].append(column)
    columns: Any = {name: np.concatenate(parts) if parts else None for name, parts in found.items()}
    if gather is not None:
        every = gather([columns])
        columns = {
            name: np.concatenate([part[name] for part in every if part[name] is not None])
            if any(part[name] is not None for part in every)
            else None
            for name in columns
        }
    if columns["ids"] is None:
        raise ValueError("the data set must have samples for the reference to run on, got none.")
    check_finite(columns["losses"])
    return _judged(**columns)


def reference_columns(
    model: nn.Module, batch: Mapping[str, Any], loss_fn: PerSampleLoss, *, anywhere: Callable[[bool], bool] = bool
) -> dict[str, np.ndarray]:
    """Run the reference on B samples.

    Args:
        model: Within `as_reference`.
        batch: Without ids.
        loss_fn: (outputs, batch) -> (B,).
        anywhere: As in `score_reference`.

    Returns:
        `losses` (B,); of a pair `clip_scores` (B,); of a classifier `log_probs` (B, C), float16, and `labels` (B,).
    """
    run = partial(mimic_forward, model, direction=None, loss_fn=loss_fn)
    second, first, valid = finite_forward(model, batch, run, run, anywhere=anywhere)
    losses, outputs = torch.full(valid.shape, torch.nan, device=valid.device), first.outputs
    if second is not None:
        losses[valid] = second.losses.float()
    found = {"losses": losses.cpu().numpy()}
    if hasattr(outputs, "image_embeds"):
        found["clip_scores"] = clip_score(outputs).cpu().numpy()
    logits: Any = getattr(outputs, "logits", None)
    labels: Any = batch.get("labels")
    if _classifies(logits, labels):
        found["log_probs"] = torch.log_softmax(logits.float(), -1).half().cpu().numpy()
        found["labels"] = labels.cpu().numpy()
    return found


def check_finite(losses: np.ndarray) -> None:
    """Raise if most of the reference's losses (N,) are not finite.

    Raises:
        ValueError: Which says what to do.
    """
    broken = float((~np.isfinite(losses)).mean())
    if broken > 0.5:
        raise ValueError(
            f"the reference's losses must be finite, got {broken:.0%} that are not: it has diverged, or its weights hold "
            'NaN. Use another reference, or strategy="mimic" if the chosen layers are sound.'
        )


def _classifies(logits: Any, labels: Any) -> bool:
    return (
        isinstance(logits, Tensor)
        and isinstance(labels, Tensor)
        and logits.dim() == 2
        and labels.shape == logits.shape[:1]
        and not labels.is_floating_point()
    )


def _judged(ids: Any, losses: Any, clip_scores: Any, log_probs: Any, labels: Any) -> ReferenceScores:
    from hf_mimic.judge import LabelJudge

    if log_probs is None or len(log_probs) != len(ids):
        return ReferenceScores(ids, losses, np.full(len(ids), np.nan), clip_scores=clip_scores)
    _, first = np.unique(ids, return_index=True)  # a padded row must not count twice
    once = np.sort(first)
    judge = LabelJudge.fit(log_probs[once], labels[once])
    return ReferenceScores(ids, losses, judge.trust(log_probs, labels), noise_rate=judge.noise_rate)
