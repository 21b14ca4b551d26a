"""--init-weights and --pretrained: adapted like timm does, and nothing but a head left as it began."""

import time
from urllib.error import URLError

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from cifar_dist.config import ModelConfig
from cifar_dist.errors import UsageError
from cifar_dist.models import build_model, head_parameter_names, hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _error(num_classes=10, **settings):
    with pytest.raises(UsageError) as caught:
        build_model(ModelConfig(**settings), num_classes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _logits(model, size=32):
    with torch.no_grad():
        return model.eval()(torch.linspace(-1, 1, 2 * 3 * size * size).reshape(2, 3, size, size))


def _differing(a, b):
    other = b.state_dict()
    return [name for name, value in a.state_dict().items() if not torch.equal(value, other[name])]


ONE = torch.ones(1)


def _under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


@pytest.fixture
def cnn4_file(tmp_path):
    torch.manual_seed(0)
    save_file(build_model(ModelConfig(model="cnn4"), 10).state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def _from(file, num_classes=10, model="cnn4"):
    torch.manual_seed(99)
    return build_model(ModelConfig(model=model, init_weights=str(file)), num_classes)


def test_saved_weights_come_back(cnn4_file, capsys):
    torch.manual_seed(0)
    original = build_model(ModelConfig(model="cnn4"), 10)
    assert torch.equal(_logits(_from(cnn4_file)), _logits(original))
    assert capsys.readouterr().out == f"--init-weights {cnn4_file}: loaded, with the head of 10 classes.\n"
    assert torch.equal(_logits(_from(cnn4_file.parent)), _logits(original))  # a checkpoint folder


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tensor: (tensor * 100).to(torch.int8), "features.0.weight holds int8, as quantised weights do"),
        (lambda tensor: tensor * torch.nan, "features.0.weight is not finite, as of a run that diverged"),
    ],
)
def test_numbers_that_are_no_weights_are_refused(cnn4_file, tmp_path, spoil, said):
    state = load_file(cnn4_file)
    first = next(name for name in state if name.endswith("weight"))
    save_file({**state, first: spoil(state[first])}, tmp_path / "spoilt.safetensors")
    with pytest.raises(UsageError, match=said.replace("features.0.weight", first)):
        _from(tmp_path / "spoilt.safetensors")


def test_a_head_that_is_one_number_is_refused(tmp_path):
    state = build_model(ModelConfig(model="test_vit"), 10).state_dict()
    torch.save({**state, "head.weight": torch.tensor(1.0)}, tmp_path / "odd.pth")
    with pytest.raises(UsageError, match=r"not weights of test_vit: .*\(head.weight"):
        build_model(ModelConfig(model="test_vit", init_weights=str(tmp_path / "odd.pth")), 10)


def test_of_a_runs_folder_the_moving_average_of_the_best_is_taken(cnn4_file, tmp_path):
    best = tmp_path / "run" / "checkpoints" / "best"
    best.mkdir(parents=True)
    raw = load_file(cnn4_file)
    average = {name: value + 1 if value.is_floating_point() else value for name, value in raw.items()}
    save_file(raw, best / "model.safetensors")
    assert torch.equal(_from(tmp_path / "run").fc.bias, raw["fc.bias"])
    save_file(average, best / "ema.safetensors")
    for folder in (best, tmp_path / "run"):
        assert torch.equal(_from(folder).fc.bias, raw["fc.bias"] + 1)
    assert torch.equal(_from(best / "model.safetensors").fc.bias, raw["fc.bias"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {"state_dict": {f"_orig_mod.{k}": v for k, v in state.items()}},
        lambda state: {"state_dict": _under("model.", state), "epoch": 3},  # Lightning's .ckpt
        lambda state: {"state_dict": {**_under("net.", state), "loss.weight": torch.ones(10), "acc.total": ONE}},
        lambda state: {"state_dict": _under("model._orig_mod.", state)},
        lambda state: _under("backbone.", state),
        lambda state: {"model_state_dict": state, "epoch": 3, "optimizer_state_dict": {"state": {0: {"m": ONE}}}},
        lambda state: {"net": _under("module.", state), "acc": ONE, "epoch": 200},
    ],
)
def test_wrapped_pth(cnn4_file, tmp_path, wrap):
    torch.save(wrap(load_file(cnn4_file)), tmp_path / "w.pth")
    assert not _differing(_from(tmp_path / "w.pth"), _from(cnn4_file))


