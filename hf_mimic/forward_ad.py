"""Make any model carry tangents: forward-mode AD that leaves the primal computation untouched.

Read `dual_parameters` (what a caller uses), then `Dual.__torch_function__`: every torch function that meets a tangent
is split into its primal, run exactly as in plain training, and its tangent, computed without graph (tangents.py).
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hf_mimic.tangents import CUT, RANDOM, VIEW_GETTERS, function_tangent, primal_context, reevaluate

_INPLACE_OPERATORS = frozenset("__iadd__ __isub__ __imul__ __itruediv__ __ipow__ __imatmul__ __setitem__".split())
_OF_THE_NODE = frozenset(("register_hook", "retain_grad"))


class Pass:
    """One scoring pass: while `active`, duals propagate; afterwards they behave as their primals."""

    def __init__(self) -> None:
        self.active = True
        self.grad = torch.is_grad_enabled()
        self.duals: list[weakref.ref[Dual]] = []

    def cuts(self) -> bool:
        """Return whether the model itself switched gradients off; a custom Function (checkpointing) does it too."""
        return self.grad and not torch.is_grad_enabled() and torch._C._is_fwd_grad_enabled()

    def close(self) -> None:
        """End the pass."""
        # Checkpointing keeps the layer inputs until backward: their tangents need not live that long.
        self.active = False
        for reference in self.duals:
            dual = reference()
            if dual is not None:
                dual._tangent = None
                dual.__class__ = dual.__dict__.pop("_former", Tensor)  # a buffer must not stay a Dual
        self.duals.clear()


class Dual(Tensor):
    """A tensor with a tangent: an alias of its primal, so that whatever ignores the tangent still works.

    The graph that autograd records never sees the tangent. `_primal` is the tensor that torch functions run on; it
    is None where the dual was made without graph, because a custom autograd Function (reentrant checkpointing, DDP's
    sink) may give such a dual its graph later.
    """

    _primal: Tensor | None
    _tangent: Tensor | None
    _pass: Pass

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` on the primals; give its floating-point outputs the tangents of `function_tangent`."""
        name, given = getattr(func, "__name__", ""), dict(kwargs or {})
        if (name == "__get__" and func not in VIEW_GETTERS) or name in _OF_THE_NODE:
            # NOTE: of the dual, not of an alias: that would not require grad, and hooks on it would never run.
            held = args[0] if args[0]._primal is None else args[0]._primal
            with torch._C.DisableTorchFunctionSubclass():
                return func(held, *args[1:], **given)
        scopes: list[Pass] = []
        primals = _map_tensors(functools.partial(_primal_noting, scopes=scopes), args)
        primal_kwargs = _map_tensors(functools.partial(_primal_noting, scopes=scopes), given)
        if not scopes or name in CUT or scopes[0].cuts():
            out = func(*primals, **primal_kwargs)
            if name == "detach_":
                args[0]._tangent = None
            return args[0] if primals and out is primals[0] else out
        if name == "__iter__":
            return iter(args[0].unbind(0))
        call = (func, primals, primal_kwargs, _map_tensors(tangent_of, args), _map_tensors(tangent_of, given))
        if _is_inplace(func, name, args, given):
            return _run_inplace(args[0], call, scopes[0])
        state = rng_state(primals) if name in RANDOM else None
        with primal_context(func, primals, primal_kwargs):
            out = func(*primals, **primal_kwargs)
        if not _has_floating(out):
            return out
        with torch.no_grad(), _replay(state):
            tangent = function_tangent(*call, out)
        return _pair(out, tangent, scopes[0])


def primal_of(x: Any) -> Any:
    """Return `x` without its tangent; anything but a `Dual` is returned as it is."""
    if not isinstance(x, Dual):
        return x
    return x._primal if x._primal is not None else x.as_subclass(Tensor)


def tangent_of(x: Any) -> Tensor | None:
    """Return the tangent of `x`, or None if it carries none; a parameter's may be computed only now."""
    tangent: Any = x._tangent if isinstance(x, Dual) else None
    return tangent() if callable(tangent) else tangent


def strip(tree: Any) -> Any:
    """Return a nested structure of outputs with every `Dual` replaced by its primal."""
    return tree_map(primal_of, tree)


def with_tangent(x: Tensor, tangent: Tensor | None, scope: Pass | None) -> Tensor:
    """Return `x` carrying `tangent` in the pass `scope` (of `dual_parameters`, or `pass_of` another tensor)."""
    return x if tangent is None or scope is None else _make(x, tangent, scope)


def pass_of(x: Any) -> Pass | None:
    """Return the pass in which `x` carries a tangent."""
    return x._pass if isinstance(x, Dual) else None


@contextmanager
def dual_parameters(model: nn.Module, tangents: Mapping[str, Tensor | Callable[[], Tensor]]) -> Iterator[Pass]:
    """Within the context the named parameters of `model` carry tangents; afterwards the model is as before.

    Args:
        model: Any module; a shared (tied) parameter carries its tangent at every place.
        tangents: Parameter name to tensor of the parameter's shape, dtype and device, or to a function that makes
            it whenever a torch function meets the parameter: not all of them at once.
    """
    scope = Pass()
    try:
        with swapped(places(model, tangents), tangents, scope):
            yield scope
    finally:
        scope.close()


Place = tuple[nn.Module, str, str]


