"""Files from elsewhere: nothing in them is run, none fills the memory, and each is refused in one clear line.

What is planted would create the file `trace`, which must not be there afterwards.
"""

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import time
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from cifar_dist import durable
from cifar_dist.config import DataConfig, ModelConfig
from cifar_dist.data import pickles, plain_pickle
from cifar_dist.data.sources import decode_image, open_source
from cifar_dist.errors import UsageError
from cifar_dist.models import build_model
from tests.data.conftest import cifar10_pickles, image_folder, parquet_folder  # noqa: F401  fixtures


@pytest.fixture
def config(tmp_path):
    return lambda dataset: DataConfig(dataset=str(dataset), cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def trace(tmp_path):
    """The file that code from elsewhere would create."""
    return tmp_path / "trace"


@pytest.fixture
def little_memory():
    """Room for 2 GiB more than is held now, so that a bomb fails the test and not the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refusal(call, *arguments):
    """What the one line says."""
    with pytest.raises(UsageError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows_of(dataset, config):
    return list(open_source(config(dataset)).rows("test"))


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(trace):
    """Pickles that run code where they are loaded by `pickle.load`."""
    command = f"touch {trace}"
    objects = np.array([Call(os.system, command), 1], dtype=object)
    return {
        "os.system": pickle.dumps(Call(os.system, command)),
        "eval": pickle.dumps(Call(eval, f"__import__('pathlib').Path({str(trace)!r}).touch()")),
        "object array": pickle.dumps({"data": objects}, 2),
        "nested": pickle.dumps({"data": [({"a": Call(os.system, command)},)]}),
        "in the arguments of another call": pickle.dumps(Call(list, (Call(os.system, command),))),
        "INST": f"(S{command!r}\nios\nsystem\n.".encode(),
        "OBJ": f"(cos\nsystem\nS{command!r}\no.".encode(),
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93"
        + b"\x8c" + bytes([len(command)]) + command.encode() + b"\x85R.",
    }  # fmt: skip


def test_the_attacks_work_where_nothing_stops_them(trace):
    """Else the tests below could not fail."""
    for name, attack in attacks(trace).items():
        trace.unlink(missing_ok=True)
        try:
            pickle.loads(attack)
        except Exception as error:
            assert trace.exists(), (name, error)
        assert trace.exists(), name


@pytest.mark.parametrize("attack", attacks("x"))
def test_pickled_code_is_not_run(attack, trace, cifar10_pickles, config):  # noqa: F811
    (cifar10_pickles / "test_batch").write_bytes(attacks(trace)[attack])
    assert "test_batch is refused" in refusal(rows_of, cifar10_pickles, config)
    assert not trace.exists()


TRICKS = {  # content of a batch -> what is said of it
    "attributes of a function": (b"c_codecs\nencode\n(N(dV__defaults__\n(Vutf8\ntstb.", "changes what is no array"),
    "attributes of a class": (b"cnumpy\ndtype\n(N(dVname\nVx\nstb.", "changes what is no array"),
    "call of an array": (b"cnumpy\nndarray\n(I4000000000\ntR.", "calls what is no part of an array"),
    "array of objects": (b"cnumpy\ndtype\n(VO8\ntR.", "an array of 'O8'"),
    "record with objects": (b"cnumpy\ndtype\n(Vu1\ntR(I3\nV|\nN(Va\nt(dI0\nI0\nI0\ntb.", "an array of records"),
    "huge shape": (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR"
        b"(I1\n(I9999999999\ntcnumpy\ndtype\n(Vu1\ntRI0\nVa\ntb.",
        "another size than its content",
    ),
    "content that is a number": (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR"
        b"(I1\n(I9999999999\ntcnumpy\ndtype\n(Vu1\ntRI0\nI9999999999\ntb.",
        "without content",
    ),
    "other bytes": (b"c_codecs\nencode\n(Vabc\nVzlib_codec\ntR.", "bytes in encoding zlib_codec"),
    "persistent id": (b"Pelsewhere\n.", "does what no array needs"),
    "extension": (b"\x80\x04\x82\x01.", "does what no array needs"),
    "hash that takes forever": (b"(dI1\nI1\n\x86" + b"2\x86" * 60 + b"I1\ns.", "keys that are no words"),
    "the same as items": (b"}(I1\nI1\n\x86" + b"2\x86" * 60 + b"I1\nu.", "keys that are no words"),
    "the same in a dict": (b"(I1\nI1\n\x86" + b"2\x86" * 60 + b"I1\nd.", "keys that are no words"),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_with_arrays_and_opcodes_are_refused(trick, cifar10_pickles, config, little_memory):  # noqa: F811
    content, said = TRICKS[trick]
    (cifar10_pickles / "test_batch").write_bytes(content)
    start = time.monotonic()
    message = refusal(rows_of, cifar10_pickles, config)
    assert "test_batch is refused" in message and said in message
    assert time.monotonic() - start < 60
    assert plain_pickle._latin1.__defaults__ == ("latin1",)


@pytest.mark.parametrize(
    "content",
    [b"}Va\nI1\nr\xff\xff\xff\x7fs.", b"\x80\x04\x8e" + (1 << 45).to_bytes(8, "little") + b"a.", b"}p9999999999\n."],
    ids=["index of the memo", "length", "index in words"],
)
def test_a_few_bytes_do_not_fill_the_memory(content, cifar10_pickles, config, little_memory):  # noqa: F811
    (cifar10_pickles / "test_batch").write_bytes(content)
    message = refusal(rows_of, cifar10_pickles, config)
    assert "test_batch" in message and "MemoryError" not in message


def test_content_used_again_and_again_is_counted(cifar10_pickles, config, monkeypatch):  # noqa: F811
    monkeypatch.setattr(plain_pickle, "_MOST_BYTES", 100_000)
    again = b"c_codecs\nencode\n(h\x00Vlatin1\ntR"
    (cifar10_pickles / "test_batch").write_bytes(b"(V" + b"a" * 20_000 + b"\nq\x00" + again * 10 + b"l.")
    assert "unpacks to more than 100,000 bytes" in refusal(rows_of, cifar10_pickles, config)


def test_class_names_that_explode_are_refused(cifar10_pickles, config):  # noqa: F811
    bomb = b"}Vlabel_names\n(lI1\nI1\n\x86" + b"2\x86" * 60 + b"as."
    (cifar10_pickles / "batches.meta").write_bytes(bomb)
    assert "label_names of batches.meta are no words" in refusal(rows_of, cifar10_pickles, config)


def test_a_pickle_larger_than_any_of_cifar_is_not_read(cifar10_pickles, config):  # noqa: F811
    with (cifar10_pickles / "test_batch").open("wb") as file:
        file.truncate(300 << 30)
    assert "test_batch is refused, with 307,200 MiB it is larger" in refusal(rows_of, cifar10_pickles, config)


@pytest.fixture
def tar(cifar10_pickles, tmp_path):  # noqa: F811
    """Packs the pickles with one member more; `test_batch` is left out if that is the member's name."""

    def pack(member, content=b""):
        path = tmp_path / "cifar-10-python.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(member, io.BytesIO(content))
            for file in cifar10_pickles.iterdir():
                if not member.name.endswith(file.name):
                    archive.add(file, f"cifar-10-batches-py/{file.name}")
        return path

    return pack


def member(name, kind=tarfile.REGTYPE, size=0, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    return info


@pytest.mark.parametrize("name", ["../trace", "cifar-10-batches-py/../../trace", "/{}"])
def test_a_tar_that_leads_out_of_itself_is_refused(name, trace, tar, config):
    path = tar(member(name.format(trace), size=4), b"mine")
    assert "leads out of its folder" in refusal(rows_of, path, config)
    assert not trace.exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_of_a_tar_are_no_files(kind, tar, config, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 3]}))
    path = tar(member("cifar-10-batches-py/test_batch", kind, target=str(secret)))
    assert "test_batch is missing" in refusal(rows_of, path, config)


