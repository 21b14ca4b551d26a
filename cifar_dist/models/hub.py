"""Whether weights can be fetched, found out in seconds instead of timm's 49."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from timm.models import parse_model_name

from cifar_dist.errors import UsageError
from cifar_dist.models.factory import named

PROBE_SECONDS = 5
CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
FETCH_ELSEWHERE = "fetch it once on a machine with network and copy its cache here"


def require_config(name: str) -> None:
    """Make sure that the description of an ``hf-hub:`` model is cached or can be fetched; other names need none.

    Raises:
        UsageError: it is not cached and the Hub does not answer (or ``HF_HUB_OFFLINE`` is set).
    """
    source, repository = parse_model_name(name)
    if source != "hf-hub" or _is_cached(repository, (CONFIG_FILE,)):
        return
    if problem := _hub_problem(repository):
        raise UsageError(f"--model {name}: it could not be fetched ({problem}); {FETCH_ELSEWHERE}.")


def require_weights(name: str, pretrained_cfg: dict[str, Any]) -> None:
    """Make sure that the weights of a timm model are cached or can be fetched.

    Raises:
        UsageError: they are not cached and their host does not answer (or ``HF_HUB_OFFLINE`` is set).
    """
    if pretrained_cfg.get("file"):
        return
    if repository := pretrained_cfg.get("hf_hub_id"):
        filename = pretrained_cfg.get("hf_hub_filename")
        cached = _is_cached(repository, (filename,) if filename else WEIGHT_FILES)
        problem = None if cached else _hub_problem(repository)
    else:
        problem = _url_problem(pretrained_cfg["url"])
    if problem:
        raise UsageError(
            f"--pretrained: weights of {name} could not be fetched ({problem}); use --init-weights FILE, or "
            f"{FETCH_ELSEWHERE}."
        )


def _is_cached(repository: str, filenames: tuple[str, ...]) -> bool:
    repository, _, revision = repository.partition("@")
    found = (try_to_load_from_cache(repository, filename, revision=revision or None) for filename in filenames)
    return any(isinstance(path, str) for path in found)


def _hub_problem(repository: str) -> str | None:
    """Why the Hub does not serve the repository, asked once without retries; None if it does."""
    repository, _, revision = repository.partition("@")
    try:
        get_hf_file_metadata(hf_hub_url(repository, CONFIG_FILE, revision=revision or None), timeout=PROBE_SECONDS)
    except EntryNotFoundError:
        return None
    except Exception as error:  # whatever the HTTP library of the day raises without a network
        return named(error)
    return None


def _url_problem(url: str) -> str | None:
    """Why the host of a weight file outside the Hub does not answer; None if it does or torch.hub has the file."""
    if Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name).is_file():
        return None
    try:
        urlopen(Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
    except HTTPError:
        return None
    except OSError as error:
        return named(error)
    return None
