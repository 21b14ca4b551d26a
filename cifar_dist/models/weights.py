"""Start from weights: timm's own (``--pretrained``) or a file (``--init-weights``), through timm's adaptation.

timm adapts position and patch embeddings to the model's size. When the head differs it also stops being strict, and
keys that fit nothing pass in silence. So the weights are loaded strictly into a model with *their* number of
classes, and everything but the head is then copied: only a new head is ever left as it began.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError
from timm.models import get_arch_pretrained_cfgs, is_model_pretrained, load_state_dict
from torch import nn

from cifar_dist.distributed.ending import is_first_process
from cifar_dist.errors import UsageError
from cifar_dist.models.factory import create, named
from cifar_dist.models.head import classifier_names
from cifar_dist.models.hub import require_weights
from cifar_dist.models.new_head import head_names, with_zero_head
from cifar_dist.models.sync_bn import other_buffers

State = dict[str, torch.Tensor]


def from_timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    """A model with timm's pretrained weights, from the Hub or its cache; a head of another size is new.

    Args:
        name: the resolved name, for messages.
        arguments: of `factory.model_arguments`.

    Raises:
        UsageError: timm has no weights of this model, or they cannot be fetched or don't fit.
    """
    settings = arguments["pretrained_cfg"]
    if not any(settings.get(key) for key in ("hf_hub_id", "url", "file")):
        tags = [tag for tag in get_arch_pretrained_cfgs(arguments["model_name"]) if is_model_pretrained(tag)]
        cure = f"there are: {', '.join(tags)}" if tags else "leave it out or use --init-weights FILE"
        raise UsageError(f"--pretrained: timm has no weights of {name}; {cure}.")
    require_weights(name, settings)
    try:
        with _keys_without_place() as notes:
            source = timm.create_model(**{**arguments, "num_classes": settings["num_classes"]}, pretrained=True)
    except Exception as error:  # network, cache and content can each fail in many ways
        create(arguments)  # a model that cannot be built at all says so itself
        size = arguments.get("img_size")
        if size and "size mismatch" in str(error):
            raise UsageError(
                f"--img-size {size[0]}: timm does not adapt the weights of {name} to this size; leave it out."
            ) from error
        raise UsageError(
            f"--pretrained: weights of {name} could not be fetched or don't fit ({named(error)}); "
            "use --init-weights FILE, or fetch them on a machine with network."
        ) from error
    if any(note.startswith("Missing") for note in notes):
        raise UsageError(f"--pretrained: weights of {name} are not complete ({notes[0]}).")
    return _with_own_head(source, arguments, f"--pretrained {name}")


def from_file(arguments: dict[str, Any], path: Path) -> nn.Module:
    """A model with the weights of a .safetensors or .pth file, or of one of our checkpoint folders.

    Wrappings (``state_dict``, ``model_state_dict``) and prefixes (of DDP, torch.compile, Lightning) are taken off, and
    what else lies beside the model is left; EMA weights are preferred, as timm does. A head of another size is replaced
    by a new one, and the first process says so.

    Args:
        arguments: of `factory.model_arguments`.
        path: the file, or a folder with ``model.safetensors``, or a run's, of which the best checkpoint is taken.

    Raises:
        UsageError: the file is missing, damaged, of another model (its first keys are named), or holds several.
    """
    file = _weights_in(path) if path.is_dir() else path
    found = _read(file)
    try:
        source = _load(file, found, arguments)
    except UsageError:
        inner = _within(found, arguments)
        if len(inner) > 1:
            raise UsageError(
                f"--init-weights {file}: it holds this model {len(inner)} times"
                f" ({_some([prefix or 'by itself' for prefix in inner])}); save one alone."
            ) from None
        if not inner:
            raise
        ((prefix, state),) = inner.items()
        source = _load(file, state, arguments)
        if is_first_process():
            print(f"weights     of {prefix} in {file}", flush=True)
    return _with_own_head(source, arguments, f"--init-weights {file}")


def _load(file: Path, found: State, arguments: dict[str, Any]) -> nn.Module:
    """A model with as many classes as the weights' head."""
    classes = _head_classes(found, arguments)
    own_size = {**arguments, "num_classes": classes}
    overlay = {"state_dict": found, "source": None, "num_classes": classes, "label_offset": None}
    try:
        with _keys_without_place() as notes:
            source = timm.create_model(**own_size, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # strict loading, or a filter of timm's that met weights it does not know
        expected = create(own_size).state_dict()
        refusal = f"--init-weights {file}: not weights of {arguments['model_name']} ({named(error)})."
        raise UsageError(_misfit(file, arguments, found, expected) or refusal) from error
    if notes:
        raise UsageError(_misfit(file, arguments, found, source.state_dict()) or f"--init-weights {file}: {notes[0]}.")
    _refuse_other_numbers(file, found, source)
    del cast(Any, source).pretrained_cfg["state_dict"]  # timm's copy, which would live as long as the model
    return source


def _refuse_other_numbers(file: Path, found: State, model: nn.Module) -> None:
    """Refuse quantised weights, which would be taken for numbers of their size, and such as are not finite."""
    bounds = other_buffers(model)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and key in found and not found[key].is_floating_point():
            raise UsageError(
                f"--init-weights {file}: {key} holds {str(found[key].dtype).removeprefix('torch.')}, as quantised"
                " weights do; give those of which they were made."
            )
        if tensor.is_floating_point() and not (~tensor.isnan() if key in bounds else tensor.isfinite()).all():
            raise UsageError(f"--init-weights {file}: {key} is not finite, as of a run that diverged; take others.")


def _within(found: State, arguments: dict[str, Any]) -> dict[str, State]:
    """The model's weights in a file that holds more, by the prefix that all of them have there."""
    head, own = head_names(arguments), create(arguments).state_dict()
    names = [key for key in own if key not in head and not key.endswith("num_batches_tracked")]
    prefixes = [key.removesuffix(names[0]) for key in found if f".{key}".endswith(f".{names[0]}")]
    return {
        prefix.rstrip("."): {key.removeprefix(prefix): found[key] for key in found if key.startswith(prefix)}
        for prefix in prefixes
        if all(prefix + name in found for name in names)
    }


def _weights_in(folder: Path) -> Path:
    """The file of a checkpoint, or a run's best, that evaluate.py would score: the moving average if there is one."""
    best = folder / "checkpoints" / "best"
    for file in (best / name if best.is_dir() else folder / name for name in ("ema.safetensors", "model.safetensors")):
        if file.is_file():
            return file
    raise UsageError(
        f"--init-weights {folder}: there are no weights in this folder; name a file, or a checkpoint such as"
        " RUN/checkpoints/last."
    )


def _read(file: Path) -> State:
    """The named tensors of a weight file, unwrapped by timm; those of other wrappings as ``WRAPPING.NAME``."""
    if not file.is_file():
        raise UsageError(f"--init-weights {file}: there is no such file.")
    try:
        state = load_state_dict(str(file))
    except Exception as error:  # each format and kind of damage has its own exception
        # torch's and timm's reasons are numbers of bytes that are no pickle's, or advice to load it unsafely.
        reason = f" ({named(error)})" if isinstance(error, OSError | SafetensorError) else ""
        raise UsageError(
            f"--init-weights {file}: not a whole file of weights that can be loaded safely{reason}; give a .safetensors"
            " file, or a state_dict (no whole model) saved by torch.save."
        ) from error
    found = _tensors(state)
    for wrapping, inner in state.items():
        if isinstance(inner, dict):
            found |= {f"{wrapping}.{key}": value for key, value in _tensors(inner).items()}
    if not found:
        raise UsageError(f"--init-weights {file}: it holds no weights (its keys: {_some(list(state))}).")
    return found


def _tensors(state: dict[str, Any]) -> State:
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def _head_classes(found: State, arguments: dict[str, Any]) -> int:
    """Rows of the file's classifier, 0 if it has none.

    Older files of a model whose classifier is now ``head.fc`` call it ``head``; timm renames it.
    """
    names = classifier_names(arguments["pretrained_cfg"])
    if not names:
        return int(arguments["num_classes"])
    for name in (names[0], names[0].split(".")[0]):
        if isinstance(weight := found.get(f"{name}.weight"), torch.Tensor) and weight.dim():
            return int(weight.shape[0])
    return 0


def _with_own_head(source: nn.Module, arguments: dict[str, Any], what: str) -> nn.Module:
    """`source` itself if it has as many classes as asked for, else a new model with all of it but the head."""
    had, wanted = cast(Any, source).num_classes, arguments["num_classes"]
    if had == wanted:
        if is_first_process():
            print(f"{what}: loaded, with the head of {had} classes.", flush=True)
        return source
    model = with_zero_head(arguments)
    head = head_names(arguments)
    body = {key: value for key, value in source.state_dict().items() if key not in head}
    result = model.load_state_dict(body, strict=False)
    left = [key for key in result.missing_keys if key not in head]
    if left or result.unexpected_keys:
        raise UsageError(f"{what}: no weights for {_some(left + result.unexpected_keys)}.")
    if is_first_process():
        had_words = f"the head of {had} classes is replaced by" if had else "there is no head, so it gets"
        print(f"{what}: {had_words} a new one of {wanted}, which starts at zero.", flush=True)
    return model


@contextmanager
def _keys_without_place() -> Iterator[list[str]]:
    """Collect what timm only logs when an architecture's loading is not strict: missing and unexpected keys."""
    notes: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message.startswith(("Missing keys", "Unexpected keys")):
                notes.append(message.split(")")[0] + ")")

    logger, collector = logging.getLogger("timm.models._builder"), Collector()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(collector)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield notes
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)
        logger.propagate = propagate


def _misfit(file: Path, arguments: dict[str, Any], found: State, expected: State) -> str:
    """How the file's tensors differ from the model's, by count and first names; empty if they don't."""
    found, expected = (
        {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
        for state in (found, expected)
    )
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    shapes = [key for key in expected if key in found and getattr(found[key], "shape", ()) != expected[key].shape]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    parts = [f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in kinds if keys]
    if not parts:
        return ""
    size = arguments.get("img_size")
    cure = f"; they may be of another --img-size than {size[0]}" if size and not missing + unexpected else ""
    return f"--init-weights {file}: not weights of {arguments['model_name']}: {', '.join(parts)}{cure}."


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
