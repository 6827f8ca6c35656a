"""Score a corpus that is larger than one process: in shards, by several processes, and on from where a run was killed.

Read `ScorePass` (what is scored, by what), then `score_corpus`. What the parts of a corpus have in common is in
corpus_folder.py.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_mimic.corpus_folder import LABELS, Layout, default_part_batches, open_folder
from hf_mimic.data import SAMPLE_ID, SampleIdCollator, SampleIdDataset, read_sample_ids
from hf_mimic.judge import LabelJudge
from hf_mimic.losses import PerSampleLoss, loss_for_model
from hf_mimic.mimic import eval_mode
from hf_mimic.processes import Processes
from hf_mimic.reference_pass import as_reference, check_finite, reference_columns
from hf_mimic.scores import ScoreTable
from hf_mimic.scoring import check_rows, score_columns, to_device
from hf_mimic.trust import fitted_rows

if TYPE_CHECKING:
    from datasets import Dataset

_LOOKED_AT = 16  # rows by which a data set is recognised
_ENOUGH_ROWS = 100  # to say that a reference is broken


@dataclass(frozen=True)
class ScorePass:
    """One pass of a frozen model over a data set: what all of its shards have in common.

    Args:
        model: The student, on its device.
        dataset: Rows as the model takes them (or with a transform that makes them so), with unique integer ids.
        direction: Parameter name to v, from `reference_direction`.
        reference: What `hf_mimic.reference_pass.runnable_tensors` returns; if given, the reference is run, too.
        loss_fn: (outputs, batch) -> (B,); by default the loss that the model is trained with.
        batch_size: Samples per forward pass; contrastive losses depend on it.
        sample_id_column: Name of the id column.
        loader_options: Of the `DataLoader`: `num_workers`, `collate_fn`.
        named: Settings by their names, the model's for instance; they are stored beside the scores.
    """

    model: nn.Module
    dataset: Dataset
    direction: Mapping[str, Tensor]
    reference: Mapping[str, Tensor] | None = None
    loss_fn: PerSampleLoss | None = None
    batch_size: int = 32
    sample_id_column: str = SAMPLE_ID
    loader_options: Mapping[str, Any] = field(default_factory=dict)
    named: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard: parts in all, parts that were there already, and parts of other shards that are missing.

    Args:
        shard: (index, count).
        parts: Of this shard; 0 if there are more shards than parts.
        found: Of these, how many were there already.
        rows: Scored by this call, in all processes.
        elsewhere: Parts of the other shards that are not there yet.
        moved: Where earlier scores went, if they were in the way.
    """

    shard: tuple[int, int]
    parts: int
    found: int
    rows: int
    elsewhere: int
    moved: Path | None

    def told(self) -> dict[str, str]:
        """Return what is worth saying, by name."""
        index, count = self.shard
        lines = {}
        if count > 1:
            lines["shard"] = f"{index} of {count} (from 0), {self.parts} parts"
            if not self.parts:
                lines["shard"] += ": empty, there are fewer parts than shards"
        if self.found:
            lines["were there already"] = f"{self.found} of {self.parts} parts (--overwrite scores them again)"
        if self.elsewhere:
            lines["not there yet"] = f"{self.elsewhere} parts of other shards"
        return lines


def score_corpus(
    task: ScorePass,
    output_dir: str | Path,
    *,
    shard: tuple[int, int] = (0, 1),
    part_batches: int | None = None,
    overwrite: bool = False,
) -> ShardReport:
    """Score every sample of a shard that has no score yet; write the scores part by part.

    Batches begin at multiples of `batch_size` and parts at multiples of `part_batches`, whatever the shard: scores do
    not depend on how the work was split, contrastive ones neither. What is scored is on the disk after each part, and a
    later call goes on after it; the table is whole once all shards are done. Processes that were launched together
    (`accelerate launch`) split the shard; all return when all are done.

    P(the label is right) needs a model of the label noise, which one shard alone must not fit: it is fitted on up to
    20,000 rows of the whole data set, the same for every shard, and kept in the folder for the next one.

    Args:
        task: What is scored; all shards must have the same.
        output_dir: Folder of the score table.
        shard: (index, count), 0 <= index < count.
        part_batches: Batches between two writes; by default 1/256 of all, at most 1000.
        overwrite: Score again what is there.

    Raises:
        ValueError: If the shard is out of range, ids are missing or repeated, an image does not decode, or the folder
            holds scores of another pass; then nothing is changed.
        TypeError: If the data set is a stream.
    """
    check_rows(task.dataset)
    _check(task, shard, part_batches)
    team, folder = Processes(), Path(output_dir)
    ids = read_sample_ids(task.dataset, task.sample_id_column)
    part_batches = part_batches or default_part_batches(len(ids), task.batch_size)
    layout = Layout(len(ids), task.batch_size, part_batches)
    opened = team.once(
        lambda: open_folder(folder, describe(task, ids, layout.part_batches), layout, shard, overwrite=overwrite)
    )
    if opened.broken and team.is_first:
        names = ", ".join(path.name for path in opened.broken)
        warnings.warn(f"scores must be whole files, {names} is not: cut off. Its rows are scored again.", stacklevel=2)
    scorer = _Scorer(task, ids, layout, team)
    if opened.missing:
        scorer.judge = scorer.find_judge(folder / LABELS)
        scorer.score(folder, team.share(opened.missing))
    team.wait()
    own = layout.parts_of(shard)
    rows = sum(len(layout.rows_of(batch)) for part in opened.missing for batch in layout.batches_of(part))
    elsewhere = len([part for part in layout.missing(folder) if part not in own])
    return ShardReport(shard, len(own), len(own) - len(opened.missing), rows, elsewhere, opened.moved)


