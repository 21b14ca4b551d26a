"""Command line, recipes and their agreement."""

import sys

import pytest

from cifar_dist.command_line import load_config, parse_command_line
from cifar_dist.config import Config
from cifar_dist.errors import UsageError
from cifar_dist.evaluate_arguments import parse_arguments
from cifar_dist.idle_flags import idle_flags
from cifar_dist.other_flags import NO_SETTINGS, OTHERS_NAMES
from tests.conftest import ROOT


def refused(capsys, *argv):
    """The one line that argparse refuses a command line with."""
    with pytest.raises(SystemExit) as stop:
        parse_command_line(argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="newer argparse lays its help out otherwise")
def test_golden_help(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        parse_command_line(["--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == (ROOT / "tests" / "golden_help.txt").read_text()


def test_an_empty_command_line_is_the_defaults():
    assert parse_command_line([]).config == Config()


def test_command_line_overrides_recipe_and_recipe_overrides_defaults(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("lr: 5e-5\nbatch-size: 64\nmean: [0.5, 0.5, 0.5]\nchannels_last: true\ndrop_path: null\n")
    config = parse_command_line(["--batch_size", "32", "--config", str(recipe)]).config
    assert (config.optim.lr, config.run.batch_size, config.model.mean) == (5e-5, 32, (0.5, 0.5, 0.5))
    assert config.model.channels_last
    assert config.optim.opt == "adamw"
    assert not parse_command_line(["--config", str(recipe), "--no-channels-last"]).config.model.channels_last


@pytest.mark.parametrize(
    "line, flags",
    [
        ("clip_grad: 1.0", ["--clip-grad", "none"]),
        ("interpolation: bicubic", ["--interpolation", "none"]),
        ("mean: [0.5, 0.5, 0.5]", ["--mean", "none"]),
        ("std: [0.5, 0.5, 0.5]", ["--lr", "1", "--std=None", "--epochs", "2"]),
    ],
)
def test_none_switches_off_what_a_recipe_sets(tmp_path, line, flags):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"{line}\npatience: 3\nfreeze: none\n")
    config = parse_command_line(["--config", str(recipe), *flags]).config
    assert (config.flat()[line.partition(":")[0]], config.run.patience, config.model.freeze) == (None, 3, "none")


@pytest.mark.parametrize(
    "argv, met",
    [
        ("--val-fraction 0.2 --select-on test", "--select-on val"),
        ("--split-seed 1 --val-fraction 0", "--val-fraction 0.2"),
        ("--crop-mode reflect --crop-padding 0", "--crop-padding 2"),
        ("--remode pixel", "--reprob 0.1"),
        ("--mixup-prob 0.5", "--cutmix 1"),
        ("--mixup-switch-prob 0.9 --mixup 0.2", "--cutmix 1"),
        ("--warmup-lr 0", "--warmup-epochs 1"),
        ("--decay-epochs 5 --sched linear", "--sched step"),
        ("--decay-rate 0.1", "--sched step"),
        ("--min-delta 0.01", "--patience 2"),
    ],
)
def test_a_flag_that_does_nothing_is_noted(argv, met):
    flag, value, *others = argv.split()
    name = flag[2:].replace("-", "_")
    (note,) = notes(argv.split())
    assert note.startswith(f"note        {flag} {value} does nothing without ")
    assert parse_command_line([*argv.split(), *met.split()]).config.flat()[name] != Config().flat()[name]
    assert not notes([*argv.split(), *met.split()]) and not notes([flag, str(Config().flat()[name]), *others])


def notes(argv):
    command = parse_command_line(argv)
    return idle_flags(command.given, command.config.flat())


def test_a_recipe_may_hold_what_the_command_line_makes_idle_or_of_use(tmp_path):
    recipe, saved = tmp_path / "r.yaml", tmp_path / "config.yaml"
    recipe.write_text("mixup: 0.2\ncutmix: 1\nmixup_switch_prob: 0.7\ncrop_mode: reflect\n")
    config = parse_command_line(["--config", str(recipe), "--mixup", "0", "--crop-padding", "0"]).config
    saved.write_text(config.as_recipe())
    assert parse_command_line(["--config", str(saved)]).config == config == load_config(saved)
    assert parse_command_line(["--config", str(recipe), "--mixup-prob", "0.5"]).config.augment.mixup_prob == 0.5
    off = ["--config", str(recipe), "--mixup", "0"]
    assert not notes(off) and not notes(["--config", str(saved)])
    (note,) = notes([*off, "--mixup-switch-prob", "0.6"])
    assert note == "note        --mixup-switch-prob 0.6 does nothing without both --mixup and --cutmix"


def test_a_home_that_no_shell_has_seen_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("dataset: ~/set\ninit_weights: ~/weights.pth\ncache_dir: ~/cache\n")
    command = parse_command_line(["--config=~/recipe.yaml", "--run-dir=~/run", "--preview-augment=~/sheet.png"])
    data, model, run = command.config.data, command.config.model, command.config.run
    found = [data.dataset, model.init_weights, data.cache_dir, run.run_dir, str(command.preview)]
    assert found == [str(tmp_path / name) for name in ("set", "weights.pth", "cache", "run", "sheet.png")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "~/a", "b", "--data=~/set", "--output=~/out"])
    arguments = parse_arguments()
    found = [str(place) for place in (*arguments.run_dirs, arguments.data, arguments.output)]
    assert found == [str(tmp_path / "a"), "b", str(tmp_path / "set"), str(tmp_path / "out")]


def test_saved_config_reads_back_equal_and_is_a_recipe(tmp_path):
    config = parse_command_line(["--mean", "0.1", "0.2", "0.3", "--no-sched-on-updates", "--lr=3e-4"]).config
    (tmp_path / "config.yaml").write_text(config.as_recipe())
    assert load_config(tmp_path / "config.yaml") == config
    assert parse_command_line(["--config", str(tmp_path / "config.yaml")]).config == config


def test_every_setting_has_one_name_over_all_sections():
    assert len(Config().flat()) == sum(
        len(vars(getattr(Config(), section))) for section in ("data", "model", "augment", "optim", "run")
    )


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--lr", "-1"], "--lr: -1 is outside (0, inf)"),
        (["--lr", "nan"], "--lr: nan is outside"),
        (["--lr", "fast"], "--lr: 'fast' is not a number"),
        (["--batch-size", "0"], "--batch-size: 0 is outside [1"),
        (["--batch-size", "1.5"], "'1.5' is not a whole number"),
        (["--val-fraction", "1.0"], "--val-fraction: 1.0 is outside [0, 1)"),
        (["--epochs", "1" + "0" * 400], "outside"),
        (["--config"], "--config: expected one argument"),
        (["--epochs", "0"], "--epochs: 0 is outside"),
        (["--sched", "cosin"], "invalid choice: 'cosin'"),
        (["--precision", "fp8"], "invalid choice: 'fp8'"),
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1. Did you mean --lr?"),
        (["--learning_rate=1"], "Did you mean --lr?"),
        (["--batch", "1"], "unrecognized arguments: --batch 1. Did you mean --batch-size?"),
        (["--bs", "1"], "Did you mean --batch-size?"),
        (["--num-epochs", "1"], "Did you mean --epochs?"),
        (["--num_train_epochs", "1"], "Did you mean --epochs?"),
        (["--per_device_train_batch_size", "1"], "Did you mean --batch-size, which is over all processes?"),
        (["--device", "cpu"], "Devices are the launcher's to choose"),
        (["--modle=cnn4"], "unrecognized arguments: --modle=cnn4. Did you mean --model"),
        (["-b", "64"], "unrecognized arguments: -b 64. Did you mean --batch-size, which is over all processes?"),
        (["--num-classes", "10"], "comes from the data"),
        (["--model-ema"], "unrecognized arguments: --model-ema. Did you mean --model-ema-decay? (see --help)"),
        (["--ratio", "0.75", "1.3"], "unrecognized arguments: --ratio 0.75 1.3. Random crops are --crop-padding's, or"),
        (["--scale", "0.5"], "--scale: expected 2 arguments"),
        (["--scale", "0", "1"], "--scale: 0 is outside (0, 1]"),
        (["--seed", "4294967296"], "--seed: 4294967296 is outside [0, 4294967296)"),
        (["--crop-padding", "-1"], "--crop-padding: -1 is outside"),
        (["--mixup", "-0.5"], "--mixup: -0.5 is outside"),
        (["--cutmix", "1e-320"], "--cutmix: 1e-320 is neither 0 nor in [0.001, 1000]"),
        (["--time-limit", "9" * 5000 + "h"], "is no time such as 90m"),
        (["--config="], "--config: it is empty"),
        (
            ["--init-weights="],
            "--init-weights: it is empty, as by a variable that is not set; give one, or leave it out",
        ),
        (["--run-dir", ""], "--run-dir: it is empty"),
        (["--preview-augment="], "--preview-augment: it is empty"),
        (["--hflip", "1.5"], "--hflip: 1.5 is outside"),
        (["--hflip", "-0.5"], "--hflip: -0.5 is outside"),
        (["--gpus", "2"], "unrecognized arguments: --gpus 2. How many processes there are is the launcher's to say"),
        (["--local-rank", "2"], "unrecognized arguments: --local-rank 2. Ranks come from the environment"),
        (["--fold", "2"], "unrecognized arguments: --fold 2. (see --help)"),
        (["digits"], "unrecognized arguments: digits. Data are named by --dataset, models by --model."),
        (["--warmup_ratio", "0.1"], "--warmup-ratio 0.1. Did you mean --warmup-epochs, which is in epochs?"),
        (
            ["--amp", "-j", "4", "--lr", "1", "--fold=2", "--torchcompile"],
            "unrecognized arguments: --amp -j 4 --fold=2 --torchcompile. --amp: Did you mean --precision? -j: There are"
            " no loader workers to be set. --fold: no such setting. --torchcompile: Did you mean --compile? (see",
        ),
        (["--report_to", "wandb"], "unrecognized arguments: --report-to wandb. Did you mean --wandb? (see --help)"),
        (["--do_train", "--do_eval"], "--do-train --do-eval. --do-train: train.py trains and watches val; evaluate.py"),
        (["--resume", "runs/a"], "; to go on in a folder: --run-dir FOLDER --resume auto"),
        (["--mixup", "0.2", "0.3"], "unrecognized arguments: 0.3. (see --help)"),
        (["/data/cifar"], "unrecognized arguments: /data/cifar. Data are named by --dataset, models by --model."),
        (["--Epoch", "3"], "Did you mean --epochs? (see --help)"),
        (["--mean", "0.5"], "--mean: expected 3 arguments"),
        (["--mean", "0.5", "none", "0.5"], "--mean: expected 3 arguments, or none"),
        (["--wandb", "none"], "--wandb: invalid choice: 'none' (choose from"),
        (["--pretrained", "none"], "a switch takes no value, got 'none'; write --pretrained or --no-pretrained"),
        (["--no-compile=true", "--lr", "1"], "got 'true'; write --compile or --no-compile"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(capsys, argv, said):
    assert said in refused(capsys, *argv)


def test_what_others_call_our_settings_is_none_of_ours():
    ours = set(Config().flat())
    assert set(OTHERS_NAMES.values()) <= ours
    assert not ours & {*OTHERS_NAMES, *NO_SETTINGS}


@pytest.mark.parametrize(
    "text, said",
    [
        ("learning_rate: 1\n", "unknown key 'learning_rate'. Did you mean lr?"),
        (
            "learning_rate: 1\nlr: 2\nzzz: 3\n",
            "unknown keys 'learning_rate', 'zzz'. learning_rate: Did you mean lr? zzz: no such setting.",
        ),
        ("batchsize: 1\n", "Did you mean batch_size"),
        ("lr: [\n", "not valid YAML at line"),
        ("lr: [1, 2]\n", "lr takes one value, got [1, 2]"),
        ("just words\n", "the file is to be a list"),
        ("plan: true\n", "unknown key 'plan'"),
        ("lr: 1\nepochs: 2\nlr: 2\n", "'lr' is given twice"),
        ("batch-size: 1\nbatch_size: 2\n", "'batch_size' is given twice"),
    ],
)
def test_bad_recipes_name_file_and_key(tmp_path, text, said):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(text)
    with pytest.raises(UsageError, match=f"{recipe}.*") as error:
        parse_command_line(["--config", str(recipe)])
    assert said in str(error.value)


@pytest.mark.parametrize("line", ["lr: -1", "epochs: many", "sched: cosin", "compile: maybe", "channels_last: 3"])
def test_bad_values_in_recipes_are_refused_as_for_flags(tmp_path, capsys, line):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(line + "\n")
    try:
        said = refused(capsys, "--config", str(recipe))
    except UsageError as error:
        said = str(error)
    assert str(recipe) in said
    assert line.split(":")[0].replace("_", "-") in said.replace("_", "-")


def test_missing_and_binary_recipes(tmp_path):
    for content in (None, b"\xff\xfe\x00"):
        recipe = tmp_path / "r.yaml"
        if content:
            recipe.write_bytes(content)
        with pytest.raises(UsageError, match="cannot be read"):
            parse_command_line(["--config", str(recipe)])


def test_other_ranks_say_nothing(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(SystemExit) as stop:
        parse_command_line(["--lr", "-1"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == ""


def test_bounds_that_belong_to_their_range():
    flags = "--seed 4294967295 --hflip 1 --mixup 0 --cutout 0 --crop-padding 0 --scale 1 1"
    config = parse_command_line(flags.split()).config
    assert (config.run.seed, config.augment.hflip, config.augment.scale) == (2**32 - 1, 1.0, (1.0, 1.0))


def test_a_recipe_named_without_its_suffix_is_suggested(tmp_path):
    (tmp_path / "mine.yaml").write_text("lr: 1\n")
    with pytest.raises(UsageError, match=r"/mine: cannot be read \(.*\)\. Did you mean .*/mine\.yaml\?$"):
        parse_command_line(["--config", str(tmp_path / "mine")])
    with pytest.raises(UsageError, match=r"/other: cannot be read \(.*\)\.$"):
        parse_command_line(["--config", str(tmp_path / "other")])


def test_what_is_empty_in_a_file_is_not_given(tmp_path):
    """As in settings that were saved when an empty flag was passed over."""
    (tmp_path / "config.yaml").write_text("init_weights: ''\nlr: 0.5\n")
    found = load_config(tmp_path / "config.yaml")
    assert found == parse_command_line(["--lr", "0.5"]).config
