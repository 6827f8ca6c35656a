"""A pass over 44 rows, for the tests of corpora in one and in two processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import models
import torch
from datasets import Dataset

from hf_mimic.corpus import ScorePass, score_corpus
from hf_mimic.mimic import reference_direction
from hf_mimic.reference_pass import runnable_tensors
from hf_mimic.scores import ScoreTable

ROWS = 44


def make_pass(family: str = "vit", **changed: Any) -> ScorePass:
    """Return a pass in batches of 4; of a classifier, the reference agrees with all labels but every fifth."""
    model, batch = models.make(family), models.make_batch(family, size=ROWS)
    reference = models.moved(model)
    if "labels" in batch:
        judge = models.make(family)
        judge.load_state_dict({**judge.state_dict(), **reference})
        with torch.no_grad():
            batch["labels"] = judge(pixel_values=batch["pixel_values"]).logits.argmax(-1)
        batch["labels"][::5] = (batch["labels"][::5] + 1) % models.LABELS
    rows = Dataset.from_dict({name: x.numpy() for name, x in batch.items()}).with_format("torch")
    rows = rows.add_column("sample_id", [(7 * i) % 1000 for i in range(ROWS)])
    tensors = runnable_tensors(model, reference)
    made = ScorePass(model, rows, reference_direction(model, reference, "all"), reference=tensors, batch_size=4)
    return dataclasses.replace(made, **changed)


def scores_of(folder: Path) -> dict[str, list]:
    """Return the rows of a score table."""
    return ScoreTable.load(folder).to_arrow().to_pydict()


def scored(folder: Path, *, family: str) -> dict[str, Any]:
    """Score a corpus in shards and in one; return the rows of both, and how many parts were found when done again."""
    for index in range(2):
        score_corpus(make_pass(family), folder / "shards", shard=(index, 2), part_batches=2)
    report = score_corpus(make_pass(family), folder / "whole")
    again = score_corpus(make_pass(family), folder / "whole")
    rows = {name: scores_of(folder / name) for name in ("shards", "whole")}
    return {**rows, "found": (report.found, report.rows, again.found, again.rows)}