def describe(task: ScorePass, ids: np.ndarray, part_batches: int) -> dict[str, Any]:
    """Return the settings of a pass, which all of its shards must have: by name, and as hashes of what was given."""
    weights = [*task.model.state_dict().items(), *task.direction.items(), *(task.reference or {}).items()]
    return {
        **task.named,
        "rows": len(ids),
        "batch_size": task.batch_size,
        "part_batches": part_batches,
        "sample_id_column": task.sample_id_column,
        "run_reference": task.reference is not None,
        "dataset": _hash([ids.tobytes(), *_looked_at(task.dataset)]),
        "weights": _hash(part for name, tensor in weights for part in (name.encode(), *_bytes(tensor))),
    }


class _Scorer:
    """Runs batches through the student, and through the reference if there is one."""

    def __init__(self, task: ScorePass, ids: np.ndarray, layout: Layout, team: Processes) -> None:
        self.task, self.ids, self.layout, self.team = task, ids, layout, team
        self.device = next(task.model.parameters()).device
        self.loss_fn = task.loss_fn or loss_for_model(task.model)
        self.tensors = {name: tensor.to(self.device) for name, tensor in (task.reference or {}).items()}
        self.judge: LabelJudge | None = None

    def batches(self, rows: list[Any], told: str) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Return the ids and the inputs of batches, given their rows."""
        from tqdm.auto import tqdm
        from transformers import default_data_collator

        options, column = dict(self.task.loader_options), self.task.sample_id_column
        collate = SampleIdCollator(options.pop("collate_fn", default_data_collator), column)
        data = SampleIdDataset(self.task.dataset, self.ids, column)
        loader: Iterable[Any] = torch.utils.data.DataLoader(data, batch_sampler=rows, collate_fn=collate, **options)
        for batch in tqdm(loader, desc=told, unit="batch", disable=not self.team.is_first):
            yield batch.pop(column), to_device(batch, self.device)

    @torch.no_grad()
    def score(self, folder: Path, parts: list[int]) -> None:
        """Score parts, and write each when it is done."""
        steps = [step for part in parts for step in self.layout.batches_of(part)]
        batches = self.batches([list(self.layout.rows_of(step)) for step in steps], "scoring")
        with eval_mode(self.task.model):
            for part in parts:
                table, told = ScoreTable(folder), []
                for step in self.layout.batches_of(part):
                    ids, batch = next(batches)
                    values = score_columns(self.task.model, batch, self.task.direction, self.loss_fn)
                    judged = self.ask(batch)
                    told.append(judged.get("ref_loss", np.zeros(0)))
                    table.record(ids, epoch=0, step=step, **values, **judged)
                losses = np.concatenate(told)
                if len(losses) >= _ENOUGH_ROWS:
                    check_finite(losses)
                table.flush()

    def ask(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return `ref_loss` and `ref_trust` (B,), as far as they can be known."""
        if self.task.reference is None:
            return {}
        with as_reference(self.task.model, self.tensors):
            found = reference_columns(self.task.model, batch, self.loss_fn)
        judged = {"ref_loss": found["losses"]}
        if self.judge is not None and "log_probs" in found:
            judged["ref_trust"] = self.judge.trust(found["log_probs"], found["labels"])
        return judged

    def find_judge(self, path: Path) -> LabelJudge | None:
        """Return the judge of all shards: the one in the folder, else fitted on rows that do not depend on the shard."""
        if self.task.reference is None:
            return None
        judge = self.team.once(lambda: LabelJudge.load(path))
        if judge is not None:
            return judge
        size, order = self.layout.batch_size, np.random.default_rng(0).permutation(self.layout.rows)
        first = self.run_reference([sorted(order[:size].tolist())])[0]
        if "log_probs" not in first:
            return None
        chosen = np.sort(order[: fitted_rows(first["log_probs"].shape[1])]).tolist()
        groups = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        found = self.team.gather(self.run_reference(self.team.share(groups)))

        def fit() -> LabelJudge:
            check_finite(np.concatenate([batch["losses"] for batch in found]))
            log_probs, labels = (np.concatenate([batch[name] for batch in found]) for name in ("log_probs", "labels"))
            fitted = LabelJudge.fit(log_probs, labels)
            fitted.save(path)
            return fitted

        return self.team.once(fit)

    @torch.no_grad()
    def run_reference(self, rows: list[list[int]]) -> list[dict[str, np.ndarray]]:
        """Return what the reference says of batches, given their rows."""
        with as_reference(self.task.model, self.tensors):
            batches = self.batches(rows, "fitting the label noise")
            return [reference_columns(self.task.model, batch, self.loss_fn) for _, batch in batches]


def _check(task: ScorePass, shard: tuple[int, int], part_batches: int | None) -> None:
    index, count = shard
    if count < 1 or not 0 <= index < count:
        raise ValueError(
            f"`shard` must be (index, count) with 0 <= index < count, got {shard}. Shards count from 0: (0, 1) is all."
        )
    for name, value in (("batch_size", task.batch_size), ("part_batches", part_batches or 1)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def _looked_at(dataset: Dataset) -> Iterator[bytes]:
    """Return the columns, and a few rows as they are stored, without what depends on the machine: paths."""
    rows = np.unique(np.linspace(0, len(dataset) - 1, _LOOKED_AT).astype(int))
    yield str(sorted(dataset.column_names)).encode()
    for row in dataset.with_format("arrow").select(rows)[:].to_pylist():
        for name, value in sorted(row.items()):
            if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
                value = value["bytes"] or Path(value["path"] or "").name
            yield f"{name} {value!r}".encode()


def _bytes(tensor: Tensor) -> Iterator[Any]:
    yield f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _hash(parts: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]
