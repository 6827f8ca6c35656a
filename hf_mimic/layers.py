"""Which parameters: names, suffixes, regular expressions and the structural words of `mimic_layers`.

`match_parameters` is what callers use; the words find the head, the last MLP and the last block of every tower
(CLIP has two) from the module tree, whatever the names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence

from torch import nn

_STACKS = (nn.ModuleList, nn.Sequential)
_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)


def match_parameters(model: nn.Module, layers: str | Sequence[str]) -> list[str]:
    """Return the names of the parameters that `layers` chooses, in the model's order.

    Args:
        model: Any module.
        layers: One or more of: `"all"` (every trainable parameter), `"head"`, `"last_block"`, `"last_mlp"` (the last
            linear layer, or convolution, of the last block), the exact name of a parameter or module, a suffix of
            one at a dot (PEFT's `target_modules`), or a regular expression that matches a whole parameter name.

    Raises:
        ValueError: If an entry chooses nothing; the closest names are shown.
    """
    wanted = [layers] if isinstance(layers, str) else list(layers)
    named = dict(model.named_parameters(remove_duplicate=False))
    # FSDP's activation checkpointing wraps blocks, which shows in the names: callers know them without.
    wrapped = {n.replace("_checkpoint_wrapped_module.", ""): n for n, p in named.items() if p.is_floating_point()}
    names = list(wrapped)
    if not wanted:
        raise ValueError(f'`mimic_layers` must name at least one layer, got {layers!r}. Use "head" or "all".')
    chosen: set[str] = set()
    for entry in wanted:
        matched = WORDS[entry](model) if entry in WORDS else [wrapped[n] for n in _match_name(names, entry)]
        if not matched:
            raise ValueError(_no_match(names, entry))
        chosen |= set(matched)
    seen: set[int] = set()  # a tied parameter is one parameter
    result = []
    for name, parameter in named.items():
        if name in chosen and id(parameter) not in seen and parameter.is_floating_point():
            seen.add(id(parameter))
            result.append(name)
    return result


def _match_name(names: list[str], entry: str) -> list[str]:
    exact = [name for name in names if name == entry or name.startswith(f"{entry}.")]
    if exact:
        return exact
    suffix = [name for name in names if f".{name}".endswith(f".{entry}") or f".{entry}." in f".{name}"]
    if suffix:
        return suffix
    try:
        return [name for name in names if re.fullmatch(entry, name)]
    except re.error:
        return []


def _no_match(names: list[str], entry: str) -> str:
    by_leaf = {name.removesuffix(".weight"): name for name in names}
    close = difflib.get_close_matches(entry, [*WORDS, *by_leaf, *names], n=4, cutoff=0.4) or names[-4:]
    return (
        f"`mimic_layers` must choose at least one parameter, {entry!r} matched none. Closest: {', '.join(close)}. "
        f"Use one of {', '.join(WORDS)}, a name, a suffix of one, or a regular expression for whole parameter names."
    )


# ---- structural words ----------------------------------------------------------------------------------------------


def _all(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]


def _head(model: nn.Module) -> list[str]:
    """Return what lies outside the base model; the projections (or pooling heads) of image-text models."""
    core, prefix = _core(model)
    names = [name for name, _ in core.named_parameters(remove_duplicate=False)]
    projections = [
        n for n in names if re.match(r"(visual|vision|image|text)_proj(ection)?\.|(vision|text)_model\.head\.", n)
    ]
    base = getattr(core, "base_model_prefix", "")
    if projections and not hasattr(core, "classifier"):  # SiglipForImageClassification has both
        found = projections
    elif base and hasattr(core, base):
        found = [name for name in names if not name.startswith(f"{base}.")]
    else:
        last = [name for name, module in core.named_modules() if isinstance(module, nn.Linear)][-1:]
        found = [name for name in names if last and name.rpartition(".")[0] == last[0]]
    return _trainable(model, [prefix + name for name in found])


def _last_block(model: nn.Module) -> list[str]:
    core, prefix = _core(model)
    blocks = [f"{prefix}{name}." for name in _last_blocks(core)]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return _trainable(model, [name for name in names if name.startswith(tuple(blocks))]) if blocks else []


def _last_mlp(model: nn.Module) -> list[str]:
    core, prefix = _core(model)
    found: list[str] = []
    for block in _last_blocks(core):
        layers = [
            n
            for n, m in core.get_submodule(block).named_modules()
            if isinstance(m, _WEIGHTED) or hasattr(m, "base_layer")
        ]
        outer = [n for n in layers if not any(n.startswith(f"{other}.") for other in layers)]
        if outer:
            place = f"{prefix}{block}.{outer[-1]}."
            found += [n for n, _ in model.named_parameters(remove_duplicate=False) if n.startswith(place)]
    return _trainable(model, found)


WORDS: dict[str, Callable[[nn.Module], list[str]]] = {
    "head": _head,
    "last_mlp": _last_mlp,
    "last_block": _last_block,
    "all": _all,
}


def _core(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the model inside PEFT's wrapping and the prefix that the wrapping puts before its names."""
    if not hasattr(model, "peft_config"):
        return model, ""
    core: nn.Module = model.get_base_model()  # type: ignore[operator]
    return core, next(f"{name}." for name, module in model.named_modules() if module is core)


def _last_blocks(core: nn.Module) -> list[str]:
    """Return the name of the last block of every tower: of each outermost stack of like modules with parameters."""
    stacks: list[str] = []
    for name, module in core.named_modules():
        inside = any(name.startswith(f"{stack}.") for stack in stacks)
        if isinstance(module, nn.ModuleList) and not inside and _alike(module):
            stacks.append(name)
    if not stacks:
        stacks = [n for n, m in core.named_modules() if isinstance(m, nn.Sequential) and n and _alike(m)][-1:]
    return [_descend(core, stack) for stack in stacks]


def _alike(stack: nn.Module) -> bool:
    children = list(stack.children())
    return bool(children) and len({type(c) for c in children}) == 1 and any(True for _ in children[-1].parameters())


def _descend(core: nn.Module, stack: str) -> str:
    """Return the last child of a stack; of a stage (Swin, ResNet), the last of its own blocks."""
    block = f"{stack}.{len(list(core.get_submodule(stack).children())) - 1}"
    for inner in ("layers", "blocks"):
        children = getattr(core.get_submodule(block), inner, None)
        if isinstance(children, _STACKS) and len(children):
            return f"{block}.{inner}.{len(children) - 1}"
    return block


def _trainable(model: nn.Module, names: list[str]) -> list[str]:
    """Keep the trainable ones where some are (adapters); all of them where none is (a frozen backbone)."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return [name for name in names if named[name].requires_grad] or names
