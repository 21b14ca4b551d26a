"""Weights & Biases: online only where there is a key, one run per folder, and never in the way of what it copies."""

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from cifar_dist.command_line import parse_command_line
from cifar_dist.config import Config
from cifar_dist.errors import UsageError
from cifar_dist.page import Table
from cifar_dist.tracking import wandb_run
from cifar_dist.tracking.wandb_run import Mirror, log_report, wandb_mode
from tests.conftest import ROOT


def config(mode):
    return dataclasses.replace(Config(), run=dataclasses.replace(Config().run, wandb=mode))


@pytest.fixture
def login(monkeypatch):
    """Make W&B's login succeed, find no key (False) or fail (None)."""
    import wandb

    def set_to(outcome):
        def answer(prompt, verify):
            assert not verify  # a server without network would be waited for
            if isinstance(outcome, Exception):
                raise outcome
            if outcome is None:
                raise wandb.Error("the server is away")
            return outcome

        monkeypatch.setattr(wandb, "login", answer)

    monkeypatch.delenv("WANDB_MODE")
    return set_to


@pytest.mark.parametrize(
    "outcome, mode", [(True, "online"), (False, "offline"), (None, "offline"), (OSError(), "offline")]
)
def test_the_default_is_online_only_where_there_is_a_key(login, outcome, mode):
    login(outcome)
    assert wandb_mode(config(None)) == mode


@pytest.mark.parametrize("outcome, said", [(False, "no API key is configured"), (None, "the server is away")])
def test_online_without_a_key_is_refused(login, outcome, said):
    login(outcome)
    with pytest.raises(UsageError, match=f"--wandb online: {said}"):
        wandb_mode(config("online"))


def test_a_mode_that_w_and_b_does_not_have_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "of-line")
    with pytest.raises(UsageError, match="WANDB_MODE of-line: no such mode; take online, offline or disabled"):
        wandb_mode(config(None))


def test_a_login_that_breaks_keeps_even_online_runs_offline(login):
    login(RuntimeError("out of order"))
    assert wandb_mode(config("online")) == "offline"


def test_offline_starts_and_the_report_are_one_run(tmp_path, capsys):
    from PIL import Image

    picture = tmp_path / "p.png"
    Image.new("RGB", (4, 4)).save(picture)
    mirror = Mirror(tmp_path, config("offline"))
    mirror.log({"train/loss": 1.0}, step=5)
    line = f"wandb       kept offline; wandb sync {tmp_path}/wandb/offline-run-* sends it"
    assert mirror.close() == line
    identity = (tmp_path / "wandb_id").read_text()
    log_report(tmp_path, config("offline"), 5, {"test/top1": 0.5}, {"lr": picture}, {"classes": TABLE})
    said = capsys.readouterr()
    assert said.out == line + "\n" and said.err == ""
    assert (tmp_path / "wandb_id").read_text() == identity
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    assert files
    assert all(file.stat().st_size > 0 for file in files)
    [table] = (tmp_path / "wandb").rglob("table/report/table_classes_*.table.json")
    assert json.loads(table.read_text())["data"] == [["cat", "0.5"]]
    assert list((tmp_path / "wandb").rglob("images/report/lr_*.png"))  # "lr" itself is the logged rate


TABLE = Table(("class", "recall"), [("cat", "0.5")])


class WandbError(Exception):
    pass


class Fake:
    """A wandb module and its run, in which the calls named fail (with an exception) or hang (until an event)."""

    Error, Settings = WandbError, SimpleNamespace

    def __init__(self, **faults):
        self.faults, self.calls, self.modes, self.logged, self.settings = faults, [], [], [], None

    def _call(self, name):
        self.calls.append(name)
        fault = self.faults.get(name)
        if isinstance(fault, BaseException):
            raise fault
        if fault is not None:
            fault.wait(60)

    def wait_for(self, call):
        """Return once `call` has been made, by W&B's thread."""
        deadline = time.monotonic() + 60
        while call not in self.calls:
            assert time.monotonic() < deadline, f"{call} is not called: {self.calls}"
            time.sleep(0.01)

    def login(self, **_):
        self._call("login")
        return True

    def init(self, mode, settings, **named):
        self.modes.append(mode)
        self.named = named
        self.settings = settings
        self._call("init")
        self._call(f"init {mode}")
        return self

    def teardown(self):
        self._call("teardown")

    def log(self, record, step):
        self._call("log")
        self.logged.append(step)

    def finish(self):
        self._call("finish")


@pytest.fixture
def fake(monkeypatch):
    """Put a `Fake` in wandb's place; the queue is short."""
    monkeypatch.setattr(wandb_run, "QUEUE_LENGTH", 50)

    def put(**faults):
        module = Fake(**faults)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return put


FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("given", "flags", "named"),
    [
        ({}, [], ("cifar-dist", "folder")),
        ({"WANDB_NAME": "first", "WANDB_MODE": ""}, [], ("cifar-dist", "first")),
        ({}, ["--wandb-project", "other"], ("other", "folder")),
    ],
)
def test_project_and_name_reach_w_and_b(monkeypatch, fake, tmp_path, given, flags, named):
    module = fake()
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    config = parse_command_line(["--wandb", "offline", *flags]).config
    (tmp_path / "folder").mkdir()
    Mirror(tmp_path / "folder", config).close()
    assert (module.named["project"], module.named["name"]) == named
    assert os.environ.get("WANDB_MODE") != ""  # which W&B would refuse


def test_an_empty_variable_does_not_keep_w_and_b_from_going_online():
    """By W&B itself, in a process of its own, since it reads variables once."""
    program = (
        "from cifar_dist.config import Config; from cifar_dist.tracking.wandb_run import _mode; print(_mode(Config()))"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"WANDB_API_KEY": "0" * 40}
    environment |= dict.fromkeys(["WANDB_CONSOLE", "WANDB_BASE_URL", "WANDB_TAGS", "WANDB_MODE"], "")
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "('online', '')\n"


def test_the_environments_project_is_the_default():
    program = "from cifar_dist.command_line import parse_command_line as p; print(p([]).config.run.wandb_project)"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "WANDB_PROJECT": "thesis"}, capture_output=True, text=True
    )
    assert done.stdout == "thesis\n"


@pytest.mark.parametrize("call", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("out of order"), FULL_DISK, TimeoutError()], ids=repr)
def test_whatever_fails_is_one_warning_and_the_end_of_w_and_b(call, error, fake, tmp_path, capsys):
    module = fake(**{call: error})
    mirror = Mirror(tmp_path, config("offline"))
    for step in range(5):
        mirror.log({"train/loss": 1.0}, step)
    mirror.close()
    (warning,) = capsys.readouterr().err.splitlines()
    reason = str(error) or "TimeoutError"
    assert warning == f"warning: W&B is left out from here on ({reason}); log.jsonl has everything."
    assert module.calls[-1].startswith(call) and module.calls.count(call) == 1