def test_a_member_that_unpacks_to_gigabytes_is_not_read(tar, config, tmp_path, monkeypatch):
    path = tmp_path / "cifar-10-python.tar.gz"
    header = member("cifar-10-batches-py/test_batch", size=10 << 30)
    import gzip

    with gzip.open(path, "wb") as file:
        file.write(header.tobuf())
        file.write(bytes(1 << 20))
    monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda *_: pytest.fail("it was read"))
    assert "test_batch is refused, with 10,240 MiB it is larger" in refusal(rows_of, path, config)


def test_a_name_of_gigabytes_and_many_members_are_refused(config, tmp_path, monkeypatch, little_memory):
    import gzip

    path = tmp_path / "x.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(member("x", tarfile.XHDTYPE, size=1 << 20).tobuf() + bytes(1 << 20))
    assert "a name of 1,048,576 bytes" in refusal(rows_of, path, config)
    monkeypatch.setattr(pickles, "_LARGEST_TAR", 100_000)
    with tarfile.open(path, "w:gz") as archive:
        for number in range(300):
            archive.addfile(member(f"file {number}"))
    assert "larger than any CIFAR's" in refusal(rows_of, path, config)


def png(width, height):
    stream = io.BytesIO()
    Image.new("1", (width, height)).save(stream, "png")
    return stream.getvalue()


