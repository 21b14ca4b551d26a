"""Bytes per engine, against hand counts and against what two processes were found to hold."""

import gc
import importlib.util
import json
import os
import socket

import pytest
import torch
from torch import nn

from cifar_dist import memory
from cifar_dist.memory import CONFIG_FILES, MIB, Load, Usage, gain, refuses_average, usage
from tests.conftest import ROOT

ADAMW = Load(num_parameters=1_000, num_trainable=900, state_per_parameter=2, data_bytes=77)
BUCKET = 4 * 10_000_000


@pytest.mark.parametrize(
    "engine, processes, weights, gradients, optimizer, buckets",
    [
        ("single", 1, 4_000, 3_600, 7_200, 0),
        ("ddp", 4, 4_000, 3_600, 7_200, 0),
        ("zero0", 4, 4_000, 3_600, 7_200, 0),
        ("zero1", 4, 4_000, 3_600, 3 * 900, BUCKET),  # two moments and a master weight for a quarter of 900, in fp32
        ("zero2", 4, 4_000, 900, 2_700, BUCKET),
        ("zero3", 4, 1_000, 1_800, 2_700, BUCKET),  # gradients twice while it steps
        ("fsdp2", 4, 1_000, 900, 1_800, 0),
        ("zero2", 7, 4_000, 4 * 129, 12 * 129, BUCKET),  # 900 / 7 = 128.6
    ],
)
def test_fp32_counted_by_hand(engine, processes, weights, gradients, optimizer, buckets):
    assert usage(engine, processes, ADAMW) == Usage(weights, gradients, optimizer, buckets, data=77)
    assert ("buckets" in str(usage(engine, processes, ADAMW))) == (buckets > 0)


