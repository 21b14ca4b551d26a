"""Several real processes within a test: forked, each with a rank of its own, joined over gloo."""

import gc
import importlib
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

from tests.conftest import ROOT


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# What each forked process would import for itself, which takes it longer than its few steps.
NEEDED = ["datasets", "sklearn.datasets"]
NEEDED_BY_ZERO = ["deepspeed.runtime.zero.muon.muon_optimizer", "transformers.integrations", "setuptools"]


def _import_once(engine):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in NEEDED + (NEEDED_BY_ZERO if engine.startswith("zero") else []):
            importlib.import_module(name)


def _rank(work, rank, count, port, engine, folder):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    if engine.startswith("zero"):
        os.environ.update(
            ACCELERATE_USE_DEEPSPEED="true",
            ACCELERATE_DEEPSPEED_CONFIG_FILE=str(ROOT / "ds_configs" / f"{engine}.json"),
            ACCELERATE_DEEPSPEED_ZERO3_INIT="false",
        )
    gc.freeze()  # what the test's process holds is shared with it, and would be copied by looking it through
    warnings.simplefilter("ignore")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with (folder / f"said-{rank}").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    status, result = 0, None
    try:
        result = work()
    except SystemExit as leaving:
        status = leaving.code
    except BaseException:
        traceback.print_exc()
        status = 1
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


class Ranks:
    """What the processes did.

    Attributes:
        statuses: exit status of each.
        results: what `work` returned in each.
        said: what each printed.
    """

    def __init__(self, work, count, engine="ddp", seconds=300):
        _import_once(engine)
        with tempfile.TemporaryDirectory() as name:
            folder, port, fork = Path(name), free_port(), multiprocessing.get_context("fork")
            processes = [fork.Process(target=_rank, args=(work, r, count, port, engine, folder)) for r in range(count)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(seconds)
                if process.is_alive():
                    process.kill()
                    process.join()
            self.statuses = [process.exitcode for process in processes]
            self.said = [(folder / f"said-{rank}").read_text() for rank in range(count)]
            found = [folder / f"result-{rank}" for rank in range(count)]
            self.results = [pickle.loads(path.read_bytes()) if path.exists() else None for path in found]

    def check(self):
        """Fail with everything said unless all ended well."""
        assert not any(self.statuses), "\n".join(f"--- rank {r}\n{said}" for r, said in enumerate(self.said))
        return self