@pytest.mark.parametrize("factor", [1.5, 3])
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_an_image_of_too_many_pixels_is_named(factor, action, monkeypatch):
    """Also one for which PIL only warns."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    content = png(100, int(100 * factor))
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        message = refusal(decode_image, {"bytes": content, "path": "a.png"}, lambda: "--dataset x: row 7 of train")
    assert message.startswith("--dataset x: row 7 of train (a.png) cannot be decoded") and "pixels" in message
    assert np.asarray(decode_image({"bytes": png(100, 100), "path": None}, lambda: "row 8")).shape == (100, 100, 3)


def test_a_bomb_is_one_line_of_a_process(image_folder, config, tmp_path):  # noqa: F811
    (image_folder / "train" / "cat" / "1.png").write_bytes(png(10_000, 10_000))  # PIL warns from 89 million on
    code = (
        "import sys; from cifar_dist.config import DataConfig; from cifar_dist.data.sources import open_source;"
        "from cifar_dist.distributed.ending import run_main;"
        "run_main(lambda: list(open_source(DataConfig(dataset=sys.argv[1])).rows('train')))"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", code, image_folder], env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "row 1 of train" in done.stderr and "100,000,000 pixels" in done.stderr


def test_an_image_that_asks_for_a_program_is_refused(trace, tmp_path, monkeypatch):
    """PIL gives PostScript to Ghostscript."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(Exception):  # noqa: B017  PIL by itself does start it
        Image.open(io.BytesIO(content)).load()
    assert trace.exists()
    trace.unlink()
    said = refusal(decode_image, {"bytes": content, "path": None}, lambda: "row 0")
    assert said.startswith("row 0 cannot be decoded (it is none of PNG, JPEG, WEBP, ")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("path", "said"), [("/dev/zero", "not a file"), ("/nowhere.png", "no such file"), ("/", "not a file")]
)
def test_a_row_that_names_no_file_is_refused(path, said, little_memory):
    message = refusal(decode_image, {"bytes": None, "path": path}, lambda: "row 0")
    assert message.startswith(f"row 0 ({path}) cannot be decoded ({path}: {said})")


def test_scripts_beside_parquet_are_not_run(parquet_folder, trace, config):  # noqa: F811
    values = {"raw": [{"bytes": png(8, 8), "path": None}] * 2, "number": [0, 1]}
    folder = parquet_folder({"train": values, "test": values})
    script = f"open({str(trace)!r}, 'w')\n"
    for place in (folder, folder / "plain_text"):
        for name in (folder.name, place.name, "dataset", "__init__", "setup"):
            (place / f"{name}.py").write_text(script)
        (place / "README.md").write_text("---\ntrust_remote_code: true\n---\n")
    source = open_source(DataConfig(dataset=str(folder), label_column="number"))
    assert len(list(source.rows("train"))) == 2
    assert not trace.exists()


