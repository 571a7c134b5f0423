"""Every sample is read exactly once per epoch, in an order that depends only on data set, seed
and epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import exactly_once
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.core.errors import TesseraError
from pipelines.data.card import Card
from pipelines.data.loading import loaders as loading
from pipelines.data.loading.loaders import EvalLoader, TrainLoader, TrainStep
from pipelines.data.loading.order import RankPart
from pipelines.data.shards import ShardReader
from pipelines.interfaces import World

ALONE = World()
MakeSet = Callable[..., tuple[Path, Card]]


def train(
    folder: Path, card: Card, batch: int, world: World = ALONE, **more: object
) -> TrainLoader:
    return TrainLoader(folder, card, card.spec(), batch_size=batch, seed=3, world=world, **more)


def counted(steps: list[TrainStep]) -> list[int]:
    return [i for step in steps for i in step.batch["index"].tolist()[: step.counted]]


def test_a_batch_has_the_packed_samples(make_set: MakeSet) -> None:
    folder, card = make_set(13)
    steps = list(train(folder, card, 4).epoch(0))
    assert [step.total for step in steps] == [4, 4, 4, 1]
    assert [step.consumed for step in steps] == [4, 8, 12, 13]
    for step in steps:
        batch = step.batch
        assert batch["image"].dtype == torch.uint8
        assert batch["image"].shape == (step.total, 1, 4, 4)
        assert batch["label"].dtype == batch["index"].dtype == torch.int64
        assert torch.equal(batch["image"][:, 0, 2, 3].long(), batch["index"])
        assert torch.equal(batch["label"], batch["index"] % 3)
        assert batch["key"] == [f"s{i:04d}" for i in batch["index"].tolist()]


def test_images_are_resized_to_the_data_spec(make_set: MakeSet) -> None:
    folder, card = make_set(3)
    spec = card.spec(6, 5)
    loader = TrainLoader(folder, card, spec, batch_size=2, seed=0, world=World())
    assert [s.batch["image"].shape for s in loader.epoch(0)] == [(2, 1, 6, 5), (1, 1, 6, 5)]


@pytest.mark.fault(19)
def test_epochs_differ_and_are_reproducible(make_set: MakeSet) -> None:
    folder, card = make_set(30)
    epochs = [counted(list(train(folder, card, 8).epoch(e))) for e in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]


@pytest.mark.fault(15, 18, 19)
@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize(
    ("size", "loader_workers"), [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 2), (7, 0)]
)
def test_the_global_batches_don_t_depend_on_the_ranks(
    make_set: MakeSet, size: int, cache: str, loader_workers: int
) -> None:
    folder, card = make_set(29)
    alone = list(train(folder, card, 6).epoch(1))
    options = {"cache": cache, "loader_workers": loader_workers}
    loaders = [train(folder, card, 6, World(r, size), **options) for r in range(size)]
    for _ in range(2):  # the second time from memory
        ranks = [list(loader.epoch(1)) for loader in loaders]
        assert {len(steps) for steps in ranks} == {len(alone)} == {loaders[0].steps_per_epoch}
        for whole, *parts in zip(alone, *ranks):
            assert {part.total for part in parts} == {whole.total}
            assert {part.consumed for part in parts} == {whole.consumed}
            assert sum(part.counted for part in parts) == whole.total
            for part in parts:
                expected = whole.batch["image"][part.rows]
                assert torch.equal(part.batch["image"], expected)
                assert part.batch["key"] == whole.batch["key"][part.rows]
    for loader in loaders:
        loader.close()


@pytest.mark.fault(15)
def test_a_rank_without_rows_gets_one_padding_row(make_set: MakeSet) -> None:
    folder, card = make_set(7)
    last = [list(train(folder, card, 6, World(rank, 3)).epoch(0))[-1] for rank in range(3)]
    assert [step.counted for step in last] == [1, 0, 0]
    assert [len(step.batch["key"]) for step in last] == [1, 1, 1]
    assert {step.batch["key"][0] for step in last} == {last[0].batch["key"][0]}
    assert [step.rows for step in last[1:]] == [slice(0, 1)] * 2


@pytest.mark.fault(16)
@pytest.mark.slow
@settings(max_examples=exactly_once.EXAMPLES, deadline=None, database=None)
@given(exactly_once.CASES)
def test_each_sample_is_used_once_for_any_case(case: exactly_once.Case) -> None:
    exactly_once.check(case)


@pytest.mark.control(16)
def test_a_repeated_sample_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: parts with a repeated row, as from samplers with padding, fail the check."""
    leg = exactly_once.Leg(3, 0, 4)
    case = exactly_once.Case((4, 3), 4, 0, 0, (leg,))
    exactly_once.check(case)
    for module in (loading, exactly_once):
        monkeypatch.setattr(module, "rank_part", padded)
    with pytest.raises(AssertionError):
        exactly_once.check(case)


