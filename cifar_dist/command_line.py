"""The command line of train.py, generated from the configuration.

A recipe (``--config recipes/x.yaml``) is a saved command line: its keys are turned into flags and
put in front of the real command line, so argparse checks both alike and the command line wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cifar_dist.argument_types import name_or_path, path
from cifar_dist.config import Config
from cifar_dist.distributed.ending import USAGE_STATUS, leave
from cifar_dist.errors import UsageError
from cifar_dist.other_flags import suggestions


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line, said once per job.

    Attributes:
        source: what file they are about, if any.
        elsewhere: where flags belong that are not known, if that can be said of all.
    """

    source: str = ""
    elsewhere: str = ""

    def error(self, message: str) -> typing.NoReturn:
        """Leave with status 2, naming the nearest flags to one that is not known."""
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            names = [word.partition("=")[0] for word in unknown.split(" ") if re.match("--?[a-zA-Z]", word)]
            known = list(self._option_string_actions)
            is_name = re.match("[a-zA-Z./~]", unknown) and "--dataset" in known
            stray = " Data are named by --dataset, models by --model." if is_name else ""
            elsewhere = "" if all(suggestions([name], known) for name in names) else self.elsewhere
            message += f".{elsewhere or suggestions(names, known) if names else stray}"
        if message.startswith("argument --resume: invalid choice"):
            message += "; to go on in a folder: --run-dir FOLDER --resume auto"
        leave(USAGE_STATUS, f"{self.source}: {message}" if self.source else f"{message} (see --help)")


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="train.py",
        usage="train.py [--config recipes/NAME.yaml] [--FLAG VALUE ...]",
        allow_abbrev=False,
        description="Train or fine-tune an image classifier. Flags may be spelled with - or _;"
        " none switches off what a recipe sets.",
    )
    parser.add_argument(
        "--config", type=name_or_path, help="recipe: a YAML file of flags, which the command line overrides"
    )
    parser.add_argument("--plan", action="store_true", help="print what would run, and stop")
    parser.add_argument(
        "--preview-augment", metavar="FILE", type=path, help="write a PNG sheet of what the model will see, and stop"
    )
    for section in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[section.name]
        group = parser.add_argument_group(kind.__doc__)
        hints = typing.get_type_hints(kind)
        for setting in dataclasses.fields(kind):
            _add_flag(group, setting, hints[setting.name])
    return parser