def test_a_prefix_and_a_new_head(cnn4_file, tmp_path, capsys):
    state = load_file(cnn4_file)
    torch.save({"state_dict": _under("model.", state)}, tmp_path / "w.ckpt")
    model = _from(tmp_path / "w.ckpt", 100)
    said = capsys.readouterr().out
    assert "the head of 10 classes is replaced by a new one of 100" in said and "weights     of model in " in said
    assert torch.equal(model.hidden.weight, state["hidden.weight"]) and "state_dict" not in model.pretrained_cfg


@pytest.mark.parametrize("student, shown", [("model.", "model"), ("", "by itself")])
def test_a_model_that_is_there_twice_is_refused(cnn4_file, tmp_path, student, shown):
    state = load_file(cnn4_file)
    torch.save({"state_dict": _under(student, state) | _under("teacher.net.", state)}, tmp_path / "w.ckpt")
    message = _error(model="cnn4", init_weights=str(tmp_path / "w.ckpt"))
    assert message.endswith(f"w.ckpt: it holds this model 2 times ({shown}, teacher.net); save one alone.")


def test_a_prefix_before_another_models_weights(cnn4_file, tmp_path):
    torch.save({"net": load_file(cnn4_file), "epoch": 1}, tmp_path / "w.pth")
    message = _error(model="resnet18_cifar", init_weights=str(tmp_path / "w.pth"))
    assert "not weights of resnet18_cifar: 100 missing" in message and "28 unexpected (net." in message


def test_head_of_another_size_is_replaced_aloud(cnn4_file, capsys, monkeypatch):
    model = _from(cnn4_file, 100)
    said = (
        f"--init-weights {cnn4_file}: the head of 10 classes is replaced by a new one of 100, which starts at zero.\n"
    )
    assert capsys.readouterr().out == said
    state = load_file(cnn4_file)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, _row(state, name, value))]
    assert changed == ["fc.weight", "fc.bias"] and model.fc.weight.shape == (100, 256)
    assert not model.eval()(torch.randn(2, 3, 32, 32)).any()  # no class is preferred
    monkeypatch.setenv("RANK", "1")
    _from(cnn4_file, 100)
    assert capsys.readouterr().out == ""


def _row(state, name, value):
    return state[name] if state[name].shape == value.shape else torch.full_like(value, torch.nan)


@pytest.mark.parametrize("name", ["volo_d1_224", "caformer_s18", "levit_128s", "deit_tiny_distilled_patch16_224"])
def test_of_a_new_head_only_its_last_layers_are_zero(name, tmp_path):
    """Else no gradient would ever reach it: these have two classifiers, one of several layers, and BatchNorms."""
    size = {"levit_128s": 224}.get(name, 64)
    torch.manual_seed(0)
    save_file(build_model(ModelConfig(model=name, img_size=size), 1000).state_dict(), tmp_path / "w.safetensors")
    model = build_model(ModelConfig(model=name, img_size=size, init_weights=str(tmp_path / "w.safetensors")), 3).eval()
    images = torch.randn(2, 3, size, size)
    assert not model(images).any()
    torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1])).backward()
    head = {key: model.get_parameter(key) for key in head_parameter_names(model)}
    last = {key: weight for key, weight in head.items() if key.endswith("weight") and len(weight) == 3}
    assert last and all(weight.grad.any() and not weight.any() for weight in last.values())


def test_file_without_a_head(cnn4_file, tmp_path, capsys):
    body = {name: value for name, value in load_file(cnn4_file).items() if not name.startswith("fc.")}
    save_file(body, tmp_path / "body.safetensors")
    model = _from(tmp_path / "body.safetensors")
    assert "there is no head, so it gets a new one of 10" in capsys.readouterr().out
    assert torch.equal(model.hidden.weight, body["hidden.weight"])


def test_position_embedding_is_adapted_as_by_timm(tmp_path):
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.safetensors")
    file = str(tmp_path / "vit.safetensors")
    model = build_model(ModelConfig(model="vit_tiny", img_size=64, init_weights=file), 10)
    timms = timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, num_classes=10, img_size=64, pretrained_cfg_overlay={"file": file}
    )
    assert _differing(model, timms) == ["head.weight"] and model.pos_embed.shape == (1, 17, 192)


