"""Data sets: sample ids that survive transforms and collation, label noise, loading, unreadable images.

Read `add_sample_ids`; `SampleIdDataset` and `SampleIdCollator` are how the trainer keeps the id.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import torch
from PIL.Image import DecompressionBombError

from hf_mimic.hub_loading import loading

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE_ID = "sample_id"
_FILE_KINDS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
UNREADABLE = (OSError, SyntaxError, DecompressionBombError)  # what PIL raises on broken files


def add_sample_ids(dataset: Dataset, column: str = SAMPLE_ID) -> Dataset:
    """Return the data set with an int64 column 0, 1, ... N-1: stable names for its rows, whatever is done to it later.

    Raises:
        ValueError: If the column is already there.
    """
    if column in dataset.column_names:
        raise ValueError(
            f"the data set must not have a column `{column}` yet. If it holds unique integers, it is already an id: "
            f'use it as it is (sample_id_column="{column}"); otherwise remove or rename it.'
        )
    return dataset.add_column(column, np.arange(len(dataset), dtype=np.int64))


def read_sample_ids(dataset: Dataset, column: str = SAMPLE_ID) -> np.ndarray:
    """Return the ids (N,), int64, without decoding anything.

    Raises:
        ValueError: If there are no rows, the column is missing, or its values are not unique integers.
    """
    if column not in dataset.column_names:
        raise ValueError(
            f"the data set must have an int64 column `{column}`, got the columns {', '.join(dataset.column_names)}. "
            "Add one once, before any shuffle or filter: hf_mimic.data.add_sample_ids(dataset)."
        )
    if len(dataset) == 0:
        raise ValueError("the data set must have at least one row, got none. Look at the filter or split before it.")
    ids = dataset.select_columns(column).with_format("arrow")[:][column]
    values = ids.to_numpy()
    if values.dtype.kind not in "iu":
        kind = "missing values" if ids.null_count else f"{ids.type} values, such as {ids[0].as_py()!r}"
        raise ValueError(
            f"the column `{column}` must hold integers (collators drop strings), got {kind}. "
            "Keep it under another name and add ids: hf_mimic.data.add_sample_ids(dataset)."
        )
    unique, counts = np.unique(values, return_counts=True)
    if unique[-1] > np.iinfo(np.int64).max:
        raise ValueError(
            f"the column `{column}` must hold ids below 2**63, got {unique[-1]}. Keep it under another name and add ids: "
            "hf_mimic.data.add_sample_ids(dataset)."
        )
    if len(unique) < len(values):
        raise ValueError(
            f"the column `{column}` must hold unique ids, got {int((counts - 1).sum())} repeated, such as "
            f"{unique[counts.argmax()]} ({counts.max()} times). Add ids after concatenating: remove the column, then "
            "hf_mimic.data.add_sample_ids(dataset)."
        )
    return values.astype(np.int64)


class SampleIdDataset(torch.utils.data.Dataset):
    """A map-style view of a data set with a transform, whose items carry the id that the transform may have dropped.

    It also names the row of an item that cannot be read, a corrupt image for instance.
    """

    def __init__(self, dataset: Dataset, ids: np.ndarray | None, column: str = SAMPLE_ID) -> None:
        self.dataset, self.ids, self.column = dataset, ids, column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        try:
            batch = self.dataset.__getitems__(list(indices))
        except UNREADABLE as error:
            raise self._named(indices) from error
        if self.ids is None:
            return batch
        return [{**item, self.column: int(self.ids[i])} for i, item in zip(indices, batch, strict=True)]

    def _named(self, indices: Sequence[int]) -> Exception:
        for index in indices:
            try:
                self.dataset[int(index)]
            except UNREADABLE as error:
                name = "" if self.ids is None else f" ({self.column} {self.ids[index]})"
                return ValueError(
                    f"every image must decode; row {index}{name} does not: {error}. "
                    "Drop it (hf_mimic.data.drop_unreadable, or --on_error skip)."
                )
        return ValueError("a row could not be read, but each could on a second try; look at the disk or the network.")


class SampleIdCollator:
    """Collate with any collator and put the ids back: it need not know them."""

    def __init__(self, collator: Callable, column: str = SAMPLE_ID) -> None:
        self.collator, self.column = collator, column

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the collator's batch with `sample_id` (B,), int64, if the examples have it."""
        if not isinstance(examples[0], Mapping):
            raise TypeError(f"an example must be a dict with `{self.column}`, got {type(examples[0]).__name__}.")
        if self.column not in examples[0]:
            return self.collator(list(examples))
        ids = torch.tensor([self._integer(example[self.column]) for example in examples])
        rest = [{key: value for key, value in example.items() if key != self.column} for example in examples]
        try:
            return {**self.collator(rest), self.column: ids}
        except (*UNREADABLE, ValueError):
            for number, example in zip(ids.tolist(), rest, strict=True):
                self._try(number, example)
            raise

    def _try(self, number: int, example: Mapping[str, Any]) -> None:
        """Raise, with its id, what an example alone makes the collator raise: an image that does not decode, say."""
        try:
            self.collator([example])
        except (*UNREADABLE, ValueError) as error:
            raise ValueError(f"{self.column} {number}: {error}") from error

    def _integer(self, value: Any) -> int:
        try:
            return operator.index(value)
        except TypeError:
            raise TypeError(f"`{self.column}` must be an integer, got {value!r}.") from None


def drop_unreadable(dataset: Dataset, column: str) -> tuple[Dataset, list[int]]:
    """Decode every image once; return the data set without the rows that do not or have none, and those rows."""
    from tqdm.auto import tqdm

    bad = []
    plain = dataset.with_format(None).select_columns([column])
    for row in tqdm(range(len(plain)), desc="decoding images", leave=False):
        try:
            missing = plain[row][column] is None
        except UNREADABLE:
            missing = True
        if missing:
            bad.append(row)
    if not bad:
        return dataset, bad
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), bad)), bad


