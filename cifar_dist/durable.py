"""Nested states as JSON and safetensors, written so that they survive; nothing is pickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cifar_dist.errors import UsageError


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write named tensors as safetensors, readable like other files (safetensors makes them private); not durably."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(0o644)


def save_json(value: Any, path: Path) -> None:
    """Write JSON; not durably."""
    path.write_text(json.dumps(value, indent=1))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the run.

    Raises:
        UsageError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}).") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is damaged (it holds no object).")
    return found


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that it is whole at any moment: the old text or the new one."""
    aside = path.with_name(f".tmp-{path.name}")
    aside.write_text(text, encoding="utf-8")
    fsync(aside)
    os.replace(aside, path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A nested state as JSON; tensors at any depth go into `tensors`, and their place names them."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"dict": [[key, encode(item, f"{path}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [encode(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]}
    return value


def decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `encode`.

    Raises:
        UsageError: the JSON holds anything but what `encode` writes; nothing of its naming is looked up but types.
    """
    if not isinstance(value, dict):
        return value
    kind: str
    content: Any
    kind, content = next(iter(value.items())) if len(value) == 1 else ("", None)
    try:
        if kind == "tensor":
            return tensors[content]
        if kind == "dtype" and isinstance(dtype := vars(torch).get(content), torch.dtype):
            return dtype
        if kind == "dict":
            return {key: decode(item, tensors) for key, item in content}
        if kind in ("list", "tuple"):
            return (list if kind == "list" else tuple)(decode(item, tensors) for item in content)
    except (KeyError, TypeError, ValueError):
        pass
    raise UsageError(f"the checkpoint is damaged: {json.dumps(value):.60} is no part of a training's state.")
