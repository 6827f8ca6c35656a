"""Parameters that FSDP2 (`torch.distributed.fsdp.fully_shard`) shards: duals for them, and their directions.

Read `dual_shards`, then `_carry`. FSDP puts a unit's whole parameters into its modules in a forward pre-hook and takes
them out in a forward hook; our hooks run inside of FSDP's and put duals of the whole parameters there meanwhile.

Every process must do the same in the same order: `dual_shards` and `total_norm` communicate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_mimic.forward_ad import Pass, Place, places, swapped


def units(model: nn.Module) -> list[Any]:
    """Return the modules that `fully_shard` was called on: none without a process group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Put the shards back into a model whose last forward pass left whole parameters (`reshard_after_forward`)."""
    for unit in units(model):
        unit.reshard()


def is_shard(x: Any) -> bool:
    """Return whether a tensor is one process's part of a tensor (a `DTensor`)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def whole(x: Any) -> Any:
    """Return the whole tensor of a shard; anything else as it is."""
    return x.full_tensor() if is_shard(x) else x


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's part of `tensor` (whole, the same everywhere) if `parameter` is sharded, as it is sharded."""
    from torch.distributed.tensor import DTensor

    tensor = whole(tensor)
    if not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    parts = torch.distributed.tensor.distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    local = parts.to_local().clone()  # NOTE: a view of the whole tensor would keep all of it in memory.
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=parts.shape, stride=parts.stride())


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the norm over all tensors (0-d), looking at each once; all the sharded ones cost one all-reduce."""
    norms: list[Tensor] = []
    parts: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if is_shard(tensor):
            local: Any = tensor
            parts[local.device_mesh, local.placements].append(local.to_local().norm())
        else:
            norms.append(tensor.norm())
    for (mesh, placements), local_norms in parts.items():
        from torch.distributed.tensor import DTensor, Partial

        square = torch.stack(local_norms).square().sum()
        kinds = [Partial() if placement.is_shard() else placement for placement in placements]
        norms.append(DTensor.from_local(square, mesh, kinds, run_check=False).full_tensor().sqrt())
    return torch.stack(norms).norm()


@contextmanager
def dual_shards(model: nn.Module, direction: Mapping[str, Tensor]) -> Iterator[None]:
    """As `dual_parameters`, for a model with units: their parameters carry tangents while the unit runs.

    Args:
        model: Any module inside which `fully_shard` was called.
        direction: Parameter name to v; sharded like the parameter, or whole where the parameter is.
    """
    owners = _owners(model)
    where: dict[nn.Module | None, list[Place]] = defaultdict(list)
    for place in places(model, direction):
        where[owners[place[0]]].append(place)
    scope = Pass()
    with ExitStack() as stack:
        stack.callback(scope.close)
        for module, own in where.items():
            if module is None:
                stack.enter_context(swapped(own, _whole(own, direction), scope))
            else:
                stack.enter_context(_carry(module, own, direction, scope))
        yield


def _carry(module: nn.Module, where: list[Place], direction: Mapping[str, Tensor], scope: Pass) -> ExitStack:
    """Let duals stand at these places while the unit `module` runs; closing what is returned ends that."""
    stack = ExitStack()
    running = stack.enter_context(ExitStack())  # closed with the rest where the forward pass raises

    def after_unshard(*_: Any) -> None:
        running.enter_context(swapped(where, _whole(where, direction), scope))

    def before_reshard(*_: Any) -> None:
        running.close()

    stack.callback(module.register_forward_pre_hook(after_unshard).remove)
    stack.callback(module.register_forward_hook(before_reshard, prepend=True).remove)
    return stack


@torch.no_grad()
def _whole(where: list[Place], direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the whole v of the parameters now at these places, in their dtype."""
    dtypes = {name: module._parameters[key].dtype for module, key, name in where}  # type: ignore[union-attr]
    found = {name: direction[name].to(dtype) for name, dtype in dtypes.items()}
    return {name: whole(v) for name, v in found.items()}


def _owners(model: nn.Module) -> dict[nn.Module, nn.Module | None]:
    """Return module to the innermost unit around it, None outside of all."""
    heads, owners = set(units(model)), {}

    def visit(module: nn.Module, owner: nn.Module | None) -> None:
        if module in owners:
            return
        owners[module] = owner = module if module in heads else owner
        for child in module.children():
            visit(child, owner)

    visit(model, None)
    return owners
