"""Run a study here, one run after another, or print what a scheduler needs for it; then compare its runs.

python -m cifar_dist.study recipes/study_e/study.yaml
python -m cifar_dist.study recipes/study_e/study.yaml --list
python -m cifar_dist.study recipes/study_e/study.yaml --slurm -- --dataset /data/cifar10 | bash
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from cifar_dist.command_line import OneLineParser
from cifar_dist.config import positive_int
from cifar_dist.errors import FAILURE_STATUS, UsageError, run_main
from cifar_dist.stop_request import SIGNALS
from cifar_dist.study_file import Study, StudyRun, load_study

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Standing:
    """Where a run stands by its last checkpoint: optimizer steps made and in all (0 where unknown), and its end."""

    step: int
    total_steps: int
    finished: bool

    def __str__(self) -> str:
        if self.finished:
            return "finished"
        return f"cut at step {self.step} of {self.total_steps}" if self.step else "new"


@dataclass
class Signals:
    """Signals that ask this program to stop, noted as they come and handed to the train.py that runs."""

    first: str = ""
    waiting: list[int] = field(default_factory=list)

    def listen(self) -> None:
        """Note signals from now on; a closed terminal counts as SIGTERM."""
        for number in (*SIGNALS, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.first = self.first or signal.Signals(number).name
        self.waiting.append(signal.SIGTERM if number == signal.SIGHUP else number)

    def run(self, command: Sequence[str]) -> int:
        """Run a command to its end, handing on what comes; its exit status, negative for the signal it died of."""
        with subprocess.Popen(command, start_new_session=True) as process:  # else Ctrl-C would reach it twice
            while True:
                while self.waiting:
                    process.send_signal(self.waiting.pop(0))
                try:
                    return process.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue


def main() -> None:
    """Do what the command line asks for."""
    arguments, further = parse_arguments(sys.argv[1:])
    study = load_study(arguments.study, further)
    if arguments.arguments is not None:
        print_arguments(study, arguments.arguments)
    elif arguments.list:
        for number, (run, standing) in enumerate(zip(study.runs, standings(study), strict=True)):
            print(f"{number}  {standing}  {run.name}  {shlex.join(['python', 'train.py', *run.arguments])}")
    elif arguments.slurm:
        print(slurm_script(study, standings(study), arguments.at_once))
    else:
        signals = Signals()
        signals.listen()
        failed = [] if arguments.report else train_all(study, signals)
        if signals.first:
            print(f"study       stopped by {signals.first}; the same command goes on with it", flush=True)
        compared = bool(signals.first) or compare(study, signals)
        sys.exit(FAILURE_STATUS if failed or not compared else 0)


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what comes after ``--``."""
    own, further = list(argv), []
    if "--" in own:
        own, further = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = OneLineParser(
        prog="python -m cifar_dist.study",
        usage="%(prog)s STUDY.yaml [--list | --arguments N | --report | --slurm [--at-once N]] [-- FLAGS OF train.py]",
        allow_abbrev=False,
        description="Run a study's runs one after another: skip what is finished, go on with what was cut, compare.",
    )
    parser.add_argument("study", metavar="STUDY.yaml", type=Path, help="the study: recipes, and a grid over them")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--list", action="store_true", help="a line a run: number, state, name, command")
    modes.add_argument(
        "--arguments", type=int, metavar="N", help="run N's arguments for train.py, each ended by a NUL byte"
    )
    modes.add_argument("--report", action="store_true", help="only compare the runs that are finished")
    modes.add_argument("--slurm", action="store_true", help="print the sbatch commands for what is not finished")
    parser.add_argument("--at-once", type=positive_int, metavar="N", help="--slurm: runs at a time (default: 4)")
    arguments = parser.parse_args(own)
    if arguments.at_once and not arguments.slurm:
        parser.error("--at-once does not go with this command; add --slurm.")
    arguments.at_once = arguments.at_once or 4
    return arguments, further


def print_arguments(study: Study, number: int) -> None:
    """Print a run's arguments, each ended by a NUL byte, for bash's ``mapfile -d ''``.

    Raises:
        UsageError: there is no such run.
    """
    if not 0 <= number < len(study.runs):
        raise UsageError(f"--arguments {number}: the study has runs 0 to {len(study.runs) - 1}.")
    sys.stdout.write("".join(f"{argument}\0" for argument in study.runs[number].arguments))


