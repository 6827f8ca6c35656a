"""A data set as files of a Hub repo: Parquet shards with their images as they are, and the metadata of its card.

Read `write_split`, then `card_metadata`. Same rows, same files: what is pushed twice is recognised by its content.
"""

from __future__ import annotations

import math
import multiprocessing
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_mimic.card_metadata import read_metadata, split_card
from hf_mimic.parquet import write_parquet

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_mimic.hub import Present

MAX_SHARD_BYTES = 500 << 20  # as `datasets` writes them
_DATA = (
    ".parquet",
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".arrow",
    ".txt",
    ".zip",
    ".tar",
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
)


@dataclass(frozen=True)
class SplitFiles:
    """The shards of a split.

    Args:
        paths: Of the local files.
        features: Of the rows.
        rows: How many.
        nbytes: Of the rows in Arrow.
        pattern: Of their paths in the repo.
    """

    paths: tuple[Path, ...]
    features: Any
    rows: int
    nbytes: int
    pattern: str

    def in_repo(self) -> dict[str, Path]:
        """Return path in the repo to local file."""
        folder = self.pattern.rpartition("/")[0]
        return {f"{folder}/{path.name}": path for path in self.paths}

    @property
    def stored(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.paths)


def write_split(
    dataset: Dataset, folder: Path, split: str, *, max_shard_bytes: int = MAX_SHARD_BYTES, num_proc: int | None = None
) -> SplitFiles:
    """Write a data set as `<split>-00000-of-0000N.parquet`; bytes of images and sounds are copied, never decoded.

    Args:
        dataset: Any format or transform is left out.
        folder: Made if it is not there; its name is that of the folder in the repo.
        split: Its name.
        max_shard_bytes: Of the rows in one file.
        num_proc: Processes that write; the files do not depend on it.
    """
    from tqdm.auto import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    plain = dataset.with_format(None)
    number = max(1, min(len(plain), math.ceil(plain._estimate_nbytes() / max_shard_bytes)))
    paths = tuple(folder / f"{split}-{i:05d}-of-{number:05d}.parquet" for i in range(number))
    write = partial(_write_shard, plain, paths)
    bar = partial(tqdm, total=number, desc=f"writing {split}", unit="shard", leave=False, disable=number == 1)
    if num_proc is None or min(num_proc, number) < 2:
        sizes = list(bar(map(write, range(number))))
    else:
        with multiprocessing.get_context("spawn").Pool(min(num_proc, number)) as pool:
            sizes = list(bar(pool.imap(write, range(number))))
    return SplitFiles(paths, plain.features, len(plain), sum(sizes), f"{folder.name}/{split}-*")


def _write_shard(dataset: Dataset, paths: tuple[Path, ...], index: int) -> int:
    return write_parquet(dataset.shard(len(paths), index, contiguous=True), paths[index])


def card_metadata(
    card: str | None, configs: Mapping[str, Mapping[str, SplitFiles]]
) -> dict[str, list[dict[str, Any]]]:
    """Return `configs` and `dataset_info` of a card: those that it has, ours added or replaced.

    NOTE: `Dataset.push_to_hub` keeps the features that the card had when columns are added, and the data set then does
    not load (huggingface/datasets 8608); here features and splits of our configs are always those of the files.

    Args:
        card: The card that is there.
        configs: Name of a config to its splits.
    """
    from datasets import DatasetInfo
    from datasets.info import DatasetInfosDict
    from datasets.splits import SplitDict, SplitInfo
    from datasets.utils.metadata import MetadataConfigs

    data = card_data(card)
    there = MetadataConfigs.from_dataset_card_data(data)
    known = DatasetInfosDict.from_dataset_card_data(data)
    infos, entries = {}, {}
    for name, splits in configs.items():
        patterns = {files.pattern for files in splits.values()}
        listed = there.get(name, {}).get("data_files")
        kept = [
            entry
            for entry in listed or []
            if isinstance(entry, dict) and entry["split"] not in splits and not _is_one_of(entry["path"], patterns)
        ]
        before = (known[name].splits if name in known else None) or {}
        found = SplitDict()
        for split in (before[e["split"]] for e in kept if e["split"] in before):
            found.add(split)
        for split_name, files in splits.items():
            found.add(SplitInfo(split_name, num_bytes=files.nbytes, num_examples=files.rows))
        infos[name] = DatasetInfo(
            features=next(iter(splits.values())).features,
            splits=found,
            download_size=None if kept else sum(files.stored for files in splits.values()),
            dataset_size=sum(split.num_bytes for split in found.values()),
            config_name=name,
        )
        ours = [{"split": split_name, "path": files.pattern} for split_name, files in splits.items()]
        first = {key: there[name][key] for key in ("default",) if key in there.get(name, {})}
        entries[name] = {**first, "data_files": [*kept, *ours]}
    DatasetInfosDict(infos).to_dataset_card_data(data)
    MetadataConfigs(entries).to_dataset_card_data(data)
    info = data["dataset_info"]
    return {"configs": data["configs"], "dataset_info": info if isinstance(info, list) else [info]}


