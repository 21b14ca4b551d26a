import errno
import io
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from huggingface_hub import HfApi
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from cifar_dist.data import sources
from cifar_dist.data.image_folder import IMAGE_FORMS
from cifar_dist.data.sources import open_source
from cifar_dist.errors import UsageError
from tests.data.fakes import pixels

FEATURES = Features({"picture": ImageFeature(), "kind": ClassLabel(names=["cat", "dog"])})


def pictures(number, seed=0):
    return [Image.fromarray(image) for image in pixels(number, seed)]


def columns(number=4, seed=0):
    return {"picture": pictures(number, seed), "kind": [row % 2 for row in range(number)]}


def arrays(source, split):
    images, labels = zip(*source.rows(split), strict=True)
    return [np.asarray(image) for image in images], list(labels)


@pytest.mark.parametrize(
    "layout",
    ["plain_text/{}-00000-of-00001.parquet", "data/{}.parquet", "{}-0.parquet", "{}/0.parquet", "default/{}/0.parquet"],
)
def test_parquet_in_the_layouts_of_the_hub(layout, parquet_folder, config):
    folder = parquet_folder({"train": columns(6, 1), "test": columns(4, 2)}, FEATURES, layout)
    source = open_source(config(folder))
    assert source.name == "hub" and source.class_names == ("cat", "dog")
    assert source.num_rows("train") == 6 and source.num_rows("test") == 4
    for split, number, seed in (("train", 6, 1), ("test", 4, 2)):
        images, labels = arrays(source, split)
        assert np.array_equal(images, pixels(number, seed)) and labels == columns(number)["kind"]


def test_several_shards_in_order(parquet_folder, config):
    splits = {"train-0": columns(4, 1), "train-1": columns(4, 2), "test": columns(2)}
    folder = parquet_folder(splits, FEATURES, "{}.parquet")
    images, _ = arrays(open_source(config(folder)), "train")
    assert np.array_equal(images, [*pixels(4, 1), *pixels(4, 2)])


def test_real_cifar10_equals_pyarrow_and_pil(real_cifar10, config):
    source = open_source(config(real_cifar10))
    assert len(source.class_names) == 10 and source.num_rows("train") == 50_000 and source.num_rows("test") == 10_000
    for split in ("train", "test"):
        table = pq.read_table(next(real_cifar10.glob(f"*/{split}-*.parquet"))).slice(0, 50).to_pylist()
        rows = source.rows(split)
        for expected in table:
            image, label = next(rows)
            theirs = Image.open(io.BytesIO(expected["img"]["bytes"])).convert("RGB")
            assert np.array_equal(np.asarray(image), np.asarray(theirs)) and label == expected["label"]


def test_image_folder(image_folder, config):
    (image_folder / "train" / ".cache").mkdir()
    (image_folder / "train" / "cat" / "notes.txt").write_text("no image")
    source = open_source(config(image_folder))
    assert source.class_names == ("cat", "dog") and source.num_rows("train") == 8
    images, labels = arrays(source, "train")
    assert labels == [0] * 4 + [1] * 4
    assert np.array_equal(images, [*pixels(4, 0), *pixels(4, 1)])


@pytest.mark.parametrize("suffix", [".webp", ".BMP", ".tif", ".gif", ".ppm", ".jfif"])
def test_every_form_that_pil_may_read_is_an_image(suffix, image_folder, config):
    for split in ("train", "test"):  # of one class all, of the other one more
        for file in (image_folder / split / "cat").iterdir():
            Image.open(file).save(file.with_suffix(suffix))
            file.unlink()
        Image.fromarray(pixels(1)[0]).save(image_folder / split / "dog" / f"9{suffix}")
    source = open_source(config(image_folder))
    assert source.class_names == ("cat", "dog")
    assert (source.num_rows("train"), source.num_rows("test")) == (9, 5)
    assert len(list(source.rows("train"))) == 9


def test_suffixes_are_those_of_pil():
    theirs = Image.registered_extensions()
    assert all(theirs[suffix] == form for form, suffixes in IMAGE_FORMS.items() for suffix in suffixes)


