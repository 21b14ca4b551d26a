"""The exceptions that end a run in one line, and how such a line is worded."""

from __future__ import annotations

from difflib import get_close_matches


class UsageError(Exception):
    """Bad input. The message is one sentence that names the setting, its value and the cure."""


class Diverged(Exception):
    """Training produced numbers that are not finite."""


def first_line(error: BaseException) -> str:
    """What a library says, without its further lines, for the middle of a sentence; its type if it says nothing."""
    line = " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split()).rstrip(". ")
    return line if len(line) <= 300 else f"{line[:299]}…"


def did_you_mean(word: str, known: list[str]) -> str:
    """`` Did you mean a, b?`` for the known words nearest to `word`, or an empty string.

    Dashes before a flag and upper case say nothing about how near two words are.
    """
    plain_names = {plain(name): name for name in reversed(known)}
    near = get_close_matches(plain(word), plain_names, cutoff=0.65)
    return f" Did you mean {', '.join(plain_names[name] for name in near)}?" if near else ""


def plain(word: str) -> str:
    """A flag or name without dashes before it, and in lower case with underscores."""
    return word.lstrip("-").replace("-", "_").lower()
