"""Exported folders: loaded by timm in a process that has no cifar_dist, read as a card, run by onnxruntime."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from PIL import ExifTags, Image
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from cifar_dist import export
from cifar_dist.config import Config, InputConfig
from cifar_dist.data import load_test_data
from cifar_dist.data.augment import Preprocess
from cifar_dist.data.resident import to_pixels
from cifar_dist.errors import UsageError
from cifar_dist.export import export_onnx, export_run, push_to_hub
from cifar_dist.models import build_model, input_config
from cifar_dist.report import write_report
from cifar_dist.run_record import open_run
from tests.made_up import NAMES, make_run, make_scored, save_report

RUNS = {
    "vit": {"model": "test_vit"},
    "vit-64": {"model": "test_vit", "img_size": 64, "drop": 0.2, "drop_path": 0.1},
    "fixed-vit": {"model": "vit_tiny", "img_size": 32, "pretrained": True},  # an alias
    "efficientnet": {
        "model": "test_efficientnet", "img_size": 48, "freeze": "backbone", "interpolation": "bilinear",
        "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25),
    },
    "convnext": {"model": "test_convnext", "img_size": 64},
    "native-vit": {"model": "vit_small_cifar"},  # plain timm can build it
    "cnn4": {"model": "cnn4"},
    "resnet18": {"model": "resnet18_cifar"},
}  # fmt: skip
NEEDS_IMPORT = ("cnn4", "resnet18")
PLAIN = [name for name in RUNS if name not in NEEDS_IMPORT]
LOADED_ELSEWHERE = """
import json, sys, timm, torch
sys.modules["cifar_dist"] = None  # importing it fails
found = {}
for folder in sys.argv[1:]:
    model = timm.create_model(f"local-dir:{folder}/out", pretrained=True).eval()
    with torch.no_grad():
        same = torch.equal(model(torch.load(f"{folder}/images.pt")), torch.load(f"{folder}/logits.pt"))
    card = open(f"{folder}/out/README.md", encoding="utf-8").read().split("```python")[1].split("```")[0]
    said = []
    scope = {"print": said.append}
    exec(card.replace("FOLDER", f"{folder}/out").replace("image.png", f"{folder}/image.png"), scope)
    found[folder] = [same, said, scope["probabilities"].tolist()]
