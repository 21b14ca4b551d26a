"""Synchronised batch norm: several processes against one plain PyTorch layer on the whole batch."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

from cifar_dist.config import ModelConfig
from cifar_dist.errors import UsageError
from cifar_dist.models import build_model
from cifar_dist.models.sync_bn import has_batch_norm, synchronise

CPU = torch.device("cpu")
ROWS = 12
SHARES = {2: (5, 7), 3: (3, 5, 4)}  # uneven on purpose
LAYERS = {
    "1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "1d-long": (lambda: nn.BatchNorm1d(4), (4, 3)),
    "2d": (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
    "2d-cumulative": (lambda: nn.BatchNorm2d(4, momentum=None, eps=0.1), (4, 3, 2)),
    "2d-bare": (lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False), (4, 3, 2)),
    "timm": (lambda: BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=nn.Softplus), (4, 3, 2)),
}
TYPES = {"fp32": torch.float32, "fp64": torch.float64}
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-10}


def layer_run(name, dtype, rank=0, processes=1):
    """Two training passes of a layer on this process's rows: everything that comes out of them."""
    torch.manual_seed(3)
    make, shape = LAYERS[name]
    layer = make().to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    if processes > 1:
        assert synchronise(layer, CPU) is layer
    found = {}
    for step in range(2):
        images = torch.randn(ROWS, *shape, dtype=torch.float64).mul(3).add(5).to(dtype)
        costs = torch.randn(ROWS, *shape, dtype=torch.float64).to(dtype)
        if processes > 1:
            images, costs = (t.split(SHARES[processes])[rank] for t in (images, costs))
        images = images.clone().requires_grad_()
        output = layer(images)
        (output * costs).sum().backward()
        found |= {f"output {step}": output.detach(), f"input gradient {step}": images.grad}
    found |= {f"gradient of {key}": parameter.grad for key, parameter in layer.named_parameters()}
    return found | {f"buffer {key}": buffer for key, buffer in layer.named_buffers()}


def cnn4_run(dtype, rank=0, processes=1):
    """Weights and statistics of cnn4 after three steps of SGD."""
    torch.manual_seed(1)
    model = build_model(ModelConfig(model="cnn4", drop=0.0), 10).to(dtype)
    runner = nn.parallel.DistributedDataParallel(synchronise(model, CPU)) if processes > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        images, labels = torch.randn(ROWS, 3, 32, 32).to(dtype), torch.randint(10, (ROWS,))
        share = slice(rank * ROWS // processes, (rank + 1) * ROWS // processes)
        optimizer.zero_grad()
        nn.functional.cross_entropy(runner(images[share]), labels[share]).backward()
        optimizer.step()
    return dict(model.state_dict())


def far_from_zero(rank=0, processes=1):
    """Running variance of fp32 rows whose mean is ten thousand times their standard deviation."""
    rows = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(5)) + 1e4
    layer = nn.BatchNorm1d(4, momentum=1.0)
    synchronise(layer, CPU)(rows.split(SHARES[processes])[rank])
    return {"running_var": layer.running_var, "expected": rows.double().var(0)}


def work(rank, processes, folder):
    """What one process of several does; its results in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    found = {f"{name} {kind}": layer_run(name, TYPES[kind], rank, processes) for name in LAYERS for kind in TYPES}
    found |= {f"cnn4 {kind}": cnn4_run(TYPES[kind], rank, processes) for kind in TYPES}
    torch.save(found | {"far": far_from_zero(rank, processes)}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=SHARES)
def found(request, tmp_path_factory):
    """Results of every process, in order."""
    folder = tmp_path_factory.mktemp(f"processes-{request.param}")
    torch.multiprocessing.start_processes(work, (request.param, folder), nprocs=request.param, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def assert_close(one, other, tolerance):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_several_processes_equal_one_plain_layer_on_the_whole_batch(found, name, kind):
    expected = layer_run(name, TYPES[kind])
    results = [process[f"{name} {kind}"] for process in found]
    for key, tensor in expected.items():
        parts = [result[key] for result in results]
        if key.startswith("buffer"):
            for part in parts:
                assert_close(part, tensor, TOLERANCE[kind])
        else:
            whole = sum(parts) if key.startswith("gradient of") else torch.cat(parts)
            assert_close(whole, tensor, TOLERANCE[kind])


@pytest.mark.parametrize("kind", TYPES)
def test_a_whole_model_trains_as_on_one_process(found, kind):
    expected = cnn4_run(TYPES[kind])
    for process in found:
        assert process[f"cnn4 {kind}"].keys() == expected.keys()
        for key, tensor in expected.items():
            assert_close(process[f"cnn4 {kind}"][key], tensor, TOLERANCE[kind])


def test_variance_survives_a_large_mean(found):
    for process in found:
        assert_close(process["far"]["running_var"].double(), process["far"]["expected"], 1e-4)


def test_with_one_process_nothing_changes():
    for name, (make, shape) in LAYERS.items():
        plain, images = make(), torch.randn(6, *shape)
        synced = synchronise(copy.deepcopy(plain), CPU)
        assert torch.equal(synced(images), plain(images)), name
        assert torch.equal(synced.eval()(images), plain.eval()(images)), name
        assert isinstance(synced, type(plain))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["resnet10t", "efficientnet_lite0"])  # efficientnet: batch norm with activation
def test_checkpoints_fit_the_plain_model(name, device):
    plain = timm.create_model(name, num_classes=3)
    parameters, state = list(plain.parameters()), plain.state_dict()
    images = torch.randn(2, 3, 64, 64)
    expected = plain.eval()(images)
    synced = synchronise(plain.train(), torch.device(device))
    assert all(a is b for a, b in zip(synced.parameters(), parameters, strict=True))
    assert list(synced.state_dict()) == list(state)
    moving_average = copy.deepcopy(synced).eval()
    assert torch.equal(moving_average(images), expected)
    kinds = {type(module) for module in synced.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert all(issubclass(kind, nn.SyncBatchNorm) for kind in kinds) == (device == "cuda")


def test_no_batch_norm_that_trains_is_refused():
    frozen = build_model(ModelConfig(model="cnn4", freeze="backbone"), 10)
    for model in (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), frozen):
        assert not has_batch_norm(model)
        with pytest.raises(UsageError, match="--sync-bn: the model has no batch norm"):
            synchronise(model, CPU)
    assert has_batch_norm(build_model(ModelConfig(model="cnn4"), 10))
