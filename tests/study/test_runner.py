"""A study from its file: what its runs are called and told, what is skipped, gone on with, refused and handed on."""

import fcntl
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

import train
from cifar_dist.command_line import parse_command_line
from cifar_dist.config import Config
from cifar_dist.distributed.ending import run_main
from cifar_dist.errors import UsageError
from cifar_dist.run_folder import is_running, run_lock
from cifar_dist.study import runner
from cifar_dist.study.record import failure_of
from cifar_dist.study.state import RunStatus
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
            run_main(runner.main)
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

    def run(self, command, failure_file=None):
        calls.append(command[1:])
        if command[1].endswith("evaluate.py"):
            return 0
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        monkeypatch.setattr(sys, "argv", command[1:])
        if (name := command[command.index("--run-dir") + 1].rpartition("/")[2]) in faults:
            if faults[name] > 0:
                failure_file.write_text(f"--lr 5 is too much for {name}.\n")
            return faults[name]
        try:
            run_main(train.main)
        except SystemExit as stop:
            return stop.code
        return 0

    monkeypatch.setattr(runner.Signals, "run", run)
    monkeypatch.setattr(runner.Signals, "listen", lambda self: self)
    return calls, faults


def names(out):
    return [line.split("  ")[2] for line in out.splitlines()]


def states(out):
    return [line.split("  ")[1] for line in out.splitlines()]


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
    numbers, states, _, commands = zip(*(re.split("  +", line) for line in out.splitlines()), strict=True)
    assert numbers == tuple(map(str, range(8)))
    assert set(states) == {"new"}
    configs = [parse_command_line(shlex.split(command)[2:]).config for command in commands]
    assert [c.optim.lr for c in configs] == [5e-5, 5e-5, 7e-4, 7e-4] * 2
    assert [c.run.batch_size for c in configs] == [64] * 4 + [32] * 4
    assert {(c.run.epochs, c.data.dataset) for c in configs} == {(9, "a b")}
    assert configs[5].run.run_dir == "runs/x/big_lr5e-5_seed1"
    assert configs[5].run.resume == "auto"


def test_an_entry_without_a_recipe_has_the_defaults(main):
    out = main("recipes: [{model: cnn4}, {model: cnn4, name: long, epochs: 30}]\ncommon: {seed: 3}\n", "--list")[1]
    assert names(out) == ["cnn4", "long"]
    commands = [shlex.split(re.split("  +", line)[3])[2:] for line in out.splitlines()]
    configs = [parse_command_line(command).config.flat() for command in commands]
    plain = Config().flat() | {"model": "cnn4", "seed": 3, "resume": "auto"}
    assert configs == [
        plain | {"run_dir": "runs/s/cnn4"}, plain | {"run_dir": "runs/s/long", "epochs": 30},
    ]  # fmt: skip


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


def test_finished_runs_are_skipped_and_cut_ones_gone_on_with(here, main, scripts):
    calls, faults = scripts
    text = "recipes: [small.yaml]\ngrid: {seed: [0, 1, 2]}\n"
    faults["small_seed1"] = 3
    status, out = main(text, "--", "--max-steps", 2)
    assert status == 1
    assert "study       small_seed1: failed with status 3" in out
    why = "failed with status 3: --lr 5 is too much for small_seed1."
    assert f"study       small_seed1: not in the comparison, {why}\n" in out
    assert out.endswith("study       2 of 3 runs are in the comparison\n")
    record = json.loads((here / "runs/s/study.json").read_text())
    assert record == {"name": "s", "runs": {"small_seed0": "finished", "small_seed1": why, "small_seed2": "finished"}}
    assert states(main(text, "--list", "--", "--max-steps", 2)[1]) == ["finished", "failed with status 3", "finished"]
    assert [call[-1] for call in calls] == ["2", "2", "2", "runs/s/small_seed2"]
    assert calls[-1][1:] == ["runs/s/small_seed0", "runs/s/small_seed2"]

    calls.clear()
    status, out = main(text, "--report", "--", "--max-steps", 2)
    assert (status, out.splitlines()[-1]) == (1, "study       2 of 3 runs are in the comparison")
    assert len(calls) == 1
    faults.clear()
    calls.clear()
    status, out = main(text, "--", "--max-steps", 2)  # the one that failed is made up for, the others left alone
    assert status == 0
    assert [call[call.index("--run-dir") + 1] for call in calls[:-1]] == ["runs/s/small_seed1"]
    assert calls[-1][1:] == [f"runs/s/small_seed{seed}" for seed in range(3)]

    assert out.endswith("study       3 of 3 runs are in the comparison\n")
    assert not list((here / "runs/s").glob("*.failed"))

    assert states(main(text, "--list")[1]) == [f"cut at step 2 of {3 * STEPS}"] * 3
    faults["small_seed2"] = -9
    status, out = main(text, "--", "--time-limit", "1s")
    assert (status, "(at step 2 of 18): ended by SIGKILL." in out) == (1, True)
    assert states(main(text, "--list")[1])[2] == f"failed with status 137 (at step 2 of {3 * STEPS})"
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


