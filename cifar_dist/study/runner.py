"""Run a study here, one run after another, or print what a scheduler needs for it; then compare its runs.

python -m cifar_dist.study recipes/study_e/study.yaml
python -m cifar_dist.study recipes/study_e/study.yaml --list
python -m cifar_dist.study recipes/study_e/study.yaml --slurm -- --dataset /data/cifar10 | bash
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from cifar_dist.argument_types import path, positive_int
from cifar_dist.command_line import OneLineParser
from cifar_dist.distributed.ending import FAILURE_FILE, FAILURE_STATUS
from cifar_dist.errors import UsageError
from cifar_dist.recovery import stop_request
from cifar_dist.study.file import Study, StudyRun, load_study
from cifar_dist.study.record import StudyRecord, forget_failure, note_failure, save_record
from cifar_dist.study.state import RunStatus, status_of, statuses

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.2


@dataclass
class Signals:
    """Signals that ask this program to stop, noted as they come and handed to the train.py that runs."""

    first: str = ""
    waiting: list[int] = field(default_factory=list)

    def listen(self) -> Signals:
        """Note signals from now on."""
        stop_request.listen(self._note)
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        self.first = self.first or signal.Signals(number).name
        self.waiting.append(number)

    def run(self, command: Sequence[str], failure_file: Path | None = None) -> int:
        """Run a command to its end, handing on what comes; its exit status, negative for the signal it died of.

        A script of ours that fails leaves its reason in `failure_file`.
        """
        environment = {**os.environ, FAILURE_FILE: str(failure_file)} if failure_file else None
        # A session of its own, else Ctrl-C would reach it twice.
        with subprocess.Popen(command, start_new_session=True, env=environment) as process:
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
        put("".join(f"{argument}\0" for argument in arguments_of(study, arguments.arguments)))
        return
    if arguments.report:
        sys.exit(0 if compare(study, Signals().listen()) else FAILURE_STATUS)
    check_settings(study)
    found = statuses(study)
    if arguments.list:
        put("".join(listed(study, found)))
        return
    refuse_what_is_in_the_way(study, found)
    if arguments.slurm:
        put(slurm_script(study, found, arguments.at_once) + "\n")
        return
    signals = Signals().listen()
    failed = train_all(study, signals)
    if signals.first:
        print(f"study       stopped by {signals.first}; the same command goes on with it", flush=True)
    compared = bool(signals.first) or compare(study, signals)
    sys.exit(FAILURE_STATUS if failed or not compared else 0)


def put(text: str) -> None:
    """Print for another program, which may read only the beginning (``| head -1``)."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end


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
    parser.elsewhere = " Flags of train.py go after --, and are for all runs."
    parser.add_argument("study", metavar="STUDY.yaml", type=path, help="the study: recipes, and a grid over them")
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


def arguments_of(study: Study, number: int) -> tuple[str, ...]:
    """A run's arguments for train.py.

    Raises:
        UsageError: there is no such run.
    """
    if not 0 <= number < len(study.runs):
        raise UsageError(f"--arguments {number}: the study has runs 0 to {len(study.runs) - 1}.")
    return study.runs[number].arguments


def listed(study: Study, found: Sequence[RunStatus]) -> list[str]:
    """A line a run: number, state, name, command."""
    states, names = max(len(str(status)) for status in found), max(len(run.name) for run in study.runs)
    return [
        f"{number:<{len(str(len(found) - 1))}}  {status!s:{states}}  {run.name:{names}}  "
        f"{shlex.join(['python', 'train.py', *run.arguments])}\n"
        for number, (run, status) in enumerate(zip(study.runs, found, strict=True))
    ]


def check_settings(study: Study) -> None:
    """Refuse now what train.py would refuse at the start of some run.

    Raises:
        UsageError: a run's model has a name that there is not, or its settings contradict each other.
    """
    from cifar_dist.contradictions import refuse_contradictions
    from cifar_dist.models import resolve_name  # takes seconds

    for run in study.runs:
        try:
            resolve_name(run.config.model.model)
            refuse_contradictions(run.config)
        except UsageError as error:
            raise UsageError(f"study {study.path}, run {run.name}: {error}") from None


def refuse_what_is_in_the_way(study: Study, found: Sequence[RunStatus]) -> None:
    """Refuse, before anything runs, to work around folders that are not the study's.

    Raises:
        UsageError: a run's folder cannot be continued.
    """
    stuck = [(run, status) for run, status in zip(study.runs, found, strict=True) if status.in_the_way]
    if stuck:
        (run, status), more = stuck[0], len(stuck) - 1
        others = f" (and {more} more, see --list)" if more else ""
        raise UsageError(
            f"study {study.path}, run {run.name}{others}: {status.in_the_way}; move {run.folder} away, give the"
            " recipe's entry a name, or the study another runs_dir."
        )


