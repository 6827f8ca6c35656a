"""The flags that say which data a command reads: the data set, where in it, and its columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(kw_only=True)
class PlaceArguments:
    """Where in a Hub data set the rows are.

    Args:
        dataset_config: Configuration of a Hub data set.
        dataset_revision: Branch, tag or commit of a Hub data set.
    """

    dataset_config: str | None = None
    dataset_revision: str | None = None

    @property
    def place(self) -> dict[str, str | None]:
        """The keywords of `load_rows`."""
        return {"config": self.dataset_config, "revision": self.dataset_revision}


@dataclass
class DataArguments(PlaceArguments):
    """The data set to train on or to score.

    Args:
        model: Hub repo id or folder of the student; for training, its head is made anew if the labels differ.
        dataset: Hub data set, folder (images, Parquet, save_to_disk) or data file.
        split: Split of the data set.
        eval_split: Split to evaluate on after each epoch, or a data file.
        eval_dataset: The data set that has the eval_split; by default the one that is trained on.
        eval_dataset_config: Configuration of an eval_dataset on the Hub.
        eval_dataset_revision: Branch, tag or commit of an eval_dataset on the Hub.
        image_column: Column with the images.
        label_column: Column with the labels.
        text_column: Column with captions, strings or lists of strings of which the first counts: trains an image-text
            model (CLIP, SigLIP ...) on pairs, not a classifier on labels.
        image_id_column: With text_column: rows of the evaluation data with the same value are captions of one image, that of
            the first of them; by default every row has an image of its own.
        on_error: What to do with an image that does not decode: "raise" names its row, "skip" drops and counts it.
    """

    model: str
    dataset: str
    split: str = "train"
    eval_split: str | None = None
    eval_dataset: str | None = None
    eval_dataset_config: str | None = None
    eval_dataset_revision: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    text_column: str | None = None
    image_id_column: str | None = None
    on_error: str = "raise"


def evaluation_part(options: DataArguments) -> DataArguments:
    """Return the same with the data to evaluate on: another split, also of another data set, or a file of its own."""
    given = str(options.eval_split)
    if Path(given).exists():
        return replace(options, dataset=given, dataset_config=None, dataset_revision=None, split="train")
    if options.eval_dataset is None:
        return replace(options, split=given)
    return replace(
        options,
        dataset=options.eval_dataset,
        dataset_config=options.eval_dataset_config,
        dataset_revision=options.eval_dataset_revision,
        split=given,
    )


def resume_point(given: Any) -> Any:
    """Return what `Trainer.train` takes for a `resume_from_checkpoint` of the command line: true, false or a folder."""
    return {"true": True, "false": None}.get(str(given).lower(), given)
