"""Derived numbers, and learning rates against closed forms and plain PyTorch schedulers."""

import dataclasses
import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler

from cifar_dist.command_line import parse_command_line
from cifar_dist.errors import UsageError
from cifar_dist.memory import MIB, Load, usage
from cifar_dist.plan import Sizes, make_plan, split_batch
from cifar_dist.schedule import Schedule, schedule_without_model

SIZES = Sizes(
    num_train=45_000, num_val=5_000, num_test=10_000, num_classes=10, data_bytes=50_000 * 3072,
    num_parameters=1_000, num_trainable=900, state_per_parameter=2,
)  # fmt: skip


def optim(*argv):
    return parse_command_line(argv).config.optim


def plan(*argv, processes=1, engine=None, sizes=SIZES):
    return make_plan(parse_command_line(argv).config, sizes, processes, engine)


def lr_at(step, *schedule):
    return schedule_without_model(*schedule).apply(step)


def torch_lrs(make, lr, count):
    """Learning rates of a plain PyTorch scheduler over `count` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_per_step_equals_torch():
    config = optim("--lr", "0.1", "--min-lr", "0.001")
    expected = torch_lrs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 60, eta_min=0.001), 0.1, 60)
    assert [lr_at(k, config, 6, 10) for k in range(60)] == pytest.approx(expected, rel=1e-6)


def test_cosine_per_epoch_equals_torch_stepped_once_an_epoch():
    config = optim("--lr", "5e-5", "--no-sched-on-updates")
    expected = torch_lrs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10), 5e-5, 10)
    assert [lr_at(k, config, 10, 4) for k in range(40)] == pytest.approx([e for e in expected for _ in range(4)])


@pytest.mark.parametrize("flag", ["--sched-on-updates", "--no-sched-on-updates"])
def test_step_schedule_equals_torch(flag):
    config = optim("--lr", "1e-3", "--sched", "step", "--decay-epochs", "10", "--decay-rate", "0.5", flag)
    expected = torch_lrs(lambda o: torch.optim.lr_scheduler.StepLR(o, 10, 0.5), 1e-3, 50)
    assert [lr_at(k, config, 50, 3) for k in range(150)] == pytest.approx([e for e in expected for _ in range(3)])


def test_linear_warmup_then_linear_decay_closed_form():
    config = optim("--lr", "1", "--sched", "linear", "--warmup-epochs", "2", "--warmup-lr", "0")
    rates = [lr_at(k, config, 10, 5) for k in range(50)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(10)])
    assert rates[10:] == pytest.approx([1 - k / 40 for k in range(40)])


def test_warmup_ends_at_the_peak_and_cosine_spans_the_rest():
    config = optim("--lr", "1", "--warmup-epochs", "2.5", "--warmup-lr", "0")
    rates = [lr_at(k, config, 10, 4) for k in range(40)]
    assert rates[10] == max(rates) == pytest.approx(1)
    assert rates[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 30)) for k in range(30)])


def test_equals_timms_schedulers_built_by_hand():
    cases = {
        "cosine": lambda o: CosineLRScheduler(
            o, t_initial=80, lr_min=1e-4, warmup_t=20, warmup_lr_init=1e-6, warmup_prefix=True, t_in_epochs=False
        ),
        "linear": lambda o: PolyLRScheduler(
            o,
            power=1,
            t_initial=80,
            lr_min=1e-4,
            warmup_t=20,
            warmup_lr_init=1e-6,
            warmup_prefix=True,
            t_in_epochs=False,
        ),
    }
    for sched, make in cases.items():
        config = optim("--lr", "0.1", "--min-lr", "1e-4", "--warmup-epochs", "2", "--sched", sched)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        scheduler, expected = make(optimizer), []
        for update in range(100):  # timm: the value for the next update is set after each
            expected.append(optimizer.param_groups[0]["lr"])
            scheduler.step_update(update + 1)
        assert [lr_at(k, config, 10, 10) for k in range(100)] == pytest.approx(expected, rel=1e-9)


def test_constant_keeps_the_rate():
    assert {lr_at(k, optim("--sched", "constant", "--lr", "0.3"), 5, 7) for k in range(35)} == {0.3}


def test_layer_decay_scales_groups_and_apply_reports_the_peak():
    groups = [{"params": [torch.zeros(1)], "lr_scale": scale} for scale in (0.25, 1.0)]
    optimizer = torch.optim.SGD(groups, lr=0.8)
    peak = Schedule(optimizer, optim("--lr", "0.8"), 2, 10).apply(10)
    assert peak == pytest.approx(0.4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.4])


def test_a_schedule_sets_no_rate_before_it_is_applied():
    """So that a run that goes on with an evaluation, and saves before its next step, saves what it was."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.8)
    optimizer.param_groups[0].update(lr=0.3, initial_lr=0.8)  # as of a checkpoint
    schedule = Schedule(optimizer, optim("--lr", "0.8", "--warmup-epochs", "1"), 2, 10)
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert schedule.apply(10) == pytest.approx(0.8)