def padded(start: int, samples: int, batch_size: int, world: World) -> RankPart:
    """The same number of rows for each rank, as with torch's DistributedSampler."""
    total = min(batch_size, samples - start)
    each = -(-total // world.size)
    first = min(world.rank * each, total - each)
    return RankPart(each, total, slice(first, first + each), start + total)


@pytest.mark.fault(16)
@pytest.mark.slow
@settings(
    max_examples=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_each_sample_is_used_once_with_shards_and_processes(
    make_set: MakeSet, data: st.DataObject
) -> None:
    """For any samples, shards and batch size, resumed repeatedly with other ranks and processes."""
    count = data.draw(st.integers(1, 40), "samples")
    shard = data.draw(st.integers(1, 15), "samples a shard")
    batch = data.draw(st.integers(1, 12), "batch")
    cache = data.draw(st.sampled_from(["none", "memory"]), "cache")
    folder, card = make_set(count, shard, name=f"set-{count}-{shard}")
    seen: list[int] = []
    consumed = 0
    while consumed < count:
        size = data.draw(st.integers(1, 3), "ranks")
        workers = data.draw(st.integers(0, 2), "loader workers")
        steps = data.draw(st.integers(1, 6), "steps until the cut")
        loaders = [
            train(folder, card, batch, World(r, size), cache=cache, loader_workers=workers)
            for r in range(size)
        ]
        streams = [loader.epoch(2, consumed) for loader in loaders]
        for _, parts in zip(range(steps), zip(*streams)):
            for part in parts:
                assert torch.equal(part.batch["image"][:, 0, 0, 0].long(), part.batch["index"])
            seen += counted(list(parts))
            consumed = parts[0].consumed
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]
        for loader in loaders:
            loader.close()
    assert sorted(seen) == list(range(count))


def test_resuming_reads_no_consumed_sample(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, card = make_set(40)
    loader = train(folder, card, 10)
    read: list[int] = []
    real = ShardReader.pieces
    monkeypatch.setattr(
        ShardReader, "pieces", lambda self, i, *more: (read.extend(i), real(self, i, *more))[1]
    )
    rest = counted(list(loader.epoch(0, 30)))
    assert sorted(read) == sorted(rest)
    assert len(rest) == 10
    assert list(loader.epoch(0, 40)) == []


@pytest.mark.parametrize("consumed", [-10, 5, 37, 50])
def test_an_epoch_is_resumed_only_at_a_step(make_set: MakeSet, consumed: int) -> None:
    folder, card = make_set(38)
    with pytest.raises(TesseraError, match=f"can't be resumed after {consumed}"):
        train(folder, card, 10).epoch(0, consumed)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_evaluation_uses_each_sample_once_in_fixed_batches(make_set: MakeSet, size: int) -> None:
    folder, card = make_set(33)
    result = {}
    for rank in range(size):
        world = World(rank, size)
        loader = EvalLoader(folder, card, card.spec(), batch_size=7, world=world, split="test")
        assert loader.samples == 33
        for k, batch in loader.batches():
            assert k % size == rank
            result[k] = batch["index"].tolist()
    assert [i for k in sorted(result) for i in result[k]] == list(range(33))
    assert all(indices == list(range(33))[k * 7 : k * 7 + 7] for k, indices in result.items())


@pytest.mark.fault(1, 4)
def test_a_missing_split_and_a_short_shard_are_reported_on_opening(make_set: MakeSet) -> None:
    folder, card = make_set(12)
    with pytest.raises(TesseraError, match="no 'val' split"):
        EvalLoader(folder, card, card.spec(), batch_size=2, world=World(), split="val")
    path = folder / card.splits["train"].shards[1].path
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(TesseraError, match=r"train/000001\.tar"):
        train(folder, card, 2)


def test_shards_are_prefetched_before_they_are_read(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards of each window and of the next one, before the first sample is read. The parent
    of the loader processes fetches them."""
    folder, card = make_set(200, 2)
    requested: list[list[int]] = []
    read: list[tuple[int, set[int]]] = []
    monkeypatch.setattr(
        ShardReader, "prefetch", lambda self, shards: requested.append(list(shards))
    )
    real = ShardReader.pieces

    def logged(self: ShardReader, samples: Any, shards: Any, *more: Any) -> Any:
        read.append((len(requested), set(shards.tolist())))
        return real(self, samples, shards, *more)

    monkeypatch.setattr(ShardReader, "pieces", logged)
    list(train(folder, card, 8).epoch(0))
    assert len(requested) == 100 // 16 + 1
    assert sorted({s for shards in requested for s in shards}) == list(range(100))
    for count, shards in read:
        assert shards <= {s for known in requested[:count] for s in known}
    count = len(requested)
    list(train(folder, card, 8, loader_workers=1).epoch(0))
    assert len(requested) == 2 * count


@pytest.mark.fault(3)
@pytest.mark.parametrize("loader_workers", [0, 2])
def test_a_damaged_sample_is_reported(make_set: MakeSet, loader_workers: int) -> None:
    folder, card = make_set(20)
    path = folder / card.splits["train"].shards[2].path
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    loader = train(folder, card, 2, loader_workers=loader_workers)
    with pytest.raises(TesseraError, match=r"sample 10: checksum differs") as caught:
        list(loader.epoch(0))
    assert "download or pack the data set again" in (caught.value.hint or "")
