"""A study: the runs that a YAML file of recipes, and a grid of settings over them, stands for."""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_dist.command_line import flags_of, parse_command_line, read_mapping
from cifar_dist.config import Config
from cifar_dist.errors import UsageError, did_you_mean

KEYS = ("name", "runs_dir", "recipes", "grid", "common")
_NAME = re.compile(r"[\w.+-]+")
_THE_STUDYS_OWN = ("run_dir", "resume")


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        name: that of its folder.
        folder: ``RUNS_DIR/NAME``.
        arguments: for train.py, with ``--config``, ``--run-dir`` and ``--resume auto``.
        config: what train.py makes of them.
    """

    name: str
    folder: Path
    arguments: tuple[str, ...]
    config: Config


@dataclass(frozen=True)
class Study:
    """A study file, expanded.

    Attributes:
        path: the file.
        name: the study's.
        runs_dir: the folder of its runs' folders.
        further: arguments that were given for every run besides.
        runs: in the order of its recipes, and of the grid's values for each, the last key's the fastest.
    """

    path: Path
    name: str
    runs_dir: Path
    further: tuple[str, ...]
    runs: tuple[StudyRun, ...]


def load_study(path: Path, further: Sequence[str] = ()) -> Study:
    """Read a study file and check each of its runs with train.py's own parser.

    Its keys: ``recipes``, a list of files relative to it, or of ``{recipe: FILE, name: NAME, FLAG: value}``, without a
    file with a ``model``; ``grid``, flags with lists of values, whose product is run for every one of them; ``common``,
    flags of all runs; ``name`` and ``runs_dir`` (default: ``runs/NAME``). A recipe's own settings give way to
    ``common``, those to its entry's and the grid's, and all to `further`.

    Args:
        path: the file.
        further: arguments for every run.

    Raises:
        UsageError: the file or a recipe is unusable, or two runs have one name. Values that train.py's parser refuses
            leave with status 2 from there.
    """
    source = f"study {path}"
    values = read_mapping(path, source)
    if "recipes" not in values and values.keys() & Config().flat().keys():
        raise UsageError(f"{source}: this is a recipe; start it by: python train.py --config {shlex.quote(str(path))}")
    for key in values:
        if key not in KEYS:
            raise UsageError(f"{source}: unknown key {key!r}.{did_you_mean(key, list(KEYS))}")
    name = _checked_name(values.get("name", path.stem), "name", source)
    runs_dir = Path(os.path.expanduser(str(values.get("runs_dir") or Path("runs") / name)))
    if (runs_dir / "config.yaml").exists() and (runs_dir / "checkpoints").is_dir():
        raise UsageError(f"{source}: runs_dir {runs_dir} is the folder of a run; name one for the folders of runs.")
    entries = values.get("recipes")
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{source}: recipes is to be a list of recipe files, relative to the study's.")
    common = _settings(values.get("common"), "common", source)
    cells = _cells(_settings(values.get("grid"), "grid", source), source)
    if twice := [key for key in cells[0] if key in common]:
        raise UsageError(f"{source}: {twice[0]} is in grid and in common; keep one.")
    runs: dict[str, StudyRun] = {}
    for entry in entries:
        recipe, stem, own = _entry(entry, path, source)
        if twice := [key for key in cells[0] if key in own]:
            raise UsageError(f"{source}: {twice[0]} is in grid and in the entry of {stem}; keep one.")
        for cell in cells:
            label = "_".join([stem, *(_label(key, value) for key, value in cell.items())])
            flags = _flags(common | own | cell, f"{source}, run {label}")
            run = _run(runs_dir / label, [*recipe, *flags], further, source)
            _refuse_same_name(runs.get(label), run, source)
            runs[label] = run
    return Study(path, name, runs_dir, tuple(further), tuple(runs.values()))


def _settings(value: Any, key: str, source: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{source}: {key} is to be a list of `flag: value` lines, got {value!r}.")
    return {str(name).replace("-", "_"): item for name, item in value.items()}


def _entry(entry: Any, path: Path, source: str) -> tuple[list[str], str, dict[str, Any]]:
    """The flag of a recipe's file, if there is one, the stem of its runs' names, and the entry's own settings."""
    own = {"recipe": entry} if isinstance(entry, str) else _settings(entry, "an entry of recipes", source)
    recipe, name = own.pop("recipe", None), own.pop("name", None)
    if not isinstance(recipe, str):
        if recipe is not None or "model" not in own:
            ways = "a file, {recipe: FILE, …} or {model: MODEL, …}"
            raise UsageError(f"{source}: an entry of recipes is to be {ways}, got {entry!r}.")
        return [], _checked_name(name or own["model"], "an entry's name", source), own
    file = os.path.normpath(path.parent / os.path.expanduser(recipe))
    return ["--config", file], _checked_name(name or Path(file).stem, "an entry's name", source), own


