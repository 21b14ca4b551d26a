"""What the campaigns share: trainings that can be killed, forked or real, and what they leave behind, digested."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

ENVIRONMENT = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
os.environ.update(ENVIRONMENT)

import psutil  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402

import train  # noqa: E402, F401  what every forked training has imported already
from cifar_dist import checkpoint  # noqa: E402
from cifar_dist.checkpoint import Trained  # noqa: E402
from cifar_dist.config import OptimConfig  # noqa: E402
from cifar_dist.distributed import start  # noqa: E402
from cifar_dist.optim import make_optimizer  # noqa: E402
from cifar_dist.parallel import Replicated  # noqa: E402
from cifar_dist.run_folder import processor  # noqa: E402
from cifar_dist.train_state import TrainState  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FLAGS = shlex.split(  # two epochs of 7 steps with all that has a state, or draws at random
    "--dataset digits --model test_efficientnet --img-size 32 --wandb disabled --epochs 2 --batch-size 192"
    " --micro-batch-size 48 --lr 2e-3 --warmup-epochs 1 --clip-grad 1 --drop 0.2 --drop-path 0.2 --mixup 0.4 --cutout 6"
    " --smoothing 0.1 --model-ema-decay 0.9 --log-every 1 --checkpoint-every 3 --resume auto"
)
STEPS = 14
TIMING = {"seconds", "images_per_second", "data_wait", "peak_memory_bytes"}  # all else is alike in every repetition
_TOKEN = "CIFAR_DIST_TRIAL"
_FORK = multiprocessing.get_context("fork")


def replace_everywhere(name: str, make: Callable[[Any], Any]) -> None:
    """Put ``make(original)`` in the place of the function `name` wherever a module of the project holds it."""
    module, _, attribute = name.rpartition(".")
    original = getattr(import_module(module), attribute)
    for other in list(sys.modules.values()):
        if other.__name__.partition(".")[0] in ("cifar_dist", "train") and vars(other).get(attribute) is original:
            setattr(other, attribute, make(original))


def run_training(flags: list[str]) -> None:
    """All of train.py as a program, in this process."""
    sys.argv, sys.path[0] = ["train.py", *flags], str(ROOT)
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def _rank(work: Callable[[], None], rank: int, count: int, port: int, said: Path) -> None:
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if count > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with said.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr, status = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1), 0
    try:
        work()
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Job:
    """A training that runs: forked from this process, or real processes under their launcher.

    Args:
        flags: of train.py.
        count: processes.
        said: the file that takes what they print.
        real: ``python train.py`` or ``torchrun``, instead of forks that have imported everything already.
        hook: called with the rank, in each forked process before it begins.
        work: what forked processes do instead of train.py.
        command: what real processes run instead of train.py.
    """

    def __init__(  # noqa: PLR0913
        self,
        flags: list[str],
        count: int,
        said: Path,
        *,
        real: bool = False,
        hook: Callable[[int], None] | None = None,
        work: Callable[[], None] | None = None,
        command: tuple[str, ...] = ("train.py",),
    ):
        self.count, self.said, self.real, self._token = count, said, real, uuid.uuid4().hex
        self._forked: list[Any] = []
        if real:
            module = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            line = [sys.executable, *(module if count > 1 else []), *command, *flags]
            environment = {**os.environ, _TOKEN: self._token}
            with said.open("a") as file:
                self._launcher = subprocess.Popen(
                    line, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
                )
            return
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(count):

            def begin(rank: int = rank) -> None:
                if hook is not None:
                    hook(rank)
                (work or (lambda: run_training(flags)))()

            self._forked.append(_FORK.Process(target=_rank, args=(begin, rank, count, port, said)))
            self._forked[-1].start()

    def pids(self) -> list[int]:
        """All live processes of the job, the launcher's first."""
        if not self.real:
            return [process.pid for process in self._forked if process.is_alive()]
        self._launcher.poll()
        return [self._launcher.pid] * (self._launcher.returncode is None) + _marked(self._token, self._launcher.pid)

    def ranks(self) -> list[int]:
        """The live processes that train."""
        found = self.pids()
        return found[1:] if self.real and self.count > 1 and found[:1] == [self._launcher.pid] else found

    def send(self, number: int, target: str, victim: int = 0) -> None:
        """Send a signal to ``one`` rank (the `victim`-th that lives), ``all`` processes, or the ``launcher``."""
        found = {"one": self.ranks() or self.pids(), "launcher": self.pids()[:1]}.get(target, self.pids())
        for pid in [found[victim % len(found)]] if target == "one" and found else found:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def launcher_lives(self) -> bool:
        """Whether the launcher of real processes has not ended yet."""
        return self._launcher.poll() is None

    def wait(self, seconds: float) -> list[int] | None:
        """Exit statuses (the launcher's alone if there is one), or None if processes are left after that time."""
        limit = time.monotonic() + seconds
        while True:
            if self.real and self._launcher.poll() is not None and not self.pids():
                return [self._launcher.returncode]
            if not self.real and not any(process.is_alive() for process in self._forked):
                return [process.exitcode for process in self._forked]
            if time.monotonic() > limit:
                return None
            time.sleep(0.02 if not self.real else 0.1)

    def end(self) -> None:
        """Kill what is left."""
        while self.wait(0) is None:
            self.send(signal.SIGKILL, "all")
            self.wait(0.5)