def test_plan_of_study_e_counted_by_hand():
    found = plan("--batch-size", "64", "--epochs", "50")
    assert (found.steps_per_epoch, found.total_steps) == (704, 35_200)  # 45,000 / 64 = 703.1
    assert (found.micro_batch_size, found.grad_accum_steps) == (64, 1)
    assert found.memory.state == 4 * (1_000 + 3 * 900)  # weights, gradients, two moments
    assert found.epoch_of(704) == 1


def test_a_plan_names_its_engine_and_what_a_process_holds():
    assert (plan().engine, plan(processes=2).engine, plan(processes=2, engine="zero3").engine) == (
        "single", "ddp", "zero3",
    )  # fmt: skip
    sizes = dataclasses.replace(SIZES, num_parameters=3 * MIB, num_trainable=2 * MIB)
    found = plan("--model-ema-decay", "0.9", "--batch-size", "64", processes=2, sizes=sizes)
    assert found.memory == usage("ddp", 2, Load(3 * MIB, 2 * MIB, 2, SIZES.data_bytes, average=True))
    assert found.lines()[-1] == (
        "memory      ddp: each process holds about 24 MiB weights, 8 MiB gradients, 16 MiB optimizer state, 146 MiB"
        " data; activations come on top"
    )
    held = plan("--precision", "fp16", processes=4, engine="zero2").memory
    assert held == usage("zero2", 4, Load(1_000, 900, 2, SIZES.data_bytes, precision="fp16"))
    between = plan("--micro-batch-size", "8", processes=4, engine="fsdp2").memory
    assert between.gradients == 4 * 900


def test_what_depends_on_the_number_of_processes_is_said():
    normed = dataclasses.replace(SIZES, has_batch_norm=True)
    argv = ["--batch-size", "128", "--mixup", "0.2", "--cutmix", "1"]
    statistics = plan(*argv, processes=4, sizes=normed).lines()[-1]
    assert statistics == (
        "batch norm  statistics per process: over 32 images, so results depend on the number of processes; --sync-bn"
        " takes them over all 128"
    )
    assert plan(*argv, "--sync-bn", processes=4, sizes=normed).notes == ()
    both = plan(*argv, "--micro-batch-size", "8", processes=4, sizes=normed).notes[0]
    assert "over 8 images, so results depend on the number of processes and --micro-batch-size; --sync-bn" in both
    assert plan(*argv, "--micro-batch-size", "8", "--sync-bn", processes=4, sizes=normed).notes == (
        "batch norm  statistics per micro-batch: over 32 images, so results depend on --micro-batch-size",
    )
    alone = plan(*argv, "--micro-batch-size", "2", sizes=normed).notes
    assert alone == ("batch norm  statistics per micro-batch: over 2 images, so results depend on --micro-batch-size",)
    assert plan("--micro-batch-size", "2").notes == ()
    assert plan(*argv, processes=1, sizes=normed).notes == ()
    assert plan(processes=4).notes == ()


def test_defaults_that_do_not_suit_are_said():
    sgd = "as for AdamW; SGD's are about 0.1 and 5e-4"
    assert plan("--opt", "sgd").notes == (f"note        --lr 0.001 and --weight-decay 0.05 {sgd}",)
    assert plan("--opt", "momentum", "--lr", "0.1").notes == (f"note        --weight-decay 0.05 {sgd}",)
    assert plan("--opt", "sgd", "--lr", "0.1", "--weight-decay", "5e-4").notes == plan("--opt", "adamw").notes == ()
    mirrored = plan("--dataset", "digits").notes
    assert mirrored == ("note        --hflip 0.5 mirrors digits, which makes others of them; take 0",)
    assert plan("--dataset", "digits", "--hflip", "0").notes == ()


