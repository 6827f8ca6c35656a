"""The splits of a data set to publish: which one is filtered, and one schema for all.

Read `splits_of_rows`, then `aligned`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from hf_mimic.curation import keep_column
from hf_mimic.push_options import check_split

if TYPE_CHECKING:
    from datasets import Dataset


def aligned(splits: Mapping[str, Dataset], first: str) -> dict[str, Dataset]:
    """Return splits with the columns of the first: what the others lack is null there, so that one schema fits all.

    Raises:
        ValueError: If another split has a column that the first has not, or of another kind.
    """
    features = splits[first].features
    found = {first: splits[first]}
    for name, rows in splits.items():
        if name == first:
            continue
        wrong = [c for c in rows.column_names if c not in features or rows.features[c] != features[c]]
        if wrong:
            raise ValueError(
                f"all splits must have the columns of {first!r}, got {', '.join(wrong)} of {name!r} that it has not, or "
                "of another type. Align them (`cast`, `remove_columns`), or publish the one split."
            )
        for column in features:
            if column not in rows.column_names:
                nulls = pa.nulls(len(rows), features.arrow_schema.field(column).type)
                rows = rows.add_column(column, nulls, feature=features[column])
        rows = rows.select_columns(list(features))
        found[name] = rows if rows.features.arrow_schema == features.arrow_schema else rows.cast(features)
    return found


def splits_of_rows(dataset: Any, split: str | None) -> tuple[str, Mapping[str, Any]]:
    """Return the name of the split to filter, and all splits.

    Raises:
        ValueError: If there is none of this name, another one has no row, or one that looks like an evaluation split was
            not asked for by name.
    """
    from datasets import Dataset, DatasetDict

    if isinstance(dataset, DatasetDict):
        name = split or "train"
        if name not in dataset:
            raise ValueError(
                f"the data set must have the split {name!r}, got {', '.join(dataset)}. Name one: split=..."
            )
        for each in dataset:
            check_split(each)
        _check_others(dataset, name)
        return name, dict(dataset)
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"a curated data set must be a Dataset or a DatasetDict, got a {type(dataset).__name__}. Load a stream whole first."
        )
    parts = re.findall(r"(?:^|\+)(\w+)", str(dataset.split or ""))  # of "train[:50%]+test"
    other = next((part for part in parts if part not in ("train", "all")), None)
    if split is None and other is not None:
        raise ValueError(
            f"only training data are filtered unless you say so, got the split {other!r}. Say split={other!r}, and that "
            "results on it cannot be compared with others'."
        )
    return split or "train", {split or "train": dataset}


def _check_others(splits: Mapping[str, Any], first: str) -> None:
    empty = [name for name, rows in splits.items() if name != first and not len(rows)]
    if empty:
        raise ValueError(
            f"every split must have a row, got none in {', '.join(empty)}: `load_dataset` reads no data set with an empty "
            "split. Leave it out."
        )
    dropping: Sequence[str] = [
        name
        for name, rows in splits.items()
        if name != first and "keep" in rows.column_names and not pa.compute.all(keep_column(rows)).as_py()
    ]
    if dropping:
        raise ValueError(
            f"only the split {first!r} is filtered, got rows with keep=False in {', '.join(dropping)}. Remove the column "
            "there, or publish that split by itself: split=..."
        )