def test_a_class_without_images_is_named(image_folder, config):
    for stray in ("train/__MACOSX", "test/emu"):
        (image_folder / stray).mkdir()
    assert open_source(config(image_folder)).class_names == ("cat", "dog")
    (image_folder / "train" / "emu" / "images").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"no image lies directly in train/emu \(\.png, .*\.webp"):
        open_source(config(image_folder))
    for file in image_folder.glob("*/*/*.png"):
        file.unlink()
    for splits in (("train", "test"), ("test",)):
        with pytest.raises(UsageError, match=rf"no image lies directly in {splits[0]}/cat"):
            open_source(config(image_folder), splits)
    Image.fromarray(pixels(1)[0]).save(image_folder / "train" / "cat" / "0.png")
    assert open_source(config(image_folder / "train"), ("test",)).class_names == ("cat",)


def test_images_in_folders_within_a_class_are_not_left_out_silently(image_folder, config):
    (image_folder / "train" / "cat" / ".ipynb_checkpoints").mkdir()
    deeper = image_folder / "train" / "cat" / "tabby" / "old"
    for folder, name in ((deeper.parents[0] / "x", "notes.txt"), (deeper.parents[1] / ".ipynb_checkpoints", "a.png")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    assert open_source(config(image_folder)).class_names == ("cat", "dog")
    deeper.mkdir()
    for name in ("b.png", "a.jpg"):
        (deeper / name).write_bytes(b"")
    with pytest.raises(
        UsageError, match=r"train/cat has images in folders within it \(train/cat/tabby/old/a.jpg, 2 in"
    ):
        open_source(config(image_folder))


def test_a_name_that_is_no_text_is_refused(image_folder, config):
    file = next((image_folder / "test" / "dog").iterdir())
    os.rename(os.fsencode(file), os.fsencode(file.parent) + b"/\xff.png")
    with pytest.raises(UsageError, match=r"the name of .*/test/dog/\ufffd.png is not in UTF-8; rename it"):
        open_source(config(image_folder))


def test_saved_by_datasets(tmp_path, config):
    saved = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(columns(4, seed), FEATURES) for name, seed in (("train", 1), ("test", 2))}
    )
    saved.save_to_disk(tmp_path / "saved")
    source = open_source(config(tmp_path / "saved"))
    assert np.array_equal(arrays(source, "test")[0], pixels(4, 2)) and source.num_rows("train") == 4
    saved["train"].save_to_disk(tmp_path / "single")
    with pytest.raises(UsageError, match="save a DatasetDict with train and test"):
        open_source(config(tmp_path / "single"))


def test_digits_are_drawn_from_scikit_learn(config):
    source = open_source(config("digits"))
    train, test = arrays(source, "train"), arrays(source, "test")
    assert (len(train[0]), len(test[0])) == (source.num_rows("train"), source.num_rows("test")) == (1438, 359)
    greys, labels = load_digits(return_X_y=True)
    assert np.array_equal(np.bincount(train[1]) + np.bincount(test[1]), np.bincount(labels))
    assert np.abs(np.bincount(test[1]) - 0.2 * np.bincount(labels)).max() < 1
    drawn = np.stack([image[2::4, 2::4, 0] for image in [*train[0], *test[0]]]).reshape(-1, 64) * (16 / 255)
    nearest = NearestNeighbors(n_neighbors=1).fit(greys).kneighbors(drawn, return_distance=False)[:, 0]
    assert sorted(nearest) == list(range(1797))  # every digit once
    assert np.array_equal(labels[nearest], [*train[1], *test[1]])
    assert {image.shape for image in train[0]} == {(32, 32, 3)}
    assert min(image.min() for image in train[0]) == 0 and max(image.max() for image in train[0]) == 255


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_other_modes_become_rgb(mode, image_folder, config):
    file = image_folder / "train" / "cat" / ("0.jpg" if mode == "CMYK" else "0.png")
    (image_folder / "train" / "cat" / "0.png").unlink()
    image = Image.fromarray(pixels(1)[0]).convert(mode)
    image.save(file, **({"transparency": bytes(range(256))} if mode == "P" else {}))
    ours, _ = next(open_source(config(image_folder)).rows("train"))
    with Image.open(file) as stored:
        expected = stored.convert("RGBA").convert("RGB") if mode == "P" else stored.convert("RGB")
    assert ours.mode == "RGB" and np.array_equal(np.asarray(ours), np.asarray(expected))


def test_sixteen_bit_image_is_refused(image_folder, config):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(image_folder / "train" / "cat" / "2.png")
    with pytest.raises(UsageError, match=r"row 2 of train .*cat/2\.png\) has more than 8 bits"):
        list(open_source(config(image_folder)).rows("train"))