def _marked(token: str, launcher: int) -> list[int]:
    """Live processes that a job started, wherever they hang in the tree, but its launcher."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.pid != launcher and process.environ().get(_TOKEN) == token
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return sorted(found)


def checkpoints_of(run_dir: Path) -> list[Path]:
    """All checkpoints that have a name, sound or not, the newest last."""
    folders = [path for path in run_dir.glob("checkpoints/step-*") if path.name[5:].replace("-", "").isdecimal()]
    return sorted(folders, key=lambda folder: [int(number) for number in folder.name.split("-")[1:]])


def steps_of(run_dir: Path) -> list[int]:
    """Their steps."""
    return [int(folder.name.split("-")[1]) for folder in checkpoints_of(run_dir)]


def fault_of(folder: Path) -> str:
    """What is wrong with a checkpoint, by its manifest alone; an empty string if nothing is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if folder.name.split("-")[1] != f"{manifest['step']:08d}":
            return f"the manifest of {folder.name} is of step {manifest['step']}"
        for name, entry in manifest["files"].items():
            content = (folder / name).read_bytes()
            if (len(content), hashlib.sha256(content).hexdigest()) != (entry["bytes"], entry["sha256"]):
                return f"{name} is not what the manifest says"
        needed = {"model.safetensors", "optimizer.safetensors", "optimizer.json", "state.json"}
        needed |= {f"process-{rank}.safetensors" for rank in range(manifest["num_processes"])}
        return f"not in the manifest: {', '.join(sorted(needed - manifest['files'].keys()))}" * (
            not needed <= manifest["files"].keys()
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return repr(error)


def newest_sound(run_dir: Path) -> int | None:
    """Step of the newest checkpoint without a fault."""
    return max((int(f.name.split("-")[1]) for f in checkpoints_of(run_dir) if not fault_of(f)), default=None)


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMING}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def final_digest(run_dir: Path) -> str:
    """sha256 over all that a run has come to.

    Every tensor of the newest checkpoint (weights, average, optimizer, each process's random streams and statistics),
    its counters, and every logged number of every step, without times.
    """
    digest, folder = hashlib.sha256(), checkpoints_of(run_dir)[-1]
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{file.name} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for file in (folder / "optimizer.json", folder / "state.json"):
        digest.update(json.dumps(_timeless(json.loads(file.read_text())), sort_keys=True).encode())
    for line in (run_dir / "log.jsonl").read_text().splitlines():
        digest.update(json.dumps(_timeless(json.loads(line)), sort_keys=True).encode())
    return digest.hexdigest()


class Failures(list[str]):
    """Sentences, each said as soon as it is known."""

    def add(self, failure: str) -> None:
        """One more."""
        print(f"FAILED  {failure}", flush=True)
        self.append(failure)


