"""Train or fine-tune an image classifier: one command on one CPU, one GPU or many nodes.

python train.py --dataset digits --model cnn4 --hflip 0
accelerate launch train.py --model swin_base --pretrained --lr 5e-5
"""

from __future__ import annotations

from cifar_dist.recovery import stop_request

if __name__ == "__main__":
    stop_request.listen()  # before the seconds of importing, in which a signal may come too

from cifar_dist.command_line import CommandLine, parse_command_line
from cifar_dist.distributed.ending import run_main

if __name__ == "__main__":
    command = run_main(parse_command_line)  # --help and wrong flags are answered at once

from contextlib import closing
from pathlib import Path

from cifar_dist.distributed.control import StepFlags
from cifar_dist.distributed.group import on_main, start
from cifar_dist.recovery.checkpoint_timer import CheckpointTimer
from cifar_dist.recovery.saver import Saver
from cifar_dist.recovery.stop_request import StopRequest
from cifar_dist.run_folder import create_run_dir, run_lock
from cifar_dist.schedule import Schedule
from cifar_dist.training.engine import Stepper, train_step
from cifar_dist.training.features import make_feed
from cifar_dist.training.job import Job, assess, conclude, decline, prepare, resume
from cifar_dist.training.progress import Progress
from cifar_dist.training.setup import Setup, claim, load_data, make_model, refuse_names, settle, show_augmentation


def main(command: CommandLine | None = None) -> None:
    """Plan the run that `command`, or this program's command line, asks for, and train."""
    command = command or parse_command_line()
    config = command.config
    refuse_names(command)
    accelerator = start(config.run.precision, config.run.ddp_timeout)
    run_dir = claim(command, accelerator)  # wrong names and taken folders are refused before data are decoded
    data = load_data(config, run_dir, accelerator)
    model = make_model(config, data, run_dir, accelerator)
    setup = settle(command, data, model, run_dir, accelerator)
    if command.preview is not None:
        show_augmentation(command.preview, setup)
    if run_dir is not None:
        run(setup, run_dir)
    setup.accelerator.end_training()


def run(setup: Setup, run_dir: Path) -> None:
    """Train in a folder that is this training's alone, and may be asked to stop."""
    lock, timer = run_lock(run_dir), CheckpointTimer(setup.config.run)
    on_main(setup.accelerator, lambda: create_run_dir(lock, setup.config, setup.plan, setup.data.facts))
    saver = Saver(run_dir, setup.accelerator, timer, setup.config.run.keep_last)
    with StopRequest(timer.time_is_up) as request:
        train(Job(setup, run_dir, request, timer, saver))
    lock.release()


def train(job: Job) -> None:
    """Train to the plan's last step; evaluate and checkpoint at the end of every epoch."""
    config, plan, timer = job.setup.config, job.setup.plan, job.timer
    trained = prepare(job.setup)
    state = resume(job, trained)

    keeps = job.setup.features.kept and state.goes_on(plan, config.run.patience)
    feed = make_feed(job.setup.data, config, plan, trained, keeps, stop=lambda: bool(job.request.reason))
    schedule = Schedule(trained.parallel.optimizer, config.optim, config.run.epochs, plan.steps_per_epoch)
    stepper = Stepper(trained.parallel, config.augment.smoothing)

    with closing(feed.batches) as batches, Progress(job.run_dir, job.setup, feed, state) as progress, job.saver:
        stopped = False
        while not stopped and state.goes_on(plan, config.run.patience):
            flags = StepFlags()
            if not state.owes_evaluation(plan):  # a run that was stopped within one begins with it
                lr = schedule.apply(state.step)
                trained.parallel.model.train()
                with timer.step():
                    share, flags = train_step(stepper, batches(state.step), job.flags)
                if flags.refused:
                    progress.say(decline(job, trained, state, batches, flags))
                else:
                    trained.average()
                if not flags.lost:
                    progress.stepped(state, None if flags.refused else share, lr)

            stopped, saves, best = flags.stop, flags.save or timer.saves_at(state.step), False
            evaluates = state.owes_evaluation(plan) and not stopped
            with progress.paused():
                if evaluates or not flags.writing:  # an evaluation may take long, and end the run
                    job.saver.finish()
                if evaluates:
                    judgement = assess(job, trained, state, feed, progress)
                    saves, best, stopped = True, judgement is True, judgement is None
                if saves or stopped:
                    progress.sync()
                    job.saver.save(trained, state, best)

        job.saver.finish()
        conclude(job, state, stopped, progress)


if __name__ == "__main__":
    run_main(lambda: main(command))
    stop_request.ignore()
