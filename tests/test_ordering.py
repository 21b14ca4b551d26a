"""Order: every row once an epoch, whatever the batch size and the number of processes."""

import numpy as np
import pytest

from cifar_dist.ordering import epoch_order, global_batch, micro_batch_slice, steps_per_epoch


@pytest.mark.parametrize("num_samples, batch_size", [(100, 10), (103, 10), (7, 7), (9, 8), (1347, 64)])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_row_is_real_exactly_once_an_epoch(num_samples, batch_size, epoch):
    steps = steps_per_epoch(num_samples, batch_size)
    seen = []
    for step in range(epoch * steps, (epoch + 1) * steps):
        batch = global_batch(num_samples, batch_size, seed=5, step=step)
        assert batch.rows.shape == batch.real.shape == (batch_size,)
        seen += batch.rows[batch.real].tolist()
    assert sorted(seen) == list(range(num_samples))


def test_order_depends_on_seed_and_epoch_alone():
    first = epoch_order(1000, seed=1, epoch=2).copy()
    epoch_order.cache_clear()
    np.random.seed(9)
    assert (epoch_order(1000, seed=1, epoch=2) == first).all()
    assert (epoch_order(1000, seed=1, epoch=3) != first).any()
    assert (epoch_order(1000, seed=2, epoch=2) != first).any()


def test_order_is_the_same_on_every_machine_and_version():
    """The order is part of the format: a change would break every resume across versions."""
    assert epoch_order(10, seed=0, epoch=0).tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]
    assert not epoch_order(10, seed=0, epoch=0).flags.writeable  # all who ask are given the same array


@pytest.mark.parametrize("processes, accumulation", [(1, 1), (2, 1), (1, 4), (3, 2), (6, 2)])
def test_slices_of_all_processes_tile_the_global_batch(processes, accumulation):
    size = 24 // (processes * accumulation)
    parts = [range(24)[micro_batch_slice(p, processes, m, size)] for m in range(accumulation) for p in range(processes)]
    assert [i for part in parts for i in part] == list(range(24))
