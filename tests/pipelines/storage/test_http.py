"""Data sets on a web server: faults of the wire are survived or said, and never kept."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty_server import FaultyWire, web_server, wire_to

from models.core.errors import TesseraError
from pipelines.data.card import Card, Shard
from pipelines.data.shards import ShardReader
from pipelines.storage.base import CacheSettings, use_cache
from pipelines.storage.http import HttpStorage
from pipelines.storage.retry import RetryPolicy

QUICK = RetryPolicy(
    max_attempts=4, first_wait_seconds=0.01, max_wait_seconds=0.05, call_seconds=1.0
)
DATA = hashlib.shake_128(b"data").digest(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        (tmp_path / "www" / split).mkdir(parents=True)
    (tmp_path / "www" / "train" / "0.tar").write_bytes(DATA)
    (tmp_path / "www" / "val" / "0.tar").write_bytes(DATA[::-1])
    (tmp_path / "www" / "card.json").write_bytes(b"{}")
    return tmp_path / "www"


@pytest.fixture
def wire(folder: Path) -> Iterator[FaultyWire]:
    with web_server(folder) as port, wire_to(port) as wire:
        yield wire


@pytest.fixture
def cache(tmp_path: Path) -> CacheSettings:
    return CacheSettings(tmp_path / "cache", 10 << 20)


@pytest.fixture
def place(wire: FaultyWire, cache: CacheSettings) -> HttpStorage:
    place = HttpStorage(wire.address, cache, QUICK)
    assert place.read("card.json") == b"{}"
    wire.connections = 0
    return place


def fetch(place: HttpStorage) -> bytes:
    return place.fetch("train/0.tar", size_bytes=len(DATA), sha256=SHA256).read_bytes()


def kept(cache: CacheSettings) -> list[str]:
    return [path.name for path in cache.folder.glob("[!.]*")]


@pytest.mark.fault(5)
@pytest.mark.parametrize(
    "fault", ["503", "500", "429", "refuse", "stall", "cut:0", "cut:100", "cut:150000", "drip:1000"]
)
def test_what_passes_is_tried_again(
    fault: str, place: HttpStorage, wire: FaultyWire, cache: CacheSettings
) -> None:
    wire.faults = [fault, fault]
    assert fetch(place) == DATA
    assert wire.connections >= 3
    assert kept(cache) == [SHA256]


@pytest.mark.fault(5)
@pytest.mark.parametrize("fault", ["503", "refuse", "stall", "cut:0", "cut:150000", "drip:1000"])
def test_what_lasts_is_an_error_and_nothing_is_kept(
    fault: str, place: HttpStorage, wire: FaultyWire, cache: CacheSettings
) -> None:
    wire.always = fault
    began = time.monotonic()
    with pytest.raises(TesseraError, match=r"train/0\.tar of .*tried 4 times"):
        fetch(place)
    assert time.monotonic() - began < 4 * (1.0 + QUICK.call_seconds)
    assert kept(cache) == []
    wire.always = ""
    assert fetch(place) == DATA


@pytest.mark.fault(5)
@pytest.mark.parametrize(("fault", "said"), [("404", "not there"), ("403", "access is denied")])
def test_what_will_not_pass_is_said_at_once(
    fault: str, said: str, place: HttpStorage, wire: FaultyWire, cache: CacheSettings
) -> None:
    wire.always = fault
    with pytest.raises(TesseraError, match=said):
        fetch(place)
    assert wire.connections == 1
    assert kept(cache) == []


@pytest.mark.fault(5)
def test_a_changed_byte_is_seen(place: HttpStorage, wire: FaultyWire, cache: CacheSettings) -> None:
    wire.always = "flip:150000"
    with pytest.raises(TesseraError, match="checksum differs"):
        fetch(place)
    assert kept(cache) == []


@pytest.mark.fault(4, 5)
def test_another_file_in_its_place_is_said_at_once(
    place: HttpStorage, folder: Path, wire: FaultyWire
) -> None:
    (folder / "train" / "0.tar").write_bytes(b"<html>sorry</html>")
    with pytest.raises(TesseraError, match="has 18 bytes, the card says 300,000"):
        fetch(place)
    assert wire.connections == 2


@pytest.mark.fault(6)
def test_two_files_of_one_name_are_two(place: HttpStorage, folder: Path) -> None:
    other = DATA[::-1]
    assert fetch(place) == DATA
    found = place.fetch(
        "val/0.tar", size_bytes=len(other), sha256=hashlib.sha256(other).hexdigest()
    )
    assert found.read_bytes() == other


@pytest.mark.control(6)
@pytest.mark.skipif(not shutil.which("curl"), reason="stock webdataset fetches with curl")
def test_stock_webdataset_takes_one_name_for_one_file(wire: FaultyWire, tmp_path: Path) -> None:
    """What the checksum is for: a cache that goes by the base name gives train for val, and keeps
    what was cut."""
    from webdataset.cache import FileCache

    for name in ("train", "val"):
        cache = FileCache(cache_dir=str(tmp_path / "stock"), validator=None, verbose=False)
        got = Path(cache.get_file(f"{wire.address}/{name}/0.tar")).read_bytes()
        assert got == DATA


def test_it_is_to_read_only(place: HttpStorage, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    for act in (
        lambda: place.write("x", b"x"),
        lambda: place.put(tmp_path / "x", "x"),
        lambda: place.remove("x"),
        lambda: place.names(),
    ):
        with pytest.raises(TesseraError, match="it is a web server"):
            act()


def test_sizes_are_asked_one_by_one(place: HttpStorage) -> None:
    assert place.sizes(["train/0.tar", "val/0.tar", "no"]) == {
        "train/0.tar": len(DATA),
        "val/0.tar": len(DATA),
    }


def test_a_server_that_never_answered_gets_little_patience(cache: CacheSettings) -> None:
    place = HttpStorage("http://127.0.0.1:9", cache, RetryPolicy(first_wait_seconds=0.01))
    with pytest.raises(TesseraError, match="tried 4 times"):
        place.read("card.json")


def test_prefetched_shards_are_there_and_its_threads_end(
    place: HttpStorage, wire: FaultyWire, cache: CacheSettings, folder: Path
) -> None:
    shards = []
    for number in range(6):
        data = hashlib.shake_128(b"%d" % number).digest(50_000)
        (folder / f"{number}.tar").write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        shards.append(
            Shard(path=f"{number}.tar", samples=1, size_bytes=50_000, sha256=sha256, rows_sha256="")
        )
    shards.append(shards[0].model_copy(update={"path": "no.tar", "sha256": "0" * 64}))
    place.prefetch(shards)
    deadline = time.monotonic() + 10
    while [t for t in threading.enumerate() if t.name == "tessera-prefetch"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sorted(kept(cache)) == sorted(shard.sha256 for shard in shards[:6])
    wire.connections = 0
    for shard in shards[:6]:
        place.fetch(shard.path, size_bytes=shard.size_bytes, sha256=shard.sha256)
    assert wire.connections == 0
    with pytest.raises(TesseraError, match="not there"):
        place.fetch("no.tar", size_bytes=50_000, sha256="0" * 64)


def test_what_is_no_longer_wanted_is_not_fetched(
    place: HttpStorage, wire: FaultyWire, folder: Path, cache: CacheSettings
) -> None:
    wire.always = "stall"
    shards = [
        Shard(path=f"{n}.tar", samples=1, size_bytes=1, sha256=f"{n:064}", rows_sha256="")
        for n in range(50)
    ]
    place.prefetch(shards)
    place.prefetch([])
    deadline = time.monotonic() + 10
    while [t for t in threading.enumerate() if t.name == "tessera-prefetch"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert wire.connections <= 4
    assert kept(cache) == []


@pytest.mark.fault(5)
def test_a_set_is_read_through_a_wire_that_breaks(
    make_set: Callable[..., tuple[Path, Card]], tmp_path: Path
) -> None:
    """The ordinary reader, at an address, with a fault in every second connection."""
    folder, card = make_set(20, shard_samples=4)
    use_cache(CacheSettings(tmp_path / "cache"))
    try:
        with web_server(folder) as port, wire_to(port) as wire:
            reader = ShardReader(wire.address, card, "train")
            wire.faults = ["cut:200", "", "503", "", "refuse", "", "cut:3000", ""]
            keys = [reader.read(number).key for number in range(len(reader))]
            assert not wire.faults
        assert keys == [f"s{n:04d}" for n in range(20)]
        assert [reader.read(n).key for n in range(20)] == keys, "all of it is in the cache"
    finally:
        use_cache(None)


@pytest.mark.control(5)
def test_python_reads_a_cut_body_without_a_word(wire: FaultyWire, folder: Path) -> None:
    """What the length is for: a tar that ends at a member's end is a good one for tarfile."""
    with tarfile.open(folder / "x.tar", "w") as tar:
        for n in range(6):
            tar.addfile(tarfile.TarInfo(f"{n}.cls"))
    data = (folder / "x.tar").read_bytes()[: 3 * 512]
    (folder / "cut.tar").write_bytes(data)
    with tarfile.open(folder / "cut.tar") as tar:
        assert len(tar.getnames()) == 3