print(json.dumps(found))
"""


def build(config):
    """The model that evaluate.py would score, with statistics and weights that no initialisation gives."""
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(config.model, pretrained=False, init_weights=None), len(NAMES))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1 + torch.rand_like(tensor) / 5).add_((torch.rand_like(tensor) - 0.5) / 50)
    return model.eval()


def finished(folder, **settings):
    """A run and its model."""
    run = open_run(make_run(folder, **settings))
    return run, build(run.config)


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    """What a report measured."""
    folder = make_run(tmp_path_factory.mktemp("scored") / "run")
    report = save_report(folder)
    return write_report(open_run(folder), report).metrics


@pytest.fixture(scope="module")
def exported(tmp_path_factory, metrics):
    """For every case: a folder with the export in out/, images and the logits of the model that was exported."""
    root = tmp_path_factory.mktemp("exported")
    for name, settings in RUNS.items():
        run, model = finished(root / name, **settings)
        size = input_config(model, run.config.model).img_size
        images = torch.randn(3, 3, size, size)
        with torch.no_grad():
            torch.save(model(images), root / name / "logits.pt")
        torch.save(images, root / name / "images.pt")
        turned = Image.Exif()
        turned[ExifTags.Base.Orientation] = 6  # as a phone held upright saves it
        picture(32).transpose(Image.Transpose.ROTATE_90).save(root / name / "image.png", exif=turned)
        export_run(run, model, metrics, root / name / "out")
    return root


@pytest.fixture(scope="module")
def elsewhere(exported, tmp_path_factory):
    """What another process, without cifar_dist, made of the folders that plain timm can load."""
    folders = [str(exported / name) for name in PLAIN]
    command = [sys.executable, "-c", LOADED_ELSEWHERE, *folders]
    done = subprocess.run(command, cwd=tmp_path_factory.mktemp("cwd"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def picture(size, height=None):
    """Blurred noise, which no filter leaves alone."""
    pixels = np.random.default_rng(size).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, height or size), Image.Resampling.BICUBIC)


def test_layers_that_several_layers_share_are_exported(metrics, tmp_path):
    """safetensors itself refuses them."""
    run, model = finished(tmp_path / "run", model="coat_lite_tiny", img_size=32)
    export_run(run, model, metrics, tmp_path / "out")
    again, images = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_timm_gives_the_same_logits_bit_for_bit(exported, elsewhere, name):
    same, _, _ = elsewhere[str(exported / name)]
    assert same
    assert "cifar_dist" not in (exported / name / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", PLAIN)
def test_the_code_on_the_card_runs_and_agrees_with_the_project(exported, elsewhere, name):
    _, said, probabilities = elsewhere[str(exported / name)]
    config = open_run(exported / name).config
    model = build(config)
    preprocess = Preprocess(input_config(model, config.model), "cpu", torch.float32)
    with torch.no_grad():
        expected = model(preprocess(torch.tensor(to_pixels(picture(32), 32))[None])).softmax(1)
    torch.testing.assert_close(torch.tensor(probabilities), expected, atol=5e-3, rtol=0)
    assert said == [NAMES[int(torch.tensor(probabilities).argmax())]]


@pytest.mark.parametrize("name", NEEDS_IMPORT)
def test_a_native_architecture_loads_after_the_import_that_its_card_names(exported, name):
    folder = exported / name
    assert "import cifar_dist.models" in (folder / "out" / "README.md").read_text()
    model = timm.create_model(f"local-dir:{folder / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(torch.load(folder / "images.pt")), torch.load(folder / "logits.pt"))


@pytest.mark.parametrize("name", RUNS)
def test_timms_transform_is_the_runs_preprocessing(exported, name):
    """To about one grey level, also for images that are not square: they are squashed, nothing is cropped."""
    config = open_run(exported / name).config
    inputs = input_config(build(config), config.model)
    model = timm.create_model(f"local-dir:{exported / name / 'out'}")
    data_config = timm.data.resolve_model_data_config(model)
    assert timm.data.resolve_model_data_config(model, use_test_size=True) == data_config
    transform = timm.data.create_transform(**data_config)
    pictures = [picture(32), picture(inputs.img_size)]
    if inputs.interpolation == "bilinear":  # as images are read
        pictures.append(picture(40, height=24).resize((80, 48), Image.Resampling.NEAREST))
    for image in pictures:
        pixels = to_pixels(image, inputs.img_size if image.width != 32 else 32)
        ours = Preprocess(inputs, "cpu", torch.float32)(torch.tensor(pixels)[None])[0]
        greys = [x * torch.tensor(inputs.std)[:, None, None] * 255 for x in (transform(image), ours)]
        assert greys[0].std() > 20
        torch.testing.assert_close(*greys, atol=1.15, rtol=0)  # PIL rounds twice, after each direction


def test_the_description_says_nothing_of_other_weights(exported):
    """No licence, tag or crop of the weights that timm's authors trained; nothing given twice to transformers."""
    for name in RUNS:
        config = json.loads((exported / name / "out" / "config.json").read_text())
        assert config["label_names"] == list(NAMES)
        assert config["num_classes"] == len(NAMES)
        assert "num_classes" not in config["model_args"]
        assert not {"tag", "license", "origin_url", "url", "hf_hub_id", "test_input_size"} & set(
            config["pretrained_cfg"]
        )


def test_an_export_is_a_model_to_start_from(exported, metrics, tmp_path):
    """A run on ``local-dir:`` of an earlier export, at another size, exports as what it is."""
    source = tmp_path / "source"
    shutil.copytree(exported / "native-vit" / "out", source)
    described = json.loads((source / "config.json").read_text()) | {"label_descriptions": {"cat": "of the source"}}
    (source / "config.json").write_text(json.dumps(described))
    settings = {"model": f"local-dir:{source}", "img_size": 48, "dataset": str(tmp_path / "secret" / "pets")}
    run, model = finished(tmp_path / "run", init_weights=str(tmp_path / "secret" / "w.pth"), **settings)
    export_run(run, model, metrics, tmp_path / "out")
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(model(images), again(images))
    written = "".join((tmp_path / "out" / name).read_text() for name in ("config.json", "README.md"))
    assert str(tmp_path) not in written and str(exported) not in written and "secret" not in written
    assert "| init_weights | w.pth |" in written and "of the source" not in written


