"""The tangent of one torch function: given its primal inputs, their tangents and its output.

Read `function_tangent`, then the rules. A rule exists where it is cheaper than torch's own forward-mode formula
(linear and bilinear functions need no second run of the primal) or where torch has none (fused attention).
Everything else is re-evaluated once on `torch.autograd.forward_ad` duals. Nothing here records a graph.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Functions whose output is constant with respect to its inputs, or cut from them on purpose.
CUT = frozenset(
    "detach detach_ zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_empty new_zeros "
    "new_ones new_full new_tensor requires_grad_ register_hook retain_grad backward numpy __array__ tolist "
    "__repr__ __format__ __reduce_ex__ __deepcopy__ __set__ __delete__".split()
)
# Functions that draw random numbers: primal and tangent must see the same ones.
RANDOM = frozenset(
    "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout dropout_ rrelu rrelu_ "
    "gumbel_softmax multi_head_attention_forward scaled_dot_product_attention bernoulli bernoulli_ normal_ "
    "uniform_ fractional_max_pool2d".split()
)
VIEW_GETTERS = frozenset(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag"))

_LINEAR = (
    "view view_as reshape reshape_as flatten unflatten permute transpose swapaxes swapdims movedim squeeze unsqueeze "
    "expand expand_as broadcast_to contiguous clone to type type_as float double half bfloat16 __getitem__ select "
    "narrow chunk split split_with_sizes tensor_split unbind t mean sum neg __neg__ roll flip repeat tile diagonal "
    "gather index_select avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d"
)
_PRODUCT = "matmul __matmul__ __rmatmul__ bmm mm mul __mul__ __rmul__"
_MULTIPLY = frozenset((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__))
_SUM = "add __add__ __radd__ sub __sub__"
_AFFINE = "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"
_CONTIGUOUS = (F.group_norm, torch.group_norm)


def function_tangent(
    func: Callable, primals: tuple, kwargs: dict[str, Any], tangents: tuple, tangent_kwargs: dict[str, Any], out: Any
) -> Any:
    """Compute the tangent of `func(*primals, **kwargs)`.

    Args:
        func: The torch function, as `__torch_function__` receives it.
        primals: Its positional arguments, without tangents.
        kwargs: Its keyword arguments, without tangents.
        tangents: `primals` with every tensor replaced by its tangent, or by None where it has none.
        tangent_kwargs: The same for `kwargs`.
        out: What `func` returned.

    Returns:
        A structure like `out` with a tensor, or None for zero, at every place.

    Raises:
        NotImplementedError: If torch has no forward-mode formula for `func`.
    """
    if func in _SIGNATURES:
        primals, kwargs = _by_position(func, primals, kwargs), {}
        tangents, tangent_kwargs = _by_position(func, tangents, tangent_kwargs), {}
    rule = _RULES.get(func)
    if rule is not None and not any(isinstance(t, Tensor) for t in tangent_kwargs.values()):
        tangent = rule(func, primals, kwargs, tangents, out)
        if tangent is not NotImplemented:
            return tangent
    if func is F.scaled_dot_product_attention and not _attention_argument("dropout_p", primals, kwargs, 0.0):
        return _attention(primals, kwargs, tangents, tangent_kwargs, out)
    return reevaluate(func, primals, kwargs, tangents, tangent_kwargs)


# Python functions pass some of their arguments on by name: rules see them all by position.
_SIGNATURES = {func: inspect.signature(func) for func in (F.batch_norm, F.layer_norm, F.embedding, F.dropout)}


def _by_position(func: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple:
    bound = _SIGNATURES[func].bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args


def primal_context(func: Callable, primals: tuple, kwargs: dict[str, Any]) -> Any:
    """Return the context in which the primal must run: dropout inside attention needs the kernel with a formula."""
    inside = func is F.multi_head_attention_forward
    if inside or (func is F.scaled_dot_product_attention and _attention_argument("dropout_p", primals, kwargs, 0.0)):
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def reevaluate(func: Callable, primals: tuple, kwargs: dict, tangents: tuple, tangent_kwargs: dict) -> Any:
    """Run `func` once more, on detached duals of `torch.autograd.forward_ad`."""
    contiguous = func in _CONTIGUOUS

    def dualize(primal: Any, tangent: Any) -> Any:
        if isinstance(primal, Tensor) and tangent is not None:
            primal, tangent = primal.detach(), tangent.to(primal.dtype)
            if contiguous:  # NOTE: group_norm's formula takes views, which fail on other strides.
                primal, tangent = primal.contiguous(), tangent.contiguous()
            return fwad.make_dual(primal, tangent)
        if type(primal) in (tuple, list):
            return type(primal)(dualize(p, t) for p, t in zip(primal, tangent, strict=True))
        if type(primal) is dict:
            return {key: dualize(primal[key], tangent[key]) for key in primal}
        return primal

    try:
        # NOTE: inside a custom Function (reentrant checkpointing) torch disables forward AD, and duals lose tangents.
        with primal_context(func, primals, kwargs), fwad._set_fwd_grad_enabled(True), fwad.dual_level():
            return _unpack(func(*dualize(primals, tangents), **dualize(kwargs, tangent_kwargs)))
    except NotImplementedError as error:
        raise NotImplementedError(
            "every function between the chosen parameters and the loss must have a forward-mode formula, but torch "
            f"has none for `{getattr(func, '__name__', func)}`. Choose `mimic_layers` behind it (for instance "
            '"head" or "last_mlp"), or load the model with attn_implementation="sdpa" or "eager".'
        ) from error


def _unpack(out: Any) -> Any:
    if isinstance(out, Tensor):
        return fwad.unpack_dual(out).tangent if out.is_floating_point() or out.is_complex() else None
    return [_unpack(item) for item in out] if isinstance(out, (tuple, list)) else None


# ---- rules: (func, primals, kwargs, tangents, out) -> tangent, or NotImplemented ----------------------------------


def _linear(func: Callable, primals: tuple, kwargs: dict, tangents: tuple, out: Any) -> Any:
    """f(x, ...) linear in its first argument alone: f(dx, ...)."""
    if not tangents or tangents[0] is None or any(isinstance(t, Tensor) for t in tangents[1:]):
        return NotImplemented
    return func(tangents[0], *primals[1:], **kwargs)


def _product(func: Callable, primals: tuple, kwargs: dict, tangents: tuple, out: Tensor) -> Any:
    """f(a, b) linear in each of two arguments: f(da, b) + f(a, db)."""
    if len(primals) != 2 or kwargs:
        return NotImplemented
    (a, b), (da, db) = primals, tangents
    if not isinstance(da, Tensor) or not isinstance(db, Tensor):
        return func(da, b) if isinstance(da, Tensor) else func(a, db)
    return func(da, b).addcmul_(a, db) if func in _MULTIPLY else func(da, b).add_(func(a, db))


def _sum(func: Callable, primals: tuple, kwargs: dict, tangents: tuple, out: Tensor) -> Any:
    """f(a, b) = a +- b: f(da, db), an absent tangent being zero. The result never aliases a tangent."""
    if len(primals) != 2 or kwargs:
        return NotImplemented
    zero = out.new_zeros(())
    da, db = (t if isinstance(t, Tensor) else zero for t in tangents)
    return func(da, db).expand(out.shape).contiguous()


def _affine(func: Callable, primals: tuple, kwargs: dict, tangents: tuple, out: Tensor) -> Any:
    """f(x, W, b) of linear layers and convolutions: f(dx, W) + f(x, dW, db)."""
    if len(primals) < 2:
        return NotImplemented
    x, weight = primals[:2]
    dx, dweight = tangents[:2]
    dbias = tangents[2] if len(tangents) > 2 else None
    rest, kwargs = primals[3:], {key: value for key, value in kwargs.items() if key != "bias"}
    if dweight is None and dbias is None:
        return func(dx, weight, None, *rest, **kwargs)
    dweight = torch.zeros_like(weight) if dweight is None else dweight
    own = func(x, dweight, dbias, *rest, **kwargs)
    if dx is None:
        return own
    if func is F.linear and own.is_contiguous() and own.dtype == dx.dtype == weight.dtype:
        own.view(-1, own.size(-1)).addmm_(dx.reshape(-1, dx.size(-1)), weight.t())  # no temporary of own's size
        return own
    return own.add_(func(dx, weight, None, *rest, **kwargs))


def _batch_norm(func: Callable, primals: tuple, kwargs: dict, tangents: tuple, out: Tensor) -> Any:
    """In training the running statistics must be updated once: the second run does without them."""
    mean, variance = (1, 2) if func is F.batch_norm else (3, 4)  # torch.batch_norm has weight and bias first
    if kwargs or len(primals) < 6 or not primals[5]:
        return NotImplemented
    without = tuple(None if i in (mean, variance) else p for i, p in enumerate(primals))
    return reevaluate(func, without, kwargs, tangents, {})


def _layer_norm(func: Callable, primals: tuple, kwargs: dict, tangents: tuple, out: Tensor) -> Any:
    """W * (J dx) + n dW + db, n the normalized x: J is symmetric, so the fused backward kernel applies it to dx."""
    x, shape, weight, _, eps = primals
    if weight is None or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return NotImplemented
    dx, _, dweight, dbias, _ = tangents
    dweight = torch.zeros_like(weight) if dweight is None else dweight
    own, mean, rstd = torch.native_layer_norm(x, shape, dweight, dbias, eps)
    if dx is None:
        return own
    mask = [True, False, False]
    through = torch.ops.aten.native_layer_norm_backward(dx.contiguous(), x, shape, mean, rstd, None, None, mask)[0]
    return own.addcmul_(through, weight)


def _embedding(func: Callable, primals: tuple, kwargs: dict, tangents: tuple, out: Tensor) -> Any:
    """Rows of dW. NOTE: autograd gives the row `padding_idx` no gradient, torch's forward-mode formula counts it."""
    indices, weight, padding = primals[:3]
    tangent = F.embedding(indices, tangents[1])
    return tangent if padding is None else tangent.masked_fill_((indices == padding % len(weight))[..., None], 0)


