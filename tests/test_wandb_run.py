"""Weights & Biases: online only where a key works, and one run per folder."""

import dataclasses

import pytest

from cifar_dist.config import Config
from cifar_dist.errors import UsageError
from cifar_dist.wandb_run import log_report, start_wandb, wandb_mode


def config(mode):
    return dataclasses.replace(Config(), run=dataclasses.replace(Config().run, wandb=mode))


@pytest.fixture
def login(monkeypatch):
    """Make W&B's login succeed, find no key (False) or fail (None)."""
    import wandb

    def set_to(outcome):
        def answer(prompt):
            if outcome is None:
                raise wandb.Error("the server is away")
            return outcome

        monkeypatch.setattr(wandb, "login", answer)

    monkeypatch.delenv("WANDB_MODE")
    return set_to


@pytest.mark.parametrize("outcome, mode", [(True, "online"), (False, "offline"), (None, "offline")])
def test_the_default_is_online_only_where_a_key_works(login, outcome, mode):
    login(outcome)
    assert wandb_mode(config(None)) == mode


@pytest.mark.parametrize("outcome, said", [(False, "no API key is configured"), (None, "the server is away")])
def test_online_without_a_key_is_refused(login, outcome, said):
    login(outcome)
    with pytest.raises(UsageError, match=f"--wandb online: {said}"):
        wandb_mode(config("online"))


def test_a_w_and_b_that_does_not_start_is_a_warning(monkeypatch, tmp_path, capsys):
    import wandb

    def fail(**_):
        raise wandb.Error("out of order")

    monkeypatch.setattr(wandb, "init", fail)
    assert start_wandb(tmp_path, config("offline")) is None
    assert "out of order" in capsys.readouterr().err


def test_offline_starts_and_the_report_are_one_run(tmp_path):
    from PIL import Image

    picture = tmp_path / "p.png"
    Image.new("RGB", (4, 4)).save(picture)
    run = start_wandb(tmp_path, config("offline"))
    run.log({"train/loss": 1.0}, step=5)
    run.finish()
    identity = (tmp_path / "wandb_id").read_text()
    log_report(tmp_path, config("offline"), 5, {"test/top1": 0.5}, {"lr": picture})
    assert (tmp_path / "wandb_id").read_text() == identity
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    assert files
    assert all(file.stat().st_size > 0 for file in files)
    assert list((tmp_path / "wandb").rglob("images/report/lr_*.png"))  # "lr" itself is the logged rate
