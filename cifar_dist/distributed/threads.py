"""How the threads of a process wait for each other; nothing but the standard library, as it comes before torch."""

from __future__ import annotations

import os

_SPINS = "1000"  # some microseconds


def sleep_soon() -> None:
    """Let a thread that waits for the others sleep soon, where the user has not said otherwise; before torch is loaded.

    GNU OpenMP, which torch computes with on a CPU, has it spin for milliseconds. Where others use the machine too it
    spins on the core that the thread it waits for is to run on.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS
