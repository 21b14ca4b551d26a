"""Engines: DeepSpeed is told the recipe's numbers and nothing else, and shards are put together and cut up again."""

import copy
import importlib.util
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from timm.optim import list_optimizers
from torch import nn

from cifar_dist.config import Config, ModelConfig, OptimConfig
from cifar_dist.distributed.group import start
from cifar_dist.errors import UsageError
from cifar_dist.models import build_model
from cifar_dist.optim import is_elementwise, make_optimizer
from cifar_dist.parallel import check_engine, zero
from cifar_dist.parallel.fully_sharded import FullySharded
from cifar_dist.schedule import Schedule
from tests.conftest import ROOT
from tests.ranks import Ranks
from tests.test_same_training import RECIPE, of, run

MEMORY_LAYOUT = {"zero_optimization", "zero_force_ds_cpu_optimizer"}
SHORT = [*RECIPE, "--epochs", 1, "--warmup-epochs", 0, "--max-steps", 3]


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").iterdir()), ids=lambda path: path.name)
def test_ds_configs_hold_memory_layout_only(path):
    assert set(json.loads(path.read_text())) <= MEMORY_LAYOUT


@pytest.mark.parametrize("number", ["gradient_clipping", "train_batch_size", "bf16"])
def test_a_number_with_two_homes_is_refused(tmp_path, monkeypatch, number):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, number: 1}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    with pytest.raises(UsageError, match=rf"zero.json sets {number}, which the recipe decides"):
        zero._refuse_second_homes()
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, number: "auto"}))
    zero._refuse_second_homes()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_waits_as_long_as_the_run_does():
    def work():
        import deepspeed

        accelerator = start("fp32", timeout_seconds=60)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled
        deepspeed.init_distributed("gloo")
        zero._share_a_timeout(45)
        group = deepspeed.utils.groups._get_data_parallel_group()
        torch.distributed.barrier()  # rank 0 keeps the store by which the other joins
        return group._get_backend(accelerator.device).options._timeout.total_seconds()

    assert Ranks(work, 2).check().results == [45.0] * 2