def _is_one_of(path: Any, patterns: set[str]) -> bool:
    return isinstance(path, str) and path in patterns  # a split may have a list of paths


def card_data(card: str | None) -> Any:
    """Return the metadata of a card as `DatasetCardData`.

    Raises:
        ValueError: If they cannot be read.
    """
    from huggingface_hub import DatasetCardData

    return DatasetCardData(**read_metadata(split_card(card)[0])) if card else DatasetCardData()


def splits_of(card: str | None, config: str) -> dict[str, Any]:
    """Return the splits of a config that a card names: split to the features of its rows, None if it does not say."""
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs

    data = card_data(card)
    info = DatasetInfosDict.from_dataset_card_data(data).get(config)
    features = None if info is None else info.features
    named = MetadataConfigs.from_dataset_card_data(data).get(config, {}).get("data_files", [])
    found = [entry["split"] for entry in named if isinstance(entry, dict)] if isinstance(named, list) else ["train"]
    return dict.fromkeys([*found, *((info.splits or ()) if info is not None else ())], features)


def stale_paths(present: Present, splits: Mapping[str, SplitFiles]) -> frozenset[str]:
    """Return the files of these splits that are in the repo, to be replaced."""
    prefixes = tuple(files.pattern.removesuffix("*") for files in splits.values())
    return frozenset(path for path in present.paths if path.startswith(prefixes))


def check_names(present: Present, *configs: str) -> None:
    """Refuse to replace a configuration that has the name of one of ours and is somebody's own.

    Raises:
        ValueError: If there is one: its rows have no `sample_id`, or the card does not say what they have.
    """
    for config in configs:
        if any("sample_id" not in (features or ()) for features in splits_of(present.card, config).values()):
            raise ValueError(
                f"the configuration {config!r} of the repo must be one that hf_mimic wrote (with `sample_id`), got one of "
                "your own. Rename it, or publish in another repo: it would be replaced."
            )


def check_unlisted(present: Present) -> None:
    """Refuse a repo whose data files no card lists: once the card lists ours, nobody would find them any more.

    Raises:
        ValueError: If there are such files, or the card lists some that are no Parquet.
    """
    data = card_data(present.card)
    if data.get("configs"):
        _check_kinds(present, data)
        return
    others = sorted(path for path in present.paths if path.endswith(_DATA))
    if others:
        raise ValueError(
            f"a repo to publish in must list its data under `configs` in README.md, got {len(others)} files that it does "
            f"not, such as {others[0]}: `load_dataset` would no longer find them. Choose another repo, or list them first "
            "(https://huggingface.co/docs/hub/datasets-manual-configuration)."
        )


def _check_kinds(present: Present, data: Any) -> None:
    """Refuse a repo whose card lists files of another kind: `load_dataset` reads all that a repo has as one kind."""
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs

    others = [path for path in sorted(present.paths) if path.endswith(_DATA) and not path.endswith(".parquet")]
    for name, config in MetadataConfigs.from_dataset_card_data(data).items():
        folder = config.get("data_dir", "")
        listed = sanitize_patterns(config.get("data_files") or (["**"] if folder else [])).values()
        patterns = [posixpath.join(folder, pattern) for paths in listed for pattern in paths]
        found = [path for path in others if any(fnmatch(path, pattern) for pattern in patterns)]
        if found:
            raise ValueError(
                f"a repo to publish in must have its data as Parquet, got {found[0]} of the configuration {name!r}: "
                "`load_dataset` would no longer read it. Choose another repo, or push that data set with its own "
                "`push_to_hub` first."
            )
