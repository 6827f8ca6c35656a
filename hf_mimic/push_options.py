"""What a publication can be told, and where it goes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from hf_mimic.checks import check_choice
from hf_mimic.hub import Destination
from hf_mimic.run_record import RunRecord


class PushOptions(TypedDict, total=False):
    """Of every publication.

    Args:
        revision: Branch; made if it is not there. By default main.
        create_pr: Open a pull request instead of writing to the branch.
        private: Whether a repo that is made is private; of one that is there, True asks that it is.
        token: By default the one that `hf auth login` stored, or HF_TOKEN.
        commit_message: Of the commit.
        split: Of the data set that was scored, by default "train".
        run: How the scores were made; by default what the run wrote beside them.
    """

    revision: str | None
    create_pr: bool
    private: bool | None
    token: str | None
    commit_message: str | None
    split: str
    run: RunRecord | None


class CurationOptions(PushOptions, total=False):
    """Of a curated data set.

    Args:
        sample_id_column: Integer ids, unique in the split; by default "sample_id".
        label_column: For the counts by class; by default "label", if there is one.
        group_columns: Columns by whose values the card tells who is dropped, too.
        drop_unscored: Whether rows without a score are left out.
        config_name: Configuration that the data become, by default "default".
        original_dataset: What was filtered; by default the Hub data set that the rows were loaded from.
        original_revision: Its commit.
        command: What made the selection, for the card.
        num_proc: Processes that write the files.
        max_shard_bytes: Of the rows in one file, by default 500 MiB.
        figures: Whether the card has figures; by default if matplotlib is there.
    """

    sample_id_column: str
    label_column: str | None
    group_columns: Sequence[str]
    drop_unscored: bool
    config_name: str
    original_dataset: str | None
    original_revision: str | None
    command: str | None
    num_proc: int | None
    max_shard_bytes: int
    figures: bool


def destination(repo_id: str, options: Mapping[str, Any], known: type) -> Destination:
    """Return where a publication goes.

    Args:
        repo_id: On the Hub.
        options: What was given.
        known: `PushOptions` or `CurationOptions`.

    Raises:
        ValueError: If an option is unknown, or the name of the repo or of the split is none.
    """
    for name in options:
        check_choice("option", name, tuple(known.__annotations__))
    if not isinstance(repo_id, str) or not repo_id.strip() or repo_id.startswith((".", "/", "~")):
        raise ValueError(f'`repo_id` must be "user/name", got {repo_id!r}.')
    if options.get("split") is not None:
        check_split(options["split"])
    return Destination(
        repo_id,
        revision=options.get("revision"),
        create_pr=bool(options.get("create_pr")),
        private=options.get("private"),
        token=options.get("token"),
    )


def check_split(name: str) -> None:
    """Refuse a name under which `datasets` would not find a split.

    Raises:
        ValueError: If it is one.
    """
    if not re.fullmatch(r"\w+(\.\w+)*", str(name)):
        raise ValueError(
            f'a split must have a name of letters, digits, _ and dots between them, got {name!r}. Use "train_clean", for '
            "instance."
        )