def test_an_installation_that_is_broken_is_a_warning(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    monkeypatch.delenv("WANDB_MODE")
    assert wandb_mode(config(None)) == "offline"
    assert Mirror(tmp_path, config(None)).close() == ""
    assert capsys.readouterr().err.count("W&B is left out") == 1


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_whatever_hangs_is_waited_for_a_little_and_given_up(call, fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 0.5)
    goes_on = threading.Event()
    fake(**{call: goes_on})
    mirror = Mirror(tmp_path, config("offline"))
    start = time.monotonic()
    for step in range(5):
        mirror.log({"train/loss": 1.0}, step)
    mirror.close()
    assert time.monotonic() - start < 30  # what hangs does so for 60 s
    (warning,) = capsys.readouterr().err.splitlines()
    assert "left out from here on (it does not finish within 0.5 s)" in warning
    (left,) = [thread for thread in threading.enumerate() if thread is mirror._thread]
    assert left.daemon  # does not keep the process
    goes_on.set()
    left.join()


STOPPED_SERVICE = """
import os, sys
from dataclasses import replace
from pathlib import Path
from threading import Event
import psutil
from cifar_dist.tracking import wandb_run
from cifar_dist.config import Config

wandb_run.FINISH_SECONDS = 0.5
mirror = wandb_run.Mirror(Path(sys.argv[1]), replace(Config(), run=replace(Config().run, wandb="offline")))

stopped = Event()

def stop(run):
    (service,) = [child for child in psutil.Process().children() if "wandb-core" in child.name()]
    print(service.pid, flush=True)
    service.suspend()
    stopped.set()

mirror.do(stop)
assert stopped.wait(60)
mirror.close()
"""


def own_environment(**variables):
    """For a process that has to do with W&B by itself, not through this one's service."""
    inherited = {name: value for name, value in os.environ.items() if "WANDB" not in name}
    return inherited | {"PYTHONPATH": os.getcwd()} | {name: str(value) for name, value in variables.items()}


def test_no_network_is_kept_offline_by_the_real_w_and_b(tmp_path):
    code = """
import sys
from dataclasses import replace
from pathlib import Path
from cifar_dist.tracking import wandb_run
from cifar_dist.config import Config

wandb_run.INIT_SECONDS = 1.0
mirror = wandb_run.Mirror(Path(sys.argv[1]), replace(Config(), run=replace(Config().run, wandb="online")))
mirror.log({"train/loss": 1.0}, 7)
print(mirror.close())
"""
    environment = own_environment(HOME=tmp_path, WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.stdout == f"wandb       kept offline; wandb sync {tmp_path}/wandb/offline-run-* sends it\n", done.stderr
    assert done.stderr.count("warning: ") == 1
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"train/loss" in file.read_bytes()


def test_a_service_that_stands_still_does_not_keep_the_process(tmp_path):
    """W&B's own hook at the end of a process would wait for it forever."""
    command = [sys.executable, "-c", STOPPED_SERVICE, tmp_path]
    with subprocess.Popen(command, env=own_environment(), stdout=subprocess.PIPE, text=True) as process:
        service = int(process.stdout.readline())
        try:
            assert process.wait(timeout=120) == 0
        finally:
            process.kill()
            os.kill(service, signal.SIGCONT)  # it holds our end of the pipe; its parent has gone, so it ends


def test_a_w_and_b_that_does_not_keep_up_is_left_out(fake, tmp_path, capsys):
    goes_on = threading.Event()
    module = fake(log=goes_on)
    mirror = Mirror(tmp_path, config("offline"))
    mirror.log({"train/loss": 1.0}, 0)
    module.wait_for("log")
    for step in range(1, 200):
        mirror.log({"train/loss": 1.0}, step)
    began = time.monotonic()
    mirror.close()
    assert time.monotonic() - began < wandb_run.FINISH_SECONDS / 2  # which what is left out is not waited for
    goes_on.set()
    mirror._thread.join(60)
    assert not mirror._thread.is_alive()
    (warning,) = capsys.readouterr().err.splitlines()
    assert "it is 50 records behind" in warning
    assert module.logged == [0] and "finish" not in module.calls


def test_online_out_of_reach_is_kept_offline(fake, tmp_path, capsys):
    module = fake(**{"init online": RuntimeError("no such host\nand advice")})
    mirror = Mirror(tmp_path, config("online"))
    mirror.log({"train/loss": 1.0}, 7)
    command = f"wandb sync {tmp_path}/wandb/offline-run-*"
    assert mirror.close() == f"wandb       kept offline; {command} sends it"
    assert module.modes == ["online", "offline"] and module.logged == [7]
    (warning,) = capsys.readouterr().err.splitlines()
    assert "(no such host)" in warning and warning.endswith(command)
    assert module.settings.init_timeout == wandb_run.INIT_SECONDS


def test_offline_and_then_broken_is_still_one_warning(fake, tmp_path, capsys):
    fake(**{"init online": RuntimeError("no such host"), "log": FULL_DISK})
    mirror = Mirror(tmp_path, config("online"))
    mirror.log({"train/loss": 1.0}, 7)
    assert mirror.close().startswith("wandb       kept offline in part; wandb sync")
    assert capsys.readouterr().err.count("warning: ") == 1


def test_online_says_nothing_of_sending(fake, tmp_path, capsys):
    module = fake()
    mirror = Mirror(tmp_path, config("online"))
    mirror.log({"train/loss": 1.0}, 7)
    assert mirror.close() == "" and module.calls[-2:] == ["log", "finish"]
    assert capsys.readouterr().err == ""


def test_a_run_of_a_sweep_has_its_agents_id_also_for_the_report(tmp_path, monkeypatch):
    """In a process of its own, since W&B reads the environment once."""
    code = f"""if True:
        from pathlib import Path
        from tests.tracking.test_wandb_run import Mirror, config
        mirror = Mirror(Path({str(tmp_path)!r}), config("offline"))
        mirror.log({{"train/loss": 1.0}}, step=5)
        mirror.close()"""
    for own in ({"WANDB_SWEEP_ID": "abcdefgh", "WANDB_RUN_ID": "xyz0123w"}, {}):
        environment = own_environment(**own)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "wandb_id").read_text() == "xyz0123w"
    assert {path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")} == {"run-xyz0123w.wandb"}
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2


@pytest.mark.parametrize("torn", ["", "ab1", "\0\0\0\0\0\0\0\0", "0123456789"])
def test_a_torn_id_is_drawn_again_and_a_whole_one_kept(torn, tmp_path):
    (tmp_path / "wandb_id").write_text(torn)
    drawn = wandb_run._identity(tmp_path / "wandb_id")
    assert re.fullmatch("[0-9a-f]{8}", drawn) and (tmp_path / "wandb_id").read_text() == drawn
    assert wandb_run._identity(tmp_path / "wandb_id") == drawn
    assert [file.name for file in tmp_path.iterdir()] == ["wandb_id"]


def test_the_id_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(FULL_DISK))
    with pytest.raises(OSError):
        wandb_run._identity(tmp_path / "wandb_id")
    assert not (tmp_path / "wandb_id").exists()


SECRETS = {"WANDB_API_KEY": "k3y" * 20, "HF_TOKEN": "hf_t0ken" * 5, "HUGGING_FACE_HUB_TOKEN": "hf_hubt0ken" * 4}


def test_secrets_of_the_environment_are_nowhere_in_a_run(tmp_path):
    environment = own_environment(**SECRETS, XDG_CACHE_HOME=tmp_path / "cache", HOME=tmp_path)
    run = str(tmp_path / "run")
    train = ["train.py", "--dataset", "digits", "--model", "cnn4", "--max-steps", "2", "--wandb", "offline"]
    for command in ([*train, "--run-dir", run], ["evaluate.py", run]):
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        for secret in SECRETS.values():
            assert secret.encode() not in done.stdout + done.stderr
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len([file for file in files if file.suffix == ".wandb"]) == 2  # W&B was there, twice
    assert tmp_path / "run" / "report" / "report.md" in files
    for file in files:
        content = file.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], file