def test_deepspeed_does_what_the_recipe_says_or_the_run_ends():
    numbers = {"train_batch_size": 8, "gradient_clipping": 0.0, "fp16": {"enabled": True}}
    numbers |= {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    numbers |= {"bf16": {"enabled": False}, "torch_autocast": {"enabled": False}}
    engine = SimpleNamespace(
        train_batch_size=lambda: 8,
        train_micro_batch_size_per_gpu=lambda: 4,
        gradient_accumulation_steps=lambda: 1,
        gradient_clipping=lambda: 0.0,
        fp16_enabled=lambda: True,
        bfloat16_enabled=lambda: False,
        torch_autocast_enabled=lambda: False,
    )
    zero._read_back(engine, numbers)
    engine.gradient_clipping = lambda: 1.0  # what DeepSpeed makes of "auto"
    with pytest.raises(RuntimeError, match=r"gradient_clipping is 1\.0, but the recipe says 0\.0"):
        zero._read_back(engine, numbers)


WHOLE_MATRICES = ("muon", "adamuon", "lamb", "lars", "adafactor", "adamp", "cadamw", "csgdw", "cadopt")


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize(
    "opt", ["adamw", "adam", "sgd", "momentum", "lion", "nadamw", "rmsprop", "laprop", *WHOLE_MATRICES]
)
def test_optimizers_that_look_at_whole_matrices_are_told_apart(opt):
    assert opt in list_optimizers()
    assert is_elementwise(OptimConfig(opt=opt)) == (opt not in WHOLE_MATRICES)


@pytest.mark.parametrize(
    "engine, flags, said",
    [
        ("zero2", ["--opt", "lamb"], "--opt lamb looks at whole matrices"),
        ("zero3", ["--model-ema-decay", 0.9], "--model-ema-decay needs whole fp32 weights"),
    ],
)
def test_what_zero_would_change_is_refused(tmp_path, engine, flags, said):
    pytest.importorskip("deepspeed")
    found = Ranks(lambda: run(*SHORT, *flags, "--run-dir", tmp_path), 2, engine)
    assert found.statuses == [2, 2]
    assert "".join(found.said).count(said) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", ["zero1", "zero3", "fsdp2"])
def test_a_parameter_that_is_one_number_cannot_be_cut_up(engine):
    with torch.device("meta"):
        model = build_model(ModelConfig(model="dm_nfnet_f0"), 10)
    config = Config.from_flat({"model": "dm_nfnet_f0"})
    with pytest.raises(UsageError, match=r"--model dm_nfnet_f0: .* one number \(stages\.0\.0\.skipinit_gain\)"):
        check_engine(config, SimpleNamespace(engine=engine, has_batch_norm=False), model)


@pytest.mark.parametrize("opt", ["kron", "kronw", "kronc"])
def test_an_optimizer_that_draws_is_for_one_process(opt):
    """timm's Kron draws from the process's own generator, of which each has another."""
    assert opt in list_optimizers()
    config, model = Config.from_flat({"opt": opt}), torch.nn.Linear(2, 2)
    check_engine(config, SimpleNamespace(engine="single", has_batch_norm=False, num_processes=1), model)
    with pytest.raises(UsageError, match=f"--opt {opt} draws random numbers"):
        check_engine(config, SimpleNamespace(engine="ddp", has_batch_norm=False, num_processes=2), model)


@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_the_average_is_the_same_under_zero(tmp_path, engine):
    pytest.importorskip("deepspeed")
    settings = [*SHORT, "--model-ema-decay", 0.5]
    run(*settings, "--run-dir", tmp_path / "one")
    Ranks(lambda: run(*settings, "--run-dir", tmp_path / "two"), 2, engine).check()
    one, two = (load_file(tmp_path / name / "checkpoints" / "last" / "ema.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_bf16_is_the_same_under_every_engine(tmp_path, engine):
    """One process under torch's autocast against two; sums in another order differ by bf16's rounding."""
    pytest.importorskip("deepspeed")
    settings = [*SHORT, "--precision", "bf16"]
    run(*settings, "--run-dir", tmp_path / "one")
    Ranks(lambda: run(*settings, "--run-dir", tmp_path / "two"), 2, engine).check()
    run(*SHORT, "--run-dir", tmp_path / "fp32")
    one, two, fp32 = (torch.tensor(of(tmp_path / name, "train/loss")) for name in ("one", "two", "fp32"))
    torch.testing.assert_close(two[0], one[0], rtol=2e-6, atol=0)
    assert (fp32[0] / one[0] - 1).abs() > 1e-5
    torch.testing.assert_close(two, one, rtol=2e-4, atol=0)
    weights = load_file(tmp_path / "two" / "checkpoints" / "last" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_evaluate_py_scores_a_run_of_zero(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    run_dir = tmp_path / "run"
    Ranks(lambda: run(*SHORT, "--run-dir", run_dir), 2, "zero3").check()
    specification = importlib.util.spec_from_file_location("evaluate_script", ROOT / "evaluate.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(run_dir)])
    Ranks(script.main, 2, "zero3").check()
    metrics = json.loads((run_dir / "report" / "metrics.json").read_text())
    assert metrics["num_samples"] == 359
    assert math.isfinite(metrics["loss"])


PIXELS = torch.linspace(-1, 1, 24).reshape(4, 6)
LARGE_STEPS = OptimConfig(lr=1e-2)


def model_of(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def step(model, optimizer):
    model(PIXELS).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def shard(accelerator, seed):
    """A `FullySharded` without Accelerate, which shards on GPUs only."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    sharded = FullySharded.__new__(FullySharded)
    sharded.accelerator, sharded.model = accelerator, torch.distributed.fsdp.fully_shard(model_of(seed), mesh=mesh)
    sharded.optimizer = SimpleNamespace(optimizer=make_optimizer(sharded.model, LARGE_STEPS))
    Schedule(sharded.optimizer.optimizer, LARGE_STEPS, epochs=10, updates_per_epoch=10)  # adds its own to the groups
    return sharded


def test_fsdp2_states_are_put_together_and_cut_up():
    def work():
        accelerator = start("fp32")
        first, second = shard(accelerator, 0), shard(accelerator, 1)
        for _ in range(2):
            step(first.model, first.optimizer.optimizer)
        saved = copy.deepcopy([first.weights(), first.optimizer_state()])
        torch.distributed.broadcast_object_list(saved)  # as if each process read the main one's files
        second.load(*copy.deepcopy(saved))
        for sharded in (first, second):
            step(sharded.model, sharded.optimizer.optimizer)
        return saved, first.weights(), second.weights()

    saved, one, other = Ranks(work, 2).check().results[0]
    model = model_of(0)
    optimizer = make_optimizer(model, LARGE_STEPS)
    for _ in range(2):
        step(model, optimizer)
    torch.testing.assert_close(saved[0], dict(model.state_dict()))
    torch.testing.assert_close(saved[1]["state"], optimizer.state_dict()["state"])
    step(model, optimizer)
    torch.testing.assert_close(one, dict(model.state_dict()))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="this CPU has no fp16")
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_fp16_under_zero_follows_fp32_and_goes_on_exactly(tmp_path, engine):
    """DeepSpeed's own fp16 engine: fp16 images in, fp32 masters and its loss scale in the checkpoint."""
    pytest.importorskip("deepspeed")
    run(*SHORT, "--max-steps", 6, "--run-dir", tmp_path / "one")
    flags = [*SHORT, "--precision", "fp16", "--resume", "auto"]
    for name, steps in (("whole", 6), ("cut", 3), ("cut", 6)):
        Ranks(lambda n=name, s=steps: run(*flags, "--run-dir", tmp_path / n, "--max-steps", s), 2, engine).check()
    one, two = (torch.tensor(of(tmp_path / name, "train/loss")) for name in ("one", "whole"))
    torch.testing.assert_close(two, one, rtol=5e-3, atol=0)
    last = [tmp_path / name / "checkpoints" / "last" for name in ("whole", "cut")]
    for file in ("model", "optimizer", "process-1"):
        whole, cut = (load_file(folder / f"{file}.safetensors") for folder in last)
        assert all(torch.equal(whole[name], cut[name]) for name in whole)
    scalers = [json.loads((folder / "state.json").read_text())["scaler"] for folder in last]
    assert scalers[0] == scalers[1]
    assert scalers[0]["cur_scale"] >= 2.0


def test_fp16_with_batch_norm_is_refused_under_zero(tmp_path):
    pytest.importorskip("deepspeed")
    flags = ["--dataset", "digits", "--model", "cnn4", "--precision", "fp16", "--wandb", "disabled"]
    found = Ranks(lambda: run(*flags, "--run-dir", tmp_path), 2, "zero2")
    assert found.statuses == [2, 2]
    assert "".join(found.said).count("makes batch norm's weights fp16") == 1