def test_original_names_of_a_head_are_understood(tmp_path):
    original = timm.create_model("convnext_atto", num_classes=7)
    state = {k.replace("head.fc.", "head.").replace("head.norm.", "norm."): v for k, v in original.state_dict().items()}
    renamed = {"stem.": "downsample_layers.0."}
    for stage in range(4):
        renamed[f"stages.{stage}.downsample."] = f"downsample_layers.{stage}."
        for block in range(6):
            renamed[f"stages.{stage}.blocks.{block}."] = f"stages.{stage}.{block}."
    old = {}
    for key, value in state.items():
        for new_name, old_name in renamed.items():
            key = key.replace(new_name, old_name)
        for new_name, old_name in (("conv_dw", "dwconv"), ("mlp.fc1", "pwconv1"), ("mlp.fc2", "pwconv2")):
            key = key.replace(new_name, old_name)
        old[key] = value
    torch.save({"model": old}, tmp_path / "convnext.pth")
    assert not _differing(_from(tmp_path / "convnext.pth", 7, "convnext_atto"), original)


def test_real_weights_equal_timms_own_loading(real_weights):
    model = _from(real_weights, 1000, "tf_efficientnet_lite0")
    timms = timm.create_model(
        "tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay={"file": str(real_weights)}
    )
    assert torch.equal(_logits(model, 64), _logits(timms, 64))


def test_real_weights_with_a_new_head_equal_timms_adaptation(real_weights):
    model = _from(real_weights, 10, "tf_efficientnet_lite0")
    timms = timm.create_model(
        "tf_efficientnet_lite0", pretrained=True, num_classes=10, pretrained_cfg_overlay={"file": str(real_weights)}
    )
    assert _differing(model, timms) == ["classifier.weight"]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny", "dla34", "tf_efficientnet_lite1"])
def test_real_weights_of_another_architecture(real_weights, name):
    message = _error(model=name, init_weights=str(real_weights))
    assert "not weights of" in message and " missing (" in message


def test_weights_of_another_native_model(cnn4_file):
    message = _error(model="resnet18_cifar", init_weights=str(cnn4_file))
    assert "not weights of resnet18_cifar: 100 missing (conv1.weight, bn1.weight, bn1.bias, …)" in message
    assert "26 unexpected (" in message


@pytest.mark.parametrize("num_classes", [10, 7])
@pytest.mark.parametrize("name", ["cnn4", "dla34"])  # timm loads DLA without being strict
def test_one_key_is_enough_to_refuse(tmp_path, name, num_classes):
    whole = timm.create_model(name, num_classes=10).state_dict()
    key = next(k for k in whole if k.endswith("conv1.weight") or k == "blocks.2.0.weight")
    torch.save({k: v for k, v in whole.items() if k != key}, tmp_path / "w.pth")
    assert f"1 missing ({key})" in _error(num_classes, model=name, init_weights=str(tmp_path / "w.pth"))
    torch.save({**whole, "extra.weight": torch.zeros(1)}, tmp_path / "w.pth")
    assert "1 unexpected (extra.weight)" in _error(num_classes, model=name, init_weights=str(tmp_path / "w.pth"))
    torch.save({**whole, key: torch.zeros(3)}, tmp_path / "w.pth")
    assert f"1 of another shape ({key})" in _error(num_classes, model=name, init_weights=str(tmp_path / "w.pth"))


