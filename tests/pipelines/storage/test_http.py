"""Data sets on a web server: network faults are retried or reported, and never cached."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from faulty_server import FaultyWire, web_server, wire_to

from models.core.errors import TesseraError
from pipelines.data.card import Card
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
def storage(wire: FaultyWire, cache: CacheSettings) -> HttpStorage:
    storage = HttpStorage(wire.address, cache, QUICK)
    assert storage.read("card.json") == b"{}"
    wire.connections = 0
    return storage


def fetch(storage: HttpStorage) -> bytes:
    return storage.fetch("train/0.tar", size_bytes=len(DATA), sha256=SHA256).read_bytes()


def cached(cache: CacheSettings) -> list[str]:
    return [path.name for path in cache.folder.glob("[!.]*")]


TIMEOUTS = [pytest.param(fault, marks=pytest.mark.slow) for fault in ("stall", "drip:1000")]


@pytest.mark.fault(5)
@pytest.mark.parametrize(
    "fault", ["503", "500", "429", "refuse", "cut:0", "cut:100", "cut:150000", *TIMEOUTS]
)
def test_a_transient_fault_is_retried(
    fault: str, storage: HttpStorage, wire: FaultyWire, cache: CacheSettings
) -> None:
    wire.faults = [fault, fault]
    assert fetch(storage) == DATA
    assert wire.connections >= 3
    assert cached(cache) == [SHA256]


@pytest.mark.fault(5)
@pytest.mark.parametrize("fault", ["503", "refuse", "cut:0", "cut:150000", *TIMEOUTS])
def test_a_lasting_fault_is_an_error_and_nothing_is_cached(
    fault: str, storage: HttpStorage, wire: FaultyWire, cache: CacheSettings
) -> None:
    wire.always = fault
    began = time.monotonic()
    with pytest.raises(TesseraError, match=r"train/0\.tar of .*tried 4 times"):
        fetch(storage)
    assert time.monotonic() - began < 4 * (1.0 + QUICK.call_seconds)
    assert cached(cache) == []
    wire.always = ""
    assert fetch(storage) == DATA


@pytest.mark.fault(5)
@pytest.mark.parametrize(
    ("fault", "message"), [("404", "does not exist"), ("403", "access is denied")]
)
def test_a_permanent_fault_is_reported_at_once(
    fault: str, message: str, storage: HttpStorage, wire: FaultyWire, cache: CacheSettings
) -> None:
    wire.always = fault
    with pytest.raises(TesseraError, match=message):
        fetch(storage)
    assert wire.connections == 1
    assert cached(cache) == []


@pytest.mark.fault(5)
def test_a_changed_byte_is_detected(
    storage: HttpStorage, wire: FaultyWire, cache: CacheSettings
) -> None:
    wire.always = "flip:150000"
    with pytest.raises(TesseraError, match="checksum differs"):
        fetch(storage)
    assert cached(cache) == []


@pytest.mark.fault(4, 5)
def test_a_replaced_file_is_reported_at_once(
    storage: HttpStorage, folder: Path, wire: FaultyWire
) -> None:
    (folder / "train" / "0.tar").write_bytes(b"<html>sorry</html>")
    with pytest.raises(TesseraError, match="has 18 bytes, the card says 300,000"):
        fetch(storage)
    assert wire.connections == 2


@pytest.mark.fault(6)
def test_files_with_the_same_name_are_cached_separately(storage: HttpStorage, folder: Path) -> None:
    other = DATA[::-1]
    assert fetch(storage) == DATA
    result = storage.fetch(
        "val/0.tar", size_bytes=len(other), sha256=hashlib.sha256(other).hexdigest()
    )
    assert result.read_bytes() == other


@pytest.mark.control(6)
@pytest.mark.skipif(not shutil.which("curl"), reason="stock webdataset fetches with curl")
def test_the_cache_of_stock_webdataset_confuses_files_with_the_same_name(
    wire: FaultyWire, tmp_path: Path
) -> None:
    """Therefore our cache uses checksums as names. A cache by file name returns train for val,
    and keeps truncated files."""
    from webdataset.cache import FileCache

    for name in ("train", "val"):
        cache = FileCache(cache_dir=str(tmp_path / "stock"), validator=None, verbose=False)
        got = Path(cache.get_file(f"{wire.address}/{name}/0.tar")).read_bytes()
        assert got == DATA


def test_a_web_server_is_read_only(storage: HttpStorage, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    for call in (
        lambda: storage.write("x", b"x"),
        lambda: storage.put(tmp_path / "x", "x"),
        lambda: storage.remove("x"),
        lambda: storage.names(),
    ):
        with pytest.raises(TesseraError, match="it is a web server"):
            call()


def test_each_size_is_requested(storage: HttpStorage) -> None:
    assert storage.sizes(["train/0.tar", "val/0.tar", "no"]) == {
        "train/0.tar": len(DATA),
        "val/0.tar": len(DATA),
    }


@pytest.mark.slow
@pytest.mark.fault(5)
def test_a_data_set_is_read_over_a_faulty_network(
    make_set: Callable[..., tuple[Path, Card]], tmp_path: Path
) -> None:
    """By `ShardReader`, with a fault in every second connection."""
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
def test_urllib_reads_a_truncated_body_without_an_error(wire: FaultyWire, folder: Path) -> None:
    """Therefore lengths are compared: tarfile accepts a tar that is truncated at a member
    boundary."""
    with tarfile.open(folder / "x.tar", "w") as tar:
        for n in range(6):
            tar.addfile(tarfile.TarInfo(f"{n}.cls"))
    data = (folder / "x.tar").read_bytes()[: 3 * 512]
    (folder / "cut.tar").write_bytes(data)
    with tarfile.open(folder / "cut.tar") as tar:
        assert len(tar.getnames()) == 3


@contextmanager
def redirecting(to: str) -> Iterator[str]:
    """The address of a server that redirects every request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", to + self.path)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_redirect_is_followed_to_the_same_host_only(
    wire: FaultyWire, cache: CacheSettings
) -> None:
    with redirecting(wire.address) as address:  # the control: another port of the same host
        assert HttpStorage(address, cache, QUICK).read("card.json") == b"{}"
    for other in ("http://localhost", "http://169.254.169.254", "https://example.com"):
        message = f"redirects to {other}, which is not followed"
        with redirecting(other) as address, pytest.raises(TesseraError, match=message):
            HttpStorage(address, cache, QUICK).read("card.json")
