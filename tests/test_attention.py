"""The rule for attention's tangent against torch's own forward mode, which exists for the MATH kernel alone."""

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from oracles import tensors, through_duals
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention_case(kind):
    """Return q, k, v (and a float mask) of (2, 4 heads, L, D), and the other arguments."""
    length = 7 if kind == "cross" else 5
    shapes = {"q": (2, 4, 5, 8), "k": (2, 4, length, 8), "v": (2, 4, length, 8)}
    if kind == "gqa":
        shapes.update(k=(2, 2, 5, 8), v=(2, 2, 5, 8))
    if kind == "value width":
        shapes.update(v=(2, 4, 5, 3))
    if kind == "float mask":
        shapes["mask"] = (2, 1, 5, 5)
    torch.manual_seed(0)
    allowed = torch.rand(2, 1, 5, length) > 0.3
    allowed[0, 0, 0] = False  # a row that may attend to nothing
    more = {
        "bool mask": {"attn_mask": allowed},
        "causal": {"is_causal": True},
        "gqa": {"enable_gqa": True},
        "scale": {"scale": 0.7},
        "padding": {"attn_mask": torch.zeros(2, 1, 1, length).masked_fill(torch.arange(length) > 3, -torch.inf)},
        "dropout": {"dropout_p": 0.4},
    }
    return shapes, more.get(kind, {})


def attend(more):
    def function(q, k, v, mask=None):
        torch.manual_seed(1)
        return F.scaled_dot_product_attention(q, k, v, **({"attn_mask": mask} if mask is not None else {}), **more)

    return function


KINDS = ["plain", "float mask", "bool mask", "padding", "causal", "gqa", "scale", "cross", "value width", "dropout"]


CASES = [(kind, which) for kind in KINDS for which in ("all", "q", "k", "v")] + [("float mask", "mask")]


@pytest.mark.parametrize(("kind", "which"), CASES)
def test_attention_equals_the_math_kernel(kind, which):
    shapes, more = attention_case(kind)
    more = {key: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in more.items()}
    primals = {n: tensors(n, shape=s, seed=i)[n] for i, (n, s) in enumerate(shapes.items())}
    tangents = {
        n: tensors(n, shape=s, seed=9 + i)[n] for i, (n, s) in enumerate(shapes.items()) if which in ("all", n)
    }
    with sdpa_kernel(SDPBackend.MATH), fwad.dual_level(), torch.no_grad():
        duals = [fwad.make_dual(x, tangents[n]) if n in tangents else x for n, x in primals.items()]
        oracle = fwad.unpack_dual(attend(more)(*duals)).tangent.nan_to_num(0.0)
    _, tangent, _ = through_duals(attend(more), primals, tangents)
    torch.testing.assert_close(tangent, oracle, rtol=1e-9, atol=1e-9)
    assert (tangent.roll(1, -2) - oracle).abs().max() > 0.01


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "dropout"])
def test_attention_keeps_its_kernel(kind):
    shapes, more = attention_case(kind)
    primals = {n: tensors(n, shape=s, seed=i, dtype=torch.float32)[n] for i, (n, s) in enumerate(shapes.items())}
    tangents = {n: torch.ones(s) for n, s in shapes.items()}
    out, _, grads = through_duals(attend(more), primals, tangents)
    plain, _, plain_grads = through_duals(attend(more), primals, {})
    assert all(map(torch.equal, [out, *grads], [plain, *plain_grads]))
