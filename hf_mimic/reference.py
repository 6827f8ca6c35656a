"""The reference model's weights: only the chosen tensors, read from safetensors; no second model is built.

Read `read_tensors`. A stored name may differ from the model's: a renaming that transformers knows, a base-model
prefix, PEFT's wrapping. `_stored_names` undoes all three.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from hf_mimic.hub_errors import HubError
from hf_mimic.hub_files import find_file, has_file, on_hub, pin

Reference = str | Path | nn.Module | Mapping[str, Tensor]

_WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")


def read_tensors(
    reference: Reference,
    model: nn.Module,
    names: Iterable[str],
    *,
    revision: str | None = None,
    optional: Collection[str] = (),
    same_labels: bool = True,
) -> dict[str, Tensor]:
    """Read the tensors of `reference` that belong to the named parameters of `model`.

    Args:
        reference: A Hub repo id, a folder, a model, or a state dict with the model's own names.
        model: The student; tells under which names and shapes to look.
        names: Parameter (or stored buffer) names of `model`.
        revision: Branch, tag or commit of the Hub repo.
        optional: Those of them that the reference may lack, or have in another shape: they are left out then.
        same_labels: Whether its labels must be in the model's order.

    Returns:
        Name to tensor on the CPU (or where the given model has it), of the shape of the student's parameter.

    Raises:
        ValueError: If tensors are missing or have another shape (all are listed), or labels are ordered differently.
        FileNotFoundError: If there is no safetensors file.
        HubError: If the Hub refuses or fails, or sends other bytes than it announces.
    """
    names, aliases = list(names), _aliases(model)
    wanted = [alias for name in names for alias in aliases[name]]
    if isinstance(reference, (str, Path)):
        revision = pin(reference, revision)
        config = read_config(reference, revision=revision)
        if same_labels:
            check_labels(model, config, str(reference))
        found = _read_files(reference, model, wanted, revision)
    else:
        source = reference if isinstance(reference, nn.Module) else model
        if isinstance(reference, nn.Module):
            if same_labels:
                check_labels(model, getattr(getattr(reference, "config", None), "to_dict", dict)(), "the reference")
            reference = stored_tensors(reference)
        stored = {_without_peft(name, source): tensor.detach() for name, tensor in reference.items()}
        found = {name: stored[_without_peft(name, model)] for name in wanted if _without_peft(name, model) in stored}
    found = {name: found[alias] for name in names for alias in reversed(aliases[name]) if alias in found}
    own = stored_tensors(model)
    found = {n: t for n, t in found.items() if n not in optional or t.shape == own[n].shape}
    names = [name for name in names if name in found or name not in optional]
    _check_shapes(found, model, names, reference if isinstance(reference, (str, Path)) else "the reference")
    return found


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return parameter name to all names of that parameter, its own first: a checkpoint stores a tied one once."""
    by_id: dict[int, list[str]] = defaultdict(list)
    named = stored_tensors(model)
    for name, parameter in named.items():
        by_id[id(parameter)].append(name)
    return {name: sorted(by_id[id(p)], key=lambda alias: alias != name) for name, p in named.items()}


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return name to parameter or stored buffer: a checkpoint is read by the same rules.

    NOTE: `state_dict` names parameters without FSDP's checkpoint wrappers, `named_parameters` with them.
    """
    stored = model.state_dict(keep_vars=True)
    buffers = {name: tensor for name, tensor in stored.items() if not isinstance(tensor, nn.Parameter)}
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


def read_config(reference: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """Return the reference's `config.json` as a dict, empty where there is none (an adapter's repo).

    Raises:
        ValueError: If the model on the Hub is made by code in its repo.
    """
    path = find_file(reference, "config.json", revision)
    config = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    if on_hub(reference) and config.get("auto_map"):
        raise ValueError(
            f"the reference must be of an architecture in transformers, {reference} has code of its own (`auto_map` in "
            "config.json), and that is never run here. Load it yourself, after reading its code, and give the module or "
            "its state dict as the reference."
        )
    return config


def check_labels(model: nn.Module, config: Mapping[str, Any], reference: str) -> None:
    """Raise if both models name their labels and the order differs: the rows of their heads would not correspond."""
    own = getattr(getattr(model, "config", None), "id2label", None) or {}
    theirs = {int(key): value for key, value in (config.get("id2label") or {}).items()}
    generic = re.compile(r"LABEL_\d+")
    named = [
        labels for labels in (own, theirs) if labels and not all(generic.fullmatch(str(x)) for x in labels.values())
    ]
    if len(named) < 2 or len(own) != len(theirs):
        return
    differing = [f"{i}: {own[i]!r} / {theirs.get(i)!r}" for i in own if own[i] != theirs.get(i)]
    if differing:
        raise ValueError(
            f"student and reference must order their labels alike, got {len(differing)} of {len(own)} that differ "
            f"(id: student / {reference}): {', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''}. "
            "Load the student with the reference's label2id and id2label, and map the data set's labels to them."
        )


def _check_shapes(found: Mapping[str, Tensor], model: nn.Module, names: list[str], reference: Any) -> None:
    shapes = {name: tuple(p.shape) for name, p in stored_tensors(model).items()}
    wrong = [f"{n}: not in the reference" for n in names if n not in found]
    wrong += [
        f"{n}: {shapes[n]} here, {tuple(found[n].shape)} in the reference"
        for n in names
        if n in found and tuple(found[n].shape) != shapes[n]
    ]
    if wrong:
        raise ValueError(
            f"{reference} must have every chosen parameter in the student's shape; {len(wrong)} of {len(names)} do "
            "not match:\n  " + "\n  ".join(wrong) + "\nUse a reference of the same architecture (and number of "
            "labels), or choose other `mimic_layers`."
        )


# ---- files ---------------------------------------------------------------------------------------------------------


def _locate_weights(reference: str | Path, revision: str | None) -> dict[str, str]:
    """Return tensor name to file name, from the index of a sharded checkpoint or the header of a single file."""
    index = find_file(reference, "model.safetensors.index.json", revision)
    if index is not None:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    for name in _WEIGHTS:
        path = find_file(reference, name, revision)
        if path is not None:
            with _open(path) as file:
                return dict.fromkeys(file.keys(), name)
    pickles = [name for name in _PICKLES if has_file(reference, name, revision)]
    if pickles:
        raise FileNotFoundError(
            f"the reference must have safetensors weights, {reference} has only {pickles[0]}, and reading that would "
            "unpickle code from it. Convert it once: from_pretrained(...).save_pretrained(...) on a trusted machine."
        )
    _needs_the_hub(reference, "the weights")
    raise FileNotFoundError(
        f"no model.safetensors, model.safetensors.index.json or adapter_model.safetensors in {reference}. "
        "Give a Hub repo id or a folder that `save_pretrained` wrote."
    )


def _needs_the_hub(reference: str | Path, what: str) -> None:
    """Raise if what was not found may be on the Hub, which must not be asked."""
    if on_hub(reference) and is_offline_mode():
        remedy = "Unset HF_HUB_OFFLINE, or load it once before"
        raise HubError(str(reference), f"reading {what}", "HF_HUB_OFFLINE is set, and it is not in the cache", remedy)


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file ({error}). Download or copy it again.") from error


def _read_files(reference: str | Path, model: nn.Module, names: list[str], revision: str | None) -> dict[str, Tensor]:
    files = _locate_weights(reference, revision)
    wanted = set(names)
    plan = [step for step in _stored_names(model, list(files)) if wanted & set(step[1])]
    by_file = defaultdict(list)
    for stored in {key for _, _, sources in plan for key in sources}:
        by_file[files[stored]].append(stored)
    tensors: dict[str, Tensor] = {}
    for name, stored_names in sorted(by_file.items()):
        path = find_file(reference, name, revision)
        if path is None:
            _needs_the_hub(reference, name)
            raise FileNotFoundError(f"{reference} lists {name} in its index but does not have it.")
        with _open(path) as file:
            tensors.update({key: file.get_tensor(key) for key in stored_names})
    found: dict[str, Tensor] = {}
    for converter, targets, sources in plan:
        realized = (
            converter({key: tensors[key] for key in sources}) if converter else {targets[0]: tensors[sources[0]]}
        )
        found.update({name: realized[name] for name in targets if name in wanted and name in realized})
    return found


# ---- names ---------------------------------------------------------------------------------------------------------


def _stored_names(model: nn.Module, stored: list[str]) -> list[tuple[Any, list[str], list[str]]]:
    """Match the names in a checkpoint to the model's: (converter or None, model names, stored names) per match."""
    own = list(stored_tensors(model))
    plain = {_without_peft(name, model): name for name in own}
    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    direct = {key: plain[_without_peft(key)] for key in stored if _without_peft(key) in plain}
    steps: list[tuple[Any, list[str], list[str]]] = [(None, [name], [key]) for key, name in direct.items()]
    if isinstance(base, PreTrainedModel):
        rest = [key for key in stored if key not in direct]
        steps += [
            (convert, [plain[t] for t in targets if t in plain], sources)
            for convert, targets, sources in _transformers_names(base, rest, list(plain))
        ]
    return steps