def test_columns_by_flag_and_without_metadata(parquet_folder, config):
    plain = {
        "raw": [{"bytes": encoded(image), "path": None} for image in pictures(4)],
        "number": [0, 2, 1, 0],
        "other": [5, 5, 5, 5],
    }
    folder = parquet_folder({"train": plain, "test": plain})
    with pytest.raises(UsageError, match=r"several columns could be the label; .*--label-column .*number \(int64\)"):
        open_source(config(folder))
    source = open_source(config(folder, label_column="number"))
    assert source.class_names == ("0", "1", "2")
    images, labels = arrays(source, "train")
    assert np.array_equal(images, pixels(4)) and labels == [0, 2, 1, 0]


@pytest.mark.parametrize("largest, refused", [(3, False), (701, False), (100_000, True), (20_000_000_000, True)])
def test_a_column_of_ids_is_no_label(largest, refused, parquet_folder, config):
    plain = {"picture": pictures(4), "id": [0, 1, 2, largest]}
    folder = parquet_folder(
        {"train": plain, "test": plain}, Features({"picture": ImageFeature(), "id": Value("int64")})
    )
    if refused:
        with pytest.raises(UsageError, match=f"'id' goes up to {largest:,} in 4 rows.*--label-column"):
            open_source(config(folder))
    else:
        assert open_source(config(folder)).class_names == tuple(map(str, range(largest + 1)))


def encoded(image):
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"image_column": "pictur"}, r"--image-column pictur: no such column; .*picture \(Image\).*mean picture"),
        ({"image_column": "kind"}, "--image-column kind: the column does not hold images"),
        ({"label_column": "picture"}, "--label-column picture: the column does not hold labels"),
        ({"label_column": "breed"}, r"--label-column breed: no such column; .*kind \(ClassLabel of 2\)"),
    ],
)
def test_wrong_columns_are_listed(flags, message, parquet_folder, config):
    folder = parquet_folder({"train": columns(), "test": columns()}, FEATURES)
    with pytest.raises(UsageError, match=message):
        open_source(config(folder, **flags))


def test_no_images_two_images_no_labels(parquet_folder, config, tmp_path):
    def attempt(values, features):
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
        return open_source(config(parquet_folder({"train": values, "test": values}, features)))

    with pytest.raises(UsageError, match=r"no column of images \(it has kind"):
        attempt({"kind": [0, 1]}, Features({"kind": FEATURES["kind"]}))
    both = {**columns(2), "second": pictures(2)}
    with pytest.raises(UsageError, match="several columns of images; choose one with --image-column"):
        attempt(both, Features({**FEATURES, "second": ImageFeature()}))
    with pytest.raises(UsageError, match="no column of class labels"):
        words = Features({"picture": ImageFeature(), "kind": Value("string")})
        attempt({"picture": pictures(2), "kind": ["a", "b"]}, words)


def test_one_class_only(parquet_folder, config):
    features = Features({"picture": ImageFeature(), "kind": ClassLabel(names=["cat"])})
    values = {"picture": pictures(2), "kind": [0, 0]}
    with pytest.raises(UsageError, match="only one class"):
        open_source(config(parquet_folder({"train": values, "test": values}, features)))


def test_train_and_test_with_different_classes(image_folder, config):
    (image_folder / "test" / "dog").rename(image_folder / "test" / "emu")
    with pytest.raises(UsageError, match=r"different classes .*only in train: dog; only in test: emu"):
        open_source(config(image_folder))


@pytest.mark.parametrize("label", [-1, 2])
def test_label_out_of_range_is_named(label, parquet_folder, config):
    plain = {"picture": columns()["picture"], "kind": [0, 1, label, 0]}
    features = Features({"picture": ImageFeature(), "kind": Value("int64")})
    train = {**plain, "kind": [0, 1, 1, 0]}
    folder = parquet_folder({"train": train, "test": plain}, features)
    with pytest.raises(UsageError, match=rf"row 2 of test .*has the label {label}, which is outside 0\.\.1"):
        list(open_source(config(folder)).rows("test"))


def test_empty_split(parquet_folder, config):
    folder = parquet_folder({"train": columns(), "test": {"picture": [], "kind": []}}, FEATURES)
    with pytest.raises(UsageError, match="the test split is empty"):
        open_source(config(folder))


