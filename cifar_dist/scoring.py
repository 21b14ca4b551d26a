"""What takes the model: predictions of a split, the maps that explain some of them, and what the model costs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from cifar_dist.config import InputConfig
from cifar_dist.cost.flops import count_flops
from cifar_dist.cost.peak import device_peak
from cifar_dist.cost.speed import measure_speed
from cifar_dist.data import TestData, load_other_test_data, load_test_data, load_val_data
from cifar_dist.data.augment import VIEWS, Preprocess
from cifar_dist.data.resident import ResidentSet
from cifar_dist.distributed.group import check_agreement, first_failure, on_main, say
from cifar_dist.errors import UsageError, first_line
from cifar_dist.eval_spec import EvalSpec
from cifar_dist.explain import Unexplained, attention_rollout, grad_cam, target_of
from cifar_dist.models import build_model, count_parameters, input_config
from cifar_dist.recovery import checkpoint
from cifar_dist.recovery.store import Stored
from cifar_dist.report.evidence import Evidence, choose
from cifar_dist.report.numbers import COST_FILE
from cifar_dist.report.predictions import About, Scored, predictions_file, save_predictions
from cifar_dist.run_record import Run
from cifar_dist.training.engine import Evaluator


@dataclass(frozen=True)
class LoadedRun:
    """A run's model with the weights of one of its checkpoints, on its device.

    Attributes:
        run: what was trained.
        spec: how it is scored.
        stored: the checkpoint.
        model: in evaluation mode.
        input: what it expects of images.
        accelerator: of this process.
    """

    run: Run
    spec: EvalSpec
    stored: Stored
    model: torch.nn.Module
    input: InputConfig
    accelerator: Accelerator


def load_run(run: Run, spec: EvalSpec, accelerator: Accelerator) -> LoadedRun:
    """Build the run's model and give it the checkpoint's weights (their moving average if the run kept one).

    Raises:
        UsageError: there is no such checkpoint, or it is damaged or of another model.
    """
    stored = on_main(accelerator, lambda: checkpoint.find(run.folder, spec.which))  # a training may go on meanwhile
    if not accelerator.is_main_process:
        stored = checkpoint.find(run.folder, stored.folder.name)
    check_agreement(accelerator, {"checkpoint": stored.digest})
    config = replace(run.config.model, pretrained=False, init_weights=None)
    model = build_model(config, len(run.environment["class_names"]))
    try:
        model.load_state_dict(checkpoint.load_weights(stored))
    except RuntimeError:
        raise UsageError(f"{run.folder}: checkpoint {spec.which} does not fit the model of its config.yaml.") from None
    inputs = input_config(model, run.config.model)
    return LoadedRun(run, spec, stored, model.to(accelerator.device).eval(), inputs, accelerator)


def score(loaded: LoadedRun) -> None:
    """Score test and val, and save all that a report needs.

    Raises:
        UsageError: the data cannot be used, or the model predicts NaN.
    """
    data = test_data(loaded.run, loaded.spec)
    scored, val = score_test(loaded, data), score_val(loaded)
    say(loaded.accelerator, "measuring   what the model looks at, its speed and memory; then its pictures are drawn")
    on_main(loaded.accelerator, lambda: save_findings(loaded, scored, val, data))


def test_data(run: Run, spec: EvalSpec) -> TestData:
    """The run's own test split, or that of another set with the same classes.

    Raises:
        UsageError: the data cannot be used, or their classes are not the run's.
    """
    if spec.other is not None:
        return load_other_test_data(spec.other, run.config.data, run.environment["class_names"])
    try:
        data = load_test_data(spec.own)
    except UsageError as error:
        hint = f" If the data of {run.folder} have moved, score it with --data and their new place first."
        raise UsageError(f"{error}{hint if spec.fingerprint is None else ''}") from None
    run.check_classes(data.class_names, data.name)
    return data


def score_test(loaded: LoadedRun, data: TestData) -> Scored:
    """Predictions for the test split.

    Raises:
        UsageError: processes have other data, or the model predicts NaN.
    """
    check_agreement(loaded.accelerator, {"test split": data.fingerprint})
    about = _about(loaded, data.name, "test", data.fingerprint)
    spec, named = loaded.spec, loaded.run.config.data.dataset
    place = spec.other or (spec.own.dataset if spec.own.dataset != named else None)
    scored = _score(loaded, data.test, replace(about, own_data=spec.other is None, place=place))
    return replace(scored, files=data.files)


def score_val(loaded: LoadedRun) -> Scored | None:
    """Predictions for the split that the run set apart to choose by, or None if it had none or it is not at hand."""
    run, missing, val = loaded.run, "", None
    config = replace(loaded.spec.own, data_mode=run.data_mode)
    try:
        val = load_val_data(config)
    except UsageError as error:
        missing = str(error)
    if missing := first_failure(loaded.accelerator, missing):
        say(loaded.accelerator, f"val         is not at hand, so no temperature is fitted ({missing})")
        return None
    if val is None:
        return None
    about = _about(loaded, config.dataset, "val", str(run.environment.get("data_fingerprint")))
    return _score(loaded, val, about)


def _about(loaded: LoadedRun, dataset: str, split: str, fingerprint: str) -> About:
    spec, stored = loaded.spec, loaded.stored
    return About(
        dataset, split, fingerprint, spec.which, stored.step, stored.digest, tta=spec.tta, precision=spec.precision
    )


def _score(loaded: LoadedRun, split: ResidentSet, about: About) -> Scored:
    """Logits of every image, each once, whatever the number of processes."""
    preprocess = Preprocess(loaded.input, loaded.accelerator.device, torch.float32)
    batch = loaded.run.plan["micro_batch_size"]
    evaluator = Evaluator(loaded.accelerator, preprocess, batch, loaded.spec.precision)
    images = split.to(loaded.accelerator.device)
    if about.tta == "none":
        logits = evaluator.logits(loaded.model, images)
    else:
        parts = [
            evaluator.logits(loaded.model, images, view).double().log_softmax(dim=1) + math.log(view.weight)
            for view in VIEWS[about.tta]
        ]
        logits = torch.stack(parts).logsumexp(dim=0).float()
    if not logits.isfinite().all():
        raise UsageError(
            f"{loaded.run.folder}: checkpoint {about.checkpoint} (step {about.step}) predicts NaN; the run diverged."
        )
    names = tuple(loaded.run.environment["class_names"])
    return Scored(split.ids.numpy(), split.labels.numpy(), logits.numpy(), names, about)


def gather_evidence(loaded: LoadedRun, scored: Scored, test: ResidentSet) -> Evidence:
    """Pixels of the images that a report shows, with Grad-CAM and attention rollout of what was predicted for some."""
    chosen = choose(scored)
    explained, shown = torch.tensor(chosen.explained), torch.tensor(chosen.shown)
    found = Evidence(scored.ids[chosen.shown], test.images[shown].cpu().numpy(), scored.ids[chosen.explained])
    device = loaded.accelerator.device
    images = Preprocess(loaded.input, device, torch.float32)(test.images[explained].to(device))
    classes = torch.from_numpy(scored.predicted[chosen.explained]).to(device)
    model, layer = loaded.model, ""
    methods: dict[str, Callable[[], torch.Tensor | None]] = {
        "grad_cam": lambda: grad_cam(model, images, classes),
        "rollout": lambda: attention_rollout(model, images),
    }
    maps, unexplained = dict[str, np.ndarray](), dict[str, str]()
    for name, method in methods.items():
        try:
            if (made := method()) is not None:
                maps[name] = _bytes(made)
        except Unexplained as error:
            unexplained[name] = str(error)
        except RuntimeError as error:  # of the model's own code, or out of memory
            unexplained[name] = f"It failed: {first_line(error)}."
    if "grad_cam" in maps:
        layer = target_of(model, loaded.input.img_size).name
    return replace(found, layer=layer, maps=maps, unexplained=unexplained)


def _bytes(maps: torch.Tensor) -> np.ndarray:
    return (maps * 255).round().to(torch.uint8).numpy()


def measure_cost(loaded: LoadedRun) -> dict[str, Any]:
    """What the model takes: parameters, FLOPs, and the time and memory of inference on this machine."""
    parameters, trained = count_parameters(loaded.model)
    flops = count_flops(loaded.model, loaded.input.img_size)
    speed = measure_speed(loaded.model, loaded.input, loaded.accelerator.device, loaded.spec.precision)
    peak = device_peak(loaded.accelerator.device, loaded.spec.precision)
    return {
        "parameters": parameters,
        "trained_parameters": trained,
        "img_size": loaded.input.img_size,
        "flops": asdict(flops),
        "inference": asdict(speed),
        "peak": asdict(peak),
    }


def save_findings(loaded: LoadedRun, scored: Scored, val: Scored | None, data: TestData) -> None:
    """Save all that a report needs: maps and pixels, costs, the predictions of val and test."""
    folder = loaded.spec.folder
    try:
        folder.mkdir(exist_ok=True)
        # Test's predictions are written last, and tell that all is there; pages are of earlier ones.
        scores = [predictions_file(folder, split) for split in ("test", "val")]
        for path in (*scores, *folder.glob("report.*"), folder / "metrics.json"):
            path.unlink(missing_ok=True)
        gather_evidence(loaded, scored, data.test).save(folder)
        cost = json.dumps(_cost_or_nothing(loaded), indent=1)
        (folder / COST_FILE).write_text(cost + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{error.filename or folder} cannot be written ({error.strerror}); make way for it.") from None
    if val is not None:
        save_predictions(folder, val)
    save_predictions(folder, scored)


def _cost_or_nothing(loaded: LoadedRun) -> dict[str, Any]:
    """What `measure_cost` finds; nothing where the model's own code fails, which must not cost the report."""
    try:
        return measure_cost(loaded)
    except (RuntimeError, UsageError) as error:
        print(f"cost        is not measured: {first_line(error)}", flush=True)
        return {}