def test_a_schedule_of_few_steps_is_said():
    """1,000 images are 8 batches of 128."""
    few = dataclasses.replace(SIZES, num_train=1000)
    assert plan("--epochs", "7", sizes=few).notes == (
        "note        56 steps in all are few: a smaller --batch-size or more --epochs make more",
    )
    assert plan("--epochs", "8", sizes=few).notes == plan("--epochs", "7", "--max-steps", "5", sizes=few).notes == ()


def test_a_plan_that_selects_on_test_says_so():
    assert "val IS test" in plan("--select-on", "test").lines()[0]
    assert "test" in plan().lines()[0]
    assert "IS" not in plan().lines()[0]


@pytest.mark.parametrize(
    "total, every, expected", [(20, 5, [5, 10, 15, 20]), (22, 5, [5, 10, 15, 22]), (4, 1, [1, 2, 3, 4]), (3, 50, [3])]
)
def test_no_record_is_the_mean_of_a_few_last_steps(total, every, expected):
    found = plan("--max-steps", str(total))
    assert [step for step in range(1, total + 1) if found.logs_at(step, every)] == expected


def test_every_epoch_ends_with_a_record():
    found = plan("--max-steps", "25")
    epoch = found.steps_per_epoch
    found = dataclasses.replace(found, steps_per_epoch=10)
    assert epoch != 10
    assert [step for step in range(1, 26) if found.logs_at(step, 4)] == [4, 8, 10, 12, 16, 20, 25]
    assert [step for step in range(1, 26) if found.logs_at(step, 3)] == [3, 6, 10, 12, 15, 18, 20, 21, 25]
    assert [step for step in range(1, 26) if found.logs_at(step, 50)] == [10, 20, 25]


def test_max_steps_stops_early_without_changing_the_schedule():
    short, whole = plan("--max-steps", "50"), plan()
    assert short.total_steps == 50
    assert short.schedule_steps == whole.total_steps
    assert short.lr_last == lr_at(49, optim(), 10, whole.steps_per_epoch)


@pytest.mark.parametrize(
    "processes, micro, expected", [(1, None, (96, 1)), (2, None, (48, 1)), (4, 8, (8, 3)), (3, 99, (32, 1))]
)
def test_global_batch_is_split_exactly(processes, micro, expected):
    assert split_batch(96, micro, processes) == expected
    assert expected[0] * expected[1] * processes == 96


GRAPHS = ["--compile", "--compile-mode", "reduce-overhead"]


@pytest.mark.parametrize("engine", ["single", "ddp", "zero2", "fsdp2"])
def test_cuda_graphs_are_for_whole_weights(engine):
    config = parse_command_line(GRAPHS).config
    if engine in ("single", "ddp"):
        assert make_plan(config, SIZES, 1, engine).engine == engine
    else:
        with pytest.raises(UsageError, match=f"not for {engine}"):
            make_plan(config, SIZES, 1, engine)


def test_compiling_is_not_for_hooks_on_every_layer():
    assert plan("--compile", engine="zero2").engine == "zero2"
    with pytest.raises(UsageError, match="--compile is not for zero3"):
        plan("--compile", engine="zero3")


