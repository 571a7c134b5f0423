"""The cache holds only complete, verified files, also after kills and with a full disk."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.storage.cache import Cache

FORK = multiprocessing.get_context("fork")
LIMIT = 1 << 20


def content(seed: int, size: int = 1000) -> tuple[str, bytes]:
    data = hashlib.shake_128(b"%d" % seed).digest(size)
    return hashlib.sha256(data).hexdigest(), data


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_file_is_fetched_once(tmp_path: Path) -> None:
    cache, (sha256, data) = Cache(tmp_path, LIMIT), content(1)
    calls = []

    def blocks() -> Iterator[bytes]:
        calls.append(1)
        yield data[:300]
        yield data[300:]

    assert not cache.has(sha256, len(data))
    for _ in range(3):
        assert cache.fetch(sha256, len(data), blocks, "x").read_bytes() == data
    assert calls == [1]
    assert cache.has(sha256, len(data))


def test_only_a_damaged_file_is_discarded(tmp_path: Path) -> None:
    cache, (sha256, data) = Cache(tmp_path, LIMIT), content(1)
    path = cache.fetch(sha256, len(data), lambda: [data], "x")
    assert not cache.discard_damaged(sha256)  # the control
    assert path.exists()
    path.write_bytes(b"?" + data[1:])
    assert cache.fetch(sha256, len(data), lambda: [data], "x").read_bytes() != data, "unnoticed"
    assert cache.discard_damaged(sha256)
    assert cache.fetch(sha256, len(data), lambda: [data], "x").read_bytes() == data


def test_an_empty_file_is_cached(tmp_path: Path) -> None:
    sha256 = hashlib.sha256(b"").hexdigest()
    assert Cache(tmp_path, LIMIT).fetch(sha256, 0, list, "x").read_bytes() == b""


@pytest.mark.fault(5)
@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([b""], "has 0 bytes"),
        ([content(1)[1][:-1]], "has 999 bytes"),
        ([content(1)[1], b"x"], "bytes, the card says 1,000"),
        ([b"<html>" * 200], "the card says 1,000"),
        ([content(2)[1]], "checksum differs"),
    ],
    ids=["empty", "short", "long", "error page", "other content"],
)
def test_wrong_content_is_not_kept(tmp_path: Path, blocks: list[bytes], message: str) -> None:
    sha256, data = content(1)
    with pytest.raises(TesseraError, match=message):
        Cache(tmp_path, LIMIT).fetch(sha256, len(data), lambda: blocks, "x")
    assert names(tmp_path) == []


@pytest.mark.fault(5)
def test_an_interrupted_download_is_not_kept(tmp_path: Path) -> None:
    sha256, data = content(1)

    def blocks() -> Iterator[bytes]:
        yield data[:500]
        raise TesseraError("the server is gone")

    cache = Cache(tmp_path, LIMIT)
    with pytest.raises(TesseraError, match="the server is gone"):
        cache.fetch(sha256, len(data), blocks, "x")
    assert names(tmp_path) == []
    assert cache.fetch(sha256, len(data), lambda: [data], "x").read_bytes() == data


def test_the_least_recently_used_file_is_deleted(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3500)
    held = [content(n) for n in range(5)]
    for sha256, data in held[:3]:
        cache.fetch(sha256, 1000, lambda data=data: [data], "x")
        time.sleep(0.01)
    cache.fetch(held[0][0], 1000, list, "x")
    time.sleep(0.01)
    cache.fetch(held[3][0], 1000, lambda: [held[3][1]], "x")
    assert names(tmp_path) == sorted(held[n][0] for n in (0, 2, 3))


def test_an_open_file_stays_readable_when_it_is_deleted(tmp_path: Path) -> None:
    cache, (sha256, data), other = Cache(tmp_path, 1500), content(1), content(2)
    file = cache.open(sha256, len(data), lambda: [data], "x")
    cache.fetch(other[0], 1000, lambda: [other[1]], "x")
    assert names(tmp_path) == [other[0]]
    assert os.pread(file, 1000, 0) == data
    os.close(file)


def _hold_open(folder: Path, sha256: str, opened: Event, done: Event) -> None:
    file = Cache(folder, 3500).open(sha256, 1000, list, "x")
    opened.set()
    done.wait(20)
    os.close(file)


def test_a_file_that_a_process_has_open_is_deleted_last(tmp_path: Path) -> None:
    cache, held = Cache(tmp_path, 3500), [content(n) for n in range(5)]
    for sha256, data in held[:3]:
        cache.fetch(sha256, 1000, lambda data=data: [data], "x")
        time.sleep(0.01)
    opened, done = FORK.Event(), FORK.Event()
    reader = FORK.Process(target=_hold_open, args=(tmp_path, held[0][0], opened, done))
    reader.start()
    assert opened.wait(20)
    for name, seconds in zip(held[:3], (1, 2, 3), strict=False):
        os.utime(tmp_path / name[0], (seconds, seconds))
    cache.fetch(held[3][0], 1000, lambda: [held[3][1]], "x")
    assert names(tmp_path) == sorted(held[n][0] for n in (0, 2, 3)), "0 is the oldest, but open"
    done.set()
    reader.join(20)
    cache.fetch(held[4][0], 1000, lambda: [held[4][1]], "x")
    assert names(tmp_path) == sorted(held[n][0] for n in (2, 3, 4))


def test_a_file_that_another_process_downloads_is_not_prefetched(tmp_path: Path) -> None:
    (sha256, data), log = content(1), tmp_path / "log"
    slow = FORK.Process(target=_fetch_slowly, args=(tmp_path / "cache", sha256, data, log, 60))
    slow.start()
    while not log.exists():
        time.sleep(0.01)
    with pytest.raises(TesseraError, match="is being downloaded by another process"):
        Cache(tmp_path / "cache", LIMIT).fetch_unless_busy(sha256, 1000, list, "x")
    slow.kill()
    slow.join()
    Cache(tmp_path / "cache", LIMIT).fetch_unless_busy(sha256, 1000, lambda: [data], "x")
    assert names(tmp_path / "cache") == [sha256]


def test_a_file_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match=r"has 1,000 bytes, the limit of the cache .* is 999"):
        Cache(tmp_path, 999).fetch("0" * 64, 1000, list, "shard x")


def test_a_file_of_another_size_is_fetched_again(tmp_path: Path) -> None:
    cache, (sha256, data) = Cache(tmp_path, LIMIT), content(1)
    cache.fetch(sha256, 1000, lambda: [data], "x").write_bytes(data[:10])
    assert cache.fetch(sha256, 1000, lambda: [data], "x").read_bytes() == data


def _fetch_slowly(folder: Path, sha256: str, data: bytes, log: Path, pause: float) -> None:
    def blocks() -> Iterator[bytes]:
        with log.open("a") as file:
            file.write("x")
        for at in range(0, len(data), 100):
            time.sleep(pause)
            yield data[at : at + 100]

    path = Cache(folder, LIMIT).fetch(sha256, len(data), blocks, "x")
    assert path.read_bytes() == data


def test_one_downloads_and_the_others_wait(tmp_path: Path) -> None:
    (sha256, data), log = content(1), tmp_path / "log"
    given = (tmp_path / "cache", sha256, data, log, 0.02)
    workers = [FORK.Process(target=_fetch_slowly, args=given) for _ in range(4)]
    threads = [threading.Thread(target=_fetch_slowly, args=given) for _ in range(3)]
    for worker in [*workers, *threads]:
        worker.start()
    for worker in [*workers, *threads]:
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert log.read_text() == "x"
    assert names(tmp_path / "cache") == [sha256]


def test_a_killed_download_blocks_no_process(tmp_path: Path) -> None:
    (sha256, data), log = content(1), tmp_path / "log"
    first = FORK.Process(target=_fetch_slowly, args=(tmp_path / "cache", sha256, data, log, 60))
    first.start()
    while not log.exists():
        time.sleep(0.01)
    second = FORK.Process(target=_fetch_slowly, args=(tmp_path / "cache", sha256, data, log, 0))
    second.start()
    time.sleep(0.2)
    assert second.is_alive(), "it must wait for the first"
    assert first.pid
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second.join(20)
    assert second.exitcode == 0
    assert log.read_text() == "xx"
    assert names(tmp_path / "cache") == [sha256]


def test_leftovers_of_a_killed_download_are_deleted_and_a_running_one_is_not(
    tmp_path: Path,
) -> None:
    (sha256, data), log = content(1), tmp_path / "log"
    killed, _ = content(7)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{killed}.part").write_bytes(bytes(LIMIT - 2000))
    slow = FORK.Process(target=_fetch_slowly, args=(tmp_path / "cache", sha256, data, log, 60))
    slow.start()
    while not log.exists():
        time.sleep(0.01)
    other = content(2, LIMIT - 500)
    cache = Cache(tmp_path / "cache", LIMIT)
    cache.fetch(other[0], LIMIT - 500, lambda: [other[1]], "x")
    assert names(tmp_path / "cache") == sorted([other[0], f"{sha256}.part"])
    slow.kill()
    slow.join()


def _fill_a_small_disk(folder: Path) -> None:
    """A limit on file sizes makes a write fail half-way, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sha256, data = content(1, 4000)
    with pytest.raises(TesseraError, match="can't be written to the cache"):
        Cache(folder, LIMIT).fetch(sha256, 4000, lambda: [data], "x")


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    worker = FORK.Process(target=_fill_a_small_disk, args=(tmp_path,))
    worker.start()
    worker.join(20)
    assert worker.exitcode == 0
    assert names(tmp_path) == []