def test_bf16_is_held_as_fp32_and_fp16_as_halves_under_zero_only():
    half, brain = (Load(1_000, 900, 2, precision=precision) for precision in ("fp16", "bf16"))
    whole = Load(1_000, 900, 2)
    for engine in CONFIG_FILES:
        assert usage(engine, 4, brain) == usage(engine, 4, whole)
    for engine in ("single", "ddp", "fsdp2"):
        assert usage(engine, 4, half) == usage(engine, 4, whole)
    assert usage("zero1", 4, half) == Usage(2_000, 1_800, 2_700, BUCKET // 2, 0)
    assert usage("zero2", 4, half) == Usage(2_000, 900, 2_700, BUCKET // 2, 0)  # an fp32 copy of a quarter
    assert usage("zero3", 4, half) == Usage(500, 450 + 900, 2_700, BUCKET // 2, 0)


def test_offloading_moves_bytes_to_main_memory():
    kept, moved = usage("zero3", 4, ADAMW), usage("zero3_offload", 4, ADAMW)
    assert (moved.weights, moved.gradients, moved.optimizer) == (0, 0, 0)
    assert moved.host == 1_000 + 1_800 + 2_700 == kept.state - kept.buckets
    assert usage("zero2_offload", 4, ADAMW) == Usage(4_000, 0, 0, BUCKET, 77, host=900 + 2_700)
    assert "MiB in main memory" in str(moved)
    assert "main memory" not in str(kept)


def test_a_moving_average_is_a_second_copy_of_the_weights():
    averaged = Load(1_000, 900, 2, average=True)
    for engine in ("single", "ddp", "zero1", "zero2"):
        assert usage(engine, 2, averaged).weights == 2 * 4_000
    refused = [engine for engine in CONFIG_FILES if refuses_average(engine, "fp32")]
    assert refused == ["zero3", "zero3_offload", "fsdp2"]
    assert [engine for engine in CONFIG_FILES if not refuses_average(engine, "fp16")] == ["single", "ddp"]


def test_fsdp2_keeps_whole_gradients_between_micro_batches():
    assert usage("fsdp2", 4, ADAMW, accumulates=True).gradients == 3_600
    assert usage("zero2", 4, ADAMW, accumulates=True) == usage("zero2", 4, ADAMW)


def test_gain_says_what_an_engine_saves_and_when_that_is_nothing():
    ddp = Usage(200 * MIB, 200 * MIB, 400 * MIB, 0, 0)
    cut = Usage(100 * MIB, 100 * MIB, 200 * MIB, 50 * MIB, 0)
    assert gain("ddp", ddp, ddp, 1) is None
    assert gain("single", ddp, ddp, 1) is None
    worth = gain("zero3", cut, ddp, 7_000 * MIB)  # saves 350 MiB: 5 %
    assert worth == (
        "zero3 holds 450 MiB of weights, gradients and optimizer state per process (50 of it buckets), DDP would hold"
        " 800 MiB of the 7,000 MiB there are"
    )
    assert gain("zero3", cut, ddp, 7_001 * MIB) == (
        worth.replace("7,000", "7,001") + ": it brings nothing for this model; take accelerate_configs/multi_gpu.yaml"
    )
    assert "buckets" not in gain("fsdp2", Usage(0, 0, 0, 0, 0), ddp, 1)


def test_named_files_exist_and_buckets_are_as_configured():
    for file in CONFIG_FILES.values():
        assert (ROOT / file).is_file()
    for file in (ROOT / "ds_configs").glob("zero*.json"):
        layout = json.loads(file.read_text())["zero_optimization"]
        assert layout["reduce_bucket_size"] == memory.ZERO_BUCKET, file


SMALL_BUCKET = 200_000
FP16 = ("zero1 fp16", "zero3 fp16") if torch.ops.mkldnn._is_mkldnn_fp16_supported() else ()  # not every CPU has it
MEASURED = ("ddp fp32", "zero1 fp32", "zero2 fp32", "zero3 fp32", "fsdp2 fp32", *FP16)


def live_bytes():
    """Bytes of all tensors made since ``gc.freeze()``."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    tensors = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held(engine, precision, moments):
    """Bytes that training eight linear layers holds, at the fuller of the moments that its hooks count in."""
    torch.manual_seed(0)
    gc.freeze()
    layers = [nn.Linear(384, 384) for _ in range(8)]
    model = nn.Sequential(*layers)
    images = torch.zeros(1, 384, dtype=torch.float16 if precision == "fp16" else torch.float32, requires_grad=True)
    if engine == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for module in (*layers, model):
            fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    if engine.startswith("zero"):
        import deepspeed

        runner, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_allow_untested_optimizer": True,
                "fp16": {"enabled": precision == "fp16"},
                "zero_optimization": {"stage": int(engine[4]), "reduce_bucket_size": SMALL_BUCKET},
            },
        )
        backward, step = runner.backward, runner.step
    else:
        ddp = nn.parallel.DistributedDataParallel
        runner = model if engine == "fsdp2" else ddp(model, gradient_as_bucket_view=True)
        backward, step = torch.Tensor.backward, optimizer.step
    if engine in ("zero1", "zero2"):  # zero3 holds gathered layers then
        layers[0].register_full_backward_hook(lambda *_: moments.append(live_bytes()))
    for _ in range(2):  # the second finds the optimizer's state made
        moments.clear()
        backward(runner(images).float().square().mean())
        step()
        optimizer.zero_grad()
    return max(moments)


def work(rank, port, folder):
    """What one of two processes holds under each engine; the first writes it down."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", DS_ACCELERATOR="cpu")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    moments, adamw_step = [], torch.optim.AdamW.step

    def counting_step(self, *arguments):
        moments.append(live_bytes())
        return adamw_step(self, *arguments)

    torch.optim.AdamW.step = counting_step
    found = {name: held(*name.split(), moments) for name in MEASURED}
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # DeepSpeed's own clean-up may hang


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_two_processes_hold_what_is_said(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, tmp_path), nprocs=2)
    monkeypatch.setattr(memory, "ZERO_BUCKET", SMALL_BUCKET)
    size = 8 * (384 * 384 + 384)
    for name, found in json.loads((tmp_path / "found.json").read_text()).items():
        engine, precision = name.split()
        expected = usage(engine, 2, Load(size, size, 2, precision=precision)).state
        assert found == pytest.approx(expected, rel=0.01), name
