import io
import pickle
import tarfile

import numpy as np
import pytest
import torchvision

from cifar_dist.data.sources import open_source
from cifar_dist.errors import UsageError


def read(source, split):
    images, labels = zip(*source.rows(split), strict=True)
    return np.stack([np.asarray(image) for image in images]), list(labels)


def make_tar(folder, path, names=None):
    with tarfile.open(path, "w:gz") as archive:
        for name in names or sorted((file.name for file in folder.iterdir()), reverse=True):
            archive.add(folder / name, f"{folder.name}/{name}")
    return path


def torchvision_reader(kind, folder, train, monkeypatch):
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(kind, "_load_meta", lambda self: None)
    return kind(folder.parent, train=train)


@pytest.mark.parametrize("form", ["folder", "parent", "tar"])
def test_cifar10_equals_torchvision(form, cifar10_pickles, tmp_path, config, monkeypatch):
    folder = cifar10_pickles
    path = {"folder": folder, "parent": folder.parent, "tar": tmp_path / "cifar-10-python.tar.gz"}[form]
    if form == "tar":
        make_tar(folder, path)
    source = open_source(config(path))
    assert source.class_names == tuple(f"class {i}" for i in range(10))
    for split in ("train", "test"):
        theirs = torchvision_reader(torchvision.datasets.CIFAR10, folder, split == "train", monkeypatch)
        images, labels = read(source, split)
        assert np.array_equal(images, theirs.data) and labels == theirs.targets


@pytest.mark.parametrize(("flags", "classes"), [({}, 100), ({"label_column": "coarse_label"}, 20)])
def test_cifar100_fine_and_coarse(flags, classes, cifar100_pickles, config, monkeypatch):
    source = open_source(config(cifar100_pickles, **flags))
    assert len(source.class_names) == classes
    images, labels = read(source, "test")
    theirs = torchvision_reader(torchvision.datasets.CIFAR100, cifar100_pickles, False, monkeypatch)
    assert np.array_equal(images, theirs.data)
    assert labels == (theirs.targets if classes == 100 else [label // 5 for label in theirs.targets])


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_any_pickle_protocol(protocol, cifar10_pickles, config):
    before = read(open_source(config(cifar10_pickles)), "test")
    for file in cifar10_pickles.iterdir():
        content = pickle.loads(file.read_bytes())
        file.write_bytes(pickle.dumps({key.encode(): value for key, value in content.items()}, protocol=protocol))
    images, labels = read(open_source(config(cifar10_pickles)), "test")
    assert np.array_equal(images, before[0]) and labels == before[1]


def test_names_of_older_numpy(cifar10_pickles, config):
    """The published archives were written when numpy.core was not yet numpy._core."""
    before = read(open_source(config(cifar10_pickles)), "test")[0]
    batch = cifar10_pickles / "test_batch"
    assert b"cnumpy._core.multiarray" in batch.read_bytes()
    batch.write_bytes(batch.read_bytes().replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    assert np.array_equal(read(open_source(config(cifar10_pickles)), "test")[0], before)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("where", ["folder", "tar"])
@pytest.mark.parametrize("file", ["batches.meta", "test_batch"])
def test_pickle_with_code_is_refused_and_not_run(where, file, cifar10_pickles, tmp_path, config):
    trace = tmp_path / "trace"
    (cifar10_pickles / file).write_bytes(pickle.dumps({"data": Attack(str(trace)), "label_names": Attack(str(trace))}))
    path = make_tar(cifar10_pickles, tmp_path / "x.tgz") if where == "tar" else cifar10_pickles
    with pytest.raises(UsageError, match=rf"{file} is refused.*io\.open"):
        list(open_source(config(path)).rows("test"))
    assert not trace.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "os.system", "numpy.load", "numpy.ctypeslib.load_library"])
def test_only_array_parts_are_admitted(name, cifar10_pickles, config):
    module, _, function = name.rpartition(".")
    (cifar10_pickles / "batches.meta").write_bytes(f"c{module}\n{function}\n(V1\ntR.".encode())
    with pytest.raises(UsageError, match=f"asks for {name}"):
        open_source(config(cifar10_pickles))


def test_only_latin1_bytes_are_admitted(cifar10_pickles, config):
    (cifar10_pickles / "batches.meta").write_bytes(b"c_codecs\nencode\n(V1\nVrot13\ntR.")
    with pytest.raises(UsageError, match="bytes in encoding rot13"):
        open_source(config(cifar10_pickles))


def test_incomplete_archive_names_what_is_missing(cifar10_pickles, tmp_path, config):
    tar = make_tar(cifar10_pickles, tmp_path / "y.tar.gz", ["batches.meta", "data_batch_1", "test_batch"])
    with pytest.raises(UsageError, match="incomplete copy of cifar-10-batches-py: data_batch_2, data_batch_3"):
        open_source(config(tar))
    (cifar10_pickles / "test_batch").unlink()
    with pytest.raises(UsageError, match="no test split of cifar-10-batches-py: test_batch is missing"):
        open_source(config(cifar10_pickles))


@pytest.mark.parametrize("damage", ["truncated", "labels", "shape", "no dict"])
def test_damaged_batch_is_named(damage, cifar10_pickles, config):
    batch = cifar10_pickles / "data_batch_3"
    content = pickle.loads(batch.read_bytes())
    if damage == "truncated":
        batch.write_bytes(batch.read_bytes()[:500])
    else:
        content["labels"] = content["labels"][:-1]
        shape = {"labels": [], "data": np.zeros((4, 5), np.uint8)}
        batch.write_bytes(pickle.dumps({"labels": content, "shape": shape, "no dict": [1]}[damage]))
    with pytest.raises(UsageError, match="data_batch_3"):
        list(open_source(config(cifar10_pickles)).rows("train"))


def test_damaged_and_foreign_tars(cifar10_pickles, tmp_path, config):
    whole = make_tar(cifar10_pickles, tmp_path / "whole.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.tar.gz").write_bytes(b"hello")
    for name in ("cut", "text"):
        with pytest.raises(UsageError, match="not a complete tar file"):
            open_source(config(tmp_path / f"{name}.tar.gz"))
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("elsewhere/file"), io.BytesIO())
    with pytest.raises(UsageError, match="without CIFAR's pickles"):
        open_source(config(tmp_path / "other.tar.gz"))


def test_reading_a_tar_writes_nothing(cifar10_pickles, tmp_path, config):
    tar = make_tar(cifar10_pickles, tmp_path / "c.tgz")
    before = sorted(tmp_path.rglob("*"))
    list(open_source(config(tar)).rows("train"))
    assert sorted(tmp_path.rglob("*")) == before
