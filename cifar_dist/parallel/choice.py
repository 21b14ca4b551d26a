"""Which engine a run needs: what each would hold, and what the one that runs brings."""

from __future__ import annotations

from cifar_dist.config import Config
from cifar_dist.errors import UsageError
from cifar_dist.memory import CONFIG_FILES, MIB, gain, refuses_average, usage
from cifar_dist.plan import Plan, Sizes, memory_load, micro_batches

_PROCESSES = (1, 2, 4, 8)
_SMALL_BYTES = 2**30  # of weights, gradients and optimizer state, which any GPU in use has to spare


def engine_lines(config: Config, sizes: Sizes) -> list[str]:
    """The table of engines, where the model is so large that it matters."""
    needs = usage("single", 1, memory_load(config, sizes))
    if needs.state >= _SMALL_BYTES:
        return engine_table(config, sizes)
    fits = f"{needs.state / MIB:,.0f} MiB of weights, gradients and optimizer state fit any GPU"
    refused = [why for count in _PROCESSES if (why := _refusal(config, count))]
    return [f"engines     no need for ZeRO or FSDP: {fits}", *refused]


def _refusal(config: Config, num_processes: int) -> str:
    """Why the batch does not go on so many processes, or nothing."""
    try:
        micro_batches(config, num_processes)
    except UsageError as error:
        return f"{num_processes} processes: {error}"
    return ""


def engine_table(config: Config, sizes: Sizes) -> list[str]:
    """What each engine would need on 1, 2, 4 and 8 processes, a line each: to choose one before queueing."""
    header = (
        "engine", "processes", "batch each", "weights", "gradients", "optimizer", "buckets", "data", "sum", "host", "",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [header]
    refused = []
    for num_processes in _PROCESSES:
        if why := _refusal(config, num_processes):
            refused.append(why)
            continue
        micro, accumulation = micro_batches(config, num_processes)
        for engine in ("single",) if num_processes == 1 else list(CONFIG_FILES)[1:]:
            if config.optim.model_ema_decay is not None and refuses_average(engine, config.run.precision):
                continue
            needs = usage(engine, num_processes, memory_load(config, sizes), accumulation > 1)
            parts = (needs.weights, needs.gradients, needs.optimizer, needs.buckets, needs.data)
            numbers = [f"{size / MIB:,.0f}" for size in (*parts, sum(parts), needs.host)]
            rows.append((engine, str(num_processes), f"{micro} x {accumulation}", *numbers, CONFIG_FILES[engine]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *middle, last in rows:
        cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells, last]).rstrip())
    return [
        "engines     MiB that each process would hold on its device (host: in main memory); activations come on top",
        *lines,
        *refused,
    ]


def zero_gain(config: Config, sizes: Sizes, plan: Plan, device_bytes: int) -> list[str]:
    """What the plan's engine brings against DDP on a device of so many bytes, as a line of the plan; see `gain`."""
    line = gain(plan.engine, plan.memory, usage("ddp", plan.num_processes, memory_load(config, sizes)), device_bytes)
    return [] if line is None else [f"gain        {line}"]
