"""The checkpoint that a reference was fine-tuned from: where its repo says so, and which of its tensors count."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_mimic.hub_files import find_file, pin
from hf_mimic.layers import match_parameters
from hf_mimic.reference import Reference, check_labels, read_config, read_tensors

_REMEDY = 'Name it as `reference_base_model`, or use direction="current" or "start".'


def find_base_model(reference: Reference, *, revision: str | None = None) -> str:
    """Return the base model that the reference's card (`base_model`) or adapter configuration names.

    Args:
        reference: Hub repo id or folder.
        revision: Branch, tag or commit of the Hub repo.

    Raises:
        ValueError: If none is named; says what was looked for, and the alternatives.
    """
    what = f"a {type(reference).__name__} has no card"
    if isinstance(reference, (str, Path)):
        revision = pin(reference, revision)
        what = (
            f"looked for `base_model` in README.md and `base_model_name_or_path` in adapter_config.json of {reference}"
        )
        named = _named_by_card(find_file(reference, "README.md", revision))
        adapter = find_file(reference, "adapter_config.json", revision)
        if not named and adapter is not None:
            named = json.loads(adapter.read_text("utf-8")).get("base_model_name_or_path")
        several = list(dict.fromkeys(named)) if isinstance(named, list) else [named]
        if len(several) > 1:
            raise ValueError(
                f"the card of {reference} must name one base model, got {', '.join(map(str, several))} (a merged model). "
                "Name the one whose weights to start from as `reference_base_model`."
            )
        if several and isinstance(several[0], str) and several[0]:
            return several[0]
    raise ValueError(
        'direction="task_vector" needs the checkpoint that the reference was fine-tuned from, and found none: '
        f"{what}. {_REMEDY}"
    )


def _named_by_card(card: Path | None) -> Any:
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        return ModelCard(card.read_text("utf-8"), ignore_metadata_errors=True).data.get("base_model") if card else None
    except (ValueError, YAMLError):  # metadata that cannot be read names nothing
        return None


def pin_base(base: Reference | None) -> str | None:
    """Return the commit of the base's main branch, None for what is not on the Hub.

    Raises:
        ValueError: If it cannot be looked up; says that it is the base, and the alternatives.
    """
    try:
        return pin(base)
    except (OSError, ValueError) as error:
        raise _unreadable(base, error) from error


def _unreadable(base: Reference | None, error: Exception) -> ValueError:
    given = base if isinstance(base, (str, Path)) else type(base).__name__
    return ValueError(
        f"the reference's base model must have the chosen parameters, {given} could not be read: {error}\n{_REMEDY}"
    )


def read_base_tensors(
    base: Reference,
    model: nn.Module,
    names: Sequence[str],
    like: Mapping[str, Tensor],
    *,
    revision: str | None = None,
) -> dict[str, Tensor]:
    """Read the base model's tensors; a head that it has not (or for other labels) counts as 0.

    The reference's head then began from a fresh one, whose random weights are unknown and zero in the mean.

    Args:
        base: Hub repo id, folder, model or state dict.
        model: The student.
        names: Parameter names of `model`.
        like: The reference's tensors, by the same names.
        revision: Branch, tag or commit of the base's Hub repo.

    Raises:
        ValueError: If it cannot be read, or another tensor is missing or has another shape.
    """
    head = set(match_parameters(model, "head")) & set(names)
    try:
        revision = pin(base, revision)
        own = [name for name in names if name not in head] if _has_other_labels(base, model, revision) else names
        found = read_tensors(base, model, own, revision=revision, optional=head, same_labels=False)
    except (OSError, ValueError) as error:
        raise _unreadable(base, error) from error
    return {name: found[name] if name in found else like[name].new_zeros(like[name].shape) for name in names}


def _has_other_labels(base: Reference, model: nn.Module, revision: str | None) -> bool:
    if not isinstance(base, (str, Path)):
        return False
    config = read_config(base, revision=revision)
    try:
        check_labels(model, config, str(base))
    except ValueError:
        return True
    return False