def test_a_reason_is_taken_from_the_script_that_failed(here):
    code = "from cifar_dist.distributed.ending import leave; leave(2, 'no such thing.')"
    assert runner.Signals().run([sys.executable, "-c", code], here / "reason") == 2
    assert (here / "reason").read_text() == "no such thing.\n"


def test_a_folder_of_other_settings_is_in_the_way_of_its_run_alone(main, scripts):
    calls, _ = scripts
    two = "recipes: [small.yaml, {{recipe: small.yaml, name: big{}}}]\n"
    assert main(two.format(""), "--", "--max-steps", 1)[0] == 0
    changed = two.format(", lr: 0.5")
    status, out = main(changed, "--list", "--", "--max-steps", 1)
    assert status == 0
    assert states(out) == ["finished", "in the way: runs/s/big has other settings (--lr 0.001 -> 0.5)"]
    calls.clear()
    for mode in ([], ["--slurm"]):
        status, said = main(changed, *mode, "--", "--max-steps", 2)
        assert (status, len(said.splitlines()), calls) == (2, 1, [])
        assert "study s.yaml, run big: runs/s/big has other settings (--lr 0.001 -> 0.5); move runs/s/big away" in said
    status, out = main(changed, "--report", "--", "--max-steps", 1)
    assert (status, calls[0][1:]) == (1, ["runs/s/small"])
    assert "study       big: not in the comparison, in the way: runs/s/big has other" in out
    assert out.endswith("study       1 of 2 runs is finished: a report, no comparison\n")


def test_data_that_have_moved_are_in_nobodys_way(here, main, scripts):
    for split, label, number in itertools.product(("train", "test"), ("cat", "dog"), range(12)):
        (here / "set" / split / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 200 * (label == "cat"))).save(here / f"set/{split}/{label}/{number}.png")
    text = f"recipes: [small.yaml]\ncommon: {{dataset: {here}/set, batch_size: 10}}\n"
    assert main(text, "--", "--max-steps", 1)[0] == 0
    (here / "set").rename(here / "moved")
    flags = ["--", "--max-steps", 2, "--dataset", here / "moved"]
    assert states(main(text, "--list", *flags)[1]) == ["cut at step 1 of 2"]
    assert main(text, *flags)[0] == 0
    assert states(main(text, "--list", *flags)[1]) == ["finished"]
    shutil.copytree(here / "moved", here / "other")
    (here / "other/train/cat/0.png").unlink()
    for place, said in (("other", f"other data than {here}/other"), ("nowhere", f"other settings (--dataset {here}/")):
        (state,) = states(main(text, "--list", *flags[:-1], here / place)[1])
        assert state.startswith(f"in the way: runs/s/small has {said}")


def test_a_run_of_another_version_is_in_the_way(here, main, scripts):
    text = "recipes: [small.yaml]\n"
    assert main(text, "--", "--max-steps", 1)[0] == 0
    (here / "runs/s/small/plan.json").write_text('{"steps": 3}')
    said = "in the way: runs/s/small/plan.json is of another version of cifar-dist"
    assert states(main(text, "--list", "--", "--max-steps", 1)[1]) == [said]


def test_a_run_that_is_running_is_left_to_that(here, main, scripts):
    text = "recipes: [small.yaml]\ngrid: {seed: [0, 1]}\n"
    run = here / "runs/s/small_seed1"
    assert not is_running(run)
    run.mkdir(parents=True)
    with run_lock(run):
        assert is_running(run)
        assert states(main(text, "--list")[1]) == ["new", "running"]
        assert "--array=0%4" in main(text, "--slurm")[1]
        status, out = main(text, "--", "--max-steps", 1)
        assert status == 1
        assert "study       small_seed1: is running elsewhere" in out
        assert len(scripts[0]) == 2
    assert not is_running(run)
    with (run / ".lock").open() as file:  # as another `is_running` does
        fcntl.flock(file, fcntl.LOCK_SH)
        assert not is_running(run)
    with run_lock(run):
        pass


def test_a_list_of_which_only_the_beginning_is_read(here):
    (here / "s.yaml").write_text("recipes: [small.yaml]\n")
    code = "from cifar_dist.study import runner; runner.check_settings = lambda _: None; runner.main()"
    command = f"{shlex.join([sys.executable, '-c', code, 's.yaml', '--list'])} | true"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert done.stderr == ""


