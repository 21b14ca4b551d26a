"""The one exception that means "the user can fix this": a clear line and exit status 2."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

FAILURE_STATUS = 1
USAGE_STATUS = 2


class UsageError(Exception):
    """Bad input. The message is one sentence that names the setting, its value and the cure."""


class Diverged(Exception):
    """Training produced numbers that are not finite."""


def did_you_mean(word: str, known: list[str], count: int = 3) -> str:
    """`` Did you mean a, b?`` for the known words nearest to `word`, or an empty string."""
    near = get_close_matches(word, known, n=count, cutoff=0.6)
    return f" Did you mean {', '.join(near)}?" if near else ""


def is_first_process() -> bool:
    """Whether this process is rank 0 of its job, known before anything has started."""
    return int(os.environ.get("RANK", "0")) == 0


def leave(status: int, message: str) -> NoReturn:
    """Print one line (on the job's first process only) and exit with `status`."""
    if is_first_process():
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def run_main(main: Callable[[], None]) -> None:
    """Call `main`, turning what the user can act on into one line and an exit status, without a traceback."""
    try:
        main()
    except UsageError as error:
        leave(USAGE_STATUS, str(error))
    except Diverged as error:
        leave(FAILURE_STATUS, f"{error} Checkpoints are from before that.")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        leave(
            USAGE_STATUS,
            f"no room left on the disk{where}; free some and start again (train.py goes on with --resume auto).",
        )
    except KeyboardInterrupt:
        leave(FAILURE_STATUS, "interrupted (train.py goes on from its last checkpoint with --resume auto).")