@pytest.mark.parametrize(
    "argv, processes, said",
    [
        (["--batch-size", "100"], 3, "does not divide over 3 processes; take a multiple of 3, such as 99"),
        (["--batch-size", "96", "--micro-batch-size", "20"], 2, "--micro-batch-size 20 does not divide the 48"),
        (["--batch-size", "50000"], 1, "there are only 45000 training images"),
        (["--warmup-epochs", "10"], 1, "--warmup-epochs 10 must be less than --epochs 10, else"),
        (["--compile-mode", "reduce-overhead"], 1, "--compile-mode reduce-overhead goes with --compile; give both"),
        ([*GRAPHS, "--batch-size", "64", "--micro-batch-size", "32"], 1, "takes a step's images at once"),
        (["--lr", "1e-4", "--min-lr", "1e-3"], 1, "--min-lr 0.001 is above --lr"),
        (["--lr", "1e-3", "--warmup-lr", "1", "--warmup-epochs", "2"], 1, "--warmup-lr 1 is above --lr 0.001"),
        (["--sched", "step", "--min-lr", "1e-5"], 1, "the step schedule does not end at a given rate"),
        (["--sched", "constant", "--min-lr", "1e-5"], 1, "the constant schedule does not end at a given rate"),
        (["--sched", "step", "--decay-rate", "10", "--decay-epochs", "0.01"], 1, "--decay-rate 10 every 0.01 epochs"),
        (["--warmup-epochs", "1e-320"], 1, "--warmup-epochs 9.99989e-321 are too few"),
        (["--cutmix", "1", "--batch-size", "45"], 1, "must be even"),
        (["--warmup-epochs", "0.5", "--no-sched-on-updates"], 1, "take a whole number"),
        (["--mixup", "0.2", "--batch-size", "45"], 1, "must be even"),
        (["--crop-padding", "32"], 1, "--crop-padding 32 must be less than the images' --data-size 32"),
        (["--cutout", "33"], 1, "--cutout 33 is larger than the images' --data-size 32; lower it"),
        (["--flip-mode", "alternating", "--hflip", "0"], 1, "--hflip 0 means nothing; leave it at 0.5"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(argv, processes, said):
    with pytest.raises(UsageError) as error:
        plan(*argv, processes=processes)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        "--scale 0.3 0.3 --crop-padding 0", "--cutout 32", "--batch-size 45000", "--warmup-epochs 0.5",
        "--warmup-epochs 1 --no-sched-on-updates", "--warmup-epochs 2 --no-sched-on-updates",
        "--lr 1e-3 --min-lr 1e-3", "--lr 1e-3 --warmup-lr 1e-3 --warmup-epochs 1", "--patience 2",
        "--scale 0.3 1 --crop-padding 0 --cutout 33",
    ],
)  # fmt: skip
def test_what_goes_together_is_planned(flags):
    plan(*flags.split())


def test_no_run_is_longer_than_its_schedule():
    whole = plan()
    assert plan("--max-steps", "1000000").total_steps == whole.schedule_steps == whole.total_steps


def test_patience_needs_val():
    with pytest.raises(UsageError, match="needs a val split"):
        plan("--patience", "2", sizes=dataclasses.replace(SIZES, num_val=0))


def test_a_test_split_that_is_not_counted_is_not_named():
    assert plan(sizes=dataclasses.replace(SIZES, num_test=None)).lines()[0].endswith("val 5,000; 10 classes")


def test_rates_at_the_start_and_after_warmup_counted_by_hand():
    """45,000 images in batches of 450 are 100 steps an epoch."""
    found = plan("--lr", "0.1", "--warmup-lr", "0.02", "--warmup-epochs", "2", "--batch-size", "450", "--epochs", "6")
    assert found.warmup_steps == 200
    assert (found.lr_first, found.lr_after_warmup) == pytest.approx((0.02, 0.1))


@pytest.mark.parametrize(("epochs", "steps"), [("0.005", 1), ("1.501", 151), ("0.1", 10), ("2", 200)])
def test_a_step_that_begins_within_the_warmup_is_one_of_its_steps(epochs, steps):
    argv = ["--lr", "0.1", "--warmup-lr", "0", "--warmup-epochs", epochs, "--batch-size", "450"]
    found, optim = plan(*argv), parse_command_line(argv).config.optim
    rates = [lr_at(step, optim, 10, 100) for step in range(steps + 1)]
    assert found.warmup_steps == steps and found.lr_after_warmup == rates[-1]
    assert rates[: steps + 1] == sorted(rates) and rates[0] == 0 and lr_at(steps + 1, optim, 10, 100) < rates[-1] <= 0.1


def test_what_stays_of_initial_weights_is_said():
    """45,000 images in batches of 450 are 100 steps an epoch: 0.9977 ** 1,000 is 10.0 %."""
    argv = ["--batch-size", "450", "--epochs", "10"]
    assert plan(*argv, "--model-ema-decay", "0.997").notes == ()
    (note,) = plan(*argv, "--model-ema-decay", "0.999").notes
    assert "after 1,000 steps 37% of the moving average" in note and "--model-ema-decay 0.999 " in note
    assert "after 10 steps 99% " in plan(*argv, "--model-ema-decay", "0.999", "--max-steps", "10").notes[0]
    frozen = [*argv, "--freeze", "backbone"]
    assert "random weights" in plan(*frozen).notes[0]
    assert plan(*frozen, "--pretrained").notes == () == plan(*frozen, "--init-weights", "x.pth").notes


def test_two_micro_batches_hold_gradients_under_fsdp2():
    """A process of four keeps all of 900 gradients in fp32 between its two."""
    found = plan("--batch-size", "64", "--micro-batch-size", "8", processes=4, engine="fsdp2")
    assert found.grad_accum_steps == 2
    assert found.memory.gradients == 4 * SIZES.num_trainable