def test_a_study_given_to_train_is_told_where_it_belongs(here):
    (here / "s.yaml").write_text("name: x\nrecipes: [small.yaml]\n")
    with pytest.raises(UsageError, match=r"--config s.yaml: this is a study .* python -m cifar_dist.study s.yaml$"):
        parse_command_line(["--config", "s.yaml"])


def test_slurm_gets_the_unfinished_runs(here, main, scripts, monkeypatch):
    done = {0, 3, 5}
    monkeypatch.setattr(
        "cifar_dist.study.state.status_of",
        lambda run: RunStatus(1, 2, finished=int(run.name[len("small_seed") :]) in done),
    )
    text = "recipes: [small.yaml]\ngrid: {seed: [0, 1, 2, 3, 4, 5, 6, 7, 8]}\n"
    status, out = main(text, "--slurm", "--at-once", 2, "--", "--dataset", "/data/my set")
    assert status == 0
    queued = "squeue() { [[ $* == *--me*--name=study-s* ]] && echo '|%s|'; }\n"
    idle = queued % "/elsewhere"
    script = idle + "sbatch() { printf '<%s>' \"$@\" >&2; echo >&2; echo '77;east'; }\n" + out
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stderr
    words = "<slurm/study.sbatch><s.yaml>"
    assert ran.splitlines() == [
        "<--parsable><--job-name=study-s><--array=1-2,4,6-8%2><--output=slurm-%A_%a.out>"
        f"{words}<--><--dataset></data/my set>",
        "<--dependency=afterany:77><--job-name=study-s-report><--nodes=1>"
        f"{words}<--report><--><--dataset></data/my set>",
    ]
    no_report = 'scancel() { echo "no $*" >&2; }; sbatch() { [[ $* != *--report* ]] && echo 78; }\n'
    refused = subprocess.run(["bash", "-c", idle + no_report + out], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.splitlines()[0]) == (2, "no 78")
    assert "SLURM refuses the comparison, a job of one node; its runs were cancelled" in refused.stderr
    sbatch = "sbatch() { echo $# >&2; false; }\n"
    refused = subprocess.run(["bash", "-c", idle + sbatch + out], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.split()) == (1, ["9"])  # no comparison of an array that is not there
    busy = subprocess.run(["bash", "-c", queued % here.resolve() + sbatch + out], capture_output=True, text=True)
    assert (busy.returncode, len(busy.stderr.splitlines())) == (2, 1)
    assert "s.yaml is queued or runs already" in busy.stderr
    unknown = subprocess.run(["bash", "-c", "squeue() { false; }\n" + sbatch + out], capture_output=True, text=True)
    assert (unknown.returncode, unknown.stderr) == (1, "")
    done.update(range(9))
    assert main(text, "--slurm")[1] == (
        "sbatch --job-name=study-s-report --nodes=1 slurm/study.sbatch s.yaml --report\n"
    )


