"""A curated data set on the Hub: rows, scores, decisions, card, `selection.json` and figures, in one commit.

Read `push_curated_dataset`. curation.py decides what is kept, hub_datasets.py writes the files, cards.py the card.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
from typing_extensions import Unpack

from hf_mimic.cards import dataset_card
from hf_mimic.curated_splits import aligned, splits_of_rows
from hf_mimic.curation import Choice, choose, counted, label_column
from hf_mimic.cuts import FilterResult, ScoreFilter
from hf_mimic.hub import CARD, Contents, Present, Published, publish
from hf_mimic.hub_datasets import (
    MAX_SHARD_BYTES,
    SplitFiles,
    card_metadata,
    check_names,
    check_unlisted,
    splits_of,
    stale_paths,
    write_split,
)
from hf_mimic.origins import COMMAND, Origin, origin
from hf_mimic.push_options import CurationOptions, destination
from hf_mimic.report import build_report
from hf_mimic.report_options import ReportOptions
from hf_mimic.run_record import RunRecord, public_name
from hf_mimic.scores import ScoreTable
from hf_mimic.selection_record import Counts, SelectionRecord
from hf_mimic.shared_scores import FOLDER, in_repo, quality_of, record_of, score_files, stale_scores

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SELECTION, SELECTION_NAME, FIGURES = "selection", "selection.json", "figures"
_CAPTIONS = {
    "score_by_epoch": "Scores by epoch",
    "classes": "Kept and dropped by class",
    "best_and_worst": "The best and the worst samples",
    "caption_length": "Score by length of the caption",
    "agreement": "How far filters agree",
}
_PICTURES = 64  # decoded for the figure of the best and the worst


def push_curated_dataset(
    dataset: Dataset | DatasetDict,
    repo_id: str,
    *,
    scores: ScoreTable | None = None,
    rule: ScoreFilter | FilterResult | str | None = None,
    **options: Unpack[CurationOptions],
) -> Published:
    """Publish the rows that are kept, with what decided: all in one commit, or nothing.

    The repo gets the configurations `default` (the rows that are kept, with their scores as columns), `scores` (every
    visit) and `selection` (`sample_id`, `keep`, `reason` of all samples), a card, `selection.json` and figures. Of a
    `DatasetDict` only the split train is filtered, the others are published whole. Images go as they are, byte for byte.
    What is there already is not sent: a second call does nothing, one after an interruption goes on.

    Args:
        dataset: All rows that were scored, with the column `keep` (see `attach_scores`), or as they were with a `rule`.
        repo_id: Data set on the Hub, "user/name"; made if it is not there.
        scores: The score table; its columns are attached if they are not there.
        rule: The filter (fitted here if it is not), what it returned, or words on who decided.
        **options: See `CurationOptions`: `split`, `private`, `revision`, `create_pr`, `num_proc`, `group_columns` ...

    Raises:
        HubError: If it cannot be published; the branch is as it was.
        ValueError: If nothing decides, no row is kept, or data set, scores and repo do not fit together.

    Example:
        >>> table = trainer.scores
        >>> push_curated_dataset(dataset, "user/curated", scores=table, rule=TrustFilter())  # doctest: +SKIP
    """
    to = destination(repo_id, options, CurationOptions)
    split, splits = splits_of_rows(dataset, options.get("split"))
    choice = choose(
        splits[split],
        scores,
        rule,
        sample_id_column=options.get("sample_id_column", "sample_id"),
        drop_unscored=options.get("drop_unscored", False),
    )
    config = options.get("config_name", "default")
    _check_config(config)
    rows = aligned({split: choice.kept, **{k: v for k, v in splits.items() if k != split}}, split)
    record = _record(choice, split, scores, options, {name: len(part) for name, part in rows.items()})
    with tempfile.TemporaryDirectory() as folder:
        publication = _Publication(Path(folder), config, record)
        publication.write(rows, choice, scores, options)
        default = f"Keep {len(choice.kept)} of {len(choice.decisions)} samples of {split}"
        return publish(to, publication.contents, message=options.get("commit_message") or default)


class _Publication:
    """The files of one publication, in a folder of their own."""

    def __init__(self, folder: Path, config: str, record: SelectionRecord) -> None:
        self.folder, self.config, self.record = folder, config, record
        self.configs: dict[str, dict[str, SplitFiles]] = {}
        self.figures: dict[str, str] = {}
        self.files: dict[str, Path | bytes] = {}

    def write(
        self, rows: Mapping[str, Dataset], choice: Choice, scores: ScoreTable | None, options: CurationOptions
    ) -> None:
        """Write everything but the card, which depends on what the repo holds."""
        data = self.folder / ("data" if self.config == "default" else self.config)
        nbytes, num_proc = options.get("max_shard_bytes", MAX_SHARD_BYTES), options.get("num_proc")
        self.configs[self.config] = {
            name: write_split(part, data, name, max_shard_bytes=nbytes, num_proc=num_proc)
            for name, part in rows.items()
        }
        self.configs[SELECTION] = {self.record.split: self._decisions(choice)}
        if scores is not None:
            files = score_files(scores, self.folder, self.record.split)
            self.configs[FOLDER] = {self.record.split: files}
            self.files |= in_repo(files, self.record.run)
        text = json.dumps(self.record.as_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        self.files[SELECTION_NAME] = text.encode()
        if options.get("figures", _has_matplotlib()) and scores is not None:
            self._draw(choice, scores, options)
        for splits in self.configs.values():
            for files in splits.values():
                self.files |= files.in_repo()

    def _decisions(self, choice: Choice) -> SplitFiles:
        from datasets import Features

        path = self.folder / SELECTION / f"{self.record.split}-00000-of-00001.parquet"
        path.parent.mkdir()
        pq.write_table(choice.decisions, path, compression="zstd")
        features = Features.from_arrow_schema(choice.decisions.schema)
        pattern = f"{SELECTION}/{self.record.split}-*"
        return SplitFiles((path,), features, len(choice.decisions), choice.decisions.nbytes, pattern)

    def _draw(self, choice: Choice, scores: ScoreTable, options: CurationOptions) -> None:
        label = label_column(choice.rows, options.get("label_column"))
        shown = ReportOptions(
            max_rows=5_000,
            max_images=_PICTURES,
            label_column=label,
            sample_id_column=self.record.sample_id_column,
        )
        report = build_report(scores, self.folder / "report", dataset=_for_figures(choice.rows, label), options=shown)
        drawn = {path.stem: path for path in report.figures if path.suffix == ".png"}
        for name, caption in _CAPTIONS.items():
            if name in drawn:
                self.figures[caption] = f"{FIGURES}/{name}.png"
                self.files[f"{FIGURES}/{name}.png"] = drawn[name]

    def contents(self, present: Present) -> Contents:
        """Return the files with the card that fits what the repo holds."""
        check_unlisted(present)
        check_names(present, *(self.configs.keys() & {SELECTION, FOLDER}))
        _check_others(present, self.config, self.configs[self.config])
        card = dataset_card(
            self.record,
            repo_id=present.repo_id,
            config=self.config,
            metadata=card_metadata(present.card, self.configs),
            figures=self.figures,
            existing=present.card,
        )
        stale = stale_paths(
            present, {**self.configs[self.config], SELECTION: self.configs[SELECTION][self.record.split]}
        )
        stale |= stale_scores(present, f"{FOLDER}/{self.record.split}") if FOLDER in self.configs else frozenset()
        stale |= {f"{FIGURES}/{name}.png" for name in _CAPTIONS} if self.figures else frozenset()
        return Contents({CARD: card.encode(), **self.files}, stale)


def _for_figures(rows: Dataset, label: str | None) -> Dataset:
    """Return the rows without the columns that the report would take for images and labels by their names only."""
    from datasets import Image

    other = {"label": label is None, "image": not isinstance(rows.features.get("image"), Image)}
    return rows.remove_columns([name for name, drop in other.items() if drop and name in rows.column_names])


def _check_config(name: str) -> None:
    if name in ("data", FOLDER, SELECTION, FIGURES) or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f'`config_name` must be a name other than data, {FOLDER}, {SELECTION} and {FIGURES}, got {name!r}. Use "default".'
        )


def _check_others(present: Present, config: str, ours: Mapping[str, SplitFiles]) -> None:
    """Refuse to publish beside splits of other columns: the data set would not load.

    Raises:
        ValueError: If the repo has such splits.
    """
    features = next(iter(ours.values())).features
    others = {name: known for name, known in splits_of(present.card, config).items() if name not in ours}
    clashing = [name for name, known in others.items() if known != features]
    if clashing:
        raise ValueError(
            f"all splits of a configuration must have the same columns, but {', '.join(clashing)} of {config!r}, which is "
            "in the repo already, has others. Publish a DatasetDict with these splits, another `config_name`, or another repo."
        )


def _record(
    choice: Choice, split: str, scores: ScoreTable | None, options: CurationOptions, sizes: dict[str, int]
) -> SelectionRecord:
    """Return what `selection.json` and the card say."""
    run = options.get("run") or (RunRecord() if scores is None else record_of(scores))
    reasons = choice.decisions["reason"].drop_null().value_counts().to_pylist()
    labels = label_column(choice.rows, options.get("label_column"))
    source, ran = origin(choice.rows), Origin(run.dataset, run.dataset_revision, run.dataset_config)
    named = public_name(options.get("original_dataset") or source.dataset or run.dataset)
    known = next((each for each in (source, ran) if each.dataset == named), Origin())
    groups = options.get("group_columns", ())
    return SelectionRecord(
        run=run,
        rule=choice.rule,
        threshold=choice.threshold,
        rows=Counts(len(choice.decisions), int(choice.keep.sum())),
        unscored=choice.unscored,
        unscored_kept=not options.get("drop_unscored", False),
        reasons={entry["values"]: entry["counts"] for entry in reasons},
        classes={} if labels is None else counted(choice, labels),
        groups={
            column: counted(choice, column, most=50) for column in ([groups] if isinstance(groups, str) else groups)
        },
        quality=None if scores is None else quality_of(scores),
        splits=sizes,
        split=split,
        original_dataset=named,
        original_revision=options.get("original_revision") or known.revision,
        original_config=known.config,
        sample_id_column=options.get("sample_id_column", "sample_id"),
        command=options.get("command") or COMMAND.get(),
    )


def _has_matplotlib() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None
