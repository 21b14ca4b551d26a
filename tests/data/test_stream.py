"""Streams: every row exactly once an epoch, in an order that is a function of seed, epoch and window alone."""

import dataclasses
import importlib.util
import io
import itertools
import json
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from cifar_dist.command_line import parse_command_line
from cifar_dist.config import InputConfig
from cifar_dist.data import label_index, load_training_data
from cifar_dist.data.local import open_local
from cifar_dist.data.stream import DataLost
from cifar_dist.data.tables import Table
from cifar_dist.errors import UsageError
from cifar_dist.plan import Sizes, make_plan
from cifar_dist.training.stream_batches import StreamBatches
from tests.conftest import ROOT

INPUT = InputConfig(img_size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bilinear")
GIB = 2**30


def png(number):
    """An image that says its number: in base 256, in its colours."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number // 65536, number // 256 % 256, number % 256)).save(file, "PNG")
    return file.getvalue()


def write_set(folder, files, rows, row_group=64, classes=True):
    """Parquet files as on the Hub; row r of all has label r mod 3 and the image of r. Files differ in length."""
    folder.mkdir()
    schema = pyarrow.schema(
        [("img", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])), ("label", pyarrow.int64())]
    )
    label = {"names": ["a", "b", "c"], "_type": "ClassLabel"} if classes else {"dtype": "int64", "_type": "Value"}
    columns = {"img": {"_type": "Image"}, "label": label}
    features = json.dumps({"info": {"features": columns}})
    cuts = np.linspace(0, 1, files + 1) ** 1.5 * rows
    for split in ("train", "test"):
        for number, (first, last) in enumerate(zip(cuts.astype(int), cuts.astype(int)[1:], strict=False)):
            ids = range(first, last)
            table = pyarrow.table(
                [[{"bytes": png(n), "path": None} for n in ids], [n % 3 for n in ids]],
                schema=schema.with_metadata({"huggingface": features}),
            )
            path = folder / f"{split}-{number:05d}-of-{files:05d}.parquet"
            pyarrow.parquet.write_table(table, path, row_group_size=row_group)
    return folder


def damage(folder, file, row):
    """Damage an image of a set that `write_set` wrote; its number."""
    paths = sorted(folder.glob("train-*"))
    table = pyarrow.parquet.read_table(paths[file])
    rows = table.to_pylist()
    rows[row]["img"]["bytes"] = b"\x89PNG broken"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=table.schema), paths[file])
    return sum(len(pyarrow.parquet.read_table(path)) for path in paths[:file]) + row


FLAGS = "--data-mode stream --data-size 8 --shuffle-window 50 --batch-size 12 --crop-padding 0 --hflip 0 --epochs 2"


def config_of(folder, *flags):
    return parse_command_line(["--dataset", str(folder), "--model", "cnn4", *FLAGS.split(), *flags]).config


def batches_of(folder, *flags, process=0, processes=1, micro=None):
    config = config_of(folder, *flags, *(["--micro-batch-size", str(micro)] if micro else []))
    train = load_training_data(config.data, GIB).train
    plan = make_plan(config, Sizes(len(train), 0, None, 3, 0, 0, 0, 0), processes)
    accelerator = SimpleNamespace(process_index=process, device=torch.device("cpu"))
    parallel = SimpleNamespace(accelerator=accelerator, input_dtype=torch.float32)
    return StreamBatches(train, config, plan, INPUT, parallel), plan, train


def seen(batches, steps):
    """Sample ids read off the pixels, step by step, and that labels belong to them."""
    found = []
    for step in steps:
        ids = []
        for batch in batches(step):
            colours = (batch.images[:, :, 0, 0] * 255).round().long()
            numbers = colours[:, 0] * 65536 + colours[:, 1] * 256 + colours[:, 2]
            there = batch.weights > 0
            assert torch.equal(numbers[there] % 3, batch.targets[there])
            ids += numbers[there].tolist()
        found.append(ids)
    batches.close()
    return found


def write_images(folder, classes, images):
    """An image folder of so many classes, and images a class in train; image n of all is `png(n)`."""
    for split, count in (("train", images), ("test", 1)):
        for label in range(classes):
            (folder / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                (folder / split / f"class{label}" / f"{number:05d}.png").write_bytes(png(label * count + number))
    return folder


def save_set(folder, saved):
    """The image folder as a DatasetDict on disk."""
    datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(list(table.stream.cast_column("image", datasets.Image(decode=False))))
            .cast_column("image", datasets.Image())
            .cast_column("label", table.stream.features["label"])
            for split, table in open_local(folder).tables.items()
        }
    ).save_to_disk(saved)
    return saved


def batches_given(batches, steps):
    """Row number: uint8 image and label, of the rows that count."""
    found = {}
    for step in steps:
        for part in batches._parts(step):
            there = part.weights > 0
            for row, image, label in zip(part.ids[there], part.images[there], part.labels[there], strict=True):
                assert int(row) not in found
                found[int(row)] = image, int(label)
    batches.close()
    return found


@pytest.fixture(scope="module", params=[1, 20], ids=["1 file", "20 files"])
def folder(request, tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("sets") / "set", request.param, 1000)


@pytest.mark.parametrize("processes, micro", [(1, None), (1, 3), (2, None), (3, None), (2, 2)])
def test_every_row_once_an_epoch_on_any_number_of_processes(folder, processes, micro):
    alone, plan, train = batches_of(folder)
    expected = seen(alone, range(2 * plan.steps_per_epoch))
    parts = [
        seen(batches_of(folder, process=process, processes=processes, micro=micro)[0], range(2 * plan.steps_per_epoch))
        for process in range(processes)
    ]
    together = [sorted(itertools.chain(*step)) for step in zip(*parts, strict=True)]
    assert together == [sorted(step) for step in expected]
    for epoch in range(2):
        steps = expected[epoch * plan.steps_per_epoch :][: plan.steps_per_epoch]
        assert sorted(itertools.chain(*steps)) == train.ids.tolist()
    assert expected[0] != expected[plan.steps_per_epoch]


@pytest.mark.parametrize("processes, micro", [(1, None), (2, 3), (3, 2)])
def test_a_steps_weights_are_those_of_its_real_rows_mean(folder, processes, micro):
    """Batches of 24 from 900 rows: the last of an epoch has 12."""
    for step, real in ((5, 24), (37, 12)):
        weights, ids = [], []
        for process in range(processes):
            batches = batches_of(folder, "--batch-size", "24", process=process, processes=processes, micro=micro)[0]
            weights += [weight for batch in batches(step) for weight in batch.weights.tolist()]
            ids += seen(batches, [step])[0]
        assert len(set(ids)) == real
        assert sorted(weights) == pytest.approx([0.0] * (24 - real) + [1 / real] * real)


def test_another_seed_is_another_order(folder):
    train = batches_of(folder)[2]
    orders = [train.order(seed, epoch).tolist() for seed, epoch in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert orders[0] == orders[3] and orders[0] != orders[1] != orders[2] != orders[0]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


@pytest.mark.parametrize("step", [1, 37, 74, 75, 110])
def test_a_stream_goes_on_at_any_step_with_another_number_of_processes(folder, step):
    alone, plan, _ = batches_of(folder)
    steps = range(step, min(step + 3, plan.total_steps))
    expected = seen(alone, range(plan.total_steps))[step : steps.stop]
    parts = [seen(batches_of(folder, process=process, processes=3)[0], steps) for process in range(3)]
    assert [sorted(itertools.chain(*part)) for part in zip(*parts, strict=True)] == [sorted(ids) for ids in expected]


def test_a_stream_is_not_waited_for_ahead_of_its_step(folder):
    """Else the share of time that steps wait for data would count time in which a GPU still computes."""
    batches, _, _ = batches_of(folder)
    assert not batches._is_there(0)  # nobody has begun to read
    batches._fetch(0)
    end = time.monotonic() + 20
    while not batches._is_there(1):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not batches._is_there(2)
    batches.close()
    while not batches._queue.empty():
        batches._queue.get()
    assert not batches._is_there(1)


def test_rows_stay_within_the_window_and_are_well_mixed(folder):
    _, _, train = batches_of(folder)
    shards, given, read = train._orders(0, 0)
    places = {row: place for place, row in enumerate(read)}
    moved = np.array([places[row] - place for place, row in enumerate(given)])
    assert np.abs(moved).max() <= 50
    assert np.abs(moved).mean() > 10
    assert sorted(shards) == list(range(len(train.shard_rows)))


@pytest.mark.parametrize("saved", [False, True], ids=["image folder", "saved"])
def test_rows_in_the_order_of_their_classes_are_mixed(tmp_path, saved):
    folder = write_images(tmp_path / "set", 10, 100)
    resident = load_training_data(config_of(folder, "--data-mode", "resident", "--val-fraction", "0").data, GIB).train
    if saved:
        folder = save_set(folder, tmp_path / "saved")
    batches, plan, train = batches_of(folder, "--val-fraction", "0")
    classes = [
        len(set(train.all_labels[batches.sample_ids(step)].tolist())) for step in range(plan.steps_per_epoch - 1)
    ]
    assert np.mean(classes) > 3 and min(classes) > 1  # a batch draws on 62 rows at most: four shards or five
    given = batches_given(batches, range(plan.steps_per_epoch))
    assert sorted(given) == list(range(1000))
    for row, (image, label) in given.items():  # the same row numbers as where all is in memory
        assert torch.equal(image, resident.images[row]) and label == resident.labels[row]


def test_only_the_wanted_rows_are_decoded(folder, monkeypatch):
    batches, _, train = batches_of(folder, process=1, processes=2)
    decoded = []

    def decode(self, number, image):
        decoded.append(number)
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(type(train), "decode", decode)
    for step in range(70, 72):
        list(batches(step))
    batches.close()
    assert len(decoded) <= 6 * (2 + 3 + 2)  # two steps, and the few that are read ahead


def test_resident_and_stream_have_the_same_split(folder):
    stream = load_training_data(config_of(folder).data, GIB)
    resident = load_training_data(dataclasses.replace(config_of(folder).data, data_mode="resident"), GIB)
    assert stream.split_digest == resident.split_digest
    assert torch.equal(stream.val.images, resident.val.images)
    assert (stream.mode, resident.mode) == ("stream", "resident")


def test_auto_streams_what_does_not_fit(folder):
    data = dataclasses.replace(config_of(folder).data, data_mode="auto")
    assert load_training_data(data, 4 * 1000 * 8 * 8 * 3).mode == "resident"
    assert load_training_data(data, 4 * 1000 * 8 * 8 * 3 - 1).mode == "stream"


def test_a_damaged_image_is_named_and_may_be_skipped(tmp_path):
    folder = write_set(tmp_path / "set", 2, 60)
    path = sorted(folder.glob("train-*"))[1]
    bad = damage(folder, 1, 5)
    batches, plan, _ = batches_of(folder, "--val-fraction", "0")
    found = seen(batches, range(plan.steps_per_epoch))
    assert f"row {bad} of train (row 5 of {path.name}) cannot be decoded" in batches.lost
    assert "--skip-corrupt 0 allows no more: with a larger one --resume auto goes on" in batches.lost
    assert found[-1] == []
    batches, plan, _ = batches_of(folder, "--val-fraction", "0", "--skip-corrupt", "1")
    found = seen(batches, range(plan.steps_per_epoch))
    assert sorted(itertools.chain(*found)) == [row for row in range(60) if row != bad]
    assert batches.take_waits()[1] == 1
    assert batches.lost is None


def test_damaged_images_are_counted_not_how_often_they_come(tmp_path, capsys):
    folder = write_set(tmp_path / "set", 2, 65)
    bad = damage(folder, 1, 5)
    batches, plan, _ = batches_of(folder, "--val-fraction", "0", "--skip-corrupt", "1", "--epochs", "4")
    skipped = []
    for epoch in range(4):
        for step in range(plan.steps_per_epoch):  # 60 of 65 rows, and 5 that are filled up with weight 0
            list(batches(step + epoch * plan.steps_per_epoch))
        skipped.append(batches.take_waits()[1])
    assert batches.lost is None and skipped == [1, 0, 0, 0]
    assert capsys.readouterr().err.count("skipped: ") == 1
    damage(folder, 0, 3)
    batches, plan, _ = batches_of(folder, "--val-fraction", "0", "--skip-corrupt", "1")
    seen(batches, range(plan.steps_per_epoch))
    assert "--skip-corrupt 1 allows no more" in batches.lost
    for process in range(3):  # a row that only fills up a batch counts where it is real
        batches, plan, _ = batches_of(
            folder, "--val-fraction", "0", "--skip-corrupt", "2", "--epochs", "1", process=process, processes=3
        )
        own = [batches._own(step) for step in range(plan.steps_per_epoch)]
        real = {int(row) for rows, weights in own for row in rows[weights > 0]}
        for step in range(plan.steps_per_epoch):
            list(batches(step))
        assert len(batches._damaged) == len(real & {bad, 3})
        batches.close()


def test_a_skipped_image_is_not_mixed_into_its_neighbour(tmp_path):
    folder = write_set(tmp_path / "set", 2, 60)
    flags = ("--val-fraction", "0", "--mixup", "0.8", "--skip-corrupt", "1")
    batches, plan, _ = batches_of(folder, *flags)
    sound = [batch for step in range(plan.steps_per_epoch) for batch in batches(step)]
    batches.close()
    bad = damage(folder, 1, 5)
    batches, plan, _ = batches_of(folder, *flags)
    ids = [row for step in range(plan.steps_per_epoch) for row in batches.sample_ids(step)]
    other = ids[ids.index(bad) ^ 1]
    for step, before in enumerate(sound):
        (after,) = batches(step)
        rows = batches.sample_ids(step)
        for place, row in enumerate(rows):
            if row == bad:
                assert before.weights[place] > 0 and after.weights[place] == 0
            elif row == other:
                assert not torch.equal(before.images[place], after.images[place])
                assert torch.allclose(after.images[place] * 255, torch.tensor([0, 0, other])[:, None, None].float())
                assert torch.allclose(after.targets[place], torch.eye(3)[other % 3])
            else:
                assert torch.equal(before.images[place], after.images[place])
                assert torch.equal(before.targets[place], after.targets[place])
            assert row == bad or after.weights[place] == before.weights[place]
    batches.close()


def test_a_damaged_image_in_val_is_said_to_be_there(tmp_path):
    folder = write_set(tmp_path / "set", 2, 60)
    bad = load_training_data(config_of(folder).data, GIB).val.ids[0]
    rows = [len(pyarrow.parquet.read_table(path)) for path in sorted(folder.glob("train-*"))]
    damage(folder, int(bad >= rows[0]), int(bad - rows[0] if bad >= rows[0] else bad))
    with pytest.raises(UsageError, match=rf"row {bad} of train .*cannot be decoded.* It is in val, which skips none\."):
        load_training_data(config_of(folder, "--skip-corrupt", "3").data, GIB)


def reader_of(batches, step=0):
    """The thread that reads ahead, started."""
    batches._start(step)
    return batches._thread


def test_closing_does_not_wait_for_the_next_attempt(tmp_path, monkeypatch):
    monkeypatch.setattr("cifar_dist.data.stream._PAUSES_SECONDS", (3600.0,))
    batches, _, train = batches_of(write_set(tmp_path / "set", 2, 60))
    tried = threading.Event()

    def down(*_):
        tried.set()
        raise OSError("the network is down")

    monkeypatch.setattr(type(train), "_read_shard", down)
    reader = reader_of(batches)
    assert tried.wait(60)
    batches.close()
    assert reader.daemon and not reader.is_alive()


def test_closing_does_not_wait_for_the_rest_of_a_step(tmp_path, monkeypatch):
    batches, _, train = batches_of(write_set(tmp_path / "set", 1, 60))
    given, plain = [], type(train)._read_shard

    def until_told(self, *arguments):
        for row in plain(self, *arguments):
            given.append(row)
            if len(given) == 3:
                batches._stop.set()
            yield row

    monkeypatch.setattr(type(train), "_read_shard", until_told)
    reader = reader_of(batches)
    reader.join(60)
    assert not reader.is_alive() and len(given) == 3 and batches._queue.empty()


def no_pauses(monkeypatch, then=lambda pauses: None):
    """The seconds between attempts, which pass at once; `then` is called after each."""
    pauses, plain = [], threading.Event.wait

    def wait(self, seconds=None):
        if seconds not in (1, 2, 4, 8):
            return plain(self, seconds)
        pauses.append(seconds)
        return then(pauses)

    monkeypatch.setattr(threading.Event, "wait", wait)
    return pauses


def test_data_that_go_away_are_tried_again_and_then_end_the_run(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set", 4, 200, row_group=20)
    pauses = no_pauses(monkeypatch)
    batches, plan, train = batches_of(folder)
    read, broken = type(train)._read_shard, [3]

    def fail(self, shard, first, wanted):
        for row in read(self, shard, first, wanted):
            if broken[0]:
                broken[0] -= 1
                raise OSError("the network is down")
            yield row

    monkeypatch.setattr(type(train), "_read_shard", fail)
    found = seen(batches, range(plan.steps_per_epoch))
    assert sorted(itertools.chain(*found)) == train.ids.tolist()  # nothing lost, nothing twice
    assert pauses == [1, 2, 4]
    broken[0] = 99
    with pytest.raises(DataLost, match=r"the network is down.*--resume auto"):
        list(train.read(train.chosen, 0, 0))


def test_skipping_needs_a_stream(folder):
    data = dataclasses.replace(config_of(folder).data, data_mode="resident", skip_corrupt=2)
    with pytest.raises(UsageError, match="--skip-corrupt 2 works with --data-mode stream only"):
        load_training_data(data, GIB)


def test_an_image_folder_that_goes_away_is_no_damage(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "set", 3, 40)
    train = load_training_data(config_of(folder, "--val-fraction", "0").data, GIB).train
    (folder / "train").rename(folder / "away")
    pauses = no_pauses(
        monkeypatch, lambda pauses: len(pauses) == 3 and (folder / "away").rename(folder / "train") and None
    )
    rows = list(train.read(train.chosen, 0, 0))
    assert sorted(number for number, _ in rows) == list(range(120)) and pauses == [1, 2, 4]
    assert all(np.array_equal(train.decode(*row)[0, 0], [0, 0, row[0]]) for row in rows)
    (folder / "train" / "class1" / "00007.png").unlink()
    with pytest.raises(DataLost, match=r"shard 2 of train can no longer be read \(.*class1/00007\.png"):
        list(train.read(train.chosen, 0, 0))


def test_a_shard_that_has_grown_is_not_read_as_if_it_had_not(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set", 2, 60)
    pauses = no_pauses(monkeypatch)
    train = load_training_data(config_of(folder, "--val-fraction", "0").data, GIB).train
    path = sorted(folder.glob("train-*"))[0]
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(pyarrow.concat_tables([table.slice(3, 1), table]), path)
    given = []
    with pytest.raises(DataLost, match=rf"shard 0 of train .* \(it has more than its {len(table)} rows"):
        for number, _ in train.read(train.chosen, 0, 0):
            given.append(number)
    assert not set(given) & set(range(len(table)))  # nothing under another's number
    assert pauses == [1, 2, 4, 8]


def test_labels_are_read_again_when_the_number_of_shards_changes(tmp_path, monkeypatch, capsys):
    folder = write_images(tmp_path / "set", 3, 40)
    with monkeypatch.context() as patch:
        patch.setattr("cifar_dist.data.image_folder.IMAGES_A_SHARD", 1000)
        assert list(load_training_data(config_of(folder).data, GIB).train.shard_rows) == [120]
    assert capsys.readouterr().err == ""
    assert list(load_training_data(config_of(folder).data, GIB).train.shard_rows) == [16] * 7 + [8]
    assert "is of 120 rows in 1 shards, now there are 8 shards: reading the labels of train again" in (
        capsys.readouterr().err
    )


def test_an_epoch_opens_a_file_once_for_each_of_its_shards(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set", 20, 400)
    train = load_training_data(config_of(folder, "--val-fraction", "0").data, GIB).train
    opened, plain = [], pyarrow.dataset.ParquetFileFormat.make_fragment
    counting = lambda self, *arguments: (opened.append(1), plain(self, *arguments))[1]  # noqa: E731
    fake = type("ParquetFileFormat", (pyarrow.dataset.ParquetFileFormat,), {"make_fragment": counting})
    monkeypatch.setattr(pyarrow.dataset, "ParquetFileFormat", fake)
    assert len(list(train.read(train.chosen, 0, 0))) == 400
    assert len(opened) == len(train.shard_rows) == 20
    sorted(folder.glob("train-*"))[7].unlink()  # the others can still be read
    wanted = train.chosen.copy()
    starts = np.cumsum(train.shard_rows)
    wanted[starts[6] : starts[7]] = False
    assert len(list(train.read(wanted, 0, 0))) == wanted.sum()


def test_where_a_row_lies_is_looked_up_for_messages_only(tmp_path, monkeypatch):
    train = load_training_data(config_of(write_set(tmp_path / "set", 2, 60)).data, GIB).train
    monkeypatch.setattr(Table, "file_of", lambda *_: pytest.fail("looked up"))
    for row in train.read(train.chosen, 0, 0):
        train.decode(*row)


def test_a_row_is_of_the_file_that_holds_it(tmp_path):
    table = open_local(write_set(tmp_path / "set", 2, 40)).tables["train"]
    (first, count), (second, rest) = table.files
    assert (count, rest) == (14, 26) and first < second
    for row, said in ((0, (0, first)), (13, (13, first)), (14, (0, second)), (39, (25, second))):
        assert table.file_of(row) == " (row {} of {})".format(*said)


def test_attempts_are_counted_anew_whenever_a_row_came(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set", 1, 60)
    pauses = no_pauses(monkeypatch)
    train = load_training_data(config_of(folder, "--val-fraction", "0").data, GIB).train
    plain = type(train)._read_shard

    def one_row(self, *arguments):
        for row in plain(self, *arguments):
            yield row
            raise OSError("the network is slow")

    monkeypatch.setattr(type(train), "_read_shard", one_row)
    assert len(list(train.read(train.chosen, 0, 0))) == 60
    assert pauses == [1] * 60


@pytest.mark.parametrize("mistake", [TypeError, AttributeError, NameError, AssertionError])
def test_a_mistake_of_ours_is_not_tried_again(tmp_path, monkeypatch, mistake):
    pauses = no_pauses(monkeypatch)
    train = load_training_data(config_of(write_set(tmp_path / "set", 1, 60)).data, GIB).train
    monkeypatch.setattr(type(train), "_read_shard", lambda *_: (_ for _ in ()).throw(mistake("ours")))
    with pytest.raises(mistake, match="ours"):
        list(train.read(train.chosen, 0, 0))
    assert pauses == []


def test_arrays_wait_as_bytes_not_as_lists(tmp_path):
    features = datasets.Features({"image": datasets.Array3D((8, 8, 3), "uint8"), "label": datasets.Value("int64")})
    rows = {"image": [np.full((8, 8, 3), n, np.uint8) for n in range(64)], "label": [n % 3 for n in range(64)]}
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "saved")
    settings = config_of(tmp_path / "saved", "--val-fraction", "0")
    train = load_training_data(settings.data, GIB).train
    resident = load_training_data(dataclasses.replace(settings.data, data_mode="resident"), GIB).train
    for number, image in train.read(train.chosen, 0, 0):
        assert image.dtype == np.uint8 and image.base is None
        assert np.array_equal(train.decode(number, image), resident.images[number])


@pytest.mark.parametrize("damage", ["empty", "truncated", "other arrays", "no archive", "too large", "too small"])
def test_a_damaged_label_index_is_said_and_read_again(tmp_path, damage, capsys):
    data = config_of(write_set(tmp_path / "set", 2, 60), "--cache-dir", str(tmp_path / "cache")).data
    before = load_training_data(data, GIB).train
    (entry,) = (tmp_path / "cache").glob("*.labels.npz")
    whole = entry.read_bytes()
    if damage == "other arrays":
        np.savez(entry, labels=before.all_labels)
    elif damage.startswith("too"):
        by = 1 if damage == "too large" else -1
        np.savez(entry, labels=before.all_labels + by, shard_rows=before.shard_rows)
    else:
        entry.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "no archive": b"hello"}[damage])
    left_over = entry.with_name(f".tmp-4242-{entry.name}")
    left_over.write_bytes(b"half")
    assert capsys.readouterr().err == ""
    after = load_training_data(data, GIB).train
    assert np.array_equal(after.all_labels, before.all_labels)
    found = capsys.readouterr().err
    assert "is damaged (" in found and "reading the labels of train again" in found
    assert entry.read_bytes() == whole and not left_over.exists()
    load_training_data(data, GIB)
    assert capsys.readouterr().err == ""


def test_labels_in_a_cache_that_can_only_be_read_are_taken(tmp_path, monkeypatch):
    data = config_of(write_set(tmp_path / "set", 2, 60), "--cache-dir", str(tmp_path / "cache")).data
    before = load_training_data(data, GIB).train

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock", refuse)
    assert np.array_equal(load_training_data(data, GIB).train.all_labels, before.all_labels)
    with pytest.raises(UsageError, match=r"--cache-dir .*cannot be kept there \(Permission denied\)"):
        load_training_data(dataclasses.replace(data, cache_dir=str(tmp_path / "other")), GIB)


def test_a_label_index_is_on_disk_before_its_name(tmp_path, monkeypatch):
    synced, plain = [], label_index.fsync
    monkeypatch.setattr(label_index, "fsync", lambda path: (synced.append((path, path.stat().st_ino)), plain(path)))
    load_training_data(config_of(write_set(tmp_path / "set", 2, 60), "--cache-dir", str(tmp_path / "cache")).data, GIB)
    (entry,) = (tmp_path / "cache").glob("*.labels.npz")
    assert [path.name.startswith(".tmp-") for path, _ in synced] == [True, False]
    assert synced[0][1] == entry.stat().st_ino and synced[1][0] == entry.parent


def test_labels_are_read_without_the_images(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set", 2, 60, classes=False)
    empty = pyarrow.parquet.read_table(next(folder.glob("train-*"))).slice(0, 0)
    pyarrow.parquet.write_table(empty, folder / "train-00000-of-00003.parquet")
    columns, plain = [], pyarrow.dataset.FileFragment.to_batches
    fake_format = pyarrow.dataset.ParquetFileFormat

    class Fragment:
        def __init__(self, fragment):
            self._fragment = fragment

        def __getattr__(self, name):
            return getattr(self._fragment, name)

        def subset(self, **arguments):
            return Fragment(self._fragment.subset(**arguments))

        def to_batches(self, **arguments):
            columns.append(arguments["columns"])
            return plain(self._fragment, **arguments)

    making = lambda self, file: Fragment(fake_format.make_fragment(self, file))  # noqa: E731
    monkeypatch.setattr(
        pyarrow.dataset, "ParquetFileFormat", type("ParquetFileFormat", (fake_format,), {"make_fragment": making})
    )
    data = load_training_data(config_of(folder, "--val-fraction", "0").data, GIB)
    assert data.class_names == ("0", "1", "2") and len(data.train) == 60
    assert data.train.all_labels.tolist() == [n % 3 for n in range(60)]
    assert (
        len(data.train.shard_rows) == 2 and columns == [["label"]] * 4
    )  # each file for the classes, and for the index


def test_the_ledger_of_the_benchmark_finds_every_fault():
    place = importlib.util.spec_from_file_location("stream_ledger", ROOT / "benchmarks" / "stream_ledger.py")
    ledger = importlib.util.module_from_spec(place)
    place.loader.exec_module(ledger)
    own = [(row, 100 + row, row % 3) for row in range(4)]
    sound = [own[:2], own[2:], own[1:3], [own[0], own[3]]]  # two epochs of two steps
    assert ledger.faults(sound, sound, set(range(4)), own) == [0, 0, 0, 0, 0]
    broken = [[own[0], own[0]], own[2:], [own[1], (2, 999, 2)], [own[0], (3, 103, 2)]]
    assert ledger.faults(broken, sound, set(range(4)), own) == [1, 1, 1, 1, 3]


HANGS = """
import runpy, sys, time
from cifar_dist.data import stream
read = stream.image_bytes
def image_bytes(path):
    if path.name == "00029.png":
        print("hangs", flush=True)
        time.sleep(600)
    return read(path)
stream.image_bytes = image_bytes
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_program_ends_though_a_file_hangs(tmp_path):
    """As on a file server that is gone."""
    folder = write_images(tmp_path / "set", classes=2, images=30)
    flags = "--model cnn4 --data-mode stream --data-size 8 --img-size 32 --batch-size 12 --val-fraction 0 --epochs 9"
    command = [sys.executable, "-c", HANGS, "train.py", "--dataset", folder, *flags.split(), "--wandb", "disabled"]
    command += ["--run-dir", tmp_path / "run", "--cache-dir", tmp_path / "cache"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as program:
        said = "".join(iter(program.stdout.readline, "hangs\n"))
        program.terminate()
        try:
            said += program.communicate(timeout=180)[0]
        finally:
            program.kill()
    assert program.returncode == 0 and "--resume auto" in said, said
