"""The checkpoint that a reference was fine-tuned from: where its repo says so, and which of its tensors count."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from hf_mimic.layers import match_parameters
from hf_mimic.reference import Reference, check_labels, find_file, read_config, read_tensors


def find_base_model(reference: Reference, *, revision: str | None = None) -> str:
    """Return the base model that the reference's card (`base_model`) or adapter configuration names.

    Args:
        reference: Hub repo id or folder.
        revision: Branch, tag or commit of the Hub repo.

    Raises:
        ValueError: If none is named; says what was looked for, and the alternatives.
    """
    looked = []
    if isinstance(reference, (str, Path)):
        from huggingface_hub import ModelCard

        card, adapter = (find_file(reference, name, revision) for name in ("README.md", "adapter_config.json"))
        looked = ["`base_model` in README.md", "`base_model_name_or_path` in adapter_config.json"]
        named = (
            ModelCard(card.read_text("utf-8"), ignore_metadata_errors=True).data.get("base_model") if card else None
        )
        if isinstance(named, list) and len(named) > 1:
            raise ValueError(
                f"the card of {reference} must name one base model, got {', '.join(named)} (a merged model). Name the "
                "one whose weights to start from as `reference_base_model`."
            )
        named = named[0] if isinstance(named, list) and named else named
        named = named or (json.loads(adapter.read_text("utf-8")).get("base_model_name_or_path") if adapter else None)
        if named:
            return str(named)
    what = (
        f"looked for {' and '.join(looked)} of {reference}" if looked else f"a {type(reference).__name__} has no card"
    )
    raise ValueError(
        'direction="task_vector" needs the checkpoint that the reference was fine-tuned from, and found none: '
        f'{what}. Name it as `reference_base_model`, or use direction="current" or "start".'
    )


def read_base_tensors(
    base: Reference, model: nn.Module, names: Sequence[str], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Read the base model's tensors; a head that it has not (or for other labels) counts as 0.

    The reference's head then began from a fresh one, whose random weights are unknown and zero in the mean.

    Args:
        base: Hub repo id, folder, model or state dict.
        model: The student.
        names: Parameter names of `model`.
        like: The reference's tensors, by the same names.

    Raises:
        ValueError: If another tensor is missing or has another shape.
    """
    head = set(match_parameters(model, "head")) & set(names)
    config = read_config(base) if isinstance(base, (str, Path)) else {}
    try:
        check_labels(model, config, "the base model")
        own = names
    except ValueError:  # the head of other labels
        own = [name for name in names if name not in head]
    found = read_tensors(base, model, own, optional=head, same_labels=False)
    return {name: found[name] if name in found else like[name].new_zeros(like[name].shape) for name in names}
