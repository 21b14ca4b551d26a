"""A private SLURM cluster on this machine: munged, slurmctld and several slurmd in one folder, ended by process id."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")

CONF = """\
ClusterName=private
SlurmctldHost={host}
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CryptoType=crypto/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={node_timeout}
SlurmctldTimeout=10
InactiveLimit=0
KillWait={kill_wait}
MinJobAge=3600
MaxArraySize=1000
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=usual Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} State=UP
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> list[str]:
    """What this machine lacks for such a cluster; programs, or the rights to start them."""
    lacks = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    return lacks + ([] if os.geteuid() == 0 else ["root"])


def search_path() -> str:
    """``PATH`` with the folders where daemons are."""
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


class Cluster:
    """Three nodes (n1, n2, n3) of `cpus` processors and two GPUs that are none, under `folder`.

    Args:
        folder: empty; holds configuration, logs, state and sockets. Its path must be short (a socket's name is).
        kill_wait: seconds from SIGTERM to SIGKILL.
        grace: seconds from a preemption's SIGTERM to SIGKILL.
        node_timeout: seconds until a node that is silent counts as down.
    """

    def __init__(self, folder: Path, *, cpus: int = 2, kill_wait: int = 20, grace: int = 20, node_timeout: int = 10):
        self.folder = folder
        self.nodes = ("n1", "n2", "n3")
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        host, ports = socket.gethostname().split(".")[0], free_ports(4)
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Gres=gpu:2"
            for name, port in zip(self.nodes, ports[1:], strict=True)
        ]
        values = {"kill_wait": kill_wait, "grace": grace, "node_timeout": node_timeout, "nodes": "\n".join(lines)}
        text = CONF.format(host=f"{host}(127.0.0.1)", port=ports[0], folder=folder, user="root", **values)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        for gpu in ("gpu0", "gpu1"):
            (folder / gpu).touch()
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (folder / name).mkdir()
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": search_path()}

    def __enter__(self) -> Cluster:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        named = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        files = [f"--{name}={self.folder / file}" for name, file in named.items()]
        try:
            self._daemon("munged", ["munged", "--foreground", "--force", *files])
            self.wait_for("munged to answer", lambda: (self.folder / "munge.sock").exists())
            self._daemon("slurmctld", ["slurmctld", "-D", "-c"])
            for node in self.nodes:
                self.start_node(node)
            self.wait_for("nodes to come up", lambda: self.query("sinfo", "-h", "-o", "%D %t") == "3 idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for job in self.query("squeue", "-h", "-o", "%A").split():
            self.query("scontrol", "update", f"JobId={job}", "Requeue=0")
            self.query("scancel", "--full", job)
        deadline = time.monotonic() + 15
        while self.query("squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.2)
        for name in ("slurmctld", *self.nodes, "munged"):
            if name in self._daemons:
                self.stop(name)

    def _daemon(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._daemon(node, ["slurmd", "-D", "-N", node])

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """End one daemon: a node's name, slurmctld or munged."""
        daemon = self._daemons.pop(name)
        daemon.send_signal(number)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def pause(self, node: str) -> subprocess.Popen[bytes]:
        """Stop a node's daemon without ending it, as a machine that hangs; it goes on with SIGCONT."""
        self._daemons[node].send_signal(signal.SIGSTOP)
        return self._daemons[node]

    def crash(self, node: str) -> None:
        """Kill a node's daemons and all they run, as a machine does that loses power: who could tell goes first."""
        self.stop(node, signal.SIGKILL)
        running = self.processes(node)
        daemons = {parent for process in running for parent in process.parents() if parent.name() == "slurmstepd"}
        for process in [*daemons, *running]:
            with suppress(psutil.Error):
                process.kill()

    def processes(self, node: str, job: int | None = None) -> list[psutil.Process]:
        """What jobs, or one of them, run on a node."""
        ours = {"SLURM_CONF": str(self.folder / "slurm.conf"), "SLURMD_NODENAME": node}
        ours |= {} if job is None else {"SLURM_JOB_ID": str(job)}
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if ours.items() <= process.environ().items():
                    found.append(process)
        return found

    def query(self, *command: str) -> str:
        """A SLURM command's output, stripped; empty where it failed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def submit(self, *arguments: str, folder: Path, **variables: str) -> int:
        """Queue a job by ``sbatch`` from `folder`; its id.

        Raises:
            AssertionError: it was refused.
        """
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            env=self.environment | variables,
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout.strip())

    def job(self, job: int | str) -> dict[str, str]:
        """What ``scontrol show job`` says of a job, by field."""
        return dict(re.findall(r"(\w+)=(\S*)", self.query("scontrol", "show", "job", str(job))))

    def state(self, job: int | str) -> str:
        """A job's state, e.g. RUNNING."""
        return self.job(job).get("JobState", "UNKNOWN")

    def wait(self, job: int | str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Wait until a job is in one of `states`."""
        self.wait_for(f"job {job} to be {' or '.join(states)}", lambda: self.state(job) in states, seconds)
        return self.job(job)

    def wait_for(self, what: str, is_so: Callable[[], bool], seconds: float = 30) -> None:
        """Wait until something is so.

        Raises:
            TimeoutError: it is not within the time; with the queue and the ends of all daemons' logs.
        """
        deadline = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > deadline:
                logs = "".join(f"\n--- {log.name}\n{log.read_text()[-1500:]}" for log in self.folder.glob("*.log"))
                raise TimeoutError(f"waited {seconds} s for {what}\n{self.query('squeue')}{logs}")
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