def train_all(study: Study, signals: Signals) -> list[StudyRun]:
    """Train what is not finished, until asked to stop; the runs that failed."""
    failed = []
    for number, run in enumerate(study.runs, 1):
        if signals.first:
            break
        before = status_of(run)  # as it is now: those before took hours
        if not before.is_due:
            say(run, "finished before" if before.finished else "is running elsewhere, and left to that")
        elif not train(run, f"run {number} of {len(study.runs)} begins ({before})", signals):
            failed.append(run)
    return failed


def train(run: StudyRun, begins: str, signals: Signals) -> bool:
    """Train a run, saying that it `begins`, and note its failure beside its folder; whether it did not fail."""
    say(run, begins)
    forget_failure(run.folder)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reason"
        status = signals.run([sys.executable, str(ROOT / "train.py"), *run.arguments], file)
        reason = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    died_of_it = signals.first and -status in stop_request.SIGNALS  # before train.py could listen
    if status != 0 and not died_of_it:
        if status < 0:  # as shells say it
            status, reason = 128 - status, reason or f"ended by {signal.Signals(-status).name}."
        note_failure(run.folder, status, reason)
        say(run, f"failed with status {status}")
        return False
    after = status_of(run)
    say(run, str(after) if after.finished else f"{after}{_reason(run)}")
    return True


def say(run: StudyRun, what: str) -> None:
    """A line about a run."""
    print(f"study       {run.name}: {what}", flush=True)


def _reason(run: StudyRun) -> str:
    word = run.folder / "REQUEUE"
    return f", by {word.read_text().strip()}" if word.is_file() else ""


def compare(study: Study, signals: Signals) -> bool:
    """Let evaluate.py report and compare the finished runs, and name the others; whether all are in the comparison."""
    found = list(zip(study.runs, statuses(study), strict=True))
    finished = [str(run.folder) for run, status in found if status.finished]
    done = False
    if finished:
        save_record(study.runs_dir, StudyRecord(study.name, {run.name: status.in_full for run, status in found}))
        done = signals.run([sys.executable, str(ROOT / "evaluate.py"), *finished]) == 0
    for run, status in found:
        if not status.finished:
            say(run, f"not in the comparison, {status.in_full}")
    if not finished:
        print(f"study       no run of {study.path} is finished, so there is nothing to compare", flush=True)
    elif not done:
        print("study       evaluate.py failed, so there is no new comparison; its reason is above", flush=True)
    elif len(finished) == 1 < len(found):
        print(f"study       1 of {len(found)} runs is finished: a report, no comparison", flush=True)
    elif len(found) > 1:
        print(f"study       {len(finished)} of {len(found)} runs are in the comparison", flush=True)
    return done and len(finished) == len(found)


def slurm_script(study: Study, found: Sequence[RunStatus], at_once: int) -> str:
    """Shell commands that submit the unfinished runs as a job array, and the comparison after it."""
    word = ["--", *study.further] if study.further else []
    script = ["slurm/study.sbatch", str(study.path)]
    name = f"study-{study.name}"
    report = [f"--job-name={name}-report", "--nodes=1", *script, "--report", *word]
    left = [number for number, status in enumerate(found) if status.is_due]
    if not left:
        return shlex.join(["sbatch", *report])
    array = ["sbatch", "--parsable", f"--job-name={name}", f"--array={_ranges(left)}%{at_once}"]
    array += ["--output=slurm-%A_%a.out", *script, *word]
    busy = f"slurm       failed: {study.path} is queued or runs already; wait, or: scancel --me --name={name}"
    refused = "slurm       failed: SLURM refuses the comparison, a job of one node; its runs were cancelled; see above"
    return (  # where there are several clusters, sbatch says NUMBER;CLUSTER
        f"queued=$(squeue --me --noheader --name={name} --format='|%Z|') || exit\n"
        f'case $queued in *"|$(pwd -P)|"*) echo {shlex.quote(busy)} >&2; exit 2 ;; esac\n'
        f"job=$({shlex.join(array)}) || exit\n"
        f'sbatch --dependency=afterany:"${{job%%;*}}" {shlex.join(report)} || {{\n'
        f'    scancel "${{job%%;*}}"; echo {shlex.quote(refused)} >&2; exit 2\n}}'
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