def add_label_noise(
    dataset: Dataset, rate: float, *, seed: int, column: str = "label", clean: str = "clean_label"
) -> Dataset:
    """Replace the labels of a share of the rows by another class, evenly; keep the true ones in a new column.

    Args:
        dataset: N rows; labels are taken as by `with_class_labels`.
        rate: Share of wrong labels, in [0, 1).
        seed: Of the choice.
        column: The label column.
        clean: Name of the new column with the true labels.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"`rate` must be in [0, 1), got {rate}. Use 0.4 for 40 % wrong labels.")
    dataset = with_class_labels(dataset, column)
    generator = np.random.default_rng(seed)
    labels = np.asarray(dataset.with_format("numpy")[column])
    classes = dataset.features[column].num_classes
    wrong = generator.permutation(len(labels))[: round(rate * len(labels))]
    noisy = labels.copy()
    noisy[wrong] = (labels[wrong] + generator.integers(1, classes, len(wrong))) % classes
    feature = dataset.features[column]
    dataset = dataset.rename_column(column, clean)
    return dataset.add_column(column, noisy, feature=feature)


def load_rows(name: str, split: str = "train", *, config: str | None = None, revision: str | None = None) -> Dataset:
    """Load one split of a Hub data set, a folder (images, Parquet, or `save_to_disk`'s), or a single data file.

    Raises:
        HubError: If there is no such data set or revision, it is closed to this login, or the Hub does not answer.
        ValueError: If the file's kind is unknown, a file is broken, or there is no such split or configuration.
    """
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    path = Path(name)
    if (config is not None or revision is not None) and (path.exists() or path.suffix in _FILE_KINDS):
        raise ValueError(
            f"only a Hub data set has a configuration or revision, got {config or revision!r} for {name}."
        )
    if path.suffix in _FILE_KINDS or path.is_file():
        return _load_file(path, split)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = load_from_disk(name)
        if not isinstance(loaded, DatasetDict):
            return cast(Dataset, loaded)
        if split not in loaded:
            raise ValueError(f"{name} must have the split {split!r}, got {', '.join(loaded)}.")
        return loaded[split]
    with loading(name, repo_type="dataset", revision=revision):
        return load_dataset(name, config, split=split, revision=revision)


def _load_file(path: Path, split: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not path.is_file():
        raise FileNotFoundError(f"the data file {path} does not exist.")
    if path.suffix not in _FILE_KINDS:
        raise ValueError(f"a data file must end in {', '.join(_FILE_KINDS)}, got {path}.")
    if split != "train":
        raise ValueError(f"a single file has only the split 'train', got {split!r}. Give the file of that split.")
    try:
        return load_dataset(_FILE_KINDS[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} must be a {path.suffix} file with rows: {error.__cause__ or error}") from error


def with_class_labels(dataset: Dataset, column: str, names: Sequence[str] | None = None) -> Dataset:
    """Return the data set with `column` as a `ClassLabel`.

    Args:
        dataset: N rows.
        column: Class labels, integers or strings.
        names: The classes in their order, those of the training data for instance; by default the column's own:
            integers stay as they are, anything else is numbered in sorted order.

    Raises:
        ValueError: If there is no such column, or a label is missing or not one of `names`.
    """
    from datasets import ClassLabel

    if column not in dataset.column_names:
        raise ValueError(f"the data set must have the column {column!r}, got {', '.join(dataset.column_names)}.")
    feature = dataset.features[column]
    encoded = isinstance(feature, ClassLabel)
    values = dataset.with_format(None)[column][:]
    numeric = all(value is None or isinstance(value, (int, float)) for value in values)
    values = [int(v) if type(v) is float and v.is_integer() else v for v in values]
    bad = sum(value is None or (numeric and not (isinstance(value, int) and value >= 0)) for value in values)
    if bad:
        raise ValueError(
            f"every row must have a label in `{column}` (numbers from 0 up, or strings), got {bad} that have none or a "
            "negative or fractional one; -1 usually means unlabelled. Drop these rows."
        )
    if encoded and (names is None or list(names) == feature.names):
        return dataset
    labels = feature.int2str(values) if encoded else list(map(str, values))
    if names is None:
        names = list(map(str, range(max(values) + 1))) if numeric else sorted(set(labels))
    unknown = sorted(set(labels) - set(names))
    if unknown:
        raise ValueError(f"every label in `{column}` must be one of {', '.join(names)}, got {', '.join(unknown)}.")
    place = {name: i for i, name in enumerate(names)}
    numbers = [place[label] for label in labels]
    old = f"{column} as given"  # removed last: a data set without columns would have no rows
    dataset = dataset.rename_column(column, old)
    return dataset.add_column(column, numbers, feature=ClassLabel(names=list(names))).remove_columns(old)


def with_image_transform(dataset: Dataset, processor: Any, image: str = "image", label: str = "label") -> Dataset:
    """Return the data set with a lazy transform to `pixel_values` (by the model's processor) and `labels`."""

    def transform(batch: dict[str, list]) -> dict[str, Any]:
        inputs = processor([picture.convert("RGB") for picture in batch[image]], return_tensors="pt")
        return {"pixel_values": inputs["pixel_values"], "labels": batch[label]}

    missing = [column for column in (image, label) if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"the data set must have the columns {image!r} and {label!r}, got {', '.join(dataset.column_names)}. "
            "Name yours with --image_column and --label_column."
        )
    return dataset.with_transform(transform)
