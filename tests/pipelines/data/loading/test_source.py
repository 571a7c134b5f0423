"""Batches from a thread, from processes and from the pixel cache; none outlives its iterator."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.core.errors import TesseraError
from pipelines.data.card import Card
from pipelines.data.loading import pixel_cache, prefetch
from pipelines.data.loading.batches import BatchMaker
from pipelines.data.loading.loaders import EvalLoader, TrainLoader, TrainStep
from pipelines.interfaces import World

MakeSet = Callable[..., tuple[Path, Card]]


def train(folder: Path, card: Card, batch: int, **more: object) -> TrainLoader:
    return TrainLoader(folder, card, card.spec(), batch_size=batch, seed=3, world=World(), **more)


def counted(steps: list[TrainStep]) -> list[int]:
    return [i for step in steps for i in step.batch["index"].tolist()[: step.counted]]


def load(folder: Path, card: Card, world: World, **options: object) -> TrainLoader:
    return TrainLoader(
        folder,
        card,
        card.spec(),
        batch_size=6,
        seed=0,
        world=world,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_that_share_decode_each_sample_once(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch, workers: int, tmp_path: Path
) -> None:
    """Counts the images decoded by all processes. Control: without a shared cache, each rank
    decodes samples again in the next epoch."""
    folder, card = make_set(29)
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    real = BatchMaker._decode

    def logged(self: BatchMaker, piece: object, missing: object, *more: object) -> None:
        os.write(log, b"x" * int(missing.sum()))  # type: ignore[attr-defined]
        real(self, piece, missing, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(BatchMaker, "_decode", logged)
    counts = []
    for shared in (True, False):
        created = pixel_cache.create(29, card.spec())
        assert created is not None
        assert created.path is not None
        paths = [created, pixel_cache.open_file(created.path, 29, card.spec())]
        created.unlink()
        loaders = [
            load(
                folder,
                card,
                World(r, 2),
                share=paths[r] if shared else None,
                loader_workers=workers,
            )
            for r in range(2)
        ]
        before = os.fstat(log).st_size
        for epoch in range(3):
            seen = []
            for loader in loaders:
                for step in loader.epoch(epoch):
                    assert torch.equal(step.batch["image"][:, 0, 2, 3].long(), step.batch["index"])
                    seen += step.batch["index"].tolist()[: step.counted]
            assert sorted(seen) == list(range(29))
        counts.append(os.fstat(log).st_size - before)
        for loader in loaders:
            loader.close()
    os.close(log)
    assert counts[0] == 29
    assert counts[1] > 29


def test_the_choice_of_the_cache_is_reported(make_set: MakeSet) -> None:
    folder, card = make_set(20)
    kept = load(folder, card, World())
    assert kept.cache_choice == "memory: 320 bytes of images fit the budget of 2.1 GB"
    read = load(folder, card, World(), cache_bytes=100)
    assert read.cache_choice == "none: 320 bytes of images don't fit the budget of 100 bytes"


def test_a_batch_from_the_cache_is_a_copy(make_set: MakeSet) -> None:
    """A training may change its batch without changing the cache."""
    folder, card = make_set(12)
    for workers in (0, 1):
        loader = load(folder, card, World(), loader_workers=workers)
        for _ in range(3):
            for step in loader.epoch(0):
                assert torch.equal(step.batch["image"][:, 0, 0, 0].long(), step.batch["index"])
                step.batch["image"].fill_(255)
                step.batch["size"].fill_(0)
        loader.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_from_the_ring_is_a_copy(make_set: MakeSet, workers: int) -> None:
    """The ring is overwritten while the first batch is in use."""
    folder, card = make_set(120)
    loader = load(folder, card, World(), cache="none", loader_workers=workers)
    steps = list(loader.epoch(0))
    for step in steps:
        assert torch.equal(step.batch["image"][:, 0, 0, 0].long(), step.batch["index"])
    loader.close()


def test_a_closed_iterator_ends_its_thread(make_set: MakeSet) -> None:
    folder, card = make_set(60)
    stream = train(folder, card, 2).epoch(0)
    next(stream)
    assert any(t.name == "tessera-loading" for t in threading.enumerate())
    del stream
    assert not any(t.name == "tessera-loading" for t in threading.enumerate())


def test_an_unused_iterator_starts_no_thread(make_set: MakeSet) -> None:
    folder, card = make_set(10)
    stream = train(folder, card, 2).epoch(0)
    assert not any(t.name == "tessera-loading" for t in threading.enumerate())
    del stream


def test_only_a_few_batches_are_prefetched(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, card = make_set(60)
    created: list[int] = []
    real = BatchMaker.fill
    monkeypatch.setattr(BatchMaker, "fill", lambda *a: (created.append(1), real(*a))[1])
    stream = train(folder, card, 2).epoch(0)
    next(stream)
    deadline = time.monotonic() + 5
    while len(created) < prefetch.THREAD_PREFETCH and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert prefetch.THREAD_PREFETCH <= len(created) <= prefetch.THREAD_PREFETCH + 2
    stream.close()  # type: ignore[attr-defined]


def test_a_split_larger_than_the_cache_is_not_kept(make_set: MakeSet) -> None:
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


def test_processes_end_with_their_loader(
    make_set: MakeSet, children: Callable[[], list[int]]
) -> None:
    folder, card = make_set(20)
    loader = train(folder, card, 2, loader_workers=2, cache="none")
    list(loader.epoch(0))
    assert len(children()) == 2  # they wait for the next epoch
    del loader
    assert not children()
    options = {"world": World(), "split": "test", "loader_workers": 2, "cache": "none"}
    evaluation = EvalLoader(folder, card, card.spec(), batch_size=7, **options)
    list(evaluation.batches())
    assert not children()