def _without_peft(name: str, model: Any = None) -> str:
    """Return the name that a parameter has without PEFT's wrapping and the names of the model's adapters."""
    name = name.replace("_checkpoint_wrapped_module.", "")  # FSDP's activation checkpointing
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)
    for adapter in getattr(model, "peft_config", ()):
        name = re.sub(rf"\.{re.escape(adapter)}(?=\.|$)", "", name)
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def _transformers_names(model: PreTrainedModel, stored: list[str], own: list[str]) -> list[tuple]:
    """Apply the renamings and conversions with which transformers loads older checkpoints of this model."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    present = dict.fromkeys(own, True)
    groups: dict[str, Any] = {}
    sources: dict[str, list[str]] = defaultdict(list)
    for key in sorted(stored):
        prefix = model.base_model_prefix
        name, pattern = rename_source_key(key, renamings, converters, prefix, present)
        sources[name].append(key)
        if pattern is not None:
            owner = next(c for c in converters if pattern in c.source_patterns)
            groups.setdefault(name, (deepcopy(owner), []))[1].append((key, pattern))
    steps: list[tuple] = []
    for name, keys in sources.items():
        if name in groups:
            owner, members = groups[name]
            targets = [name.replace(owner.target_patterns[0], target) for target in owner.target_patterns]
            steps.append((_Conversion(model, owner, members, name), targets, keys))
        else:
            steps.append((None, [name], keys[:1]))
    return steps


class _Conversion:
    """One of transformers' weight conversions (for example a fused qkv split in three), run on given tensors."""

    def __init__(self, model: PreTrainedModel, converter: WeightConverter, members: list, name: str) -> None:
        self.model, self.converter, self.members, self.name = model, converter, members, name

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for key, pattern in self.members:
            self.converter.add_tensor(self.name, key, pattern, tensors[key])  # type: ignore[arg-type]
        realized = self.converter.convert(self.name, model=self.model, config=self.model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in realized.items()}
