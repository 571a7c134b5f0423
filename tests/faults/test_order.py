"""Controls: stock webdataset with uneven shards, several epochs and interruptions.

Tests of the guarantees of Tessera: `test_loaders.py`, `test_order.py`, `test_exactly_once.py`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.data.card import Card
from pipelines.data.loading.loaders import TrainLoader
from pipelines.interfaces import World

MakeSet = Callable[..., tuple[Path, Card]]


def urls(folder: Path, card: Card) -> list[str]:
    return [str(folder / shard.path) for shard in card.splits["train"].shards]


def tessera_steps(folder: Path, card: Card, world: World, epoch: int = 0) -> list[list[str]]:
    """For each step, the keys of the rows that are not padding."""
    spec = card.spec()
    loader = TrainLoader(folder, card, spec, batch_size=4, seed=0, world=world, cache="none")
    return [step.batch["key"][: step.counted] for step in loader.epoch(epoch)]


STOCK_RANK = """
import os, sys, torch, webdataset
from torch import distributed
rank = int(sys.argv[1])
os.environ.update(RANK=str(rank), WORLD_SIZE="2")
meeting = "file://" + sys.argv[2]
distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
options = {"shardshuffle": False, "nodesplitter": webdataset.split_by_node}
steps = 0
for sample in webdataset.WebDataset(sys.argv[3:], **options):
    distributed.all_reduce(torch.ones(1))
    steps += 1
print(steps, flush=True)
distributed.barrier()
print("ended", flush=True)
"""


@pytest.mark.slow
@pytest.mark.control(15)
def test_stock_webdataset_hangs_with_three_shards_on_two_ranks(
    make_set: MakeSet, tmp_path: Path
) -> None:
    """The rank with one shard has ended; the rank with two waits for it in the fifth step."""
    folder, card = make_set(12, shard_samples=4)
    arguments = [str(tmp_path / "meeting"), *urls(folder, card)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", STOCK_RANK, str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert ranks[1].stdout is not None
        assert ranks[1].stdout.readline() == "4\n"
        time.sleep(2)
        assert [rank.poll() for rank in ranks] == [None, None]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.fault(15)
@pytest.mark.parametrize(("samples", "ranks"), [(12, 2), (12, 5), (1, 3), (13, 8)])
def test_every_rank_has_the_same_number_of_steps(
    samples: int, ranks: int, make_set: MakeSet
) -> None:
    """Three shards on two ranks, fewer shards than ranks, a single sample."""
    folder, card = make_set(samples, shard_samples=4)
    steps = [tessera_steps(folder, card, World(rank, ranks)) for rank in range(ranks)]
    assert {len(rank_steps) for rank_steps in steps} == {-(-samples // 4)}
    used = Counter(key for rank_steps in steps for keys in rank_steps for key in keys)
    assert used == Counter(f"s{n:04d}" for n in range(samples))


@pytest.mark.control(17, 18)
def test_stock_webdataset_restarts_the_epoch_after_a_kill(make_set: MakeSet) -> None:
    """It has no state: samples used before the kill are used again."""
    import webdataset as library

    folder, card = make_set(12, shard_samples=4)
    stock = library.WebDataset(urls(folder, card), shardshuffle=False)
    before = [sample["__key__"] for sample, _ in zip(stock, range(5))]
    after = [sample["__key__"] for sample in stock]
    used = Counter(before + after)
    assert sum(count > 1 for count in used.values()) == 5
    loader = TrainLoader(folder, card, card.spec(), batch_size=4, seed=0, world=World())
    first, *_ = loader.epoch(0)
    rest = [key for step in loader.epoch(0, first.consumed) for key in step.batch["key"]]
    assert Counter(first.batch["key"] + rest) == Counter(f"s{n:04d}" for n in range(12))


@pytest.mark.control(18, 19)
def test_the_order_of_stock_webdataset_depends_on_the_readers_and_not_on_the_epoch(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    import webdataset as library

    folder, card = make_set(12, shard_samples=4)
    stock = library.WebDataset(urls(folder, card), shardshuffle=False).shuffle(12, seed=1)
    first, second = ([sample["__key__"] for sample in stock] for _ in range(2))
    assert first == second, "two epochs in the same order"
    assert tessera_steps(folder, card, World(), 0) != tessera_steps(folder, card, World(), 1)

    def batches(ranks: int) -> set[frozenset[str]]:
        """The global batches of four, rank by rank."""
        streams = []
        for rank in range(ranks):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(ranks))
            options = {"shardshuffle": False, "nodesplitter": library.split_by_node}
            streams.append(
                [s["__key__"] for s in library.WebDataset(urls(folder, card), **options)]
            )
        each = 4 // ranks
        starts = range(0, max(map(len, streams)), each)
        return {frozenset(k for keys in streams for k in keys[at : at + each]) for at in starts}

    assert batches(1) != batches(2)
    two = [tessera_steps(folder, card, World(rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*two)] == tessera_steps(folder, card, World())