def test_missing_splits_list_what_is_there(image_folder, parquet_folder, tmp_path, config):
    folder = parquet_folder({"train": columns(), "validation": columns()}, FEATURES, "{}.parquet")
    message = (
        r"no test split \(splits: train, validation; the folder holds train\.parquet, .*\); it needs train and test: "
        r"rename validation to test \(val is then cut from train\), or set images of train apart as test\."
    )
    with pytest.raises(UsageError, match=message):
        open_source(config(folder))
    shutil.rmtree(image_folder / "test")
    message = r"no test split \(splits: train; the folder holds train\); it needs train and test: set images of train"
    with pytest.raises(UsageError, match=message):
        open_source(config(image_folder))
    shutil.copytree(image_folder / "train", image_folder / "val")  # ImageNet's layout
    with pytest.raises(UsageError, match=r"no test split .*: rename val to test \(val is then cut from train\), or"):
        open_source(config(image_folder))
    (image_folder / "val").rename(image_folder / "test")
    assert not open_source(config(image_folder)).has_val
    shutil.rmtree(image_folder / "train")
    with pytest.raises(UsageError, match=r"no train split \(splits: test; .*\); it needs train and test\."):
        open_source(config(image_folder))
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns(), FEATURES)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match="no test split"):
        open_source(config(tmp_path / "saved"))


def test_folder_with_several_data_sets(parquet_folder, config):
    for name in ("small", "large"):
        folder = parquet_folder({"train": columns(), "test": columns()}, FEATURES, name + "/{}.parquet")
    with pytest.raises(UsageError, match=r"several data sets inside; give one of .*large, .*small"):
        open_source(config(folder))