def test_the_card_is_measured(metrics, tmp_path):
    names = ("cat", "a|b", "{{ 1 + 1 }}", "two\nlines", "truck", "frog")
    classes = [{**row, "name": name} for row, name in zip(metrics["classes"], names, strict=True)]
    run, model = finished(tmp_path / "run", model="test_vit", dataset="cifar10", pretrained=True, lr=0.025)
    known = {**metrics, "classes": classes, "top1_interval": [0.4321, 0.5432]}
    export_run(run, model, known, tmp_path / "out")
    scored = make_scored()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    labels, predicted = scored.labels, scored.probabilities.argmax(1)
    result = card.data.eval_results[0]
    assert result.metric_value == pytest.approx(accuracy_score(labels, predicted))
    assert (result.metric_type, result.dataset_type, result.dataset_split) == ("accuracy", "uoft-cs/cifar10", "test")
    assert card.data.base_model.startswith("timm/test_vit")
    assert card.data.library_name == "timm" and card.data.license is None
    assert (
        f"**Test accuracy {accuracy_score(labels, predicted):.2%}** (95% interval 43.21% to 54.32%) on the 300"
        in card.text
    )
    rows = re.findall(r"^\| (.+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", card.text, re.MULTILINE)
    assert [row[0] for row in rows] == ["cat", r"a\|b", "{{ 1 + 1 }}", "two lines", "truck", "frog"]
    expected = np.transpose(precision_recall_fscore_support(labels, predicted))
    np.testing.assert_allclose(np.array([row[1:] for row in rows], dtype=float), expected, atol=5.1e-5)
    assert "| lr | 0.025 |" in card.text
    assert "optimistic" not in card.text and "picked on val" in card.text


