"""The order is a permutation that depends only on data set, split, seed and epoch, and any part
of it costs the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.loading.order import EpochOrder, nodes_per_shard, rank_slice
from pipelines.interfaces import World

SIZES = st.lists(st.integers(0, 9), max_size=12)


def whole(*arguments: object, **more: object) -> list[int]:
    order = EpochOrder(*arguments, **more)  # type: ignore[arg-type]
    rows: list[int] = order.rows(0, order.samples).tolist()
    return rows


def test_the_order_never_changes() -> None:
    """Golden: this order is what a checkpoint's (epoch, consumed) means."""
    sizes = [3, 2, 4]
    assert whole("d1", "train", sizes, 0, 0) == GOLDEN
    assert whole("d1", "train", sizes, 0, 0, window=1) == GOLDEN_ONE
    assert EpochOrder("d1", "train", sizes, 0, 0).batch(0, 5).tolist() == GOLDEN_BATCH


GOLDEN = [6, 5, 1, 3, 2, 7, 8, 4, 0]
GOLDEN_ONE = [6, 5, 7, 8, 4, 3, 2, 1, 0]
GOLDEN_BATCH = [6, 5, 3, 1, 2]


@given(SIZES, st.integers(0, 5), st.integers(1, 5))
def test_an_order_is_a_permutation(sizes: list[int], epoch: int, window: int) -> None:
    order = EpochOrder("digest", "train", sizes, 1, epoch, window)
    rows = order.rows(0, order.samples)
    assert rows.dtype == np.int64
    assert sorted(rows.tolist()) == list(range(sum(sizes)))


@given(SIZES, st.integers(1, 5), st.data())
def test_any_part_can_be_computed_alone(sizes: list[int], window: int, data: st.DataObject) -> None:
    """In any sequence, also after a window was dropped from memory. The members of a batch are
    the same."""
    arguments = ("digest", "train", sizes, 1, 0, window)
    expected = whole(*arguments)
    order = EpochOrder(*arguments)
    for _ in range(3):
        start = data.draw(st.integers(0, len(expected)))
        stop = data.draw(st.integers(start, len(expected) + 3))
        assert order.rows(start, stop).tolist() == expected[start:stop]
        assert sorted(order.batch(start, stop).tolist()) == sorted(expected[start:stop])


@pytest.mark.fault(19)
def test_an_order_depends_on_each_of_its_arguments() -> None:
    base = ("d", "train", [50, 50], 0, 0)
    others = [
        ("e", *base[1:]),
        ("d", "val", *base[2:]),
        (*base[:3], 1, 0),
        (*base[:4], 1),
    ]
    orders = {tuple(whole(*arguments)) for arguments in [base, *others, base]}
    assert len(orders) == 5


def test_samples_stay_within_their_window_of_shards() -> None:
    rows = np.array(whole("d", "train", [10] * 8, 0, 0, window=2)) // 10
    windows = [set(rows[at : at + 20].tolist()) for at in range(0, 80, 20)]
    assert all(len(window) == 2 for window in windows)
    assert set.union(*windows) == set(range(8))


def test_each_window_is_shuffled_differently() -> None:
    order = EpochOrder("d", "train", [100] * 4, 0, 0, window=2)
    shards = order.shards(0, World()), order.shards(1, World())
    assert sorted(shards[0] + shards[1]) == [0, 1, 2, 3]
    positions = []
    for at, window in zip((0, 200), shards):
        starts = {shard: number * 100 for number, shard in enumerate(window)}
        rows = order.rows(at, at + 200)
        positions.append([starts[row // 100] + row % 100 for row in rows.tolist()])
    assert sorted(positions[0]) == sorted(positions[1]) == list(range(200))
    assert positions[0] != positions[1]


@given(st.integers(0, 300), st.integers(1, 40))
def test_ranks_get_nearly_equal_contiguous_rows(total: int, size: int) -> None:
    slices = [rank_slice(total, World(rank, size)) for rank in range(size)]
    assert [row for c in slices for row in range(c.start, c.stop)] == list(range(total))
    lengths = [c.stop - c.start for c in slices]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("nodes", "limit"), [(1, 1.0), (2, 1.25), (4, 1.6), (8, 2.3)])
def test_a_shard_is_read_by_few_nodes(nodes: int, limit: float) -> None:
    """Also if shards differ in size. Without sorting, the control, every node reads nearly all."""
    sizes = [200 + 37 * i % 100 for i in range(64)]
    order = EpochOrder("d", "train", sizes, 0, 0)
    assert 1.0 <= nodes_per_shard(order, sizes, 256, nodes) <= limit
    order.batch = order.rows  # type: ignore[method-assign]
    assert nodes_per_shard(order, sizes, 256, nodes) > 0.99 * nodes


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 4), st.integers(4, 40))
def test_a_rank_knows_which_shards_it_will_read(sizes: list[int], ranks: int, batch: int) -> None:
    """Together the ranks get all shards, and none beyond the end."""
    order = EpochOrder("d", "train", sizes, 0, 0, window=4)
    last = order.window(order.samples - 1)
    known = {
        s for w in range(last + 1) for r in range(ranks) for s in order.shards(w, World(r, ranks))
    }
    assert known == set(range(len(sizes)))
    assert order.shards(last + 1, World()) == []


def test_ten_thousand_shards_cost_no_more_than_their_window(tmp_path: Path) -> None:
    """In its own process, because memory that was used once is not returned to the system."""
    program = """
import resource, time
from pipelines.data.loading.order import EpochOrder
sizes = [1000] * 10_000
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.process_time()
order = EpochOrder("d", "train", sizes, 0, 0)
assert len(order.batch(0, 256)) == len(order.batch(9_000_192, 9_000_448)) == 256
print(time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    root = Path(__file__).parents[4]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 1
    assert kilobytes < 20_000  # the whole permutation has 80,000