class Small:
    """A tiny training whose weights, average, momentum and random stream all tell its step, to save and load by itself.

    Args:
        run_dir: where checkpoints go.
        width: weights are `width` x `width`.
    """

    def __init__(self, run_dir: Path, width: int = 8):
        model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width), torch.nn.Dropout(0.1))
        self.run_dir, self._ema = run_dir, ModelEmaV3(model)
        run_dir.mkdir(parents=True, exist_ok=True)
        optimizer = make_optimizer(model, OptimConfig(opt="momentum"))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        self._trained = Trained(Replicated(start("fp32", 60), model, optimizer, None), self._ema)

    def _tensors(self) -> list[torch.Tensor]:
        parallel = self._trained.parallel
        momenta = [state["momentum_buffer"] for state in parallel.optimizer.state.values()]
        return [*parallel.module.parameters(), *momenta]

    def save(self, step: int, best: bool = False) -> None:
        """Save the checkpoint of a step, keeping the last two and the best."""
        torch.manual_seed(step)
        with torch.no_grad():
            for tensor in self._tensors():
                tensor.fill_(step)
            for tensor in self._ema.module.parameters():
                tensor.fill_(-step)
        self.run_dir.mkdir(exist_ok=True)
        checkpoint.save(self.run_dir, self._trained, TrainState(step=step), best)

    def load(self) -> int:
        """Load the checkpoint that is chosen; its step, on which all of it must agree, or 0 if there is none."""
        found = checkpoint.resume_point(self._trained.parallel.accelerator, self.run_dir)
        if found is None:
            return 0
        checkpoint.load(found, self._trained)
        tensors = [*self._tensors(), *(-tensor for tensor in self._ema.module.parameters())]
        [step] = {value for tensor in tensors for value in tensor.unique().tolist()} | {float(torch.initial_seed())}
        return int(step)


def reference(folder: Path, count: int, flags: list[str] = FLAGS, real: bool = False) -> tuple[str, float]:
    """Digest and seconds of an uninterrupted run on `count` processes."""
    name = f"whole-{count}{'-real' * real}"
    began, job = (
        time.monotonic(),
        Job([*flags, "--run-dir", str(folder / name)], count, folder / f"{name}.txt", real=real),
    )
    statuses = job.wait(300)
    seconds = time.monotonic() - began
    job.end()
    if statuses is None or any(statuses):
        raise RuntimeError(f"the uninterrupted run failed ({statuses}): {folder / name}.txt")
    return final_digest(folder / name), seconds


def campaign(
    doc: str, run: Callable[..., dict[str, Any]], trials: int, more: Callable[..., None] | None = None
) -> None:
    """A campaign's command line: run it, print its rows, write JSON, and exit with status 1 if something failed.

    Args:
        doc: the script's docstring.
        run: called with trials, seed, folder and what `more` declares; returns ``rows`` (dicts of a table) and
            ``failures`` (sentences), among others.
        trials: how many by default.
        more: adds arguments to the parser.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=trials)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where runs are made and failed ones stay (default: a new one)")
    parser.add_argument("--json", type=Path)
    if more is not None:
        more(parser)
    options = vars(parser.parse_args())
    json_path, folder = options.pop("json"), options.pop("folder")
    folder = folder or Path(tempfile.mkdtemp(prefix="recovery-"))
    began = time.monotonic()
    found = run(folder=folder, **options)
    found["seconds"] = round(time.monotonic() - began, 1)
    columns = list(dict.fromkeys(name for row in found["rows"] for name in row))
    table = [columns, *([str(row.get(name, "")) for name in columns] for row in found["rows"])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(f"{found['seconds']} s; " + (f"failed runs are in {folder}" if found["failures"] else "nothing failed"))
    if json_path is not None:
        packages = ("torch", "accelerate", "safetensors", "timm", "numpy")
        machine = {
            "command": shlex.join(["python", "-m", f"benchmarks.recovery.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
            "processor": processor(),
            "cores": os.cpu_count(),
            "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
        }
        json_path.write_text(json.dumps(machine | found, indent=1) + "\n")
    if not found["failures"]:
        shutil.rmtree(folder)
    sys.exit(1 if found["failures"] else 0)


def begin(folder: Path) -> None:
    """Make the folder, with a cache of its own, and keep this process to one thread, as its children will be."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    torch.set_num_threads(1)
