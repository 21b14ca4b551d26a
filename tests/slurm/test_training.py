"""Real trainings on a real cluster: interrupted in every way SLURM knows, they end as if nobody had touched them."""

import json
import random
import re
import subprocess
import sys

import pytest

from benchmarks.recovery import slurm_cycles
from benchmarks.recovery.common import FLAGS, begin, final_digest, reference
from benchmarks.recovery.slurm_cluster import Cluster, missing
from tests.conftest import ROOT

EPOCHS = "--epochs=24"
pytestmark = pytest.mark.skipif(bool(missing()), reason=f"a SLURM cluster needs {', '.join(missing())}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("c")) as cluster:
        yield cluster


def test_an_interrupted_job_on_two_nodes_ends_like_two_processes_that_nobody_touched(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # `begin` sets one
    begin(tmp_path)
    digest, _ = reference(tmp_path, 2, [*FLAGS, EPOCHS])
    job = slurm_cycles.train_job(cluster, tmp_path, "cut", EPOCHS)
    for cause in ("rank killed", "preempted", "told", "node lost"):
        assert not slurm_cycles.cycle(cluster, job, tmp_path / "cut", cause, random.Random(0))
    said = (tmp_path / f"slurm-{job}.out").read_text()
    assert "a process was ended by signal" in said
    assert "stopped by SIGTERM" in said
    assert "stopped by SIGUSR1" in said
    assert "DUE TO NODE FAILURE" in said
    assert cluster.wait(job, *slurm_cycles.ENDED, seconds=180)["JobState"] == "COMPLETED"
    assert final_digest(tmp_path / "cut") == digest


STUDY = """
name: two
recipes: [quick.yaml]
grid: {seed: [0, 1]}
"""
RECIPE = "{dataset: digits, model: cnn4, epochs: 1, batch_size: 128, wandb: disabled}"


def test_a_study_is_an_array_and_then_its_comparison(cluster, tmp_path):
    for part in ("train.py", "evaluate.py", "cifar_dist", "slurm"):
        (tmp_path / part).symlink_to(ROOT / part)
    (tmp_path / "two.yaml").write_text(STUDY)
    (tmp_path / "quick.yaml").write_text(RECIPE)
    environment = cluster.environment | {"VENV": sys.prefix, "NETWORK": "no", "OMP_NUM_THREADS": "1"}

    def study():
        line = ["bash", "slurm/study.sh", "--cpus-per-task=1", "--hold", "two.yaml", "--", "--lr", "2e-3"]
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)

    def submit():
        """What the script says, and the number of the job that it has submitted last: the report."""
        done = study()
        assert done.returncode == 0, done.stderr
        return done.stdout, int(re.findall(r"Submitted batch job (\d+)", done.stdout)[-1])

    said, report = submit()
    array = re.search(r"job (\d+) is the array", said)[1]
    again = study()  # while the array is queued
    assert (again.returncode, "two.yaml is queued or runs already" in again.stderr) == (2, True), again.stderr
    cluster.query("scontrol", "release", array)
    cluster.query("scontrol", "release", str(report))
    assert cluster.wait(report, *slurm_cycles.ENDED, seconds=300)["JobState"] == "COMPLETED"
    assert sorted(path.name for path in tmp_path.glob("slurm-*_*.out")) == [
        f"slurm-{array}_{task}.out" for task in (0, 1)
    ]
    for seed in (0, 1):
        run = tmp_path / f"runs/two/quick_seed{seed}"
        config = (run / "config.yaml").read_text()
        assert f"seed: {seed}" in config
        assert "lr: 0.002" in config
        assert json.loads((run / "report/metrics.json").read_text())["num_samples"] == 359
    assert (tmp_path / "runs/two/comparison/comparison.html").is_file()

    said, report = submit()  # all is finished: the report alone
    assert "array" not in said
    cluster.query("scancel", str(report))
