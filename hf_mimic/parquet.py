"""Rows as a Parquet file that needs no other file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def write_parquet(rows: Dataset, path: Path) -> int:
    """Write rows without their format or transform; return their bytes.

    NOTE: `Dataset.to_parquet` writes only the paths of images that are files of their own, on this machine; here their
    bytes go into the file, as they are.

    Args:
        rows: Any.
        path: In a folder that exists.
    """
    import datasets
    from datasets.features.features import require_storage_embed
    from datasets.table import embed_table_storage

    plain = rows.with_format(None)
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # of one file; who writes many shows one for all
    try:
        if any(map(require_storage_embed, plain.features.values())):
            arrow = plain.with_format("arrow")
            plain = arrow.map(embed_table_storage, batched=True, batch_size=100, keep_in_memory=True).with_format(None)
        return plain.to_parquet(path)
    finally:
        if shown:
            datasets.enable_progress_bars()
