"""How a program ends: what the user can mend in a clear line and exit status 2, anything else with its traceback.

Of several processes the first that fails speaks: once a process group exists it is the first of the job to claim that
in the group's store, before that the first process of each node.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import NoReturn, TypeVar

from cifar_dist.distributed import peers
from cifar_dist.errors import Diverged, UsageError

FAILURE_FILE = "CIFAR_DIST_FAILURE_FILE"  # variable: where a job script looks for why a process failed
FAILURE_STATUS = 1
GRACE_SECONDS = 5.0  # for the others, once one process has failed
LOST_STATUS = 75  # other processes were lost, by no fault of this one: worth a new start (EX_TEMPFAIL of sysexits.h)
USAGE_STATUS = 2
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)  # of a path
T = TypeVar("T")
STARTED_TOGETHER = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def is_first_process() -> bool:
    """Whether this process is rank 0 of its job, known before anything has started."""
    rank = os.environ.get("RANK", "0")
    return not rank.isdecimal() or int(rank) == 0


def _group_rank() -> int | None:
    """This process's rank among several that have met, or None."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.get_rank() if distributed.get_world_size() > 1 else None


def _is_first_to_fail() -> bool:
    """Whether no process of the group has failed before this one."""
    from torch.distributed import distributed_c10d

    try:
        # Ask first whether the store is there: torch prints pages when it is not.
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=5).close()
        store = distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=5))
        return store.add("cifar_dist/failures", 1) == 1
    except (OSError, RuntimeError, ValueError):
        return False  # rank 0, which held the store, has gone before


def _local_rank() -> int:
    """This process's place among those that its node's launcher started together; 0 if it was started by hand."""
    ranks = [os.environ[name] for name in LOCAL_RANKS if name in os.environ]
    together = any(name in os.environ for name in STARTED_TOGETHER)
    return int(ranks[0]) if together and ranks and ranks[0].isdecimal() else 0


def _speaks() -> bool:
    """Whether an error of this process is the one to print."""
    return _local_rank() == 0 if _group_rank() is None else _is_first_to_fail()


def leave(status: int, message: str) -> NoReturn:
    """Print one line, on the process that speaks for its job or its node, and exit with `status`."""
    spoke = _speaks()
    _note_failure(message)
    if spoke:
        _print(f"error: {message}")
    _exit(status, spoke)


def _exit(status: int, first: bool = False) -> NoReturn:
    """Leave at once from a group: taking its threads down in order can hang or abort when others have gone.

    The first to fail sees to it that none is left behind.
    """
    rank = _group_rank()
    if rank is None:
        sys.exit(status)
    if rank == 0:
        time.sleep(0.5)  # it may hold the store that the others ask who failed first
    if first:
        peers.end_those_left(GRACE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _print(message: str) -> None:
    sys.stdout.flush()
    # One write, so that lines of several processes do not mix.
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    sys.stderr.write(f"{name}: {_who()}{message}\n")
    sys.stderr.flush()


def _who() -> str:
    """``rank 1: `` among several processes."""
    rank, local_rank = _group_rank(), _local_rank()
    return f"rank {rank}: " if rank is not None else f"local rank {local_rank}: " if local_rank else ""


def _note_failure(message: str) -> None:
    """Leave a failure's reason to the job script that waits for it: it cannot tell from the exit status whether a
    process failed or was ended with another, and only the latter is worth a new start."""
    if path := os.environ.get(FAILURE_FILE):
        with suppress(OSError):
            Path(path).write_text(f"{_who()}{message}\n", encoding="utf-8")


def _is_from_others(error: Exception) -> bool:
    """Whether an error is of the connection to other processes, as when one of them was killed."""
    of_torch = getattr(sys.modules.get("torch"), "distributed", None)
    return bool(of_torch and isinstance(error, of_torch.DistError)) or "gloo" in str(error).partition("]")[0]


def run_main(main: Callable[[], T]) -> T:
    """Call `main`, turning what the user can act on into one line and an exit status, without a traceback.

    Any other exception keeps its traceback on the first process that fails; the others, which mostly fail because that
    one has gone, say so in a line.
    """
    with suppress(AttributeError):  # a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # what an old locale lacks
    try:
        return main()
    except SystemExit as error:
        if _group_rank() is not None and error.code:
            _exit(error.code if isinstance(error.code, int) else FAILURE_STATUS)
        raise
    except UsageError as error:
        leave(USAGE_STATUS, str(error))
    except Diverged as error:
        leave(FAILURE_STATUS, f"{error} Checkpoints are from before that.")
    except KeyboardInterrupt:
        leave(FAILURE_STATUS, "interrupted (train.py goes on from its last checkpoint with --resume auto).")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else leaving would write to it once more
        leave(
            FAILURE_STATUS,
            "what read the output has gone (train.py goes on from its last checkpoint with --resume auto).",
        )
    except Exception as error:
        if isinstance(error, OSError) and (line := _mendable(error)):
            leave(USAGE_STATUS, line)
        if _group_rank() is None and _local_rank() == 0:
            _note_failure(f"failed: {type(error).__name__}: {_first_words(error)}")
            raise
        _crash(error)


def _mendable(error: OSError) -> str:
    """What to say of a full disk, or of a path that cannot be used; nothing of others, as of the system's files."""
    paths = [f"{path:.200}" for path in (error.filename, error.filename2) if isinstance(path, str)]
    where = " -> ".join(paths)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        there = f" ({where})" if where else ""
        return f"no room left on the disk{there}; free some and start again (train.py goes on with --resume auto)."
    if error.errno in UNUSABLE and where and not where.startswith(("/dev/", "/proc/")):
        cure = "get access to it, or name another (train.py goes on with --resume auto)"
        return f"{_flag_of(paths[0])}{where} cannot be used ({error.strerror}); {cure}."
    return ""


def _flag_of(path: str) -> str:
    """``--init-weights: ``, or what flag else of this command line names a path or a folder above it; or nothing."""
    words = [part for word in sys.argv[1:] for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for flag, value in pairwise(words):
        named = os.path.abspath(os.path.expanduser(value))
        if flag.startswith("--") and value and f"{os.path.abspath(path)}/".startswith(f"{named}/"):
            return f"{flag}: "
    return ""


def _crash(error: Exception) -> NoReturn:
    """End one of several processes: with its traceback if it is the first that fails, else in a line."""
    if isinstance(error, RuntimeError) and _group_rank() is not None:
        time.sleep(0.5)  # if it comes from another process's end, let that come to an end
    spoke, absent = _speaks(), peers.absent()
    lost, at = bool(absent) or _is_from_others(error), f" in {peers.place}" if peers.place else ""
    what = f"{type(error).__name__}{at}: {_first_words(error)}"
    if not lost:
        _note_failure(f"failed: {what}")
    if spoke:
        sys.excepthook(type(error), error, error.__traceback__)  # torch's, which names the rank in every line
        _print(f"{absent}; so {what}" if absent else f"failed: {what}")
    else:
        time.sleep(0.3)  # the first one's words come first
        _print(f"ended too ({type(error).__name__}: {_first_words(error)})")
    _exit(LOST_STATUS if lost else FAILURE_STATUS, spoke)


def _first_words(error: Exception) -> str:
    """Without gloo's source file and advice, in one line."""
    reason = re.sub(r"^\[[^]]*\] ", "", str(error).partition(". ")[0])
    return f"{reason:.120}".replace("\n", " ")
