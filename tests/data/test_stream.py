"""Streams: every row exactly once an epoch, in an order that is a function of seed, epoch and window alone."""

import dataclasses
import io
import itertools
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from cifar_dist.command_line import parse_command_line
from cifar_dist.config import InputConfig
from cifar_dist.data import load_training_data
from cifar_dist.data.local import open_local
from cifar_dist.data.stream import DataLost
from cifar_dist.errors import UsageError
from cifar_dist.plan import Sizes, make_plan
from cifar_dist.stream_batches import StreamBatches

INPUT = InputConfig(img_size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bilinear")
GIB = 2**30


def png(number):
    """An image that says its number: in base 256, in its colours."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number // 65536, number // 256 % 256, number % 256)).save(file, "PNG")
    return file.getvalue()


def write_set(folder, files, rows, row_group=64):
    """Parquet files as on the Hub; row r of all has label r mod 3 and the image of r. Files differ in length."""
    folder.mkdir()
    schema = pyarrow.schema(
        [("img", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])), ("label", pyarrow.int64())]
    )
    columns = {"img": {"_type": "Image"}, "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
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
            assert torch.equal(numbers[there] % 3, batch.labels[there])
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


@pytest.mark.parametrize("step", [1, 37, 74, 75, 110])
def test_a_stream_goes_on_at_any_step_with_another_number_of_processes(folder, step):
    alone, plan, _ = batches_of(folder)
    steps = range(step, min(step + 3, plan.total_steps))
    expected = seen(alone, range(plan.total_steps))[step : steps.stop]
    parts = [seen(batches_of(folder, process=process, processes=3)[0], steps) for process in range(3)]
    assert [sorted(itertools.chain(*part)) for part in zip(*parts, strict=True)] == [sorted(ids) for ids in expected]


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
    table = pyarrow.parquet.read_table(path)
    rows = table.to_pylist()
    rows[5]["img"]["bytes"] = b"\x89PNG broken"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=table.schema), path)
    bad = len(pyarrow.parquet.read_table(sorted(folder.glob("train-*"))[0])) + 5
    batches, plan, _ = batches_of(folder, "--val-fraction", "0")
    found = seen(batches, range(plan.steps_per_epoch))
    assert f"row {bad} of train (row 5 of {path.name}) cannot be decoded" in batches.lost
    assert "--skip-corrupt 0 allows no more" in batches.lost
    assert found[-1] == []
    batches, plan, _ = batches_of(folder, "--val-fraction", "0", "--skip-corrupt", "1")
    found = seen(batches, range(plan.steps_per_epoch))
    assert sorted(itertools.chain(*found)) == [row for row in range(60) if row != bad]
    assert batches.take_waits()[1] == 1
    assert batches.lost is None


def test_data_that_go_away_are_tried_again_and_then_end_the_run(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set", 4, 200, row_group=20)
    pauses = []
    monkeypatch.setattr("cifar_dist.data.stream.time.sleep", pauses.append)
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