@pytest.mark.parametrize(
    ("text", "argv", "said"),
    [
        ("recipes: [small.yaml]\ngird: {lr: [1]}\n", [], "unknown key 'gird'. Did you mean grid?"),
        ("recipes: [smal.yaml]\n", [], "smal.yaml: cannot be read"),
        (RECIPE, [], "study s.yaml: this is a recipe; start it by: python train.py --config s.yaml"),
        ("lr: 1\ndatset: digits\n", [], "this is a recipe"),
        ("recipes: [small.yaml]\nlr: 1\n", [], "unknown key 'lr'"),
        ("recipes: [small.yaml]\nruns_dir: a_run\n", ["--list"], "runs_dir a_run is the folder of a run"),
        ("recipes: small.yaml\n", [], "recipes is to be a list"),
        ("name: x\n", [], "recipes is to be a list"),
        ("recipes: [small.yaml]\ngrid: {lr: 1}\n", [], "a list of values for lr"),
        ("recipes: [small.yaml]\ngrid: {lr: []}\n", [], "a list of values for lr"),
        ("recipes: [small.yaml]\ngrid: [lr]\n", [], "grid is to be a list of `flag: value` lines"),
        ("recipes: [small.yaml]\ngrid: {lr: [0.1, 1e-1]}\n", [], "lr in grid has 0.1 and '1e-1', whose runs"),
        ("recipes: [small.yaml]\ngrid: {seed: [0, 1, 0]}\n", [], "seed in grid has 0 and 0, whose runs would both"),
        ("recipes: [small.yaml, ./small.yaml]\n", [], "two entries of recipes make a run called small; give"),
        ("recipes: [small.yaml]\ncommon: {model: cnn5}\n", [], "s.yaml, run small: --model cnn5: timm has no such"),
        ("recipes: [small.yaml]\ncommon: {warmup_epochs: 3}\n", [], "run small: --warmup-epochs 3 must be less than"),
        ("recipes: [small.yaml]\ngrid: {crop_padding: [0, 32]}\n", ["--list"], "--crop-padding 32 must be less"),
        ("recipes: [small.yaml]\ngrid: {model: [cnn4, cnn5]}\n", ["--list"], "run small_modelcnn5: --model cnn5"),
        ("recipes: [small.yaml]\ncommon: {model: cnn5}\n", ["--slurm"], "Did you mean cnn4"),
        ("recipes: [{recipe: small.yaml, name: comparison}]\n", [], "cannot be called comparison;"),
        ("recipes: [{recipe: small.yaml, name: comparison-flip}]\n", [], "cannot be called comparison-flip;"),
        ("recipes: [{recipe: small.yaml, name: a/b}]\n", [], "becomes that of a folder"),
        ("recipes: [{name: x}]\n", [], "an entry of recipes is to be a file"),
        ("recipes: [{recipe: small.yaml, lr: 1, lr: 2}]\n", [], "'lr' is given twice"),
        ("recipes: [small.yaml]\ncommon: {lr: 1}\ngrid: {lr: [1]}\n", [], "lr is in grid and in common"),
        ("recipes: [{recipe: 3, model: cnn4}]\n", [], "an entry of recipes is to be a file"),
        ("recipes: [{recipe: small.yaml, lr: 1}]\ngrid: {lr: [1]}\n", [], "lr is in grid and in the entry of small"),
        ("recipes: [small.yaml]\ncommon: {run_dir: x}\n", [], "the study gives --run-dir itself"),
        ("recipes: [small.yaml]\ncommon: {ephocs: 3}\n", [], "unknown key 'ephocs'. Did you mean epochs?"),
        ("recipes: [small.yaml]\ngrid: {lr: [-1]}\n", [], "run small_lr-1: argument --lr: -1 is outside"),
        ("recipes: [small.yaml]\ncommon: {sync_bn: 3}\n", [], "sync_bn is true or false"),
        ("recipes: [small.yaml]\n", ["--", "--run-dir", "x"], "leave them out after --"),
        ("recipes: [small.yaml]\n", ["--", "--config", "small.yaml"], "are for a single run"),
        ("recipes: [small.yaml]\n", ["--", "--plan"], "are for a single run"),
        ("recipes: [small.yaml]\n", ["--", "--precision", "auto"], "name fp32 or bf16"),
        ("recipes: [small.yaml]\n", ["--", "--epoch", "x"], "Did you mean --epochs"),
        ("recipes: [small.yaml]\n", ["--arguments", "1"], "--arguments 1: the study has runs 0 to 0"),
        ("recipes: [small.yaml]\n", ["--list", "--report"], "not allowed with"),
        ("recipes: [small.yaml]\n", ["--at-once", "2"], "add --slurm"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_runs(here, main, scripts, text, argv, said):
    (here / "a_run/checkpoints").mkdir(parents=True)
    (here / "a_run/config.yaml").touch()
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
signal.signal(signal.SIGHUP, lambda *_: asked.append("SIGHUP"))
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
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL);"  # which may be ignored here, as under nohup
        "import pathlib; from cifar_dist.study import runner; runner.ROOT = pathlib.Path();"
        "runner.status_of = lambda *_: runner.RunStatus(0, 0, False);"
        "runner.check_settings = lambda *_: None; runner.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "s.yaml"]
    with subprocess.Popen(command, stdout=-1, text=True, env=environment, start_new_session=True) as process:
        while not (here / "ready").exists():
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, number)
        out, _ = process.communicate(timeout=180)
    assert process.returncode == 0
    assert f"stopped by {number.name}; the same command goes on" in out
    assert (here / "asked").read_text() == f"{number.name}\n"  # once, and the second run did not begin


def test_a_job_that_fails_leaves_its_reason_beside_its_run(here):
    for part in ("slurm", "cifar_dist"):
        (here / part).symlink_to(ROOT / part)
    (here / "s.yaml").write_text("recipes: [small.yaml]\n")
    (here / "bin").mkdir()
    for name, does in {"srun": "echo because. > $CIFAR_DIST_FAILURE_FILE; exit 2", "scontrol": "echo"}.items():
        (here / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
        (here / "bin" / name).chmod(0o755)
    job = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"}
    job |= {"SLURM_TASKS_PER_NODE": "1", "SLURM_JOB_CPUS_PER_NODE": "1", "SLURM_JOB_NUM_NODES": "1"}
    job |= {"SLURMD_NODENAME": "n", "VENV": sys.prefix, "NETWORK": "yes", "MASTER_ADDR": "127.0.0.1"}
    environment = os.environ | job | {"PATH": f"{here / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "slurm/study.sbatch", "s.yaml"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "failed, not requeued: because." in done.stdout
    assert failure_of(here / "runs/s/small") == "status 2: because."
