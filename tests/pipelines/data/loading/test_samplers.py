"""Balanced sampling: how often each image is used, for any ranks, processes and resumes."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from sample_sources import png

from pipelines.data import shards
from pipelines.data.card import Card, ImageCard
from pipelines.data.loading.loaders import TrainLoader
from pipelines.data.loading.order import EpochOrder
from pipelines.data.loading.samplers import ClassSampler
from pipelines.data.shards import Packed
from pipelines.interfaces import World

LABELS = np.repeat([0, 1, 2, 4], [900, 90, 9, 1])
"""A class without samples is among them."""


def share(repeats: np.ndarray, label: int) -> int:
    return int(repeats[label == LABELS].sum())


@pytest.mark.parametrize("epoch", range(4))
def test_each_class_is_used_equally_often(epoch: int) -> None:
    repeats = ClassSampler(LABELS, "balanced", "set", 3).repeats(epoch)
    assert repeats.sum() == 1000
    for label in (0, 1, 2, 4):
        assert abs(share(repeats, label) - 250) <= 1
        own = repeats[label == LABELS]
        assert own.max() - own.min() <= 1, "as evenly as possible"


def test_the_square_root_lies_between() -> None:
    repeats = ClassSampler(LABELS, "sqrt", "set", 3).repeats(0)
    assert repeats.sum() == 1000
    expected = np.sqrt([900, 90, 9, 1])
    expected = 1000 * expected / expected.sum()
    found = [share(repeats, label) for label in (0, 1, 2, 4)]
    assert np.allclose(found, expected, atol=1)


def test_what_is_left_out_changes_with_each_epoch() -> None:
    sampler = ClassSampler(LABELS, "balanced", "set", 3)
    used = sum(sampler.repeats(epoch)[:900] for epoch in range(40))
    assert used.min() > 0
    assert abs(used.mean() - 40 * 250 / 900) < 0.5
    again = ClassSampler(LABELS, "balanced", "set", 3)
    assert np.array_equal(again.repeats(7), sampler.repeats(7))
    for other in (
        ClassSampler(LABELS, "balanced", "set", 4),
        ClassSampler(LABELS, "sqrt", "set", 3),
    ):
        assert not np.array_equal(other.repeats(7), sampler.repeats(7))


def test_classes_of_one_size_are_used_once() -> None:
    labels = np.tile(np.arange(5), 40)
    assert set(ClassSampler(labels, "balanced", "set", 0).repeats(0).tolist()) <= {0, 1, 2}
    assert abs(ClassSampler(labels, "sqrt", "set", 0).repeats(0) - 1).mean() < 0.05


@pytest.mark.parametrize("sizes", [[1000], [7, 500, 0, 493], [100] * 10, [40] * 25])
def test_the_order_has_each_sample_as_often_as_asked(sizes: list[int]) -> None:
    repeats = ClassSampler(LABELS, "balanced", "set", 3).repeats(2)
    order = EpochOrder("digest", "train", sizes, 3, 2, repeats=repeats)
    assert order.samples == 1000
    seen = np.concatenate([order.batch(start, start + 64) for start in range(0, 1000, 64)])
    assert np.array_equal(np.bincount(seen, minlength=1000), repeats)
    once = EpochOrder("digest", "train", sizes, 3, 2, repeats=np.ones(1000, np.int64))
    plain = EpochOrder("digest", "train", sizes, 3, 2)
    assert np.array_equal(once.batch(0, 1000), plain.batch(0, 1000)), "the control"


def grey(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, np.uint8)


def make(folder: Path) -> Card:
    counts = {"many": 20, "few": 3, "one": 1}
    samples = [
        Packed(
            f"s{label}-{n}",
            ("png", png(np.full((8, 8, 3), label * 50 + n, np.uint8))),
            ("cls", b"%d" % label),
            label,
        )
        for label, count in enumerate(counts.values())
        for n in range(count)
    ]
    split = shards.write(folder, "train", samples, shard_samples=7)
    image = ImageCard(
        channels=3,
        min_height=8,
        max_height=8,
        min_width=8,
        max_width=8,
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
    )
    split = split.model_copy(update={"class_counts": counts})
    return Card(
        name="rare",
        task="classification",
        classes=tuple(counts),
        image=image,
        splits={"train": split},
    ).sealed()


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (2, 0), (3, 1)])
def test_ranks_processes_and_resumes_see_the_same_batches(
    size: int, workers: int, tmp_path: Path
) -> None:
    card = make(tmp_path)

    def steps(rank: int, of: int, processes: int, consumed: int = 0) -> list[list[int]]:
        loader = TrainLoader(
            tmp_path,
            card,
            card.spec(8, 8),
            batch_size=5,
            seed=3,
            world=World(rank, of),
            sampler="balanced",
            loader_workers=processes,
        )
        taken = [step.batch["index"][: step.counted].tolist() for step in loader.epoch(1, consumed)]
        loader.close()
        return taken

    alone = steps(0, 1, 0)
    used = Counter(sample for step in alone for sample in step)
    assert sum(used.values()) == 24
    assert [sum(used[s] for s in part) for part in (range(20), range(20, 23), [23])] == [8, 8, 8]
    parts = [steps(rank, size, workers, consumed=10) for rank in range(size)]
    assert [list(chain(*together)) for together in zip(*parts)] == alone[2:]
