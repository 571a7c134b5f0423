"""Plans for shards hold what they promise; what can't be fed is refused with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.core.errors import TesseraError, UsageError
from pipelines.data.card import Card
from pipelines.data.importers import digits
from pipelines.data.inspection import shard_plan
from pipelines.data.inspection.shard_plan import Amount, Readers
from pipelines.data.loading import preflight
from pipelines.data.packing import pack
from pipelines.data.packing import plan as packing_plan

GB = 1 << 30


def metrics(plan: shard_plan.Plan) -> dict[str, str]:
    return {line.what: line.metric for line in plan.lines}


@given(
    samples=st.integers(1, 2_000_000),
    mean=st.integers(100, 2_000_000),
    gpus=st.integers(1, 64),
    loader_workers=st.integers(1, 16),
)
@settings(max_examples=300, deadline=None)
def test_a_plan_holds_what_it_promises(
    samples: int, mean: int, gpus: int, loader_workers: int
) -> None:
    amount, readers = Amount(samples, samples * mean), Readers(gpus, loader_workers, 4096)
    if samples < gpus:
        with pytest.raises(UsageError, match="can't feed"):
            shard_plan.recommend(amount, readers)
        return
    plan = shard_plan.recommend(amount, readers)
    assert plan.shards == math.ceil(samples / plan.shard_samples), "all samples, no empty shard"
    assert plan.shard_bytes <= shard_plan.MOST_BYTES or plan.shard_samples <= 128
    enough = amount.size_bytes >= 2 * readers.count * shard_plan.SMALL_BYTES
    if enough and samples >= 100 * readers.count:
        assert plan.shards >= 0.99 * readers.count
    assert all(line.why for line in plan.lines)


def test_much_data_is_cut_into_a_multiple_of_the_readers() -> None:
    plan = shard_plan.recommend(Amount(1_281_167, 140 * GB), Readers(8, 4, 256))
    assert plan.shards % 32 == 0
    assert shard_plan.LEAST_BYTES <= plan.shard_bytes <= shard_plan.MOST_BYTES
    assert metrics(plan)["readers"] == "8 GPUs x 4 loader workers = 32"
    assert metrics(plan)["steps"] == "5,005 an epoch, 1,281,167 samples in batches of 256"
    assert metrics(plan)["rank"] == "32 samples a step"


def test_little_data_is_not_cut_to_crumbs() -> None:
    plan = shard_plan.recommend(Amount(1000, 3 << 20), Readers(8, 4, 256))
    assert plan.shards == 1
    assert "too little data for 32 readers" in plan.lines[0].why


def test_a_batch_that_can_not_be_split_evenly_is_said() -> None:
    plan = shard_plan.recommend(Amount(1000, 3 << 20), Readers(3, 1, 256))
    assert metrics(plan)["rank"] == "85 or 86 samples a step"


def test_nodes_share_the_gpus() -> None:
    plan = shard_plan.recommend(Amount(100_000, 10 * GB), Readers(8, 4, 256, nodes=2))
    assert metrics(plan)["window"].endswith("on each of 2 nodes")
    with pytest.raises(UsageError, match="8 GPUs are too few for 9 nodes"):
        Readers(8, 4, 256, nodes=9)


def test_a_source_is_surveyed_as_it_is_packed(tmp_path: Path) -> None:
    source = digits.read("digits", {})
    train = packing_plan.split_items(source.items, seed=0)["train"]
    amount = shard_plan.survey(source, train)
    split = pack.pack("digits", tmp_path / "out").split("train")
    real = sum(shard.size_bytes for shard in split.shards)
    assert amount.samples == split.samples
    assert amount.size_bytes == pytest.approx(real, rel=0.05)
    needs_judge = shard_plan.judge(split, Readers(2, 2, 128))
    assert needs_judge.shards == len(split.shards)
    assert needs_judge.lines[0].metric.startswith("1 of ")


def test_packing_as_planned_gives_the_shards_that_were_planned(tmp_path: Path) -> None:
    source = digits.read("digits", {})
    train = packing_plan.split_items(source.items, seed=0)["train"]
    amount = shard_plan.survey(source, train)
    plan = shard_plan.recommend(
        Amount(amount.samples, 40 * shard_plan.SMALL_BYTES), Readers(4, 2, 128)
    )
    card = pack.pack("digits", tmp_path / "out", shard_samples=plan.shard_samples)
    assert len(card.split("train").shards) == plan.shards == 8


# ── what can't be fed ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def packed(make_set: Callable[..., tuple[Path, Card]]) -> tuple[Path, Card]:
    return make_set(12, shard_samples=4)


def test_what_can_be_fed_passes(packed: tuple[Path, Card]) -> None:
    folder, card = packed
    for workers, batch_size in ((0, 1), (1, 1), (12, 12), (3, 1000)):
        preflight.check_feedable(card, workers=workers, batch_size=batch_size, where=folder)


@pytest.mark.fault(15)
def test_what_can_not_is_refused_with_the_reason(packed: tuple[Path, Card]) -> None:
    folder, card = packed
    with pytest.raises(UsageError, match="12 train samples can't feed 13 workers"):
        preflight.check_feedable(card, workers=13, batch_size=26)
    with pytest.raises(UsageError, match="a batch of 2 can't be split over 3 workers"):
        preflight.check_feedable(card, workers=3, batch_size=2)
    with pytest.raises(TesseraError, match="no 'val' split"):
        preflight.check_feedable(card, workers=1, batch_size=2, split="val")
    (folder / "train" / "000001.tar").unlink()
    (folder / "train" / "000002.tar").write_bytes(b"<html>")
    preflight.check_feedable(card, workers=1, batch_size=2)
    with pytest.raises(
        TesseraError,
        match=r"2 of 3 shards .*000001\.tar is missing; .*000002\.tar has 6 bytes, the card says",
    ):
        preflight.check_feedable(card, workers=1, batch_size=2, where=folder)
    (folder / "train" / "index.npy").unlink()
    with pytest.raises(TesseraError, match=r"the index train/index\.npy of .* is missing"):
        preflight.check_feedable(card, workers=1, batch_size=2, where=folder)
