"""Advice on the shards of a remote data set: their size, and the cache that a node needs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from pipelines.data.card import Shard, SplitCard
from pipelines.data.inspection import shard_advice

MIB = 1 << 20


def split(sizes: Sequence[int], samples_each: int = 100) -> SplitCard:
    shards = tuple(
        Shard(path=f"{n}.tar", samples=samples_each, size_bytes=size, sha256="", rows_sha256="")
        for n, size in enumerate(sizes)
    )
    return SplitCard(
        samples=samples_each * len(shards), shards=shards, index="", index_bytes=0, index_sha256=""
    )


@pytest.mark.parametrize(
    ("sizes", "advice"),
    [
        ([2 * MIB] * 100, "2.1 MB each, small for an object store; --shard-samples 6400 makes"),
        ([512 * MIB] * 4, "536.9 MB each, large: the first batch waits.*--shard-samples 25 makes"),
        ([64 * MIB] * 20, ""),
    ],
)
def test_shards_of_a_bad_size_get_a_better_number_of_samples(sizes: list[int], advice: str) -> None:
    rows = dict(shard_advice.advise(split(sizes)))
    assert ("shards" in rows) == bool(advice)
    if advice:
        assert re.match(advice, rows["shards"])


def test_a_data_set_of_one_good_shard_gets_no_advice() -> None:
    assert not dict(shard_advice.advise(split([2 * MIB] * 50)))


def test_the_cache_holds_two_windows_or_all_of_a_small_set() -> None:
    large = dict(shard_advice.advise(split([64 * MIB] * 1000)))["cache"]
    assert large.startswith("at least 2,147.5 MB on each node; with 67.1 GB ")
    small = dict(shard_advice.advise(split([64 * MIB] * 3)))["cache"]
    assert small.startswith("at least 201.3 MB on each node; with 201.3 MB ")
