"""A model of one's own, added as docs/settings.md says."""

import os
import shutil
import subprocess
import sys

from tests.conftest import ROOT


def test_a_copied_model_trains_is_reported_and_exported(tmp_path):
    for name in ("train.py", "evaluate.py", "cifar_dist"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    models = tmp_path / "cifar_dist" / "models"
    text = (models / "cnn4.py").read_text()
    (models / "mynet.py").write_text(text.replace("cnn4", "mynet").replace("Cnn4", "MyNet").replace("32, 64", "8, 16"))
    names = (models / "names.py").read_text()
    (models / "names.py").write_text(
        names.replace("import airbench, cifar_variants, cnn4,", "import airbench, mynet, cifar_variants, cnn4,")
    )

    def run(*words):
        command = [sys.executable, *map(str, words)]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    train = run("train.py", "--dataset", "digits", "--model", "mynet", "--max-steps", 2, "--run-dir", "run")
    assert train.returncode == 0, train.stderr
    scored = run("evaluate.py", "run", "--export", "exported")
    assert scored.returncode == 0, scored.stderr
    load = (
        "import timm, torch, cifar_dist.models;"
        "print(timm.create_model('local-dir:exported', pretrained=True)(torch.zeros(1, 3, 32, 32)).shape[1])"
    )
    loaded = run("-c", load)
    assert loaded.stdout == "10\n", loaded.stderr
