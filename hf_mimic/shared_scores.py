"""Scores on the Hub without the data: published by those who scored, joined by id by those who have the data set.

Read `push_scores`, then `load_scores`.
"""

from __future__ import annotations

import math
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import snapshot_download
from typing_extensions import Unpack

from hf_mimic.cards import scores_card
from hf_mimic.hub import CARD, Contents, Present, Published, publish
from hf_mimic.hub_datasets import SplitFiles, card_metadata, check_names, check_unlisted
from hf_mimic.hub_errors import explain, hub_errors
from hf_mimic.hub_files import on_hub, verify
from hf_mimic.parts import SCHEMA
from hf_mimic.push_options import PushOptions, destination
from hf_mimic.quality import QualityReport
from hf_mimic.run_record import RECORD_NAME, RunRecord
from hf_mimic.scores import ScoreTable

FOLDER = "scores"


def push_scores(table: ScoreTable, repo_id: str, **options: Unpack[PushOptions]) -> Published:
    """Publish a score table: every visit, without images or captions, and a card that says how to join it.

    Others call `load_scores(repo_id)` and `attach_scores`. All goes into one commit; what is there already is not sent.

    Args:
        table: At least one visit.
        repo_id: Data set on the Hub, "user/name"; made if it is not there. It may hold the data set itself.
        **options: See `PushOptions`.

    Raises:
        HubError: If it cannot be published; the branch is as it was.
        ValueError: If there is no score, or an option is unknown.
    """
    to = destination(repo_id, options, PushOptions)
    split = options.get("split", "train")
    run = options.get("run") or record_of(table)
    quality = quality_of(table)
    with tempfile.TemporaryDirectory() as folder:
        files = score_files(table, Path(folder), split)
        columns = [name for name in SCHEMA.names if _has_values(files, name)]

        def contents(present: Present) -> Contents:
            check_unlisted(present)
            check_names(present, FOLDER)
            card = scores_card(
                run,
                repo_id=present.repo_id,
                metadata=card_metadata(present.card, {FOLDER: {split: files}}),
                n_samples=len(table.aggregate()),
                n_visits=files.rows,
                columns=columns,
                quality=quality,
                existing=present.card,
            )
            return Contents({CARD: card.encode(), **in_repo(files, run)}, stale_scores(present, f"{FOLDER}/{split}"))

        return publish(to, contents, message=options.get("commit_message") or "Add scores")


def load_scores(
    repo_id: str, *, split: str | None = None, revision: str | None = None, token: str | None = None
) -> ScoreTable:
    """Download the scores that `push_scores` or `push_curated_dataset` published.

    Args:
        repo_id: Data set on the Hub.
        split: Of the data set that was scored; only needed where there are scores of several.
        revision: Branch, tag or commit.
        token: By default the one that `hf auth login` stored, or HF_TOKEN.

    Raises:
        HubError: If the repo cannot be read.
        FileNotFoundError: If it has no scores.
        ValueError: If it has scores of several splits, or none of this one.
    """
    patterns = [f"{FOLDER}/{split or '*'}/{name}" for name in ("steps-*.parquet", RECORD_NAME)]
    try:
        path = snapshot_download(repo_id, repo_type="dataset", revision=revision, token=token, allow_patterns=patterns)
    except hub_errors() as error:
        raise explain(error, repo_id, "reading the scores") from None
    folders = sorted({file.parent for file in (Path(path) / FOLDER).glob(f"{split or '*'}/steps-*.parquet")})
    if not folders:
        raise FileNotFoundError(
            f"{repo_id} must hold scores{'' if split is None else f' of the split {split!r}'} "
            f"({FOLDER}/{split or '*'}/*.parquet), found none. Give a data set that hf_mimic.push_scores wrote."
        )
    if len(folders) > 1:
        raise ValueError(
            f"{repo_id} has scores of several splits, {', '.join(each.name for each in folders)}: their ids may be the same. "
            "Name one: split=..."
        )
    for file in sorted(folders[0].iterdir()):
        verify(file, token=token)
    return ScoreTable.load(folders[0])


def open_scores(name: str) -> ScoreTable:
    """Open a folder of score shards, or the scores of a Hub data set."""
    if not on_hub(name) or name.count("/") != 1:
        return ScoreTable.load(name)
    return load_scores(name)


def record_of(table: ScoreTable) -> RunRecord:
    """Return what lies beside the shards of a table; an empty record if nothing does."""
    found = None if table.folder is None else RunRecord.read(table.folder)
    return found or RunRecord()


def quality_of(table: ScoreTable) -> dict[str, Any] | None:
    """Return the quality report of a table, None where its scores tell nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said in the card
        try:
            return QualityReport.from_scores(table).as_dict()
        except ValueError:
            return None


def score_files(table: ScoreTable, folder: Path, split: str) -> SplitFiles:
    """Return the shards of a table as they are; of one in memory, or of an older version, new ones in `folder`.

    Raises:
        ValueError: If it has no row.
    """
    from datasets import Features

    table.flush()
    paths = table.shards()
    if not paths or any(not pq.read_schema(path).equals(SCHEMA) for path in paths):
        copy = ScoreTable(folder / FOLDER)
        copy.extend(table)
        copy.flush()
        paths = copy.shards()
    if not paths:
        raise ValueError("a score table must have a row to be published, got none. Train or score first.")
    rows = sum(pq.read_metadata(path).num_rows for path in paths)
    width = sum(entry.type.bit_width for entry in SCHEMA) / 8
    features = Features.from_arrow_schema(SCHEMA)
    return SplitFiles(tuple(paths), features, rows, math.ceil(rows * width), f"{FOLDER}/{split}/steps-*.parquet")


def in_repo(files: SplitFiles, run: RunRecord) -> dict[str, Path | bytes]:
    """Return path in the repo to file, of the shards and of the record of the run."""
    folder = files.pattern.rpartition("/")[0]
    return {**files.in_repo(), f"{folder}/{RECORD_NAME}": run.to_bytes()}


def stale_scores(present: Present, folder: str) -> frozenset[str]:
    """Return the files of earlier scores in a repo; others that lie beside them are somebody's own.

    Args:
        present: What the repo holds.
        folder: A regular expression of its name.
    """
    ours = re.compile(rf"{folder}/(steps-[^/]*\.parquet|{re.escape(RECORD_NAME)})")
    return frozenset(path for path in present.paths if ours.fullmatch(path))


def _has_values(files: SplitFiles, name: str) -> bool:
    for path in files.paths:
        head = pq.read_metadata(path)
        place = head.schema.names.index(name)
        for number in range(head.num_row_groups):
            told = head.row_group(number).column(place).statistics
            if told is None or not told.has_null_count or told.null_count < head.row_group(number).num_rows:
                return True
    return False
