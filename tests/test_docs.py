"""What README and docs/ say is there: files, headings, flags and commands."""

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cifar_dist.command_line import parse_command_line
from cifar_dist.evaluate_arguments import parse_arguments
from cifar_dist.study.file import load_study
from tests.conftest import ROOT

FOR_USERS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*FOR_USERS, ROOT / "CONTRIBUTING.md", *(ROOT / "slurm").glob("*.md"), *(ROOT / "recipes").glob("*.md")]
PAGES += sorted((ROOT / "benchmarks" / "results").rglob("*.md"))
OTHERS = {  # flags of launchers and of the Hub's client
    "--num_processes", "--machine_rank", "--main_process_ip", "--main_process_port", "--rdzv_conf", "--cpu",
    "--repo-type", "--local-dir",
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
        rf"^    (?:python|accelerate|torchrun) [^#\n]*?{re.escape(program)} ([^#…\n]*)(?:#.*)?$", text, re.M
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


def test_the_study_of_the_docs_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "studies.md").read_text()
    example = re.search(r"^    recipes:.*?\n\n", text, re.M | re.S)[0].replace("recipes/demo", f"{ROOT}/recipes/demo")
    (tmp_path / "mine.yaml").write_text(textwrap.dedent(example))
    runs = load_study(tmp_path / "mine.yaml").runs
    assert [run.name for run in runs] == [f"{name}_seed{n}" for name in ("cnn4", "resnet18", "vit") for n in (0, 1)]
    assert {run.config.run.epochs for run in runs} == {5} and {run.config.data.dataset for run in runs} == {"digits"}


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