def test_a_type_pickled_into_parquet_is_not_loaded(parquet_folder, trace, config):  # noqa: F811
    values = {"raw": [{"bytes": png(8, 8), "path": None}] * 2, "number": [0, 1]}
    folder = parquet_folder({"train": values, "test": values})
    for file in folder.rglob("*.parquet"):
        table = pq.read_table(file)
        hidden = {
            b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": attacks(trace)["os.system"],
        }
        fields = [field.with_metadata(hidden) if field.name == "number" else field for field in table.schema]
        pq.write_table(table.cast(pa.schema(fields)), file)
    try:
        list(open_source(DataConfig(dataset=str(folder), label_column="number")).rows("train"))
    except UsageError as error:
        assert "\n" not in str(error)
    assert not trace.exists()


def weights_refusal(file):
    return refusal(build_model, ModelConfig(model="cnn4", init_weights=str(file)), 10)


@pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter:DeprecationWarning")  # of torch.load
@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "tar"])
def test_code_in_weights_is_not_run(form, trace, tmp_path):
    file = tmp_path / "w.pth"
    evil = {"state_dict": {"conv.weight": Call(os.system, f"touch {trace}")}}
    if form == "plain pickle":
        file.write_bytes(pickle.dumps(evil))
    elif form == "tar":
        with tarfile.open(file, "w") as archive:
            for name in ("storages", "tensors", "pickle"):
                content = pickle.dumps(Call(os.system, f"touch {trace}"))
                archive.addfile(member(name, size=len(content)), io.BytesIO(content))
    else:
        torch.save(evil, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(Exception):  # noqa: B017  whatever becomes of it, the attack is real
        torch.load(file, weights_only=False)
        raise ZeroDivisionError
    assert trace.exists()
    trace.unlink()
    assert f"--init-weights {file}: not a whole file of weights" in weights_refusal(file)
    assert not trace.exists()


def safetensors_with(header, length=None, body=bytes(16)):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


F32 = {"dtype": "F32", "shape": [2]}


@pytest.mark.parametrize(
    "content",
    [
        safetensors_with({"a": {**F32, "data_offsets": [0, 8]}}, length=1 << 62),
        safetensors_with({"a": {**F32, "data_offsets": [0, 8]}}, length=(100 << 20) + 1),
        safetensors_with({"a": {**F32, "data_offsets": [1 << 40, (1 << 40) + 8]}}),
        safetensors_with({"a": {**F32, "data_offsets": [0, 8]}, "b": {**F32, "data_offsets": [4, 12]}}),
        safetensors_with({"a": {**F32, "data_offsets": [8, 0]}}),
        safetensors_with({"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 16]}}),
        safetensors_with({"a": {"dtype": "OBJ", "shape": [2], "data_offsets": [0, 16]}}),
    ],
    ids=["huge header", "large header", "beyond the file", "overlap", "backwards", "overflow", "type"],
)
def test_headers_that_lie_are_refused(content, tmp_path, little_memory):
    file = tmp_path / "w.safetensors"
    file.write_bytes(content)
    assert f"--init-weights {file}: not a whole file of weights" in weights_refusal(file)
    file.write_bytes(save({"a": torch.zeros(2)}))  # one that does not lie gets further
    assert "not weights of cnn4" in weights_refusal(file)


@pytest.mark.parametrize(
    "state",
    [
        {"dtype": "load"}, {"dtype": "ops"}, {"dtype": "nowhere"}, {"dtype": ["float32"]}, {"tensor": "missing"},
        {"call": "os.system"}, {"dict": 3}, {"dict": [[1]]}, {"list": None}, {"dtype": "float32", "tensor": "a"}, {},
        {"dict": [[["unhashable"], 1]]}, {"list": [{"dtype": "hub"}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_names_types_and_nothing_else(state):
    assert "the checkpoint is damaged" in refusal(durable.decode, state, {"a": torch.zeros(1)})


def test_what_encode_writes_is_read():
    state = {"a": [torch.zeros(2), (1, None)], "b": {3: torch.bfloat16}}
    tensors = {}
    again = durable.decode(json.loads(json.dumps(durable.encode(state, "s", tensors))), tensors)
    assert torch.equal(again["a"].pop(0), state["a"].pop(0)) and again == state