@pytest.mark.parametrize(("settings", "said"), [({"img_size": 64}, True), ({"img_size": 32}, False)])
def test_the_card_says_how_images_were_resized_where_they_were(metrics, tmp_path, settings, said):
    run, model = finished(tmp_path / "run", model="test_vit", **settings)
    export_run(run, model, metrics, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert ("own resize from 32 to 64 pixels" in card.text) == ("0.3 of 255 levels" in card.text) == said
    assert "\n\n\n" not in card.text


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_what_the_card_says_of_the_resize_is_so(real_cifar10, interpolation):
    data = load_test_data(Config.from_flat({"dataset": str(real_cifar10)}).data)
    images = data.test.images[:100]
    own = Preprocess(InputConfig(128, (0, 0, 0), (1, 1, 1), interpolation), "cpu", torch.float32)(images)
    filter = Image.Resampling[interpolation.upper()]
    theirs = [np.asarray(Image.fromarray(image.numpy()).resize((128, 128), filter)) for image in images]
    levels = np.abs(255 * own.permute(0, 2, 3, 1).numpy() - np.stack(theirs))
    assert levels.mean() == pytest.approx(0.3, abs=0.05) and levels.max() < 1.2


def test_test_selection_is_labelled_on_the_card_and_in_its_header(metrics, tmp_path):
    run, model = finished(tmp_path / "run", model="cnn4", select_on="test", dataset="some/where/pets")
    watched = {**metrics, "selected_on": "test", "warnings": ["No unseen data was left."]}
    export_run(run, model, watched, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "**No unseen data was left.**" in card.text
    assert card.data.eval_results[0].metric_name.endswith("picked on test")
    assert card.data.datasets is None and card.data.base_model is None


@pytest.fixture
def small(metrics, tmp_path):
    """The arguments of an export, without the folder."""
    return *finished(tmp_path / "run", model="cnn4"), metrics


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(said, call, *arguments):
    with pytest.raises(UsageError, match=said) as error:
        call(*arguments)
    assert "\n" not in str(error.value)


def test_an_earlier_export_is_replaced_whole(small, tmp_path):
    run, model, metrics = small
    folder = tmp_path / "deep" / "out"
    export_run(run, model, metrics, folder)
    first = contents(folder)
    (folder / "model.onnx").write_bytes(b"of the first weights")
    with torch.no_grad():
        model.fc.bias.add_(1)
    export_run(run, model, metrics, folder)
    second = contents(folder)
    assert set(second) == set(first) == {"model.safetensors", "config.json", "README.md"}
    assert second["model.safetensors"] != first["model.safetensors"]
    assert os.listdir(tmp_path / "deep") == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


def _file(folder):
    folder.write_text("mine")


def _note(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


def _other_model(folder):
    timm.models.save_for_hf(timm.create_model("test_vit"), folder, safe_serialization=True)


def _broken(folder):
    folder.mkdir()
    (folder / "config.json").write_text("[")


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (_file, "in the way"),
        (_note, "holds notes.txt"),
        (_other_model, "not exported by"),
        (_broken, "not exported by"),
    ],
)
def test_what_is_no_earlier_export_is_kept(small, tmp_path, there, said):
    there(tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused(f"--export .*out: .*{said}", export_run, *small, tmp_path / "out")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("step", ["card", "rename"])
def test_a_failed_export_leaves_what_was_there(small, tmp_path, monkeypatch, earlier, step):
    folder = tmp_path / "here" / "out"
    if earlier:
        export_run(*small, folder)
    before = contents(folder) if earlier else None
    rename = Path.rename

    def full(self, *_):
        if step == "card" or self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, *_)

    if step == "card":
        monkeypatch.setattr(ModelCard, "save", full)
    else:
        monkeypatch.setattr(Path, "rename", full)
    refused("--export .*out: it cannot be written .*No space left", export_run, *small, folder)
    assert os.listdir(tmp_path / "here") == (["out"] if earlier else [])
    assert not earlier or contents(folder) == before


@pytest.fixture(scope="module")
def onnx_file(exported, tmp_path_factory):
    config, folder = open_run(exported / "cnn4").config, tmp_path_factory.mktemp("onnx")
    model = build(config).train()
    path = export_onnx(model, input_config(model, config.model), folder)
    assert model.training and os.listdir(folder) == ["model.onnx"]
    return path


def test_onnx_is_the_model_for_any_batch(exported, onnx_file):
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    images, logits = torch.load(exported / "cnn4" / "images.pt"), torch.load(exported / "cnn4" / "logits.pt")
    for part in (slice(0, 1), slice(0, 3)):
        found = session.run(None, {"images": images[part].numpy()})[0]
        np.testing.assert_allclose(found, logits[part], rtol=1e-4, atol=1e-6)


def test_an_onnx_file_that_is_not_the_model_is_not_kept(small, onnx_file, tmp_path, monkeypatch):
    run, model, _ = small
    monkeypatch.setattr(export, "_convert", lambda _model, _images, path: shutil.copy(onnx_file, path))
    (tmp_path / "out").mkdir()
    inputs = input_config(model, run.config.model)
    assert export_onnx(model, inputs, tmp_path / "out").read_bytes() == onnx_file.read_bytes()
    os.remove(tmp_path / "out" / "model.onnx")
    with torch.no_grad():
        model.fc.bias[0] += 1
    refused("--onnx: .*differ by", export_onnx, model, inputs, tmp_path / "out")
    assert not os.listdir(tmp_path / "out")


def test_onnx_says_what_to_install(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    run, model, _ = small
    inputs = input_config(model, run.config.model)
    refused(r"--onnx: onnxscript .*pip install -e '\.\[onnx\]'", export_onnx, model, inputs, tmp_path)


class FakeHub:
    """Records what would be sent."""

    sent: tuple

    def __init__(self, **_):
        pass

    def create_repo(self, repo_id, exist_ok):
        assert exist_ok
        return Address(f"https://huggingface.co/me/{repo_id}")

    def upload_folder(self, repo_id, folder_path, allow_patterns, delete_patterns, commit_message):
        assert delete_patterns == allow_patterns
        FakeHub.sent = (repo_id, {name for name in os.listdir(folder_path) if name in allow_patterns})


class Address(str):
    @property
    def repo_id(self):
        return "/".join(self.split("/")[-2:])


def test_pushing_sends_the_export_and_nothing_else(small, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "HfApi", FakeHub)
    export_run(*small, tmp_path / "out")
    (tmp_path / "out" / "diary.txt").write_text("mine")
    assert push_to_hub(tmp_path / "out", "pets") == "https://huggingface.co/me/pets"
    assert FakeHub.sent == ("me/pets", {"model.safetensors", "config.json", "README.md"})


def test_whatever_keeps_the_hub_away_is_one_line_and_the_folder_stays(small, tmp_path, monkeypatch):
    export_run(*small, tmp_path / "out")
    before = contents(tmp_path / "out")

    def not_logged_in(self, *_, **__):
        raise LocalTokenNotFoundError("Token is required.\nSee the manual.")

    refused("--push-to-hub me/pets: .*out is intact.*hf auth login", push_to_hub, tmp_path / "out", "me/pets")
    refused("--push-to-hub bad name!: .*Repo id must", push_to_hub, tmp_path / "out", "bad name!")
    monkeypatch.setattr(export, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "upload_folder", not_logged_in)
    refused("Token is required", push_to_hub, tmp_path / "out", "me/pets")
    assert contents(tmp_path / "out") == before
