"""What `hf-mimic compare` does: read the scores of some data sets, rank them, print and write the ranking."""

from __future__ import annotations

import json
from pathlib import Path

from hf_mimic.command_arguments import CompareArguments
from hf_mimic.files import write_atomically
from hf_mimic.quality import QualityReport, compare_datasets
from hf_mimic.scores import ScoreTable

_HEAD = ("data set", "samples", "noise", "interval", "kept", "mean score", "evidence")


def run_compare(options: CompareArguments) -> str:
    """Return the ranking as text.

    Raises:
        ValueError: If names and folders do not go together, or the data sets cannot be compared.
    """
    names = options.names or options.scores
    if len(names) != len(options.scores) or len(set(names)) != len(names):
        raise ValueError(
            f"--names must have a different name for each of the {len(options.scores)} folders, got {', '.join(names)}."
        )
    tables = {name: ScoreTable.load(folder) for name, folder in zip(names, options.scores, strict=True)}
    reports = compare_datasets(tables, by=options.by, level=options.level)
    if options.output is not None:
        text = json.dumps({name: report.as_dict() for name, report in reports.items()}, indent=1)
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(options.output), lambda file: file.write(text.encode()))
    rows = [_HEAD, *((name, *_cells(report)) for name, report in reports.items())]
    widths = [max(len(row[k]) for row in rows) for k in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + ("" if options.output is None else f"\n\nwritten: {options.output}")


def _cells(report: QualityReport) -> tuple[str, ...]:
    unknown = report.noise_rate is None
    return (
        f"{report.n_samples:,}",
        "not known" if unknown else f"{report.noise_rate:.1%}",
        "" if unknown else f"{report.noise_low:.1%} to {report.noise_high:.1%}",
        f"{report.retained:.1%}",
        "" if report.mean_score is None else f"{report.mean_score:.4g}",
        report.evidence,
    )
