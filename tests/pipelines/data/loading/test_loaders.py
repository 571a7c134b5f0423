"""Exactly once, in an order that nothing but data set, seed and epoch decides."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
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
from pipelines.data.loading import prefetch
from pipelines.data.loading.batches import BatchMaker
from pipelines.data.loading.loaders import EvalLoader, TrainLoader, TrainStep
from pipelines.data.loading.order import RankPart
from pipelines.data.shards import ShardReader
from pipelines.interfaces import World

ALONE = World()
MakeSet = Callable[..., tuple[Path, Card]]


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert not multiprocessing.active_children()
    deadline = time.monotonic() + 5  # a queue's own thread ends a moment after its queue
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [t.name for t in threading.enumerate() if t not in before]


def train(
    folder: Path, card: Card, batch: int, world: World = ALONE, **more: object
) -> TrainLoader:
    return TrainLoader(folder, card, card.spec(), batch_size=batch, seed=3, world=world, **more)


def counted(steps: list[TrainStep]) -> list[int]:
    return [i for step in steps for i in step.batch["index"].tolist()[: step.counted]]


def test_a_batch_holds_what_was_packed(make_set: MakeSet) -> None:
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


def test_images_get_the_size_asked_for(make_set: MakeSet) -> None:
    folder, card = make_set(3)
    spec = card.spec(6, 5)
    loader = TrainLoader(folder, card, spec, batch_size=2, seed=0, world=World())
    assert [s.batch["image"].shape for s in loader.epoch(0)] == [(2, 1, 6, 5), (1, 1, 6, 5)]


@pytest.mark.fault(19)
def test_two_epochs_differ_and_a_seed_repeats(make_set: MakeSet) -> None:
    folder, card = make_set(30)
    epochs = [counted(list(train(folder, card, 8).epoch(e))) for e in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]


@pytest.mark.fault(15, 18, 19)
@pytest.mark.parametrize("loader_workers", [0, 1, 2])
@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_global_batches_don_t_depend_on_the_ranks(
    make_set: MakeSet, size: int, cache: str, loader_workers: int
) -> None:
    folder, card = make_set(29)
    alone = list(train(folder, card, 6).epoch(1))
    options = {"cache": cache, "loader_workers": loader_workers if size < 4 else 0}
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
def test_a_rank_without_rows_gets_one_that_doesn_t_count(make_set: MakeSet) -> None:
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
def test_each_sample_once_whatever_the_numbers(case: exactly_once.Case) -> None:
    exactly_once.check(case)


@pytest.mark.control(16)
def test_a_sample_used_twice_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a cut that repeats a row, as samplers that pad do, fails the check."""
    leg = exactly_once.Leg(3, 0, 4)
    case = exactly_once.Case((4, 3), 4, 0, 0, (leg,))
    exactly_once.check(case)
    for module in (loading, exactly_once):
        monkeypatch.setattr(module, "rank_part", padded)
    with pytest.raises(AssertionError):
        exactly_once.check(case)


