"""`import evaluate` means the Hugging Face library, however Python was started, though ./evaluate.py is in the way."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest

from tests.conftest import ROOT

PROBE = "import json, evaluate; print(json.dumps([evaluate.__name__, evaluate.__version__, hasattr(evaluate, 'load')]))"
TEST = "def test_probe(capsys):\n    import evaluate\n    with capsys.disabled():\n        {probe}\n"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each way of starting Python printed; all run side by side."""
    folder = tmp_path_factory.mktemp("probe")
    (folder / "transformers.py").write_text("raise ImportError")  # the library does without, and starts sooner
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    beside_script = folder / "beside.py"  # as train.py, whose folder, the root, is first on the path
    beside_script.write_text(f"import sys; sys.path[0] = {str(ROOT)!r}; {PROBE}\n")
    test = folder / "test_probe.py"
    test.write_text(TEST.format(probe=PROBE))
    python = [sys.executable]
    torch_run = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    accelerate = [*python, "-m", "accelerate.commands.launch", "--num_processes", "1", "--main_process_port", "0"]
    commands = {
        "python -c": [*python, "-c", PROBE],
        "python script": [*python, str(beside_script)],
        "python -m pytest": [*python, "-m", "pytest", "-p", "no:cacheprovider", "-c", "/dev/null", str(test)],
        "torchrun": [*torch_run, str(beside_script)],
        "accelerate launch": [
            *accelerate,
            "--cpu",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            str(beside_script),
        ],
        "python evaluate.py": [*python, "evaluate.py", "--help"],
    }
    started = {
        name: subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name, command in commands.items()
    }
    return {name: (*process.communicate(timeout=300), process.returncode) for name, process in started.items()}


@pytest.mark.parametrize("start", ["python -c", "python script", "python -m pytest", "torchrun", "accelerate launch"])
def test_every_launcher_gets_the_library(outputs, start):
    out, err, status = outputs[start]
    assert status == 0, err
    found = next(json.loads(line[line.index("[") :]) for line in out.splitlines() if '"evaluate"' in line)
    assert found == ["evaluate", version("evaluate"), True]


def test_the_script_itself_still_runs(outputs):
    out, err, status = outputs["python evaluate.py"]
    assert status == 0, err
    assert "RUN_DIR" in out and "--checkpoint" in out


def test_this_very_process_has_the_library():
    import evaluate

    assert evaluate.__version__ == version("evaluate")
    assert str(ROOT / "evaluate.py") != evaluate.__file__


def test_a_second_checkout_on_the_path_is_not_taken_for_the_library(tmp_path):
    shutil.copy(ROOT / "evaluate.py", tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert json.loads(found.stdout) == ["evaluate", version("evaluate"), True]
