"""Data sets in a real S3 store: packing, reading, verifying, and reading during an outage."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import rank_work
from faulty_server import FaultyWire, wire_to
from s3_server import S3Server, missing

from models.core.errors import TesseraError
from pipelines.data import card as cards
from pipelines.data.card import Card
from pipelines.data.inspection import verify
from pipelines.data.packing import pack
from pipelines.data.shards import ShardReader
from pipelines.storage.base import CacheSettings, current_cache, use_cache
from pipelines.storage.object_store import ObjectStorage
from pipelines.storage.open import open_storage
from pipelines.storage.retry import RetryPolicy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing() or "there is a server"),
]
QUICK = RetryPolicy(
    max_attempts=4, first_wait_seconds=0.01, max_wait_seconds=0.05, call_seconds=2.0
)
DATA = hashlib.shake_128(b"data").digest(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def wire(s3_server: S3Server, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyWire]:
    """A proxy between the client and the server."""
    with wire_to(s3_server.port) as wire:
        monkeypatch.setenv("AWS_ENDPOINT_URL", wire.address)
        yield wire


def quick(where: str) -> ObjectStorage:
    cache = current_cache()
    return ObjectStorage("s3", where.removeprefix("s3://"), where, cache, QUICK)


def put(where: str, name: str, data: bytes = DATA) -> None:
    open_storage(where).write(name, data)


def cached(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").glob("[!.]*")]


def keys(reader: ShardReader) -> list[str]:
    return [reader.read(number).key for number in range(len(reader))]


# ── the contract ─────────────────────────────────────────────────────────────────────────────────


def test_a_written_file_can_be_read(s3: str, tmp_path: Path) -> None:
    storage = open_storage(s3)
    assert storage.names() == []
    assert storage.size("card.json") is None
    storage.write("card.json", b"{}")
    storage.write("train/empty", b"")
    big = np.random.default_rng(0).bytes(20 << 20)
    (tmp_path / "big").write_bytes(big)
    storage.put(tmp_path / "big", "train/000000.tar")
    assert not (tmp_path / "big").exists()
    assert storage.names() == ["card.json", "train/000000.tar", "train/empty"]
    assert storage.names("train") == ["train/000000.tar", "train/empty"]
    assert storage.names("tra") == []
    assert storage.read("card.json") == b"{}"
    assert storage.read("train/empty") == b""
    sizes = {"train/000000.tar": len(big), "train/empty": 0}
    assert storage.sizes([*sizes, "train/no"]) == sizes
    sha256 = hashlib.sha256(big).hexdigest()
    path = storage.fetch("train/000000.tar", size_bytes=len(big), sha256=sha256)
    assert path.read_bytes() == big
    storage.download("train/000000.tar", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == big
    for _ in range(2):
        storage.remove("card.json")
    assert storage.size("card.json") is None


def test_errors_name_the_problem(s3: str) -> None:
    with pytest.raises(TesseraError, match=r"card\.json of s3://.* does not exist"):
        open_storage(s3).read("card.json")
    with pytest.raises(TesseraError, match="there is no such bucket"):
        open_storage("s3://nobodys-bucket/set").read("card.json")
    with pytest.raises(TesseraError, match="there is no such bucket"):
        open_storage("s3://nobodys-bucket/set").write("card.json", b"{}")
    with pytest.raises(TesseraError, match="is not a packed data set"):
        cards.read(s3)


def test_wrong_credentials_are_reported(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if s3_server.kind == "moto":
        pytest.skip("moto's server takes any login")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(TesseraError, match="access is denied"):
        open_storage(s3).read("card.json")
    with pytest.raises(TesseraError, match="access is denied"):
        open_storage(s3).names()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(TesseraError, match="credentials are missing or incomplete"):
        open_storage(s3).read("card.json")


def test_a_fork_has_its_own_connection(s3: str) -> None:
    storage = open_storage(s3)
    storage.write("card.json", b"{}")

    def read() -> None:
        assert storage.read("card.json") == b"{}"

    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    process.join(20)
    assert process.exitcode == 0


# ── network faults ────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(5)
@pytest.mark.parametrize("fault", ["503", "refuse", "stall", "cut:0", "cut:100000", "drip:1000"])
def test_a_transient_fault_is_retried(
    fault: str, s3: str, wire: FaultyWire, tmp_path: Path
) -> None:
    storage = quick(s3)
    put(s3, "a.tar")
    assert storage.size("a.tar") == len(DATA)
    wire.faults = [fault, fault]
    wire.cut()
    assert storage.fetch("a.tar", size_bytes=len(DATA), sha256=SHA256).read_bytes() == DATA
    assert not wire.faults
    assert cached(tmp_path) == [SHA256]


@pytest.mark.fault(5)
@pytest.mark.parametrize(
    "fault", ["503", "refuse", "stall", "cut:100000", "drip:1000", "flip:50000"]
)
def test_a_lasting_fault_is_an_error_and_nothing_is_cached(
    fault: str, s3: str, wire: FaultyWire, tmp_path: Path
) -> None:
    storage = quick(s3)
    put(s3, "a.tar")
    assert storage.size("a.tar") == len(DATA)
    wire.always = fault
    wire.cut()
    with pytest.raises(TesseraError, match=r"a\.tar of .*(tried 4 times|checksum differs)"):
        storage.fetch("a.tar", size_bytes=len(DATA), sha256=SHA256)
    assert cached(tmp_path) == []
    wire.always = ""
    wire.cut()
    assert storage.fetch("a.tar", size_bytes=len(DATA), sha256=SHA256).read_bytes() == DATA


def test_a_replaced_object_is_reported(s3: str) -> None:
    put(s3, "a.tar", b"<html>sorry</html>")
    with pytest.raises(TesseraError, match="has 18 bytes, the card says 300,000"):
        quick(s3).fetch("a.tar", size_bytes=len(DATA), sha256=SHA256)


def test_an_interrupted_upload_is_retried(s3: str, wire: FaultyWire, tmp_path: Path) -> None:
    storage = quick(s3)
    assert storage.size("a.tar") is None
    (tmp_path / "a").write_bytes(DATA)
    wire.faults = ["cut:0", "503"]
    wire.cut()
    storage.put(tmp_path / "a", "a.tar")
    assert storage.read("a.tar") == DATA
    (tmp_path / "a").write_bytes(DATA)
    wire.always = "503"
    wire.cut()
    with pytest.raises(TesseraError, match="tried 4 times"):
        storage.put(tmp_path / "a", "b.tar")
    assert (tmp_path / "a").exists(), "a file that was not uploaded must stay"
    wire.always = ""
    wire.cut()
    assert storage.names() == ["a.tar"]


# ── data sets ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def uploaded(s3: str, make_set: Callable[..., tuple[Path, Card]]) -> Card:
    """120 samples in shards of 10, at the address of `s3`."""
    folder, card = make_set(120, shard_samples=10)
    storage = open_storage(s3)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            shutil.copy(path, folder / "up")
            storage.put(folder / "up", path.relative_to(folder).as_posix())
    return card


@pytest.mark.slow
def test_a_data_set_packed_to_a_store_equals_one_in_a_folder(s3: str, tmp_path: Path) -> None:
    here = pack.pack("digits", tmp_path / "digits", shard_samples=300)
    there = pack.pack("digits", s3, shard_samples=300)
    assert there.digest == here.digest
    assert cards.read(s3) == there
    local = {
        path.relative_to(tmp_path / "digits").as_posix()
        for path in (tmp_path / "digits").rglob("*")
        if path.is_file()
    }
    assert set(open_storage(s3).names()) == local
    report = verify.verify(s3)
    assert report.differences == ()
    assert report.samples == sum(split.samples for split in here.splits.values())
    ours, theirs = (ShardReader(where, here, "val") for where in (tmp_path / "digits", s3))
    assert [ours.read(n) for n in range(len(ours))] == [theirs.read(n) for n in range(len(ours))]


def test_damage_is_detected(s3: str, uploaded: Card) -> None:
    storage = open_storage(s3)
    shard = uploaded.splits["train"].shards[3]
    data = bytearray(storage.read(shard.path))
    data[1500] ^= 1
    storage.write(shard.path, bytes(data))
    storage.remove(uploaded.splits["train"].shards[5].path)
    result = verify.verify(s3).differences
    assert [line.split(":")[0] for line in result] == [
        *["shard train/000003.tar"] * 2,
        *["shard train/000005.tar"] * 2,
    ]
    assert "1 of 10 samples differ" in result[0]
    assert "does not exist" in result[2]


def test_opening_costs_the_same_for_any_number_of_shards(
    s3: str, wire: FaultyWire, make_set: Callable[..., tuple[Path, Card]]
) -> None:
    counts = []
    for shard_samples in (60, 2):
        folder, card = make_set(120, shard_samples=shard_samples, name=f"set{shard_samples}")
        where = f"{s3}/{shard_samples}"
        storage = open_storage(where)
        for path in ("card.json", card.splits["train"].index):
            shutil.copy(folder / path, folder / "up")
            storage.put(folder / "up", path)
        before = wire.requests
        reader = ShardReader(where, cards.read(where), "train")
        assert len(reader) == 120
        counts.append(wire.requests - before)
    assert counts[0] == counts[1] > 0


@pytest.mark.cluster
def test_reading_continues_after_an_outage(s3: str, uploaded: Card, wire: FaultyWire) -> None:
    """The store is down for some seconds during an epoch: each sample is read once, in order, and a
    second epoch is read from the cache."""
    reader = ShardReader(s3, uploaded, "train")
    wanted = [f"s{n:04d}" for n in range(120)]
    seen = [reader.read(n).key for n in range(35)]
    wire.down()
    back = threading.Timer(4, wire.up)
    began = time.monotonic()
    back.start()
    seen += [reader.read(n).key for n in range(35, 120)]
    back.join()
    assert seen == wanted
    assert time.monotonic() - began > 4, "it was read without the store"
    wire.down()
    assert keys(reader) == wanted
    wire.up()


@pytest.mark.control(5)
def test_without_retries_the_same_outage_ends_the_epoch(
    s3: str, uploaded: Card, wire: FaultyWire
) -> None:
    storage = ObjectStorage("s3", s3[5:], s3, current_cache(), RetryPolicy(max_attempts=1))
    assert storage.size("card.json")
    wire.down()
    shard = uploaded.splits["train"].shards[0]
    with pytest.raises(TesseraError, match="tried once"):
        storage.fetch(shard.path, size_bytes=shard.size_bytes, sha256=shard.sha256)
    wire.up()


def test_processes_fetch_each_shard_once(
    s3: str, uploaded: Card, wire: FaultyWire, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def read() -> None:
        queue.put(keys(ShardReader(s3, uploaded, "train")))

    processes = [context.Process(target=read) for _ in range(3)]
    for process in processes:
        process.start()
    result = Counter(key for _ in processes for key in queue.get())
    for process in processes:
        process.join(20)
    assert set(result.values()) == {3}
    assert len(result) == 120
    assert len(cached(tmp_path)) == 13, "12 shards and the index"
    total = sum(path.stat().st_size for path in (tmp_path / "cache").glob("[!.]*"))
    assert wire.passed < 2 * total


def test_one_limit_bounds_the_cache_of_all_processes(
    s3: str, uploaded: Card, tmp_path: Path
) -> None:
    """Three processes read 12 shards through a cache for 4. What they have open counts: a deleted
    file that is open still occupies the disk."""
    shards = uploaded.splits["train"].shards
    limit = 4 * max(shard.size_bytes for shard in shards) + (1 << 14)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def read(cache: CacheSettings) -> None:
        use_cache(cache)
        reader = ShardReader(s3, uploaded, "train")
        read = keys(reader)
        held = [os.fstat(file) for file in reader._open.values()]
        queue.put((read, sum(status.st_size for status in held if not status.st_nlink)))

    def cached() -> set[Path]:
        return set((tmp_path / "cache").glob("[!.]*"))

    settings = CacheSettings(tmp_path / "cache", limit)
    processes = [context.Process(target=read, args=(settings,)) for _ in range(3)]
    for process in processes:
        process.start()
    largest = 0
    results = []
    while len(results) < 3:
        if not queue.empty():
            results.append(queue.get())
        total, files = 0, cached()
        for path in files:
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        if cached() == files:  # else a file that went is counted beside the one that came
            largest = max(largest, total)
    for process in processes:
        process.join(20)
    assert 0 < largest <= limit
    for read_keys, deleted in results:
        assert read_keys == [f"s{n:04d}" for n in range(120)]
        assert deleted <= 2 * max(shard.size_bytes for shard in shards)


def test_a_training_over_a_faulty_network_equals_one_on_a_folder(
    s3: str, digits: Path, wire: FaultyWire, tmp_path: Path
) -> None:
    """Bit-identical weights: no sample was lost, repeated or reordered."""
    from pipelines import recipe as recipes
    from pipelines.interfaces import World
    from pipelines.tracking.events import EventLog
    from pipelines.training import worker

    storage = open_storage(s3)
    for path in sorted(digits.rglob("*")):
        if path.is_file():
            shutil.copy(path, tmp_path / "up")
            storage.put(tmp_path / "up", path.relative_to(digits).as_posix())
    weights = []
    for data in (str(digits), s3):
        recipe = recipes.start("cnn", "tiny").with_overrides(
            {
                "data.path": data,
                "data.digest": cards.read(data).digest,
                "train.epochs": 1,
                "train.precision": "fp32",
            }
        )
        folder = tmp_path / f"run{len(weights)}"
        folder.mkdir()
        emit = EventLog(folder / "events.jsonl")
        if data == s3:
            wire.faults = ["", "cut:5000", "503"]
            wire.cut()
        worker.run(rank_work.payload_for(recipe, folder), World(), emit)
        emit.close()
        last = sorted(folder.glob("checkpoints/step-*"))[-1]
        weights.append((last / "weights.safetensors").read_bytes())
    assert not wire.faults, "the faults were not reached: the store got fewer requests"
    assert weights[0] == weights[1]
