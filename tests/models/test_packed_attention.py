"""Our kernels of attention, by Triton's interpreter on a CPU, against timm's layers in double precision."""

import os

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention as attention

from cifar_dist.config import ModelConfig
from cifar_dist.models import build_model, packed_attention
from cifar_dist.models.packed_attention import (
    Gathered,
    PackedAttention,
    PackedWindowAttention,
    image_attention,
    pack_attention,
    window_attention,
)
from tests.conftest import TORCH_WARNINGS


def as_if_on_hopper(monkeypatch):
    monkeypatch.setattr(packed_attention, "_HAS_TRITON", True)
    monkeypatch.setattr(packed_attention, "_on_gpu", lambda x: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.fixture
def interpreted(monkeypatch):
    """Layers compute by the kernels, here."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("tests/test_gpu.py runs the kernels themselves")
    monkeypatch.setattr(packed_attention, "_adds_in_any_order", lambda table: True)
    as_if_on_hopper(monkeypatch)


def results(layer, tokens, *more):
    """What comes out, and every gradient."""
    layer.zero_grad()
    tokens = tokens.clone().requires_grad_()
    out = layer(tokens, *more)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype))
    return [out.detach(), tokens.grad, *(parameter.grad.clone() for parameter in layer.parameters())]


def assert_as_exact(layer, tokens, mask=None):
    """In single precision by the kernels as in double precision by timm."""
    exact = results(layer.double(), tokens.double(), None if mask is None else mask.double())
    pack_attention(nn.Sequential(layer))
    found = results(layer.float(), tokens, mask)
    for mine, right in zip(found, exact, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-4 * right.abs().max().item())


def window_layer(size, heads, masks):
    """A layer and its masks."""
    torch.manual_seed(0)
    layer = WindowAttention(32 * heads, heads, window_size=size)
    nn.init.normal_(layer.relative_position_bias_table)
    hidden = torch.rand(masks, layer.window_area, layer.window_area) < 0.3
    return layer, torch.where(hidden, -100.0, 0.0) if masks else None


@pytest.mark.parametrize("size, heads, masks", [(7, 2, 4), (7, 3, 0), (4, 2, 10), (1, 2, 0), ((2, 5), 1, 2)])
@pytest.mark.parametrize("programs", [1, 16, 256])
def test_windows(interpreted, monkeypatch, size, heads, masks, programs):
    """Twenty of them: in a program each, or several in one, be it always the same number or not."""
    triton_attention = pytest.importorskip("cifar_dist.models.triton_attention")
    monkeypatch.setattr(triton_attention, "_PROGRAMS", programs)
    layer, mask = window_layer(size, heads, masks)
    assert_as_exact(layer, torch.randn(20, layer.window_area, 32 * heads), mask)


def test_a_mask_may_lie_in_memory_as_it_likes(interpreted):
    layer, mask = window_layer(3, 2, 4)
    assert_as_exact(layer, torch.randn(8, 9, 64), mask.mT.contiguous().mT)


@pytest.mark.parametrize("windows, masks, tokens", [(3, 4, 9), (5, 4, 9), (4, 4, 16)])
def test_what_does_not_fit_together_is_refused(interpreted, windows, masks, tokens):
    with pytest.raises(ValueError, match="does not fit together"):
        window_attention(torch.randn(windows, 9, 192), torch.randn(2, tokens, tokens), torch.zeros(masks, 9, 9), 0.2)


def test_half_precision(interpreted):
    """As near to exact as torch's, of inputs that are the same."""
    torch.manual_seed(0)
    qkv, grad = torch.randn(2, 197, 3 * 64).half(), torch.randn(2, 197, 64).half()
    found = []
    for way in ("exact", "torch", "ours"):
        packed = (qkv.double() if way == "exact" else qkv.clone()).requires_grad_()
        q, k, v = packed[:, None].chunk(3, dim=3)
        out = image_attention(packed, 1, 1 / 8)[0] if way == "ours" else attention(q, k, v)[:, 0]
        out.backward(grad.to(out.dtype))
        found.append((out.detach().double(), packed.grad.double()))
    for exact, theirs, mine in zip(*found, strict=True):
        assert 0 < (mine - exact).norm() < 1.2 * (theirs - exact).norm()


@pytest.mark.parametrize("tokens", [130, 197, 256])
def test_images(interpreted, tokens):
    torch.manual_seed(0)
    assert_as_exact(Attention(128, num_heads=2, qkv_bias=True), torch.randn(2, tokens, 128))


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_from_zero(interpreted, sign):
    """Beyond what an exponential can hold; keys that are no token, whose scores are zero, would win."""
    torch.manual_seed(0)
    qkv = torch.randn(1, 197, 3 * 64)
    qkv[..., :64] += 20
    qkv[..., 64:128] += 20 * sign
    found, exact = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    out, _ = image_attention(found, 1, 1 / 8)
    q, k, v = exact.chunk(3, dim=2)
    assert ((q @ k.mT) / 8).abs().min() > 2000
    right = ((q @ k.mT) / 8).softmax(-1) @ v
    grad = torch.randn(1, 197, 64)
    out.backward(grad)
    right.backward(grad.double())
    torch.testing.assert_close(out.double(), right, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-2, atol=1e-2 * exact.grad.abs().max().item())


@pytest.mark.filterwarnings(*TORCH_WARNINGS)
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_of_a_table_have_the_gradient_of_indexing(compiled):
    torch.manual_seed(0)
    table, index = torch.randn(13, 3, dtype=torch.float64), torch.randint(12, (49,))  # the last row is not used
    grad, found = torch.randn(49, 3, dtype=torch.float64), []

    def gather(rows):
        return Gathered.apply(rows, index)

    for way in (lambda rows: rows[index], torch.compile(gather, backend="aot_eager") if compiled else gather):
        rows = table.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = way(rows)
            out.backward(grad)
        found.append((out.detach(), rows.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1])


@pytest.mark.parametrize("kind", [Attention, WindowAttention])
def test_a_compiled_layer_is_the_layer(interpreted, kind):
    torch.manual_seed(0)
    layer = kind(128, 2) if kind is Attention else kind(64, 2)
    tokens = torch.randn(4, 197, 128) if kind is Attention else torch.randn(4, 49, 64)
    pack_attention(nn.Sequential(layer))
    plain = results(layer, tokens)
    layer.compile(backend="aot_eager", fullgraph=True)
    for found, right in zip(results(layer, tokens), plain, strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by the check itself
def test_torch_may_compile_them(interpreted):
    """torch's own check of an operator: what it says of shapes and gradients is so."""
    bias, mask = torch.randn(2, 9, 9, requires_grad=True), torch.randn(2, 9, 9)
    qkv = torch.randn(4, 9, 3 * 64, requires_grad=True)
    for masks in (mask, None):
        torch.library.opcheck(window_attention, (qkv, bias, masks, 0.25))
    torch.library.opcheck(image_attention, (qkv, 2, 0.25))
    assert not image_attention(qkv, 2, 0.25)[1].requires_grad


@pytest.mark.parametrize(
    "name, kind, layers",
    [
        ("test_vit", PackedAttention, 6),
        ("vit_tiny_patch16_224", PackedAttention, 12),
        ("swin_tiny_patch4_window7_224", PackedWindowAttention, 12),
        ("swinv2_cr_tiny_224", None, 0),
        ("swinv2_tiny_window8_256", None, 0),
    ],
)
def test_which_layers_are_changed(name, kind, layers):
    model = build_model(ModelConfig(model=name), 10)
    found = [type(part) for part in model.modules() if isinstance(part, PackedAttention | PackedWindowAttention)]
    assert found == [kind] * layers
    assert model.state_dict().keys() == timm.create_model(name, num_classes=10).state_dict().keys()


class ByKernels(Exception):
    """The layer went to a kernel."""


def by_kernels(monkeypatch, layer, tokens):
    """Whether a layer on a GPU, a made-up one, goes to the kernels."""

    def refuse(*given):
        raise ByKernels

    for name in ("window_attention", "image_attention"):
        monkeypatch.setattr(packed_attention, name, refuse)
    pack_attention(nn.Sequential(layer))
    try:
        layer(tokens)
    except ByKernels:
        return True
    return False


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (12, 0)])
def test_only_under_autocast_on_a_gpu_that_is_new_enough(monkeypatch, cuda_autocast, enabled, capability):
    monkeypatch.setattr(packed_attention, "_HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    cuda_autocast(enabled)
    with FakeTensorMode():
        vit = by_kernels(monkeypatch, Attention(128, 2, device="cuda"), torch.empty(2, 197, 128, device="cuda"))
        windows = WindowAttention(64, 2, device="cuda")
        swin = by_kernels(monkeypatch, windows, torch.empty(2, 49, 64, device="cuda"))
    assert vit == (enabled and capability == (9, 0))
    assert swin == (enabled and capability >= (8, 0))


def without_fused(layer):
    layer.fused_attn = False
    return layer


@pytest.mark.parametrize(
    "make, tokens, expected",
    [
        (lambda: Attention(128, 2), 197, True),
        (lambda: Attention(128, 2, attn_drop=0.1).eval(), 197, True),
        (lambda: Attention(128, 2, attn_drop=0.1), 197, False),
        (lambda: Attention(128, 4), 197, False),  # heads of 32
        (lambda: Attention(128, 2), 65, False),
        (lambda: Attention(128, 2), 257, False),
        (lambda: Attention(128, 2, qk_norm=True, norm_layer=nn.LayerNorm), 197, False),
        (lambda: Attention(128, 2, scale_norm=True, norm_layer=nn.LayerNorm), 197, False),
        (lambda: Attention(128, 2, gated=True), 197, False),
        (lambda: without_fused(Attention(128, 2)), 197, False),
        (lambda: WindowAttention(64, 2), 49, True),
        (lambda: WindowAttention(64, 2, attn_drop=0.1), 49, False),
        (lambda: WindowAttention(64, 2, head_dim=16), 49, False),
        (lambda: WindowAttention(64, 2, window_size=8), 64, True),
        (lambda: WindowAttention(64, 2, window_size=12), 144, False),
    ],
)
def test_only_layers_that_the_kernels_compute(monkeypatch, make, tokens, expected):
    as_if_on_hopper(monkeypatch)
    layer = make()
    assert by_kernels(monkeypatch, layer, torch.randn(2, tokens, layer.qkv.in_features)) == expected


@pytest.mark.parametrize("more", [{"is_causal": True}, {"attn_mask": torch.zeros(197, 197)}])
def test_not_with_a_mask(monkeypatch, more):
    as_if_on_hopper(monkeypatch)
    layer, tokens = Attention(128, 2), torch.randn(2, 197, 128)
    expected = layer(tokens, **more)
    pack_attention(nn.Sequential(layer))
    assert torch.equal(layer(tokens, **more), expected)


@pytest.mark.parametrize("make, expected", [(lambda: Attention(128, 2), False), (lambda: WindowAttention(64, 2), True)])
def test_without_gradients_it_is_for_windows_alone(monkeypatch, make, expected):
    as_if_on_hopper(monkeypatch)
    layer = make().eval()
    with torch.no_grad():
        tokens = torch.randn(2, 197 if type(layer) is Attention else 49, layer.qkv.in_features)
        assert by_kernels(monkeypatch, layer, tokens) == expected
