"""The house keeps its shape: layers, module sizes, no import cycle."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

LAYERS = [
    {"peers"},
    {"errors", "policy_string", "stop_request"},
    {"config", "ordering", "durable", "page", "slurm"},
    {"command_line", "memory", "launch", "checkpoint_store", "pace"},
    {"plan", "study_file", "study_record"},
    {
        *("distributed", "models", "optim", "data", "wandb_run", "predictions", "run_folder", "train_state"),
        *("metrics", "statistics", "calibration", "label_errors", "flops", "explain"),
    },
    {
        *(
            "control",
            "whitening",
            "engine_choice",
            "parallel",
            "cost",
            "figures",
            "tracking",
            "lost_work",
            "run_record",
        ),
        *("evidence",),
    },
    {"batches", "checkpoint", "micro_batch", "wandb_report"},
    {"engine", "precision", "report", "saver", "speed", "stream_batches", "study_state"},
    {"preview", "export", "peak", "features", "study"},
    {"scoring"},
]
MODULES = sorted((ROOT / "cifar_dist").rglob("*.py"))


def layer(part):
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def imports(path):
    """Names of our own modules that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("cifar_dist"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cifar_dist"):
            yield from ([f"cifar_dist.{a.name}" for a in node.names] if node.module == "cifar_dist" else [node.module])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_layers_below(path):
    relative = path.relative_to(ROOT / "cifar_dist").with_suffix("")
    own = relative.parts[0]
    if own == "__init__":
        assert not list(imports(path))
        return
    for name in imports(path):
        other = name.split(".")[1]
        assert other == own or layer(other) < layer(own), name


@pytest.mark.parametrize("path", [*MODULES, ROOT / "train.py", ROOT / "evaluate.py"], ids=lambda path: path.name)
def test_modules_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            limit = 65 if (path.name, node.name) == ("train.py", "train") else 50  # the loop stays in view
            assert node.end_lineno - node.lineno < limit, node.name


@pytest.mark.parametrize("module", [str(p.relative_to(ROOT).with_suffix("")).replace("/", ".") for p in MODULES])
def test_no_module_is_a_drawer(module):
    assert module.split(".")[-1] not in {"utils", "helpers", "misc", "common"}


def test_training_imports_nothing_it_does_not_need():
    """Libraries that cost seconds stay out of the start of train.py."""
    late = ["matplotlib", "sklearn", "evaluate", "deepspeed", "pandas"]
    code = f"import train, sys; print([m for m in {late} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_wrong_flag_is_answered_before_the_seconds_of_importing():
    command = [sys.executable, "-X", "importtime", "train.py", "--epoch", "3"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2
    assert "unrecognized arguments: --epoch 3. Did you mean --epochs" in found.stderr
    assert " cifar_dist.config" in found.stderr and " torch" not in found.stderr and " timm" not in found.stderr
