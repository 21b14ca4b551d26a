"""What README and docs/ say is there: files, headings, flags and commands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_dist.command_line import parse_command_line
from cifar_dist.evaluate_arguments import parse_arguments
from tests.conftest import ROOT

FOR_USERS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*FOR_USERS, ROOT / "CONTRIBUTING.md", *(ROOT / "slurm").glob("*.md"), *(ROOT / "recipes").glob("*.md")]
PAGES += sorted((ROOT / "benchmarks" / "results").rglob("*.md"))
OTHERS = {  # flags of launchers and of W&B
    "--num_processes", "--machine_rank", "--main_process_ip", "--main_process_port", "--rdzv_conf", "--cpu",
}  # fmt: skip


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for place, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
        if not place.startswith("http"):
            found = (page.parent / place).resolve() if place else page
            assert found.exists(), place
            assert not anchor or anchor in anchors(found), f"{place}#{anchor}"


def commands(program: str) -> list[list[str]]:
    """What follows the program's name in the examples that leave nothing to be filled in."""
    text = "\n".join(page.read_text() for page in FOR_USERS)
    examples = re.findall(
        rf"^    (?:python|accelerate|torchrun) .*?{re.escape(program)} ([^#…\n]*)(?:#.*)?$", text, re.M
    )
    return [shlex.split(words) for words in examples]


def test_examples_are_command_lines(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(commands("train.py")) > 4 and len(commands("evaluate.py")) > 2
    for arguments in commands("train.py"):
        parse_command_line(arguments)
    for arguments in commands("evaluate.py"):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        parse_arguments()


def test_flags_that_are_named_exist():
    programs = (["train.py"], ["evaluate.py"], ["-m", "cifar_dist.study"])
    helps = [
        subprocess.run(
            [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for program in programs
    ]
    known = set(re.findall(r"--[\w-]+", " ".join(helps))) | OTHERS
    for page in FOR_USERS:
        named = {
            word
            for code in re.findall(r"`([^`]+)`", page.read_text())
            for word in re.findall(r"--[\w-]*\w(?![\w-])", code)
        }
        assert named <= known, page
