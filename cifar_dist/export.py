"""A trained run as a folder that plain timm loads, as an ONNX file, and on the Hugging Face Hub."""

from __future__ import annotations

import copy
import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from safetensors import SafetensorError
from timm.models._hub import save_config_for_hf
from torch import nn

from cifar_dist.config import Config, InputConfig
from cifar_dist.data.sources import HUB_IDS
from cifar_dist.durable import fsync, save_tensors
from cifar_dist.errors import UsageError, first_line
from cifar_dist.models import NATIVE, input_config
from cifar_dist.page import plain
from cifar_dist.report.tables import SHOWN_SETTINGS, shown_names
from cifar_dist.run_record import Run

WEIGHTS, CONFIG, CARD, ONNX = FILES = ("model.safetensors", "config.json", "README.md", "model.onnx")
MARK = {"exported_by": "cifar-dist"}  # in config.json; without it a folder is never replaced
TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.j2"
ONNX_TOLERANCE = 1e-4  # of the largest logit
OF_OTHER_WEIGHTS = ("tag", "license", "description", "origin_url", "notes", "label_descriptions")  # as timm has them


def export_run(run: Run, model: nn.Module, metrics: dict[str, Any], folder: Path) -> None:
    """Write a folder that plain timm loads: weights, ``config.json`` and a model card, in the Hub's layout.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` gives the same logits bit for bit, and timm's own
    transforms the run's preprocessing. Only an architecture that timm has no class for needs ``import
    cifar_dist.models`` first; its card says so. The folder appears whole, in one rename, in the place of an empty
    folder or an earlier export. It names no path of this machine.

    Args:
        run: the settings and class names.
        model: with the weights to export, as `build_model` made it, not wrapped.
        metrics: of the run's ``metrics.json``.
        folder: where to.

    Raises:
        UsageError: the folder holds anything but an earlier export, or cannot be written.
    """
    inputs = input_config(model, run.config.model)
    with _new_folder(folder) as aside:
        _write_model(model, inputs, run.environment["class_names"], aside)
        _model_card(run, model, inputs, metrics).save(aside / CARD)


def check(folder: Path, onnx: bool) -> None:
    """Refuse, before anything is computed, what `export_run` and `export_onnx` would refuse in the end.

    Raises:
        UsageError: the folder holds anything but an earlier export, or libraries are missing.
    """
    _check_replaceable(folder)
    if onnx:
        _check_libraries()


def _check_libraries() -> None:
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise UsageError(f"--onnx: {missing[0]} is not installed; run pip install -e '.[onnx]'.")


def export_onnx(model: nn.Module, input: InputConfig, folder: Path) -> Path:
    """Write ``model.onnx`` into an exported folder: ``images`` float32 (B,3,S,S), normalised, to ``logits`` (B,K).

    The batch size B is free. Before the file gets its name, onnxruntime's logits are compared with the model's.

    Raises:
        UsageError: the libraries are missing, torch's exporter refuses the model or its size, the logits differ by
            more than 1e-4 of the largest, or the folder cannot be written.
    """
    _check_libraries()
    twin = copy.deepcopy(model).cpu().eval()
    images = torch.randn(5, 3, input.img_size, input.img_size, generator=torch.Generator().manual_seed(0))
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx-") as scratch:
            aside = Path(scratch, ONNX)
            _convert(twin, images, aside)
            difference = max(_onnx_difference(twin, part, aside) for part in images.split([1, 4]))
            if not difference <= ONNX_TOLERANCE:
                raise ValueError(f"its logits would differ by {difference:.1e} of the largest")
            os.replace(aside, folder / ONNX)
    except Exception as error:  # torch's exporter, protobuf's 2 GiB, onnxruntime, the disk: each has its own
        raise UsageError(
            f"--onnx: no {ONNX} could be made ({first_line(error)}); the exported folder {folder} is whole without it."
        ) from error
    return folder / ONNX


