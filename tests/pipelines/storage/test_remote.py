"""Retries and prefetching, which all remote storages share, with a web server."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_server import FaultyWire, web_server, wire_to

from models.core.errors import TesseraError
from pipelines.data.card import Shard
from pipelines.storage.base import CacheSettings
from pipelines.storage.http import HttpStorage
from pipelines.storage.retry import RetryPolicy

QUICK = RetryPolicy(
    max_attempts=4, first_wait_seconds=0.01, max_wait_seconds=0.05, call_seconds=1.0
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that the server publishes."""
    (tmp_path / "www").mkdir()
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
    """A storage whose server has responded once."""
    storage = HttpStorage(wire.address, cache, QUICK)
    assert storage.read("card.json") == b"{}"
    wire.connections = 0
    return storage


def cached(cache: CacheSettings) -> list[str]:
    return [path.name for path in cache.folder.glob("[!.]*")]


def test_a_server_that_never_responded_gets_few_attempts(cache: CacheSettings) -> None:
    storage = HttpStorage("http://127.0.0.1:9", cache, RetryPolicy(first_wait_seconds=0.01))
    with pytest.raises(TesseraError, match="tried 4 times"):
        storage.read("card.json")


def test_a_range_of_a_file_is_read(storage: HttpStorage, folder: Path) -> None:
    (folder / "x").write_bytes(b"0123456789")
    assert storage.read_range("x", 3, 7) == b"3456"
    with pytest.raises(TesseraError, match="ends before byte 11"):
        storage.read_range("x", 3, 11)


def test_shards_are_prefetched_and_the_threads_end(
    storage: HttpStorage, wire: FaultyWire, cache: CacheSettings, folder: Path
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
    storage.prefetch(shards)
    deadline = time.monotonic() + 10
    while [t for t in threading.enumerate() if t.name == "tessera-prefetch"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sorted(cached(cache)) == sorted(shard.sha256 for shard in shards[:6])
    wire.connections = 0
    for shard in shards[:6]:
        storage.fetch(shard.path, size_bytes=shard.size_bytes, sha256=shard.sha256)
    assert wire.connections == 0
    with pytest.raises(TesseraError, match="does not exist"):
        storage.fetch("no.tar", size_bytes=50_000, sha256="0" * 64)


@pytest.mark.slow
def test_a_new_list_cancels_the_old_one(
    storage: HttpStorage, wire: FaultyWire, folder: Path, cache: CacheSettings
) -> None:
    wire.always = "stall"
    shards = [
        Shard(path=f"{n}.tar", samples=1, size_bytes=1, sha256=f"{n:064}", rows_sha256="")
        for n in range(50)
    ]
    storage.prefetch(shards)
    storage.prefetch([])
    deadline = time.monotonic() + 10
    while [t for t in threading.enumerate() if t.name == "tessera-prefetch"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert wire.connections <= 4
    assert cached(cache) == []


@pytest.mark.slow
def test_a_file_that_is_replaced_meanwhile_is_read_as_a_whole(
    storage: HttpStorage, cache: CacheSettings, folder: Path
) -> None:
    """With the size before and the content after a replacement, it would be cut."""
    texts = [b"[" + b"0, " * count + b"0]" for count in (1, 400)]
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            for text in texts:
                (folder / "new").write_bytes(text)
                os.replace(folder / "new", folder / "state.json")
                time.sleep(0.001)

    (folder / "state.json").write_bytes(texts[0])
    thread = threading.Thread(target=replace)
    thread.start()
    try:
        patient = HttpStorage(storage.where, cache, dataclasses.replace(QUICK, max_attempts=100))
        assert patient.read("card.json") == b"{}"  # a server that never responded gets few attempts
        assert {patient.read("state.json") for _ in range(40)} <= set(texts)
    finally:
        stop.set()
        thread.join()