def test_truncated_and_damaged_parquet(parquet_folder, config):
    folder = parquet_folder({"train": columns(40), "test": columns()}, FEATURES, "{}.parquet")
    file = folder / "train.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"train\.parquet is truncated or no parquet file"):
        open_source(config(folder))
    file.write_bytes(whole[:20] + os.urandom(len(whole) // 2) + whole[20 + len(whole) // 2 :])
    with pytest.raises(UsageError, match="train"):
        list(open_source(config(folder)).rows("train"))


def test_corrupt_image_is_named(image_folder, config):
    file = image_folder / "train" / "dog" / "1.png"
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(UsageError, match=r"row 5 of train .*dog/1\.png\) cannot be decoded"):
        list(open_source(config(image_folder)).rows("train"))


def test_corrupt_image_in_parquet_is_named(parquet_folder, config):
    broken = {"raw": [{"bytes": b"no image", "path": "a.png"}] * 2, "number": [0, 1]}
    with pytest.raises(UsageError, match=r"row 0 of train .*\(a\.png\) cannot be decoded"):
        list(open_source(config(parquet_folder({"train": broken, "test": broken}))).rows("train"))


def test_unknown_names_and_paths(tmp_path, config):
    with pytest.raises(UsageError, match=r"cifar11: no such data set or path\. Did you mean cifar10.*Known.*digits"):
        open_source(config("cifar11"))
    with pytest.raises(UsageError, match="nothing/here: no such file or folder"):
        open_source(config(tmp_path / "nothing/here"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="an empty folder, which is no form known here; give a folder of parquet"):
        open_source(config(tmp_path / "empty"))
    (tmp_path / "notes.txt").write_text("no data")
    with pytest.raises(UsageError, match="a file of no known form"):
        open_source(config(tmp_path / "notes.txt"))
    with pytest.raises(UsageError, match="the folder holds"):
        open_source(config(tmp_path))


def test_fingerprint_follows_the_files(image_folder, tmp_path, config):
    first = open_source(config(image_folder))
    moved = shutil.copytree(image_folder, tmp_path / "moved", copy_function=shutil.copyfile)  # new times
    copied = open_source(config(moved))
    assert copied.fingerprint == first.fingerprint  # a copy is the same data …
    assert copied.stamp != first.stamp  # … but is decoded anew
    (moved / "train" / "cat" / "0.png").rename(moved / "train" / "cat" / "9.png")
    assert open_source(config(moved)).fingerprint != first.fingerprint


@pytest.mark.parametrize("form", ["image_folder", "cifar10_pickles"])
def test_every_file_is_part_of_what_a_set_is(form, request, config):
    """Else old pixels would come from the cache, and a run would go on with other data."""
    root = request.getfixturevalue(form)
    files = [path for path in sorted(root.rglob("*")) if path.suffix == ".png" or "_batch" in path.name]
    assert len(files) == (12 if form == "image_folder" else 6)
    for path in files:
        before, times = open_source(config(root)), path.stat()
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1_000_000_000))
        later = open_source(config(root))
        assert (later.fingerprint == before.fingerprint) and later.stamp != before.stamp, path
        path.write_bytes(path.read_bytes() + b"\0")
        assert open_source(config(root)).fingerprint != before.fingerprint, path


def test_odd_paths_are_refused_in_one_line(config, image_folder):
    for dataset in ("", "~nobody-of-this-name/x", "x" * 5000, "a\0b"):
        with pytest.raises(UsageError) as error:
            open_source(config(dataset))
        assert "\n" not in str(error.value)
    (image_folder / "train" / "cat" / "lost.png").symlink_to("/no/such/image.png")
    with pytest.raises(UsageError, match=r"lost.png cannot be read"):
        open_source(config(image_folder))


@pytest.mark.parametrize("where, why", [("file", "Not a directory"), ("/proc/nope", "No such file or directory")])
def test_an_unwritable_cache_of_hugging_face_is_said(where, why, image_folder, parquet_folder, config, monkeypatch):
    (image_folder.parent / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", image_folder.parent / where / "datasets")
    values = {"raw": [{"bytes": b"", "path": None}] * 2, "number": [0, 1]}
    for dataset in ("digits", image_folder, parquet_folder({"train": values, "test": values})):
        with pytest.raises(UsageError, match=rf"{where}/datasets cannot be written \({why}\); set HF_HOME to"):
            open_source(config(dataset))


def hub_cache(folder, root, revision="a" * 40):
    """A cache of the Hub as its client keeps it, made by hand."""
    repository = root / "datasets--uoft-cs--cifar10"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(folder, repository / "snapshots" / revision)
    return repository / "snapshots" / revision


def test_hub_name_from_the_cache_needs_no_network(parquet_folder, tmp_path, config, monkeypatch):
    folder = parquet_folder({"train": columns(6), "test": columns(4)}, FEATURES)
    snapshot = hub_cache(folder, tmp_path / "hf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    for request in ("repo_info", "dataset_info", "list_repo_tree"):
        monkeypatch.setattr(HfApi, request, lambda *_, **__: pytest.fail("asked the Hub"))
    source = open_source(config("cifar10"))
    assert source.name == "cifar10" and source.fingerprint == "a" * 40 and source.class_names == ("cat", "dog")
    assert np.array_equal(arrays(source, "test")[0], pixels(4))
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    next(snapshot.rglob("test*")).unlink()
    with pytest.raises(UsageError, match=r"cifar10: the Hub cannot be reached .*use `digits`.*cifar-10-batches-py"):
        open_source(config("cifar10"))


def test_silent_hub_is_given_up_quickly(tmp_path):
    """A server that takes the connection and never answers: the worst kind of no network."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        code = (
            "from cifar_dist.data.sources import open_source; from cifar_dist.config import DataConfig\n"
            "from cifar_dist.distributed.ending import run_main\n"
            "import atexit, time; began = time.monotonic(); atexit.register(lambda: print(time.monotonic() - began))\n"
            "run_main(lambda: open_source(DataConfig(dataset='cifar100')))"
        )
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "PYTHONPATH": os.getcwd()}
        environment.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=180
        )
    assert done.returncode == 2 and "use `digits`" in done.stderr and done.stderr.count("\n") == 1
    assert float(done.stdout) < 20  # 15 of them at most in the Hub's client


def refusal(dataset, config, split="train", **settings):
    with pytest.raises(UsageError) as refused:
        list(open_source(config(dataset, **settings)).rows(split))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_damaged_images_are_named_all_at_once(image_folder, config, monkeypatch):
    for file in ("cat/1.png", "cat/3.png", "dog/0.png"):
        (image_folder / "train" / file).write_bytes(b"no image")
    said = refusal(image_folder, config)
    assert said.count("cannot be decoded") == 3
    for row in (1, 3, 4):
        assert f"row {row} of train" in said
    monkeypatch.setattr(sources, "_MOST_DAMAGED", 2)
    said = refusal(image_folder, config)
    assert said.count("cannot be decoded") == 2 and said.endswith(" There may be more.")


def test_images_beside_the_folders_of_classes_are_not_left_out_silently(image_folder, config):
    (image_folder / "train" / "cat" / "0.png").rename(image_folder / "train" / "x.png")
    said = refusal(image_folder, config)
    assert "train has images beside its folders of classes (x.png, 1 in all); sort them into these" in said


def test_what_programs_leave_behind_is_no_data_and_a_class_may_begin_with_underscores(image_folder, config):
    for split in ("train", "test"):
        (image_folder / split / "dog").rename(image_folder / split / "__dog__")
        (image_folder / split / "__MACOSX").mkdir()
        (image_folder / split / "cat" / "._0.png").write_bytes(b"macOS's")
    source = open_source(config(image_folder))
    assert source.class_names == ("__dog__", "cat")
    assert len(list(source.rows("train"))) == 8


@pytest.mark.parametrize("name", ["meta", "train/labels.parquet", "train.parquet"])
def test_a_table_or_another_file_beside_images_does_not_hide_them(image_folder, config, name):
    pq.write_table(pa.table({"x": [1]}), image_folder / name)
    assert len(list(open_source(config(image_folder)).rows("train"))) == 8


def test_near_misses_are_told(image_folder, config, tmp_path):
    (tmp_path / "above").mkdir()
    image_folder.rename(tmp_path / "above" / "pets")
    assert f"({tmp_path}/above/pets looks like one: give that)" in refusal(tmp_path / "above", config)
    folder = tmp_path / "above" / "pets"
    assert "(2 folders with images: set some apart as test, docs/data.md shows how)" in refusal(
        folder / "train", config
    )
    for split in ("train", "test"):
        (folder / split).rename(folder / split.title())
    assert "(write Test and Train in small letters)" in refusal(folder, config)


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("label", [0.7, 1.2], "the column 'label' of test does not hold labels, as train's does"),
        ("label", ["cat", "dog"], "the column 'label' of test does not hold labels, as train's does"),
        ("image", [b"1", b"2"], "the column 'image' of test does not hold images, as train's does"),
    ],
)
def test_a_column_of_test_that_is_of_another_type_is_refused(image_folder, config, tmp_path, column, values, said):
    files = sorted((image_folder / "train").glob("*/0.png"))
    rows = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files], "label": [0, 1]}
    (tmp_path / "set").mkdir()
    for split, table in (("train", rows), ("test", rows | {column: values})):
        pq.write_table(pa.table(table), tmp_path / "set" / f"{split}.parquet")
    assert said in refusal(tmp_path / "set", config)


@pytest.mark.parametrize("change", ["nullable", "int32", "order", "large_binary", "extra first"])
def test_files_of_a_split_may_differ_where_datasets_can_cast(image_folder, config, tmp_path, change):
    files = sorted((image_folder / "train").glob("*/0.png"))
    rows = pa.table({"image": [{"bytes": file.read_bytes(), "path": None} for file in files], "label": [0, 1]})
    other = {
        "nullable": lambda: rows.cast(pa.schema([rows.schema.field("image"), pa.field("label", pa.int64(), False)])),
        "int32": lambda: rows.set_column(1, "label", rows["label"].cast(pa.int32())),
        "order": lambda: rows.select(["label", "image"]),
        "large_binary": lambda: rows.set_column(
            0, "image", rows["image"].cast(pa.struct([("bytes", pa.large_binary()), ("path", pa.null())]))
        ),
        "extra first": lambda: rows.append_column("more", pa.array(["a", "b"])),
    }[change]()
    (tmp_path / "set").mkdir()
    for name, table in (("train-0", other), ("train-1", rows), ("test", rows)):
        pq.write_table(table, tmp_path / "set" / f"{name}.parquet")
    assert [label for _, label in open_source(config(tmp_path / "set")).rows("train")] == [0, 1, 0, 1]


def test_images_win_over_a_table_of_test_for_training_and_for_scoring(image_folder, config):
    pq.write_table(pa.table({"x": [1]}), image_folder / "test.parquet")
    for splits in (("train", "test"), ("test",)):
        assert len(list(open_source(config(image_folder), splits).rows("test"))) == 4


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_a_set_that_was_saved_with_a_format_is_read_without_it(image_folder, config, tmp_path, kind):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
    files = sorted((image_folder / "train").glob("*/0.png"))
    table = Dataset.from_dict({"image": [str(file) for file in files], "label": [0, 1]}, features=features)
    DatasetDict(train=table.with_format(kind, columns=["label"]), test=table).save_to_disk(tmp_path / "saved")
    assert [label for _, label in open_source(config(tmp_path / "saved")).rows("train")] == [0, 1]


def test_a_folder_without_permission_is_one_line(image_folder, config, monkeypatch):
    plain = Path.iterdir

    def closed(self):
        if self.name == "cat":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return plain(self)

    monkeypatch.setattr(Path, "iterdir", closed)
    said = refusal(image_folder, config)
    assert said.endswith("train/cat cannot be read (Permission denied); give yourself access to it.")