def test_files_that_are_not_weights(cnn4_file, tmp_path):
    whole = cnn4_file.read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save(load_file(cnn4_file), tmp_path / "w.pth")
    (tmp_path / "short.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:50_000])
    torch.save(build_model(ModelConfig(model="cnn4"), 10), tmp_path / "pickled.pth")
    for name in ("short.safetensors", "text.pth", "empty.pth", "short.pth", "pickled.pth"):
        message = _error(model="cnn4", init_weights=str(tmp_path / name))
        assert f"--init-weights {tmp_path / name}: not a whole file of weights that can be loaded safely" in message
        assert "; give a .safetensors file, or a state_dict (no whole model) saved by torch.save." in message
        assert "weights_only" not in message and "\n" not in message
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    assert "holds no weights (its keys: epoch)" in _error(model="cnn4", init_weights=str(tmp_path / "other.pth"))
    (tmp_path / "folder").mkdir()
    for name, said in (("nowhere.pth", "there is no such file"), ("folder", "such as RUN/checkpoints/last")):
        assert said in _error(model="cnn4", init_weights=str(tmp_path / name))


def test_two_sources_of_weights(cnn4_file):
    assert "--pretrained" in _error(model="cnn4", init_weights=str(cnn4_file), pretrained=True)


def test_bad_size_is_blamed_on_the_size_and_not_on_the_weights(cnn4_file):
    assert _error(model="cnn4", img_size=40, init_weights=str(cnn4_file)).startswith("--img-size 40")


def test_weights_of_another_size_that_timm_does_not_adapt(monkeypatch, tmp_path):
    whole = timm.create_model("mixer_s32_224", num_classes=10).state_dict()
    file = tmp_path / "mixer.safetensors"
    save_file(whole, file)
    message = _error(model="mixer_s32_224", img_size=64, init_weights=str(file))
    assert "24 of another shape (" in message and message.endswith("); they may be of another --img-size than 64.")
    save_file({key: value for key, value in whole.items() if key != "stem.proj.bias"}, file)
    assert "--img-size" not in _error(model="mixer_s32_224", img_size=64, init_weights=str(file))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    _cache(
        tmp_path, timm.get_pretrained_cfg("mixer_b16_224").hf_hub_id, timm.create_model("mixer_b16_224").state_dict()
    )
    message = _error(model="mixer_b16_224", img_size=64, pretrained=True)
    assert message.startswith("--img-size 64: timm does not adapt the weights of mixer_b16_224")


def test_model_without_pretrained_weights():
    assert "timm has no weights of cnn4" in _error(model="cnn4", pretrained=True)


def test_tag_without_pretrained_weights_names_those_with():
    assert "leave it out or use --init-weights FILE" in _error(model="nfnet_f1", pretrained=True)
    message = _error(model="resnext101_32x4d.untrained", pretrained=True)
    assert f"there are: {', '.join(timm.list_pretrained('resnext101_32x4d'))}" in message


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    """Online, but nothing listens where the Hub should be."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("name", ["resnet18", "hf-hub:someone/something"])
def test_hub_that_does_not_answer(unreachable, monkeypatch, name):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("the Hub is to be asked once"))  # as its client would
    message = _error(model=name, pretrained=True)
    assert "could not be fetched" in message and "on a machine with network" in message
    assert name.startswith("hf-hub") or ("weights of resnet18" in message and "use --init-weights FILE" in message)


def test_weights_outside_the_hub(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr(hub, "urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert "weights of legacy_seresnet18 could not be fetched (URLError" in _error(
        model="legacy_seresnet18", pretrained=True
    )


def _cache(folder, repository, state):
    """The Hub's cache layout, made by hand."""
    home = folder / f"models--{repository.replace('/', '--')}"
    (home / "snapshots" / COMMIT).mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    save_file(state, home / "snapshots" / COMMIT / "model.safetensors")
    return home / "snapshots" / COMMIT


def test_pretrained_from_a_cache_made_by_hand(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "could not be fetched" in _error(model="vit_tiny", pretrained=True)
    torch.manual_seed(0)
    original = timm.create_model("vit_tiny_patch16_224")
    _cache(tmp_path, timm.get_pretrained_cfg("vit_tiny_patch16_224").hf_hub_id, original.state_dict())
    assert not _differing(build_model(ModelConfig(model="vit_tiny", pretrained=True), 1000), original)
    ten = build_model(ModelConfig(model="vit_tiny", pretrained=True), 10)
    assert torch.equal(ten.blocks[3].mlp.fc1.weight, original.blocks[3].mlp.fc1.weight)
    assert not ten.head.weight.any() and not ten.head.bias.any()
    assert "the head of 1000 classes is replaced by a new one of 10" in capsys.readouterr().out


def test_cached_weights_of_another_model_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    _cache(tmp_path, timm.get_pretrained_cfg("resnet18").hf_hub_id, timm.create_model("cnn4").state_dict())
    assert "don't fit" in _error(model="resnet18", pretrained=True)


def test_model_and_weights_from_a_cached_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    original = build_model(ModelConfig(model="cnn4"), 10)
    timm.models.save_for_hf(original, tmp_path / "export", safe_serialization=True)
    snapshot = _cache(tmp_path, "someone/cnn4-cifar", original.state_dict())
    (tmp_path / "export" / "config.json").rename(snapshot / "config.json")
    assert not _differing(build_model(ModelConfig(model="hf-hub:someone/cnn4-cifar", pretrained=True), 10), original)