def _gelu(func: Callable, primals: tuple, kwargs: dict, tangents: tuple, out: Tensor) -> Any:
    """An elementwise function's Jacobian is diagonal: its backward kernel applies it to dx."""
    return torch.ops.aten.gelu_backward(tangents[0], primals[0], **kwargs) if len(primals) == 1 else NotImplemented


def _sigmoid(func: Callable, primals: tuple, kwargs: dict, tangents: tuple, out: Tensor) -> Any:
    """As in `_gelu`; CLIP's x sigmoid(1.702 x) is made of it."""
    return NotImplemented if kwargs else torch.ops.aten.sigmoid_backward(tangents[0], out)


def _dropout(func: Callable, primals: tuple, kwargs: dict, tangents: tuple, out: Tensor) -> Any:
    """The identity where nothing is dropped; else tangent and primal need the same mask."""
    _, p, training, _ = primals
    return NotImplemented if training and p > 0 else tangents[0]


_ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def _attention_argument(name: str, args: tuple, kwargs: dict, default: Any = None) -> Any:
    index = _ATTENTION_ARGUMENTS.index(name)
    return args[index] if index < len(args) else kwargs.get(name, default)


def _attention(primals: tuple, kwargs: dict, tangents: tuple, tangent_kwargs: dict, out: Tensor) -> Tensor:
    """Tangent of softmax(q k' s + mask) v by its formula; no fused kernel has a forward-mode formula in torch.

    On a CPU one sample at a time, whose (H, L, S) temporaries stay in the cache.
    """
    q, k, v, mask = (_attention_argument(name, primals, kwargs) for name in _ATTENTION_ARGUMENTS[:4])
    dq, dk, dv, dmask = (_attention_argument(name, tangents, tangent_kwargs) for name in _ATTENTION_ARGUMENTS[:4])
    if _attention_argument("enable_gqa", primals, kwargs, False):
        k, v, dk, dv = (x if x is None else x.repeat_interleave(q.size(-3) // x.size(-3), -3) for x in (k, v, dk, dv))
    if _attention_argument("is_causal", primals, kwargs, False):
        mask = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril()
    scale = _attention_argument("scale", primals, kwargs)
    scale = q.size(-1) ** -0.5 if scale is None else scale
    large = out.shape[:-1].numel() * k.size(-2) > 2**17  # elements of the attention weights
    step = 1 if large and out.dim() > 2 and out.device.type == "cpu" else len(out)
    tangent = torch.empty_like(out)
    for part in (slice(i, i + step) for i in range(0, len(out), step)):
        rows = (  # what has no batch dimension of its own is broadcast
            x[part] if x is not None and x.dim() == out.dim() and len(x) == len(out) else x
            for x in (q, k, v, mask, dq, dk, dv, dmask, out)
        )
        tangent[part] = _attention_rows(scale, *rows)
    return tangent


def _attention_rows(scale: float, q: Any, k: Any, v: Any, mask: Any, *tangents_and_out: Any) -> Tensor:
    """(P * D) v - r out + P dv; P the weights, D = s (dq k' + q dk') + dmask, r = rowsum(P * D)."""
    dq, dk, dv, dmask, out = tangents_and_out
    logits = (q * scale) @ k.transpose(-2, -1)  # (..., L, S)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    weights = logits.softmax(-1)
    if mask is not None:
        weights = weights.nan_to_num(0.0)  # a row that may attend to nothing gives zeros, as in torch
    tangent = weights @ dv if dv is not None else torch.zeros_like(out)
    changes = [(a * scale) @ b.transpose(-2, -1) for a, b in ((dq, k), (q, dk)) if a is not None and b is not None]
    if dmask is not None:
        changes.append(dmask)
    if not changes:
        return tangent
    change = weights * functools.reduce(torch.add, changes)  # P * D
    return tangent + change @ v - change.sum(-1, keepdim=True) * out


def _named(names: str, rule: Callable) -> dict[Callable, Callable]:
    spaces = (torch, Tensor, F)
    return {getattr(space, n): rule for n in names.split() for space in spaces if hasattr(space, n)}


_RULES: dict[Callable, Callable] = {
    **_named(_LINEAR, _linear),
    **dict.fromkeys(VIEW_GETTERS, _linear),
    **_named(_PRODUCT, _product),
    **_named(_SUM, _sum),
    **_named(_AFFINE, _affine),
    F.batch_norm: _batch_norm,
    torch.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.gelu: _gelu,
    **_named("sigmoid", _sigmoid),
    F.dropout: _dropout,
    F.embedding: _embedding,
}