def standings(study: Study) -> list[Standing]:
    """Where each run stands.

    Raises:
        UsageError: a run's folder holds something else than this run.
    """
    return [standing_of(run, study.path) for run in study.runs]


def standing_of(run: StudyRun, study: Path) -> Standing:
    """Where a run stands, by the counters of its newest checkpoint, which tell train.py too whether it goes on.

    Raises:
        UsageError: its folder is in the way: of other settings than the study asks for, damaged, or no run's.
    """
    if not run.folder.exists():
        return Standing(0, 0, finished=False)  # without the seconds of importing
    from cifar_dist import checkpoint, checkpoint_store
    from cifar_dist.plan import Plan
    from cifar_dist.run_folder import choose_run_dir, read_json

    try:
        choose_run_dir(run.config)
        stored = checkpoint_store.latest_manifest(run.folder / "checkpoints")
        if stored is None:
            return Standing(0, 0, finished=False)
        state = checkpoint.state_of(stored)
        plan = Plan(**read_json(run.folder / "plan.json"))
    except (UsageError, OSError) as error:
        raise UsageError(f"study {study}, run {run.name}: {error}") from None
    except TypeError:
        raise UsageError(
            f"study {study}, run {run.name}: {run.folder / 'plan.json'} is of another version of cifar-dist; go on with"
            " that, or name another runs_dir."
        ) from None
    plan = replace(plan, total_steps=min(plan.schedule_steps, run.config.run.max_steps or plan.schedule_steps))
    return Standing(state.step, plan.total_steps, not state.goes_on(plan, run.config.run.patience))


def train_all(study: Study, signals: Signals) -> list[StudyRun]:
    """Train what is not finished, until asked to stop; the runs that failed."""
    failed = []
    for run, before in zip(study.runs, standings(study), strict=True):
        if signals.first:
            break
        if before.finished:
            say(run, "finished before")
            continue
        say(run, f"begins ({before})")
        status = signals.run([sys.executable, str(ROOT / "train.py"), *run.arguments])
        died_of_it = signals.first and -status in SIGNALS  # before train.py could listen
        if status != 0 and not died_of_it:
            failed.append(run)
            say(run, f"failed with status {status}")
        else:
            after = standing_of(run, study.path)
            say(run, str(after) if after.finished else f"{after}{_reason(run)}")
    return failed


def say(run: StudyRun, what: str) -> None:
    """A line about a run."""
    print(f"study       {run.name}: {what}", flush=True)


def _reason(run: StudyRun) -> str:
    word = run.folder / "REQUEUE"
    return f", by {word.read_text().strip()}" if word.is_file() else ""


def compare(study: Study, signals: Signals) -> bool:
    """Let evaluate.py report and compare the finished runs, and name the others; whether that was done."""
    finished = []
    for run, standing in zip(study.runs, standings(study), strict=True):
        if standing.finished:
            finished.append(str(run.folder))
        else:
            say(run, f"not in the comparison, {standing}")
    if not finished:
        print(f"study       no run of {study.path} is finished, so there is nothing to compare", flush=True)
        return False
    return signals.run([sys.executable, str(ROOT / "evaluate.py"), *finished]) == 0


def slurm_script(study: Study, found: Sequence[Standing], at_once: int) -> str:
    """Shell commands that submit the unfinished runs as a job array, and the comparison after it."""
    word = ["--", *study.further] if study.further else []
    script = ["slurm/study.sbatch", str(study.path)]
    report = ["--nodes=1", *script, "--report", *word]
    left = [number for number, standing in enumerate(found) if not standing.finished]
    if not left:
        return shlex.join(["sbatch", *report])
    array = ["sbatch", "--parsable", f"--array={_ranges(left)}%{at_once}", "--output=slurm-%A_%a.out", *script, *word]
    return (  # where there are several clusters, sbatch says NUMBER;CLUSTER
        f'job=$({shlex.join(array)}) &&\nsbatch --dependency=afterany:"${{job%%;*}}" {shlex.join(report)}'
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as SLURM writes them: ``0,2-5``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


if __name__ == "__main__":
    run_main(main)
