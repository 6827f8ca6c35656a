"""The health of a score, for a report: what the run said while it trained, and what its table says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_mimic.checkpoints import STATE_NAME, TRAINER_STATE_NAME
from hf_mimic.health import LEAST_FIT_CORRELATION, LEAST_TRUST_CORRELATION, Health
from hf_mimic.report_numbers import number, rank_correlation

_SIGNALS = ("score_fit_correlation", "score_trust_correlation", "unhealthy")
_MOST_STEPS = 500


def last_checkpoint(scores: str | Path) -> Path | None:
    """Return the last checkpoint beside a folder of scores that says how the score was, None if there is none."""
    found = [path.parent for path in Path(scores).resolve().parent.glob(f"checkpoint-*/{STATE_NAME}")]
    numbered = [folder for folder in found if folder.name.removeprefix("checkpoint-").isdigit()]
    return max(numbered, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), default=None)


def read_health(path: str | Path) -> dict[str, Any]:
    """Read what a run said about its score.

    Args:
        path: Of a checkpoint, or of its mimic_state.json or trainer_state.json.

    Raises:
        ValueError: If there is no such file, or it says nothing.
    """
    folder = Path(path)
    files = [folder / STATE_NAME, folder / TRAINER_STATE_NAME] if folder.is_dir() else [folder]
    result: dict[str, Any] = {}
    for file in files:
        try:
            result |= from_run(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"the health must come from a JSON file, {file} is not one: {error}") from error
    if not result:
        raise ValueError(
            f"the health must come from a checkpoint ({STATE_NAME} or {TRAINER_STATE_NAME}), got {path}, which says "
            "nothing about a score."
        )
    return result


def from_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the signals of a `mimic_state.json`, of a `trainer_state.json` with its steps, or of `Health.report`."""
    if "log_history" in given:
        steps = [row for row in given["log_history"] if any(name in row for name in _SIGNALS)]
        every = max(1, -(-len(steps) // _MOST_STEPS))
        kept = [{name: row[name] for name in ("step", *_SIGNALS) if name in row} for row in steps[::every]]
        return ({name: steps[-1][name] for name in _SIGNALS if name in steps[-1]} | {"steps": kept}) if steps else {}
    state = given.get("health")
    if isinstance(state, Mapping) and state:
        health = Health()
        health.resume(state, torch.zeros((), dtype=torch.float64))
        return health.report()
    return {name: given[name] for name in (*_SIGNALS, "steps") if name in given}


def health_numbers(columns: Mapping[str, np.ndarray], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the run said, what the table says, and a verdict in words.

    Args:
        columns: Name to mean values (N,) of a table.
        given: As `from_run` takes it; None where nothing is known of the run.
    """
    run = from_run(given or {})
    table = {}
    if "mimic_score" in columns:
        score = columns["mimic_score"]
        if "ref_trust" in columns:
            table["score_trust_rank_correlation"] = number(rank_correlation(score, columns["ref_trust"]))
        if "loss" in columns:
            table["score_fit_rank_correlation"] = number(rank_correlation(score, -columns["loss"]))
    verdicts = {
        0.0: "The run found the score informative.",
        1.0: "The run found the score uninformative or turned around: do not cut by the mimic score.",
    }
    known = verdicts.get(run.get("unhealthy", -1.0))
    limits = {"score_trust_correlation": LEAST_TRUST_CORRELATION, "score_fit_correlation": LEAST_FIT_CORRELATION}
    return {"verdict": known or "The run gave no verdict.", "run": run, "table": table, "least": limits}