def _checked_name(name: Any, what: str, source: str) -> str:
    if not _NAME.fullmatch(str(name)) or str(name).strip(".") == "":
        raise UsageError(f"{source}: {what} becomes that of a folder; take letters, digits and -_+. for {name!r}.")
    return str(name)


def _cells(grid: dict[str, Any], source: str) -> list[dict[str, Any]]:
    """The product of the grid's values; without a grid one cell without settings."""
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UsageError(f"{source}: grid takes a list of values for {key}, got {values!r}.")
        labels = [_label(key, value) for value in values]
        if twice := [label for label in labels if labels.count(label) > 1]:
            alike = " and ".join(repr(v) for v, label in zip(values, labels, strict=True) if label == twice[0])
            raise UsageError(
                f"{source}: {key} in grid has {alike}, whose runs would both be called …{twice[0]}; keep one, or make"
                " them entries of recipes with a name each."
            )
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _label(key: str, value: Any) -> str:
    """A setting as part of a name: ``lr5e-5``, ``seed0``, ``no-sync-bn``."""
    flag = key.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else f"no-{flag}"
    values = value if isinstance(value, list) else [value]
    return flag + "-".join(re.sub(r"[^\w.+-]+", "-", _short(item)) for item in values)


def _short(value: Any) -> str:
    """A small number in its shortest spelling, however the file has it: 5e-5, 0.1; another value as it is."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return "none" if value is None else str(value)
    if not math.isfinite(number) or abs(number) >= 1:
        return str(value)
    mantissa, exponent = f"{number:.5e}".split("e")
    return min(f"{number:.6g}", f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}", key=len)


def _flags(settings: dict[str, Any], source: str) -> list[str]:
    if own := [key for key in _THE_STUDYS_OWN if key in settings]:
        raise UsageError(f"{source}: the study gives --{own[0].replace('_', '-')} itself; leave it out.")
    return flags_of({key: "none" if value is None else value for key, value in settings.items()}, source)


def _run(folder: Path, flags: Sequence[str], further: Sequence[str], source: str) -> StudyRun:
    """A run, checked by train.py's parser."""
    arguments = [*flags, "--run-dir", str(folder), "--resume", "auto", *further]
    source += f", run {folder.name}"
    command = parse_command_line(arguments, source)
    if (command.config.run.run_dir, command.config.run.resume) != (str(folder), "auto"):
        raise UsageError(f"{source}: the study gives --run-dir and --resume itself; leave them out after --.")
    if not command.trains or any(word.partition("=")[0] == "--config" for word in further):
        raise UsageError(f"{source}: --config, --plan and --preview-augment are for a single run; leave them out.")
    if command.config.run.precision == "auto":
        raise UsageError(
            f"{source}: --precision auto may choose otherwise for each run, which a comparison would show as a setting;"
            " name fp32 or bf16."
        )
    return StudyRun(folder.name, folder, tuple(arguments), command.config)


def _refuse_same_name(other: StudyRun | None, run: StudyRun, source: str) -> None:
    if run.name.partition("-")[0] == "comparison":  # where evaluate.py puts it
        raise UsageError(f"{source}: a run cannot be called {run.name}; that is a comparison's. Give it another name.")
    if other is not None:
        raise UsageError(
            f"{source}: two entries of recipes make a run called {run.name}; give one a name: {{recipe: FILE, name:"
            " ANOTHER}."
        )