def _add_flag(group: argparse._ArgumentGroup, setting: dataclasses.Field[Any], hint: Any) -> None:
    meta = setting.metadata
    shown = "" if setting.default is None else f" (default: {setting.default})"
    flag = "--" + setting.name.replace("_", "-")
    help = (meta["help"] + shown).replace("%", "%%")
    if hint is bool:
        switch = group.add_argument(flag, action=argparse.BooleanOptionalAction, default=setting.default)
        switch.help = help  # to which Python 3.10 would add the default once more
        return
    extra: dict[str, Any] = {"nargs": "+"} if meta["nargs"] else {}  # so many, or none
    if meta["choices"] is None:
        word = {0: None, 2: ("LOW", "HIGH"), 3: ("R", "G B")}[meta["nargs"]]
        extra["metavar"] = word or setting.name.upper()
    kind = name_or_path if meta["type"] is str else meta["type"]
    if setting.default is None:
        kind = str.lower if meta["choices"] else _or_none(kind)
    group.add_argument(flag, type=kind, choices=meta["choices"], default=setting.default, help=help, **extra)


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type that also takes ``none``, to switch off on the command line what a recipe sets."""
    return lambda text: None if text.lower() == "none" else kind(text)


def load_config(path: Path) -> Config:
    """Read a configuration written by `Config.as_recipe`, checked like a command line.

    Raises:
        UsageError: it is missing, damaged or has a setting that is not known.
    """
    return Config.from_flat(_parse(_recipe_argv(path), f"--config {path}"))


def _parse(argv: Sequence[str], source: str = "") -> dict[str, Any]:
    parser = _parser()
    parser.source = source
    values = vars(parser.parse_args(_without_values_of_switches(argv, parser)))
    several = _several()
    for name, value in values.items():
        if value == [None] or (value == "none" and parser.get_default(name) is None):  # among choices
            values[name] = None
        elif isinstance(value, list) and (len(value) != several[f"--{name}"] or None in value):
            parser.error(f"argument --{name}: expected {several[f'--{name}']} arguments, or none")
    return values


def _without_values_of_switches(argv: Sequence[str], parser: OneLineParser) -> Sequence[str]:
    """The command line, unless it gives a switch a value; argparse would say of that only that it is not recognized."""
    switches = {
        flag: action.option_strings[:2]
        for action in parser._actions
        if isinstance(action, argparse.BooleanOptionalAction)
        for flag in action.option_strings
    }
    for word, following in zip(argv, [*argv[1:], "--"], strict=False):
        flag, equals, value = word.partition("=")
        if flag in switches and (equals or not following.startswith("-")):
            on, off = switches[flag]
            parser.error(f"argument {flag}: a switch takes no value, got {value or following!r}; write {on} or {off}")
    return argv


def read_mapping(path: Path, source: str) -> dict[str, Any]:
    """A YAML file of ``key: value`` lines; ``-`` in its keys becomes ``_``.

    Args:
        path: the file.
        source: what to call it in errors.

    Raises:
        UsageError: it cannot be read, is no such file, or has a key twice, at any depth.
    """
    try:
        lines = path.read_text(encoding="utf-8")
        values = yaml.safe_load(lines)
        tree = yaml.compose(lines, yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        meant = f" Did you mean {path}.yaml?" if os.path.isfile(f"{path}.yaml") else ""
        raise UsageError(f"{source}: cannot be read ({_reason(error)}).{meant}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UsageError(f"{source}: not valid YAML{where}.") from None
    if not isinstance(values, dict):
        raise UsageError(f"{source}: the file is to be a list of `key: value` lines.")
    _refuse_twice(tree, source)
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _refuse_twice(node: Any, source: str) -> None:
    if isinstance(node, yaml.MappingNode):
        names = [str(key.value).replace("-", "_") for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"{source}: {twice[0]!r} is given twice; keep one.")
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        for part in child if isinstance(child, tuple) else (child,):
            _refuse_twice(part, source)


def _recipe_argv(path: Path) -> list[str]:
    """The command line that a recipe stands for; see `read_mapping` and `flags_of` for what it raises."""
    source = f"--config {path}"
    settings = read_mapping(path, source)
    if "recipes" in settings:
        command = f"python -m cifar_dist.study {shlex.quote(str(path))}"
        raise UsageError(f"{source}: this is a study of several runs; start it by: {command}")
    return flags_of(settings, source)


def flags_of(settings: dict[str, Any], source: str) -> list[str]:
    """The command line that settings from a file stand for: ``["--lr=5e-5", "--no-compile"]``.

    Args:
        settings: values by the flag's name, with ``_``; None, and what is empty, is left out.
        source: what to call the file in errors.

    Raises:
        UsageError: there is no such flag, a switch is neither true nor false, or there are several values for one.
    """
    defaults, argv = Config().flat(), []
    if unknown := [name for name in settings if name not in defaults]:
        keys = f"key{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))}"
        raise UsageError(f"{source}: unknown {keys}.{suggestions(unknown, list(defaults))}")
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value == "":
            continue
        if isinstance(value, bool) != isinstance(defaults[name], bool):
            kind = "true or false" if isinstance(defaults[name], bool) else "a value, not a switch"
            raise UsageError(f"{source}: {name} is {kind}, got {value!r}.")
        if isinstance(value, list) and flag not in _several():
            raise UsageError(f"{source}: {name} takes one value, got {value!r}.")
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            argv += [flag, *map(str, value)]
        else:
            argv.append(f"{flag}={value}")
    return argv


def _several() -> dict[str, int]:
    """Flags that take several values, and how many."""
    sections = (typing.get_type_hints(Config)[section.name] for section in dataclasses.fields(Config))
    return {
        f"--{f.name}": f.metadata["nargs"] for kind in sections for f in dataclasses.fields(kind) if f.metadata["nargs"]
    }


def _with_dashes(argument: str) -> str:
    """``--batch_size=64`` as ``--batch-size=64``; anything that is no flag is left alone."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


@dataclass(frozen=True)
class CommandLine:
    """What a command line asks for: the merged configuration, and whether only to look at what it would do.

    Attributes:
        config: the merged configuration.
        plan_only: print the plan and stop.
        preview: write a sheet of augmented images to this file and stop.
        given: settings that differ from the default on the command line itself, not in its recipe.
    """

    config: Config
    plan_only: bool
    preview: Path | None
    given: dict[str, Any]

    @property
    def trains(self) -> bool:
        """Whether the run itself is asked for."""
        return not self.plan_only and self.preview is None


def parse_command_line(argv: Sequence[str] | None = None, source: str = "") -> CommandLine:
    """Merge defaults, recipe and command line (the later wins).

    Args:
        argv: the command line; without one, this program's.
        source: what to call it in errors.

    Raises:
        UsageError: the recipe is unusable. Errors in flags leave with status 2 from argparse itself.
    """
    arguments = [_with_dashes(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    only_config = OneLineParser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config", type=name_or_path)
    recipe = only_config.parse_known_args(arguments)[0].config
    if recipe is not None:
        saved = _recipe_argv(Path(recipe))
        _parse(saved, f"--config {recipe}")  # alone first, so that its errors name the file
    else:
        saved = []
    given, values, defaults = _parse(arguments, source), _parse(saved + arguments, source), Config().flat()
    changed = {name: given[name] for name, default in defaults.items() if given[name] != default}
    return CommandLine(Config.from_flat(values), values["plan"], values["preview_augment"], changed)
