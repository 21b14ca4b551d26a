"""The house keeps its shape: layers, module sizes, no import cycle."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from tests.conftest import ROOT

LAYERS = [
    {
        "errors",
        "argument_types",
        "policy_string",
        "ordering",
        "memory",
        "page",
        "explain",
        "figures",
        "metrics",
        "statistics",
    },
    {"config", "durable", "distributed", "idle_flags", "other_flags", "run_log"},
    {"schedule", "contradictions"},
    {"command_line", "plan", "models", "optim", "data"},
    {"parallel", "tracking", "evaluate_arguments"},
    {"recovery"},
    {"run_folder"},
    {"training", "run_record", "study"},
    {"cost"},
    {"report"},
    {"export", "eval_spec"},
    {"scoring"},
]
MODULES = sorted((ROOT / "cifar_dist").rglob("*.py"))


def layer(part):
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def dotted(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Our own modules that a file imports, at any depth."""
    known = {dotted(module) for module in MODULES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                yield submodule if (submodule := f"{node.module}.{alias.name}") in known else node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_layers_below(path):
    own = path.relative_to(ROOT / "cifar_dist").with_suffix("").parts[0]
    if own == "__init__":
        assert not list(imports(path))
        return
    for name in imports(path):
        other = name.split(".")[1]
        assert other == own or layer(other) < layer(own), name


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter({dotted(path): set(imports(path)) for path in MODULES}).prepare()


@pytest.mark.parametrize("path", [*MODULES, ROOT / "train.py", ROOT / "evaluate.py"], ids=lambda path: path.name)
def test_modules_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, node.name


@pytest.mark.parametrize("module", [dotted(path) for path in MODULES])
def test_no_module_is_a_drawer(module):
    assert module.split(".")[-1] not in {"utils", "helpers", "misc", "common"}


def test_training_imports_nothing_it_does_not_need():
    """Libraries that cost seconds stay out of the start of train.py."""
    late = ["matplotlib", "sklearn", "evaluate", "deepspeed", "pandas"]
    code = f"import train, sys; print([m for m in {late} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train.py", "--epoch", "3"], "unrecognized arguments: --epoch 3. Did you mean --epochs"),
        (["evaluate.py", "runs/x", "--tta", "all"], "argument --tta: invalid choice: 'all'"),
    ],
    ids=["train", "evaluate"],
)
def test_a_wrong_flag_is_answered_before_the_seconds_of_importing(command, said):
    command = [sys.executable, "-X", "importtime", *command]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2
    assert said in found.stderr
    assert " cifar_dist.config" in found.stderr and " torch" not in found.stderr and " timm" not in found.stderr