def _convert(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    torch.onnx.export(
        model,
        (images,),
        path,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )


def _onnx_difference(model: nn.Module, images: torch.Tensor, path: Path) -> float:
    """The largest difference of onnxruntime's logits from the model's, as a part of the largest logit."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(images)
    found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    return float((found - expected).abs().max() / expected.abs().max())


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload an exported folder to the Hugging Face Hub, into a repository that is made if there is none.

    Args:
        folder: of `export_run`.
        repository: OWNER/NAME, or NAME for the one who is logged in; its address is returned.

    Raises:
        UsageError: whatever goes wrong; the folder stays as it is.
    """
    api = HfApi(library_name="cifar-dist")
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, allow_patterns=list(FILES), delete_patterns=list(FILES),
            commit_message="Export of a run",
        )  # fmt: skip
    except Exception as error:  # the name, the login, the network, the Hub: each with exceptions of its own
        raise UsageError(
            f"--push-to-hub {repository}: not uploaded ({first_line(error)}); the exported folder {folder} is intact: "
            f"log in with `hf auth login`, then upload it with `hf upload OWNER/NAME {shlex.quote(str(folder))}`."
        ) from error
    return str(address)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill beside `folder`, which takes its place when all went well."""
    try:
        _check_replaceable(folder)
        target = folder.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            new.mkdir()
            yield new
            for path in (*new.iterdir(), new):
                fsync(path)
            if target.exists():
                target.rename(old)
            try:
                new.rename(target)
            except BaseException:
                if old.exists():
                    old.rename(target)
                raise
            fsync(target.parent)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"--export {folder}: it cannot be written ({first_line(error)}); name another folder."
        ) from None


def _check_replaceable(folder: Path) -> None:
    """Refuse a folder in which something could get lost."""
    cure = "name a new or empty folder"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--export {folder}: a file of that name is in the way; {cure}.")
    names = sorted(os.listdir(folder)) if folder.exists() else []
    if foreign := [name for name in names if name not in FILES]:
        raise UsageError(f"--export {folder}: it holds {foreign[0]}, which is no part of an export; {cure}.")
    if names and not _is_marked(folder / CONFIG):
        raise UsageError(f"--export {folder}: the model in it was not exported by cifar-dist; {cure}.")


def _is_marked(path: Path) -> bool:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.items() >= MARK.items()


def _write_model(model: nn.Module, inputs: InputConfig, class_names: list[str], folder: Path) -> None:
    """Write weights and ``config.json``."""
    architecture, arguments = _as_timm_builds_it(model)
    preprocessing = {
        "input_size": (3, inputs.img_size, inputs.img_size),
        "mean": inputs.mean,
        "std": inputs.std,
        "interpolation": inputs.interpolation,
        "crop_pct": 1.0,
        "crop_mode": "squash",  # as an image that is not square is read
    }
    description = {"label_names": list(class_names), "pretrained_cfg": {"architecture": architecture}, **MARK}
    save_config_for_hf(model, str(folder / CONFIG), description, arguments, preprocessing)
    # Copies, since layers of some models (CoaT) are several layers' own.
    copies = {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    save_tensors(copies, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    config["model_args"].pop("num_classes", None)  # transformers gives it as well, and would give it twice
    for key in OF_OTHER_WEIGHTS:
        config["pretrained_cfg"].pop(key, None)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _architecture(model: nn.Module) -> str:
    """The name in timm's registry, also of a model that was built from an ``hf-hub:`` or ``local-dir:`` source."""
    return cast(Any, model).pretrained_cfg["architecture"]


def _as_timm_builds_it(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """The architecture to write down, and arguments with which it becomes this model.

    ``vit_small_cifar`` is timm's own ViT in another shape, so it goes under a name that plain timm knows.
    """
    name, own = _architecture(model), cast(Any, model)
    if name != "vit_small_cifar":
        return name, {}
    return "vit_small_patch16_224", {
        "patch_size": own.patch_embed.patch_size[0],
        "embed_dim": own.embed_dim,
        "depth": len(own.blocks),
        "num_heads": own.blocks[0].attn.num_heads,
        "mlp_ratio": own.blocks[0].mlp.fc1.out_features / own.embed_dim,
    }


def _model_card(run: Run, model: nn.Module, inputs: InputConfig, metrics: dict[str, Any]) -> ModelCard:
    """The page that the Hub shows."""
    architecture, dataset = _architecture(model), metrics["dataset"]["name"]
    base_model = cast(Any, model).pretrained_cfg.get("hf_hub_id") if run.config.model.pretrained else None
    return ModelCard.from_template(
        _header(run, metrics, architecture, base_model and base_model.split("@")[0]),
        template_path=str(TEMPLATE),
        architecture=architecture,
        dataset=plain(dataset),
        needs_import=_as_timm_builds_it(model)[0] in NATIVE,
        input=inputs,
        metrics=metrics,
        rows=[{**row, "name": plain(row["name"])} for row in metrics["classes"]],
        settings=_settings(run.config, dataset),
        versions=", ".join(f"{name} {number}" for name, number in run.environment.get("versions", {}).items()),
    )


def _header(run: Run, metrics: dict[str, Any], architecture: str, base_model: str | None) -> ModelCardData:
    """What the Hub's search and leaderboards read; a data set that is not on the Hub has its own name as type."""
    dataset, hub_id = metrics["dataset"]["name"], HUB_IDS.get(run.config.data.dataset)
    picked = " of a checkpoint picked on test" if metrics["selected_on"] == "test" else ""
    accuracy = EvalResult(
        task_type="image-classification",
        dataset_type=hub_id or dataset,
        dataset_name=dataset,
        dataset_split=metrics["dataset"]["split"],
        metric_type="accuracy",
        metric_name=f"top-1 accuracy{picked}",
        metric_value=metrics["top1"],
    )
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "cifar-dist"],
        datasets=[hub_id] if hub_id else None,
        base_model=base_model,
        metrics=["accuracy"],
        model_name=f"{architecture}-{dataset}",
        eval_results=[accuracy],
    )


def _settings(config: Config, dataset: str) -> dict[str, str]:
    """The settings that say what the run is, and others that differ from the defaults; of paths the last part."""
    values = config.flat() | {"dataset": dataset, "data_size": config.data.pixels}
    if config.model.init_weights:
        values["init_weights"] = Path(config.model.init_weights).name
    if config.model.model.startswith("local-dir:"):
        values["model"] = f"local-dir:{Path(config.model.model).name}"
    names = dict.fromkeys((*SHOWN_SETTINGS, "data_size", *shown_names(config)))
    return {name: plain(str(values[name])) for name in names if values[name] is not None}
