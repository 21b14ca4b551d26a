"""A study from its file: what its runs are called and told, what is skipped, gone on with, refused and handed on."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from accelerate.state import AcceleratorState, GradientState

import train
from cifar_dist import study
from cifar_dist.command_line import parse_command_line
from cifar_dist.errors import run_main
from tests.conftest import ROOT

RECIPE = "dataset: digits\nmodel: cnn4\nimg_size: 16\nepochs: 3\nbatch_size: 240\nhflip: 0\nwandb: disabled\n"
STEPS = 6  # an epoch of digits in batches of 240


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def main(here, monkeypatch, capsys):
    """The command, on a study file of the given text; its exit status, and what it printed."""

    def call(text, *argv):
        (here / "s.yaml").write_text(text)
        monkeypatch.setattr(sys, "argv", ["study.py", "s.yaml", *map(str, argv)])
        try:
            run_main(study.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr()
        return status, said.err if status == 2 else said.out

    return call


@pytest.fixture
def scripts(monkeypatch):
    """train.py within this process instead of its own, evaluate.py not at all; the commands that were called."""
    calls, faults = [], {}

    def run(self, command):
        calls.append(command[1:])
        if command[1].endswith("evaluate.py"):
            return 0
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        monkeypatch.setattr(sys, "argv", command[1:])
        if (name := command[command.index("--run-dir") + 1].rpartition("/")[2]) in faults:
            return faults[name]
        try:
            run_main(train.main)
        except SystemExit as stop:
            return stop.code
        return 0

    monkeypatch.setattr(study.Signals, "run", run)
    monkeypatch.setattr(study.Signals, "listen", lambda self: None)
    return calls, faults


def names(out):
    return [line.split("  ")[2] for line in out.splitlines()]


def test_names_and_precedence(main):
    text = (
        "name: x\ncommon: {batch-size: 64}\ngrid: {lr: [5e-5, 0.0007], seed: [0, 1]}\n"
        "recipes: [small.yaml, {recipe: small.yaml, name: big, epochs: 7, batch_size: 32}]\n"
    )
    status, out = main(text, "--list", "--", "--epochs", 9, "--dataset", "a b")
    assert status == 0
    assert names(out) == [
        f"{stem}_lr{lr}_seed{seed}" for stem in ("small", "big") for lr in ("5e-5", "7e-4") for seed in (0, 1)
    ]
    numbers, states, _, commands = zip(*(line.split("  ") for line in out.splitlines()), strict=True)
    assert numbers == tuple(map(str, range(8)))
    assert set(states) == {"new"}
    configs = [parse_command_line(shlex.split(command)[2:]).config for command in commands]
    assert [c.optim.lr for c in configs] == [5e-5, 5e-5, 7e-4, 7e-4] * 2
    assert [c.run.batch_size for c in configs] == [64] * 4 + [32] * 4
    assert {(c.run.epochs, c.data.dataset) for c in configs} == {(9, "a b")}
    assert configs[5].run.run_dir == "runs/x/big_lr5e-5_seed1"
    assert configs[5].run.resume == "auto"


def test_labels_of_switches_lists_and_paths(main):
    text = (
        "recipes: [small.yaml]\nruns_dir: out\n"
        "grid: {sync_bn: [true, false], mean: [[0.5, 0.5, 0.5]], layer-decay: [null], dataset: [a/b c], "
        "lr: [1.0e-10]}\n"
    )
    out = main(text, "--list")[1]
    tail = "mean0.5-0.5-0.5_layer-decaynone_dataseta-b-c_lr1e-10"
    assert names(out) == [f"small_sync-bn_{tail}", f"small_no-sync-bn_{tail}"]
    assert "--run-dir out/small_sync-bn_" in out


def test_arguments_are_for_bash_and_take_no_torch(here):
    (here / "s.yaml").write_text("recipes: [small.yaml]\ngrid: {seed: [0, 1]}\n")
    code = (
        "import runpy, sys; runpy.run_module('cifar_dist.study', run_name='__main__');assert 'torch' not in sys.modules"
    )
    argv = [sys.executable, "-c", code, "s.yaml", "--arguments", "1", "--", "--cache-dir", 'it\'s "a"\nplace']
    bash = f"mapfile -d '' -t found < <({shlex.join(argv)}); printf '<%s>' \"${{found[@]}}\""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", bash], capture_output=True, text=True, env=environment, check=True)
    expected = ["--config", "small.yaml", "--seed=1", "--run-dir", "runs/s/small_seed1", "--resume", "auto"]
    assert done.stdout == "".join(f"<{word}>" for word in [*expected, "--cache-dir", 'it\'s "a"\nplace']), done.stderr
    assert done.stderr == ""


def test_finished_runs_are_skipped_and_cut_ones_gone_on_with(main, scripts):
    calls, faults = scripts
    text = "recipes: [small.yaml]\ngrid: {seed: [0, 1, 2]}\n"
    faults["small_seed1"] = 3
    status, out = main(text, "--", "--max-steps", 2)
    assert status == 1
    assert "study       small_seed1: failed with status 3" in out
    assert "study       small_seed1: not in the comparison, new" in out
    assert [call[-1] for call in calls] == ["2", "2", "2", "runs/s/small_seed2"]
    assert calls[-1][1:] == ["runs/s/small_seed0", "runs/s/small_seed2"]

    faults.clear()
    calls.clear()
    status, out = main(text, "--", "--max-steps", 2)  # the one that failed is made up for, the others left alone
    assert status == 0
    assert [call[call.index("--run-dir") + 1] for call in calls[:-1]] == ["runs/s/small_seed1"]
    assert calls[-1][1:] == [f"runs/s/small_seed{seed}" for seed in range(3)]

    out = main(text, "--list")[1]
    assert [line.split("  ")[1] for line in out.splitlines()] == [f"cut at step 2 of {3 * STEPS}"] * 3
    calls.clear()
    assert main(text, "--report")[0] == 1
    assert main(text, "--report", "--", "--max-steps", 2)[0] == 0
    assert len(calls) == 1


def test_early_stopping_ends_a_run(main, scripts):
    text = "recipes: [small.yaml]\ncommon: {patience: 1, min_delta: 0.99}\n"
    assert main(text)[0] == 0
    assert main(text, "--list")[1].split("  ")[1] == "finished"
    assert len(scripts[0]) == 2
    assert not (ROOT / "runs/s").exists()


def test_a_run_that_leaves_for_want_of_time_is_cut_and_the_next_begins(main, scripts):
    status, out = main("recipes: [small.yaml]\ngrid: {seed: [0, 1]}\n", "--", "--time-limit", "1s")
    assert status == 1
    assert "no run of s.yaml is finished" in out
    for seed in (0, 1):
        assert f"study       small_seed{seed}: cut at step" in out
    assert ", by " in out


def test_other_settings_are_refused_by_name(main, scripts):
    assert main("recipes: [small.yaml]\n", "--", "--max-steps", 1)[0] == 0
    status, said = main("recipes: [small.yaml]\ncommon: {lr: 0.5}\n", "--list")
    assert status == 2
    assert "run small" in said
    assert "--lr 0.001 -> 0.5" in said
    assert len(said.splitlines()) == 1


def test_slurm_gets_the_unfinished_runs(main, scripts, monkeypatch):
    done = {0, 3, 5}
    monkeypatch.setattr(
        study, "standing_of", lambda run, _: study.Standing(1, 2, finished=int(run.name[len("small_seed") :]) in done)
    )
    text = "recipes: [small.yaml]\ngrid: {seed: [0, 1, 2, 3, 4, 5, 6, 7, 8]}\n"
    status, out = main(text, "--slurm", "--at-once", 2, "--", "--dataset", "/data/my set")
    assert status == 0
    script = "sbatch() { printf '<%s>' \"$@\" >&2; echo >&2; echo '77;east'; }\n" + out
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stderr
    words = "<slurm/study.sbatch><s.yaml>"
    assert ran.splitlines() == [
        f"<--parsable><--array=1-2,4,6-8%2><--output=slurm-%A_%a.out>{words}<--><--dataset></data/my set>",
        f"<--dependency=afterany:77><--nodes=1>{words}<--report><--><--dataset></data/my set>",
    ]
    refused = subprocess.run(["bash", "-c", "sbatch() { echo $# >&2; false; }\n" + out], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.split()) == (1, ["8"])  # no comparison of an array that is not there
    done.update(range(9))
    assert main(text, "--slurm")[1] == "sbatch --nodes=1 slurm/study.sbatch s.yaml --report\n"


@pytest.mark.parametrize(
    ("text", "argv", "said"),
    [
        ("recipes: [small.yaml]\ngird: {lr: [1]}\n", [], "unknown key 'gird'. Did you mean grid?"),
        ("recipes: [smal.yaml]\n", [], "smal.yaml: cannot be read"),
        ("recipes: small.yaml\n", [], "recipes is to be a list"),
        ("name: x\n", [], "recipes is to be a list"),
        ("recipes: [small.yaml]\ngrid: {lr: 1}\n", [], "a list of values for lr"),
        ("recipes: [small.yaml]\ngrid: {lr: []}\n", [], "a list of values for lr"),
        ("recipes: [small.yaml]\ngrid: [lr]\n", [], "grid is to be a list of `flag: value` lines"),
        ("recipes: [small.yaml]\ngrid: {lr: [0.1, 1e-1]}\n", [], "2 runs are called small_lr0.1"),
        ("recipes: [small.yaml, small.yaml]\n", [], "2 runs are called small;"),
        ("recipes: [{recipe: small.yaml, name: comparison}]\n", [], "cannot be called comparison"),
        ("recipes: [{recipe: small.yaml, name: a/b}]\n", [], "becomes that of a folder"),
        ("recipes: [{name: x}]\n", [], "an entry of recipes is to be a file"),
        ("recipes: [{recipe: small.yaml, lr: 1, lr: 2}]\n", [], "'lr' is given twice"),
        ("recipes: [small.yaml]\ncommon: {lr: 1}\ngrid: {lr: [1]}\n", [], "lr is in grid and in common"),
        ("recipes: [{recipe: small.yaml, lr: 1}]\ngrid: {lr: [1]}\n", [], "lr is in grid and in the entry of"),
        ("recipes: [small.yaml]\ncommon: {run_dir: x}\n", [], "the study gives --run-dir itself"),
        ("recipes: [small.yaml]\ncommon: {ephocs: 3}\n", [], "unknown key 'ephocs'. Did you mean epochs?"),
        ("recipes: [small.yaml]\ngrid: {lr: [-1]}\n", [], "run small_lr-1: argument --lr: -1 is outside"),
        ("recipes: [small.yaml]\ncommon: {sync_bn: 3}\n", [], "sync_bn is true or false"),
        ("recipes: [small.yaml]\n", ["--", "--run-dir", "x"], "leave them out after --"),
        ("recipes: [small.yaml]\n", ["--", "--config", "small.yaml"], "leave them out after --"),
        ("recipes: [small.yaml]\n", ["--", "--plan"], "leave them out after --"),
        ("recipes: [small.yaml]\n", ["--", "--epoch", "x"], "Did you mean --epochs"),
        ("recipes: [small.yaml]\n", ["--arguments", "1"], "--arguments 1: the study has runs 0 to 0"),
        ("recipes: [small.yaml]\n", ["--list", "--report"], "not allowed with"),
        ("recipes: [small.yaml]\n", ["--at-once", "2"], "add --slurm"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_runs(main, scripts, text, argv, said):
    status, line = main(text, *argv)
    assert status == 2
    assert said in line
    assert len(line.splitlines()) == 1
    assert not scripts[0]


TRAINS_UNTIL_ASKED = """
import os, pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append("SIGINT"))
signal.signal(signal.SIGTERM, lambda *_: asked.append("SIGTERM"))
pathlib.Path("ready").touch()
for _ in range(1000):
    if asked:
        break
    time.sleep(0.01)
time.sleep(0.5)  # a second one would come in this time
with open("asked", "a") as file:
    file.write(" ".join(asked) + "\\n")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_reaches_train_once_and_ends_the_study(here, number):
    """As Ctrl-C does: to all of the terminal's foreground processes, of which train.py is not to be one."""
    (here / "train.py").write_text(TRAINS_UNTIL_ASKED)
    (here / "s.yaml").write_text("recipes: [small.yaml]\ngrid: {seed: [0, 1]}\n")
    code = (
        "import pathlib, sys; from cifar_dist import errors, study; study.ROOT = pathlib.Path();"
        "study.standing_of = lambda *_: study.Standing(0, 0, False); errors.run_main(study.main)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "s.yaml"]
    with subprocess.Popen(command, stdout=-1, text=True, env=environment, start_new_session=True) as process:
        while not (here / "ready").exists():
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, number)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert f"stopped by {number.name}; the same command goes on" in out
    expected = "SIGTERM" if number == signal.SIGHUP else number.name
    assert (here / "asked").read_text() == f"{expected}\n"  # once, and the second run did not begin
