"""The tangent of single torch functions against reverse mode alone."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from oracles import jvp_by_two_backwards, tensors, through_duals
from torch import nn
from torch.utils.checkpoint import checkpoint

LABELS = torch.tensor([0, 1, 3, 2])
ROWS, COLUMNS = torch.tensor([0, 2, 1, 1]), torch.tensor([[0, 1], [1, 2], [3, 3], [0, 5]])


def edit(x, change):
    """Return a copy of x after an in-place change."""
    z = x * 1
    change(z)
    return z


def zeros():
    return torch.zeros(4, 6, dtype=torch.float64)


def image(x):
    return x.reshape(1, 1, 4, 6)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b.sin()

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g * b.sin(), g * a * b.cos()


def with_backward_hook(x, y):
    layer = nn.Tanh()
    layer.register_full_backward_hook(lambda *_: None)
    return layer(x * 1) * y + x


SHAPES = {
    "chunk": lambda x, y: x.chunk(2, -1)[0] * y.chunk(2, -1)[1].sin(),
    "split": lambda x, y: torch.split(x, [2, 4], 1)[0].sum(1) * x.split(3, 1)[1].sum(1) * y[:, 0],
    "unbind": lambda x, y: x.unbind(0)[0] * y.unbind(0)[3],
    "tensor_split": lambda x, y: torch.stack(x.tensor_split(3, 1)).sin(),
    "iterate": lambda x, y: torch.stack([row.sin() * other for row, other in zip(x, y, strict=True)]),
    "unpack": lambda x, y: (lambda a, *rest: a * rest[-1])(*x) * y[0],
    "getitem": lambda x, y: x[1:3, None, ..., -1] * y[2, 0] + x[ROWS, ROWS][:2, None],
    "mask": lambda x, y: x[x > 0].sum() * torch.masked_select(y, y > 0),
    "transpose": lambda x, y: x.movedim(0, 1) @ y.T.mT.T.t() + x.swapaxes(0, 1).permute(0, 1) @ y.transpose(0, 1).T,
    "reshape": lambda x, y: x.view(-1).unflatten(0, (4, 6)) * y.flatten().reshape(2, 12).view_as(x),
    "squeeze": lambda x, y: x.unsqueeze(0).squeeze(0) * y.expand(3, 4, 6).sum(0),
    "broadcast": lambda x, y: torch.mul(*torch.broadcast_tensors(x[:, None], y[None])),
    "roll": lambda x, y: torch.roll(x, (1, 2), (0, 1)) * y.flip(0) + x.diagonal().sum(),
    "repeat": lambda x, y: x.repeat(2, 1) * y.repeat_interleave(2, 0) + torch.tile(x, (2, 1)),
    "cat": lambda x, y: torch.cat([x, zeros() + 1, y]).sin(),
    "stack": lambda x, y: torch.stack((zeros(), x, y)).sin(),
    "vstack": lambda x, y: torch.vstack([x, y]) * torch.hstack([x[:, :3], y[:, 3:]]).repeat(2, 1),
    "pad": lambda x, y: F.pad(x, (1, 1))[:, :6] * y + F.pad(x[None], (1, 1), mode="reflect")[0, :, :6],
    "gather": lambda x, y: (
        x.gather(1, COLUMNS) * y.index_select(0, ROWS)[:, :2] * x.take_along_dim(LABELS[:, None], 1)
    ),
    "scatter": lambda x, y: (
        zeros().scatter(1, COLUMNS[:, :1], x[:, :1]) * y + zeros().scatter_add(1, COLUMNS, y[:, :2])
    ),
    "index_add": lambda x, y: zeros().index_add(0, ROWS, x) * y,
    "masked_scatter": lambda x, y: zeros().masked_scatter(zeros() == 0, x) * y,
    "unfold": lambda x, y: x.unfold(1, 2, 1).sin() * y[:, :5, None] + F.unfold(image(x), (4, 2)).sum(),
    "pixel_shuffle": lambda x, y: F.pixel_shuffle((x * y).view(1, 4, 2, 3), 2),
    "type": lambda x, y: x.to(torch.complex128).real * y.type(torch.float64) + x.to(y) + y.type_as(x) + x.double(),
}
PRODUCTS = {
    "arithmetic": lambda x, y: -x - (3 - x) * (y + 1) - (2 * y - x * 3) / 2 + 1 / (y.abs() + 1) - x.__rsub__(y),
    "alpha": lambda x, y: torch.add(x, y, alpha=3) + x.sub(y, alpha=2) + torch.rsub(x, y),
    "broadcasting": lambda x, y: x[:, None] + y[None] - x[0] * y[0, 0] + (x[0] + y[:, :1])[None],
    "keywords": lambda x, y: torch.add(input=x, other=y) + x.mul(other=y) + torch.mean(input=x, dim=1, keepdim=True),
    "matmul": lambda x, y: x @ y.t() + torch.matmul(input=x, other=y.t()) + torch.mm(x, y.t()) + x.mv(y[0]),
    "batched": lambda x, y: torch.bmm(x.view(2, 2, 6), y.view(2, 6, 2)) + x.view(2, 2, 6) @ y.t()[:, :2],
    "addmm": lambda x, y: torch.addmm(x @ x.t(), x, y.t(), beta=2, alpha=0.5) + torch.outer(x[0, :4], y[0, :4]),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=2) + torch.addcdiv(x, y, x.abs() + 1) + torch.lerp(x, y, 0.3),
    "einsum": lambda x, y: torch.einsum("ij,kj->ik", x, y).sin() + torch.einsum("ij,kj,k->i", x, y, y[:, 0]),
    "power": lambda x, y: (x.abs() + 1) ** y + 2**y + y**2 + x.prod(1, keepdim=True),
    "linear": lambda x, y: F.linear(x, y, y.sum(1)) + F.linear(input=x, weight=y, bias=x.sum(1)) + F.linear(x, y),
    "bilinear": lambda x, y: F.bilinear(x, y, torch.arange(72.0, dtype=x.dtype).view(2, 6, 6)),
    "conv1d": lambda x, y: F.conv1d(x[None], y.reshape(4, 2, 3).repeat(1, 2, 1), padding=1),
    "conv2d": lambda x, y: F.conv2d(image(x), y.reshape(2, 1, 3, 4), y.sum(1)[:2], padding=1, stride=2),
    "conv2d, no bias": lambda x, y: F.conv2d(input=image(x), weight=y.reshape(2, 1, 4, 3), groups=1),
    "conv_transpose2d": lambda x, y: F.conv_transpose2d(image(x), y.reshape(1, 2, 3, 4), y.sum(1)[:2], stride=2),
    "embedding": lambda x, y: F.embedding(LABELS[:2], x).sin() * y[:2],
    "embedding, padding": lambda x, y: F.embedding(LABELS, x, 1).sin() + F.embedding(LABELS, y, padding_idx=-1),
    "complex": lambda x, y: torch.view_as_real(torch.view_as_complex(x.view(4, 3, 2)).mul(y[0, 0] + 2j)),
    "fourier": lambda x, y: torch.fft.fftn(x, dim=(0, 1)).real * y + torch.fft.fft(y).imag + torch.fft.fft(x).abs(),
}
CURVES = {
    "activations": lambda x, y: F.gelu(x, approximate="tanh") + F.gelu(y) + F.mish(x) + F.elu(x) + F.softplus(y),
    "kinks": lambda x, y: F.relu(x) + F.relu6(y) + F.leaky_relu(x) + F.hardtanh(x) + y.clamp(min=-0.2) + x.minimum(y),
    "gates": lambda x, y: F.glu(x) * F.silu(y[:, :3]) + x[:, :3] * torch.sigmoid(1.702 * x[:, :3]),
    "prelu": lambda x, y: F.prelu(x, y[0, :1]),
    "elementary": lambda x, y: (
        x.abs().sqrt() * y.exp() + x.erf() + x.atan2(y) + (x.abs() + 1).log1p() + y.abs().rsqrt()
    ),
    "where": lambda x, y: torch.where(x > 0, x, y).sin() + torch.where(y > 0, x, torch.zeros((), dtype=x.dtype)),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, -3.0).sin() + x.nan_to_num() + x.tril() * y.triu(),
    "max": lambda x, y: x.max(dim=1).values * y.sum(1) + x.amax(1) * y.argmax(1) + torch.max(y, 1)[0] + x.max(),
    "sort": lambda x, y: x.sort(-1).values * y + torch.topk(x, 2).values.sum() + x.median(1, keepdim=True).values,
    "cumulate": lambda x, y: x.cumsum(1) * y.cumprod(1) + x.var(1, keepdim=True) * y.std(1, keepdim=True),
    "softmax": lambda x, y: F.softmax(x, -1, dtype=torch.float64) @ y.t() + torch.logsumexp(x * y, 1),
    "cross_entropy": lambda x, y: F.cross_entropy(x @ y.t(), LABELS, reduction="none", label_smoothing=0.1),
    "cross_entropy, ignored": lambda x, y: F.cross_entropy(x @ y.t(), LABELS - 101 * (LABELS == 1), reduction="none"),
    "nll": lambda x, y: F.nll_loss(F.log_softmax(x, -1), LABELS, reduction="none") * y[:, 0],
    "binary": lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid(), reduction="none") - F.logsigmoid(y),
    "regression": lambda x, y: F.mse_loss(x, y, reduction="none") + F.smooth_l1_loss(x, y) + F.huber_loss(x, y),
    "kl_div": lambda x, y: F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="none").sum(1),
    "distances": lambda x, y: (
        F.cosine_similarity(x, y) + F.pairwise_distance(x, y) + (x[:, None] - y).pow(2).sum((1, 2))
    ),
    "normalize": lambda x, y: F.normalize(x, dim=-1) * y + x / x.norm(dim=-1, keepdim=True),
    "layer_norm": lambda x, y: F.layer_norm(x, (6,), y[0], y[1]) + F.layer_norm(x, (6,), y[0]) + F.layer_norm(x, (6,)),
    "torch.layer_norm": lambda x, y: torch.layer_norm(x, (6,), y[0], y[1]) + F.layer_norm(x.t(), (6, 4), y.t()).t(),
    "rms_norm": lambda x, y: F.rms_norm(x, (6,), y[0]),
    "batch_norm, eval": lambda x, y: F.batch_norm(x, zeros()[0], zeros()[0] + 2, y[0], y[1], False),
    "batch_norm, train": lambda x, y: F.batch_norm(x, zeros()[0], zeros()[0] + 2, y[0], y[1], True),
    "group_norm": lambda x, y: F.group_norm((x * y).view(1, 4, 2, 3), 2, x[0, :4], y[0, :4]),
    "group_norm, strided": lambda x, y: F.group_norm(
        (x * y).reshape(1, 4, 2, 3).to(memory_format=torch.channels_last), 2
    ),
    "instance_norm": lambda x, y: F.instance_norm((x * y)[None]),
    "pooling": lambda x, y: (
        F.max_pool2d(image(x * y), 2) + F.avg_pool2d(image(x), 2) + F.adaptive_avg_pool2d(image(y), 1)
    ),
    "interpolate": lambda x, y: F.interpolate(image(x * y), scale_factor=2, mode="bicubic", antialias=True),
    "linalg": lambda x, y: (
        torch.linalg.inv(x[:, :4] + 5 * torch.eye(4, dtype=x.dtype)) @ y + torch.linalg.det(y[:, :4])
    ),
    "lstm": lambda x, y: _module(lambda: nn.LSTM(6, 5, batch_first=True), x, y)[0],
    "MultiheadAttention": lambda x, y: _module(lambda: nn.MultiheadAttention(6, 2, batch_first=True), x, y, y)[0],
}
IN_PLACE = {
    "operators": lambda x, y: edit(x, lambda z: z.__iadd__(y).__imul__(y).__isub__(1).__itruediv__(2).__ipow__(2)),
    "methods": lambda x, y: edit(x, lambda z: z.add_(y, alpha=2).div_(y.abs() + 1).neg_().clamp_(-1, 2)),
    "relu_": lambda x, y: edit(x, lambda z: z.relu_()) * y,
    "relu(inplace)": lambda x, y: edit(x, lambda z: F.relu(z, inplace=True)) * y + F.silu(x * 1, True),
    "masked_fill_": lambda x, y: edit(x, lambda z: z.masked_fill_(y > 0, 0.0)).sin(),
    "setitem": lambda x, y: edit(x, lambda z: z.__setitem__((slice(None), 0), y[:, 1])).sin(),
    "setitem, mask": lambda x, y: edit(x, lambda z: z.__setitem__(x > 0, 0.0)) * y,
    "zero_": lambda x, y: edit(x, lambda z: z.zero_().add_(y)) + edit(x, lambda z: z.fill_(2.0)) * y,
    "index_put_": lambda x, y: edit(x, lambda z: z.index_put_((ROWS[:2],), y[:2])).sin(),
    "round": lambda x, y: edit(x.round(), lambda z: z.mul_(y)),
    "of a view": lambda x, y: edit(x, lambda z: z[0].add_(z[1])).sin() * y,
    "of a flat view": lambda x, y: edit(x, lambda z: z.view(-1).mul_(3)) * y + edit(x, lambda z: z.reshape(-1).neg_()),
    "of a base": lambda x, y: (lambda z: (z[1], z.mul_(y)))(x + y)[0].sin(),
    "of a copy": lambda x, y: edit(x, lambda z: z.t().contiguous().mul_(2)) * y + edit(x, lambda z: z.clone().mul_(2)),
    "of the same": lambda x, y: edit(x, lambda z: z.to(torch.float64).mul_(3)) * y,
    "of a sum": lambda x, y: edit(x + zeros(), lambda z: z.mul_(2)) * x * edit(x - y[0], lambda z: z.add_(x)),
    "on a plain tensor": lambda x, y: edit(zeros(), lambda z: z.add_(x).mul_(y)),
    "setitem on a plain tensor": lambda x, y: edit(
        zeros(), lambda z: z.__setitem__(slice(1, 3), x[1:3] * y[:2])
    ).cos(),
    "copy_ on a plain tensor": lambda x, y: (
        edit(zeros(), lambda z: z.copy_(x)) * y + edit(zeros(), lambda z: z.fill_(x.sum()))
    ),
    "index_copy_ on a plain tensor": lambda x, y: edit(zeros(), lambda z: z.index_copy_(0, ROWS[:2], x[:2])) * y,
}
CONTROL = {
    "detach": lambda x, y: (
        x.detach() * y + (y - x).detach() + x.data * y + (x * 2).detach_() + edit(x, lambda z: z.detach_())
    ),
    "constants": lambda x, y: x * y.tolist()[0][0] * y[0, 0].item() * len(y) + torch.zeros_like(x) + x.new_ones(4, 6),
    "conditions": lambda x, y: (x if bool(y.sum() > 0) else y) * (y > 0).to(x.dtype) * y.numel(),
    "text": lambda x, y: x * y if f"{x} {y.sum()}" and repr(y) else x,
    "requires_grad_": lambda x, y: (x * 1).requires_grad_(True) * y,
    "custom Function": lambda x, y: _Scale.apply(x * 1, y * 1) * x,
    "backward hook": with_backward_hook,
    "checkpoint": lambda x, y: checkpoint(lambda a, b: (a * b).sin(), x * 1, y, use_reentrant=False),
}


def _module(make, *inputs):
    torch.manual_seed(3)
    return (
        make().double()(*(x[None] for x in inputs))
        if len(inputs) > 2
        else make().double()((inputs[0] * inputs[1])[None])
    )


FUNCTIONS = {**SHAPES, **PRODUCTS, **CURVES, **IN_PLACE, **CONTROL}


@pytest.mark.parametrize("which", ["xy", "x", "y"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_tangent_equals_reverse_mode(name, which):
    primals, tangents = tensors("x", "y"), {n: v for n, v in tensors("x", "y", seed=6).items() if n in which}
    expected, oracle = jvp_by_two_backwards(FUNCTIONS[name], primals, tangents)
    out, tangent, grads = through_duals(FUNCTIONS[name], primals, tangents)
    assert torch.equal(out, expected)
    torch.testing.assert_close(tangent, oracle, rtol=1e-9, atol=1e-9)
    _, _, plain = through_duals(FUNCTIONS[name], primals, {})
    assert all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(grads, plain, strict=True)
    )


@pytest.mark.parametrize("name", ["matmul", "layer_norm", "embedding, padding", "operators", "iterate"])
def test_another_tangent_fails_the_comparison(name):
    primals, tangents = tensors("x", "y"), tensors("x", "y", seed=6)
    _, oracle = jvp_by_two_backwards(FUNCTIONS[name], primals, tangents)
    wrong = through_duals(FUNCTIONS[name], primals, tensors("x", "y", seed=7))[1]
    assert (wrong - oracle).abs().max() > 0.1 * oracle.abs().max()


# ---- what cannot be followed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cdist", "grid_sampler", "_weight_norm"])
def test_function_without_forward_mode_formula_is_named(name):
    functions = {
        "cdist": lambda x, y: torch.cdist(x, y),
        "grid_sampler": lambda x, y: F.grid_sample(image(x), y.view(1, 3, 4, 2), align_corners=False),
        "_weight_norm": lambda x, y: torch._weight_norm(x, y[:, :1], 0),
    }
    with pytest.raises(
        NotImplementedError, match=rf"torch has none for `(\w*{name}|grid_sample)`. Choose `mimic_layers`"
    ):
        through_duals(functions[name], tensors("x", "y"), tensors("x", seed=6))


def test_writing_a_tangent_into_a_view_of_a_plain_tensor():
    with pytest.raises(NotImplementedError, match="into a view of a tensor without one, which cannot be followed"):
        through_duals(lambda x: edit(zeros(), lambda z: z[0].copy_(x[0])), tensors("x"), tensors("x", seed=6))


@pytest.mark.xfail(strict=True, reason="the view was plain when it was made")
def test_view_of_a_plain_tensor_that_is_written_to_later():
    primals, tangents = tensors("x", "y"), tensors("y", seed=6)
    oracle = jvp_by_two_backwards(lambda x, y: (lambda z: (z[1], z.mul_(y)))(x * 2)[0], primals, tangents)[1]
    out = through_duals(lambda x, y: (lambda z: (z[1], z.mul_(y)))(x * 2)[0], primals, tangents)[1]
    torch.testing.assert_close(out, oracle)


def test_no_grad_cuts():
    def function(x, y):
        with torch.no_grad():
            constant = x.sin()
        return constant * y

    primals, tangents = tensors("x", "y"), tensors("x", "y", seed=6)
    oracle = jvp_by_two_backwards(function, primals, tangents)[1]
    torch.testing.assert_close(through_duals(function, primals, tangents)[1], oracle)


@pytest.mark.parametrize("kind", ["script", "vmap"])
@pytest.mark.xfail(strict=True, reason="TorchScript and vmap drop the tangent without a word")
def test_other_interpreters(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        inner = torch.jit.script(_sin) if kind == "script" else torch.vmap(_sin)
        primals, tangents = tensors("x"), tensors("x", seed=6)
        oracle = jvp_by_two_backwards(lambda x: inner(x) + x, primals, tangents)[1]
        torch.testing.assert_close(through_duals(lambda x: inner(x) + x, primals, tangents)[1], oracle)


def _sin(x):
    return x.sin()
