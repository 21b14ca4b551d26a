"""Compiling: what is given to the compiler, how often it works, and that a transformer computes the same."""

import threading

import pytest
import torch
from scipy.stats import binomtest
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from cifar_dist.config import ModelConfig
from cifar_dist.models import build_model
from cifar_dist.models.compilation import SharedDropPath, compile_model, share_rates, transformer_blocks

# torch's compiler looks at the gradient of what it is given
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

VIT = ModelConfig(model="vit_small_cifar", img_size=32, drop_path=0.3)


@pytest.fixture
def graphs(monkeypatch):
    """What the compiler has been given; it runs the graphs as they are."""
    found = []
    compile_in_place = nn.Module.compile

    def keep(graph, inputs):
        found.append(graph)
        return graph.forward

    def compile_so(model, options, **more):
        compile_in_place(model, backend=keep, **more)

    monkeypatch.setattr(nn.Module, "compile", compile_so)
    yield found
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("vit_tiny_patch16_224", "Block", 12),
        ("vit_small_cifar", "Block", 7),
        ("swin_base_patch4_window7_224", "SwinTransformerBlock", 2 + 2 + 18 + 2),
        ("maxvit_tiny_tf_224", "MaxxVitBlock", 2 + 2 + 5 + 2),
        ("resnet18_cifar", "", 0),
        ("convnext_tiny", "", 0),
        ("vit_base_r50_s16_224", "", 0),  # half a ResNet
        ("coatnext_nano_rw_224", "", 0),  # 92 % of its parameters are in such blocks, 64 % of its layers
    ],
)
def test_blocks_are_the_innermost_with_attention(name, kind, count):
    with torch.device("meta"):
        blocks = transformer_blocks(build_model(ModelConfig(model=name), 10))
    assert [type(block).__name__ for block in blocks] == [kind] * count
    assert len(set(map(id, blocks))) == count


@pytest.mark.parametrize(
    ("name", "mode", "compilations"),
    [
        ("vit_small_cifar", "default", 2),  # of the seven blocks the first has no stochastic depth
        ("vit_small_cifar", "reduce-overhead", 1),
        ("resnet18_cifar", "default", 1),
        ("swin_tiny_patch4_window7_224", "default", 7),  # two of each stage but the last
    ],
)
def test_what_is_alike_is_compiled_once(graphs, name, mode, compilations):
    torch.manual_seed(0)
    model = build_model(ModelConfig(model=name, drop_path=0.3 if "resnet" not in name else None), 10).train()
    compile_model(model, mode)
    size = 224 if "224" in name else 32
    for _ in range(2):
        model(torch.randn(2, 3, size, size)).sum().backward()
    assert len(graphs) == compilations
    with torch.no_grad():
        model.eval()(torch.randn(3, 3, size, size))
    assert len(graphs) == 2 * compilations


def test_a_compiled_transformer_computes_the_same_and_keeps_its_keys(graphs):
    plain, compiled = build_model(VIT, 10), build_model(VIT, 10)
    compiled.load_state_dict(plain.state_dict())
    compile_model(compiled, "default")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(compiled.eval()(images), plain.eval()(images), atol=1e-5)
    for block in (*plain.blocks, *compiled.blocks):
        for layer in block.children():
            if isinstance(layer, DropPath):
                layer.drop_prob = 0.0
            elif isinstance(layer, SharedDropPath):
                layer.keep = torch.ones(())
    losses = [model.train()(images).logsumexp(1).sum() for model in (plain, compiled)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses)
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_rates_that_are_tensors_drop_as_often_and_make_up_for_it_as_timm_does(rate):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(1, 1), DropPath(rate))
    theirs = block[1](torch.ones(4000, 2, 3))
    share_rates(block)
    assert isinstance(block[1], SharedDropPath)
    samples = torch.ones(4000, 2, 3, requires_grad=True)
    ours = block[1](samples)
    ours.sum().backward()
    assert torch.equal(samples.grad, ours)
    assert torch.equal(ours.unique(), theirs.unique())  # 0 and 1 / (1 - rate)
    assert torch.equal(ours, ours[:, :1, :1].expand_as(ours))
    assert binomtest(int((ours[:, 0, 0] == 0).sum()), len(ours), rate).pvalue > 0.01
    assert ours.bfloat16().dtype == block[1](samples.bfloat16()).dtype
    block.eval()
    assert block[1](samples) is samples


@pytest.mark.parametrize(("mode", "depth", "graphs"), [("default", 8, 5), ("reduce-overhead", 1, 3)])
def test_the_compiler_never_chooses_by_the_clock(monkeypatch, tmp_path, mode, depth, graphs):
    """Not in a later block either, nor in evaluation, nor in the backward pass, which on a GPU has its own thread."""
    from torch._inductor import config
    from torch._inductor.scheduler import Scheduler

    found, codegen = [], Scheduler.codegen

    def look(self):
        found.append((config.deterministic, config.triton.cudagraphs))
        return codegen(self)

    monkeypatch.setattr(Scheduler, "codegen", look)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = VisionTransformer(32, 16, num_classes=10, embed_dim=16, depth=depth, num_heads=2, drop_path_rate=0.3)
    images = torch.randn(2, 3, 32, 32)
    try:
        compile_model(model, mode)
        backward = threading.Thread(target=model(images).sum().backward)
        backward.start()
        backward.join()
        with torch.no_grad():
            model.eval()(images)
    finally:
        torch.compiler.reset()
    # Forward, backward and evaluation; of the first block, without stochastic depth, the first two are another graph.
    assert found == [(True, mode == "reduce-overhead")] * graphs


def test_the_gradient_of_an_overlapping_max_pool_is_not_summed_up_in_any_order():
    """Inductor is given the operator itself, not a scatter, which on a GPU adds up by atomic operations."""
    from torch._inductor import decomposition

    compile_model(nn.Linear(2, 2), "default")
    decomposition.fast_random_decomps.cache_clear()  # of another test

    def gradient(images):
        return torch.func.grad(lambda x: nn.functional.max_pool2d(x, 3, 2, 1).square().sum())(images)

    graph = make_fx(gradient, decomposition.select_decomp_table())(torch.randn(1, 2, 8, 8)).graph
    operators = [str(node.target) for node in graph.nodes]
    assert "aten.max_pool2d_with_indices_backward.default" in operators
    assert not any("scatter" in name for name in operators)