def places(model: nn.Module, names: Iterable[str]) -> list[Place]:
    """Return (module, key, parameter name) for every place of `model` that holds a named parameter."""
    named = dict(model.named_parameters(remove_duplicate=False))
    chosen = {id(named[name]): name for name in names}
    own = ((module, key, id(p)) for module in model.modules() for key, p in module._parameters.items())
    return [(module, key, chosen[number]) for module, key, number in own if number in chosen]


@contextmanager
def swapped(where: Sequence[Place], tangents: Mapping[str, Any], scope: Pass) -> Iterator[None]:
    """Within the context duals stand at the given places, with the parameters now there as primals."""
    before = [(module, key, name, module._parameters[key]) for module, key, name in where]
    duals: dict[str, Any] = {}
    try:
        with torch.enable_grad():
            # The parameter itself stays the primal: autocast caches the casts of leaves only.
            for _, _, name, parameter in before:
                if name not in duals:
                    duals[name] = _make(parameter, tangents[name], scope)  # type: ignore[arg-type]
        for module, key, name, _ in before:
            module._parameters[key] = duals[name]
        yield
    finally:
        for module, key, _, parameter in before:
            module._parameters[key] = parameter


def _make(primal: Tensor, tangent: Any, scope: Pass) -> Dual:
    dual = primal.as_subclass(Dual)
    dual._primal = primal if torch.is_grad_enabled() else None
    dual._tangent, dual._pass = tangent, scope
    scope.duals.append(weakref.ref(dual))
    return dual


# ---- structure: nested arguments and outputs ----------------------------------------------------------------------


def _map_tensors(function: Callable, x: Any) -> Any:
    if isinstance(x, Tensor):
        return function(x)
    if type(x) in (tuple, list):
        return type(x)([_map_tensors(function, item) for item in x])
    if type(x) is dict:
        return {key: _map_tensors(function, item) for key, item in x.items()}
    return x


def _primal_noting(x: Tensor, scopes: list[Pass]) -> Tensor:
    if isinstance(x, Dual) and x._tangent is not None and x._pass.active:
        scopes.append(x._pass)
    return primal_of(x)


def _has_floating(out: Any) -> bool:
    if isinstance(out, Tensor):
        return out.is_floating_point() or out.is_complex()
    return isinstance(out, (tuple, list)) and any(_has_floating(item) for item in out)


def _pair(out: Any, tangent: Any, scope: Pass) -> Any:
    """Join outputs and tangents of the same structure; an output whose tangent is None stays plain."""
    if tangent is None or not _has_floating(out):
        return out
    if isinstance(out, Tensor):
        return _make(out, tangent, scope)
    items = [_pair(o, t, scope) for o, t in zip(out, tangent, strict=True)]
    return type(out)(*items) if hasattr(out, "_fields") else type(out)(items)


# ---- in-place and random functions --------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _inplace_position(func: Callable) -> int | None:
    """Return the position of the parameter `inplace` of a Python function, None if it has none."""
    try:
        names = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _is_inplace(func: Callable, name: str, args: tuple, kwargs: dict) -> bool:
    if name in _INPLACE_OPERATORS or (name.endswith("_") and not name.endswith("__")):
        return True
    position = _inplace_position(func)
    return position is not None and bool(args[position] if position < len(args) else kwargs.get("inplace"))


def _run_inplace(target: Tensor, call: tuple, scope: Pass) -> Any:
    """Compute the tangent first, on clones; then run the primal; then write the tangent in place too."""
    func, primals, kwargs, tangents, tangent_kwargs = call

    def on_clone(clone: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        func(clone, *args, **kwargs)
        return clone

    on_clone.__name__ = getattr(func, "__name__", "an in-place function")
    old = tangents[0]
    with torch.no_grad(), _replay(rng_state(primals)):
        clone = primals[0].detach().clone()
        start = torch.zeros_like(clone) if old is None else old.clone()
        new = reevaluate(on_clone, (clone, *primals[1:]), kwargs, (start, *tangents[1:]), tangent_kwargs)
    result = func(*primals, **kwargs)
    if old is not None and isinstance(primals[0], nn.Parameter):
        target._tangent = new  # type: ignore[attr-defined]  # the old one is the caller's
    elif old is not None:
        old.copy_(new)  # the tangent of a view is a view of its base's tangent: both change
    elif new is not None:
        _become_dual(target, new, scope)
    return target if result is primals[0] else result


def _become_dual(target: Tensor, tangent: Tensor, scope: Pass) -> None:
    """Let a plain tensor to which a value with a tangent was just written carry a tangent from now on."""
    if target._is_view():
        raise NotImplementedError(
            "an in-place function wrote a value with a tangent into a view of a tensor without one, which cannot be "
            "followed. Choose `mimic_layers` behind it, or write to the whole tensor."
        )
    dual: Any = target
    dual._former, dual.__class__ = type(target), Dual
    dual._primal, dual._tangent, dual._pass = None, tangent, scope
    scope.duals.append(weakref.ref(dual))


def rng_state(primals: Iterable[Any]) -> tuple[Any, Tensor]:
    """Return the random generator of the first tensor's device (its module) and its state."""
    device = next((x.device for x in primals if isinstance(x, Tensor)), torch.device("cpu"))
    module = torch if device.type == "cpu" else torch.get_device_module(device)
    return module, module.get_rng_state()


@contextmanager
def _replay(state: tuple[Any, Tensor] | None) -> Iterator[None]:
    """Draw the random numbers that followed `state` again, then continue where the generator was."""
    if state is None:
        yield
        return
    module, before = state
    after = module.get_rng_state()
    module.set_rng_state(before)
    try:
        yield
    finally:
        module.set_rng_state(after)
