"""Checks the central property of the data layer for one generated case.

Every epoch uses each sample exactly once, for any number of samples, shards, ranks and loader
processes and any batch size, and however often it is interrupted and resumed with other numbers.
`benchmarks/exactly_once.py` checks more cases than the tests do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from pipelines.data.card import Card, ImageCard, Shard, SplitCard
from pipelines.data.loading.loaders import TrainRows
from pipelines.data.loading.order import rank_part
from pipelines.interfaces import World

EXAMPLES = 2000


@dataclass(frozen=True)
class Leg:
    """A part of an epoch between two interruptions."""

    ranks: int
    loader_workers: int
    steps: int


@dataclass(frozen=True)
class Case:
    shard_sizes: tuple[int, ...]
    batch: int
    seed: int
    epoch: int
    legs: tuple[Leg, ...]


LEGS = st.builds(Leg, st.integers(1, 9), st.integers(0, 4), st.integers(0, 12))
CASES = st.builds(
    Case,
    st.lists(st.integers(1, 40), min_size=1, max_size=40).map(tuple),
    st.integers(1, 70),
    st.integers(0, 2**63),
    st.integers(0, 1000),
    st.lists(LEGS, min_size=1, max_size=6).map(tuple),
)


def card_of(sizes: Sequence[int]) -> Card:
    """The card of a data set without files."""
    shards = tuple(
        Shard(path=f"train/{n}.tar", samples=size, size_bytes=0, sha256="", rows_sha256="")
        for n, size in enumerate(sizes)
    )
    split = SplitCard(samples=sum(sizes), shards=shards, index="", index_bytes=0, index_sha256="")
    image = ImageCard(
        channels=1, min_height=1, max_height=1, min_width=1, max_width=1, mean=(0,), std=(1,)
    )
    card = Card(name="x", task="images", classes=(), image=image, splits={"train": split})
    return card.sealed()


def check(case: Case) -> None:
    """Runs an epoch to its end; the legs are repeated as needed."""
    card, samples = card_of(case.shard_sizes), sum(case.shard_sizes)
    alone = TrainRows(card, "train", case.seed, case.batch, World())
    seen: list[int] = []
    consumed = leg_number = 0
    while consumed < samples:
        leg = case.legs[leg_number % len(case.legs)]
        # Ends the epoch even if no leg has any steps.
        steps = leg.steps if leg_number < len(case.legs) else samples
        worlds = [World(rank, leg.ranks) for rank in range(leg.ranks)]
        processes = [
            [
                TrainRows(card, "train", case.seed, case.batch, world)
                for _ in range(max(leg.loader_workers, 1))
            ]
            for world in worlds
        ]
        for step in range(steps):
            if consumed >= samples:
                break
            parts = [rank_part(consumed, samples, case.batch, world) for world in worlds]
            assert len({(p.total, p.consumed) for p in parts}) == 1
            batch: list[int] = []
            for mine, makers in zip(parts, processes):
                rows = makers[step % len(makers)]((case.epoch, consumed)).tolist()
                assert len(rows) == max(mine.counted, 1)
                batch += rows[: mine.counted]
            assert len(batch) == parts[0].total
            assert batch == alone((case.epoch, consumed)).tolist()
            seen += batch
            consumed = parts[0].consumed
        leg_number += 1
    assert sorted(seen) == list(range(samples))