def padded(start: int, samples: int, batch_size: int, world: World) -> RankPart:
    """Equal rows for each rank, as torch's DistributedSampler gives them."""
    total = min(batch_size, samples - start)
    each = -(-total // world.size)
    first = min(world.rank * each, total - each)
    return RankPart(each, total, slice(first, first + each), start + total)


@pytest.mark.fault(16)
@pytest.mark.slow
@settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_each_sample_once_through_tars_and_processes(
    make_set: MakeSet, data: st.DataObject
) -> None:
    """Any samples, shards and batch; resumed again and again with other ranks and processes."""
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


def test_resuming_reads_nothing_of_what_was_consumed(
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
def test_an_epoch_goes_on_only_at_a_step(make_set: MakeSet, consumed: int) -> None:
    folder, card = make_set(38)
    with pytest.raises(TesseraError, match=f"can't go on after {consumed}"):
        train(folder, card, 10).epoch(0, consumed)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_evaluation_sees_each_sample_once_in_fixed_batches(make_set: MakeSet, size: int) -> None:
    folder, card = make_set(33)
    found = {}
    for rank in range(size):
        world = World(rank, size)
        loader = EvalLoader(folder, card, card.spec(), batch_size=7, world=world, split="test")
        assert loader.samples == 33
        for k, batch in loader.batches():
            assert k % size == rank
            found[k] = batch["index"].tolist()
    assert [i for k in sorted(found) for i in found[k]] == list(range(33))
    assert all(indices == list(range(33))[k * 7 : k * 7 + 7] for k, indices in found.items())


def test_an_iterator_that_is_given_up_ends_its_thread(make_set: MakeSet) -> None:
    folder, card = make_set(60)
    stream = train(folder, card, 2).epoch(0)
    next(stream)
    assert any(t.name == "tessera-loading" for t in threading.enumerate())
    del stream
    assert not any(t.name == "tessera-loading" for t in threading.enumerate())


def test_an_iterator_never_begun_starts_no_thread(make_set: MakeSet) -> None:
    folder, card = make_set(10)
    stream = train(folder, card, 2).epoch(0)
    assert not any(t.name == "tessera-loading" for t in threading.enumerate())
    del stream


def test_no_more_than_a_few_batches_are_made_ahead(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, card = make_set(60)
    made: list[int] = []
    real = BatchMaker.fill
    monkeypatch.setattr(BatchMaker, "fill", lambda *a: (made.append(1), real(*a))[1])
    stream = train(folder, card, 2).epoch(0)
    next(stream)
    deadline = time.monotonic() + 5
    while len(made) < prefetch.THREAD_PREFETCH and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert prefetch.THREAD_PREFETCH <= len(made) <= prefetch.THREAD_PREFETCH + 2
    stream.close()  # type: ignore[attr-defined]


@pytest.mark.fault(1, 4)
def test_a_missing_split_and_a_short_shard_are_said_at_once(make_set: MakeSet) -> None:
    folder, card = make_set(12)
    with pytest.raises(TesseraError, match="no 'val' split"):
        EvalLoader(folder, card, card.spec(), batch_size=2, world=World(), split="val")
    path = folder / card.splits["train"].shards[1].path
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(TesseraError, match=r"train/000001\.tar"):
        train(folder, card, 2)


def test_a_split_that_doesn_t_fit_is_not_kept(make_set: MakeSet) -> None:
    folder, card = make_set(20)
    pixels = 20 * 16
    kept = train(folder, card, 4, cache_bytes=pixels)
    read = train(folder, card, 4, cache_bytes=pixels - 1)
    for loader in (kept, read):
        list(loader.epoch(0))
    for shard in card.splits["train"].shards:
        path = folder / shard.path
        path.write_bytes(b"\0" * path.stat().st_size)
    assert len(counted(list(kept.epoch(1)))) == 20
    with pytest.raises(TesseraError, match="checksum differs"):
        list(read.epoch(1))


def test_the_next_shards_are_asked_for_before_they_are_read(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each window's and those of the one after it; every shard is asked for before its first
    sample is read. Processes ask for none: their parent does."""
    folder, card = make_set(200, 2)
    asked: list[list[int]] = []
    read: list[tuple[int, set[int]]] = []
    monkeypatch.setattr(ShardReader, "prefetch", lambda self, shards: asked.append(list(shards)))
    real = ShardReader.pieces

    def logged(self: ShardReader, samples: Any, shards: Any, *more: Any) -> Any:
        read.append((len(asked), set(shards.tolist())))
        return real(self, samples, shards, *more)

    monkeypatch.setattr(ShardReader, "pieces", logged)
    list(train(folder, card, 8).epoch(0))
    assert len(asked) == 100 // 16 + 1
    assert sorted({s for shards in asked for s in shards}) == list(range(100))
    for count, shards in read:
        assert shards <= {s for known in asked[:count] for s in known}
    count = len(asked)
    list(train(folder, card, 8, loader_workers=1).epoch(0))
    assert len(asked) == 2 * count


@pytest.mark.fault(3)
@pytest.mark.parametrize("loader_workers", [0, 2])
def test_a_damaged_sample_is_named_whoever_reads_it(make_set: MakeSet, loader_workers: int) -> None:
    folder, card = make_set(20)
    path = folder / card.splits["train"].shards[2].path
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    loader = train(folder, card, 2, loader_workers=loader_workers)
    with pytest.raises(TesseraError, match=r"sample 10: checksum differs") as caught:
        list(loader.epoch(0))
    assert "fetch or pack the data set again" in (caught.value.hint or "")


def test_processes_end_with_their_loader(make_set: MakeSet) -> None:
    folder, card = make_set(20)
    loader = train(folder, card, 2, loader_workers=2, cache="none")
    list(loader.epoch(0))
    assert len(multiprocessing.active_children()) == 2  # they wait for the next epoch
    del loader
    assert not multiprocessing.active_children()
    options = {"world": World(), "split": "test", "loader_workers": 2, "cache": "none"}
    evaluation = EvalLoader(folder, card, card.spec(), batch_size=7, **options)
    list(evaluation.batches())
    assert not multiprocessing.active_children()
