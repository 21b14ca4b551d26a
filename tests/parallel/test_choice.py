"""The table of engines and what an engine brings, counted by hand."""

import dataclasses

from cifar_dist.command_line import parse_command_line
from cifar_dist.memory import MIB
from cifar_dist.parallel.choice import engine_lines, engine_table, zero_gain
from cifar_dist.plan import make_plan
from tests.test_plan import SIZES


def table(*argv):
    sizes = dataclasses.replace(SIZES, num_parameters=4 * MIB, num_trainable=4 * MIB, data_bytes=5 * MIB)
    lines = engine_table(parse_command_line(argv).config, sizes)
    return lines, [line.split() for line in lines]


def test_table_of_engines_counted_by_hand():
    lines, cells = table("--batch-size", "64", "--micro-batch-size", "16")
    assert [row[:2] for row in cells[2:]] == [["single", "1"]] + [
        [engine, str(count)]
        for count in (2, 4, 8)
        for engine in ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
    ]
    assert cells[2][2:] == ["16", "x", "4", "16", "16", "32", "0", "5", "69", "0", "accelerate_configs/gpu.yaml"]
    zero2_on_4 = next(row for row in cells if row[:2] == ["zero2", "4"])
    assert zero2_on_4[2:] == [
        "16", "x", "1", "16", "4", "12", "38", "5", "75", "0", "accelerate_configs/zero2.yaml",
    ]  # fmt: skip
    assert zero2_on_4[2:5] != cells[-1][2:5] == ["8", "x", "1"]
    ends = {line.index("accelerate_configs") for line in lines[2:]}
    assert len(ends) == 1


def test_table_says_what_does_not_divide_and_leaves_out_what_is_refused():
    lines, cells = table("--batch-size", "36", "--mixup", "0.2", "--model-ema-decay", "0.9")
    assert [row[0] for row in cells[2:-2]] == ["single", "ddp", "zero1", "zero2"]
    assert lines[-2] == "4 processes: --mixup and --cutmix pair images: the micro-batch of 9 must be even."
    assert lines[-1].startswith("8 processes: --batch-size 36 is global and does not divide over 8 processes;")


def test_the_table_is_for_models_that_sharding_can_help():
    """64 Mi parameters are 1,024 MiB of weights, gradients and AdamW's two moments."""
    config = parse_command_line(["--batch-size", "64"]).config
    small, large = (
        dataclasses.replace(SIZES, num_parameters=count, num_trainable=count) for count in (60 * MIB, 64 * MIB)
    )
    assert engine_lines(config, large) == engine_table(config, large)
    [line] = engine_lines(config, small)
    assert line == "engines     no need for ZeRO or FSDP: 960 MiB of weights, gradients and optimizer state fit any GPU"
    odd = parse_command_line(["--batch-size", "36"]).config
    assert engine_lines(odd, small)[1:] == [engine_table(odd, large)[-1]]


def test_gain_compares_with_ddp_on_as_many_processes():
    config = parse_command_line(["--batch-size", "64"]).config
    sizes = dataclasses.replace(SIZES, num_parameters=400 * MIB, num_trainable=400 * MIB)
    ddp, sharded = (make_plan(config, sizes, 4, engine) for engine in ("ddp", "fsdp2"))
    assert zero_gain(config, sizes, ddp, 2**40) == []
    [said] = zero_gain(config, sizes, sharded, 2**40)
    assert said.startswith(
        "gain        fsdp2 holds 1,600 MiB of weights, gradients and optimizer state per process, DDP would hold"
    )
    assert "DDP would hold 6,400 MiB of the 1,048,576 MiB there are: it brings nothing" in said
    assert "nothing" not in zero_gain(config, sizes, sharded, 2**34)[0]
