"""The contract of every storage, on a folder and in memory; the settings of the cache."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.storage.base import (
    CacheSettings,
    Storage,
    absolute_location,
    cache_payload,
    current_cache,
    use_cache,
    use_cache_of,
)
from pipelines.storage.open import open_storage


@pytest.fixture(params=["folder", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    cache = CacheSettings(tmp_path / "cache")
    where = str(tmp_path / "set") if request.param == "folder" else f"memory://bucket{tmp_path}"
    storage = open_storage(where, cache)
    yield storage
    for name in storage.names():
        storage.remove(name)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_written_file_can_be_read(storage: Storage, tmp_path: Path) -> None:
    assert storage.names() == []
    assert storage.size("card.json") is None
    storage.write("card.json", b"{}")
    file = tmp_path / "shard"
    file.write_bytes(b"tar")
    storage.put(file, "train/000000.tar")
    assert not file.exists()
    assert storage.names() == ["card.json", "train/000000.tar"]
    assert storage.names("train") == ["train/000000.tar"]
    assert storage.names("val") == []
    assert storage.read("card.json") == b"{}"
    assert storage.read_range("train/000000.tar", 1, 3) == b"ar"
    with pytest.raises(TesseraError, match="ends before byte 4"):
        storage.read_range("train/000000.tar", 1, 4)
    assert storage.size("train/000000.tar") == 3
    assert storage.sizes(["train/000000.tar", "train/1.tar", "card.json"]) == {
        "train/000000.tar": 3,
        "card.json": 2,
    }
    assert (
        storage.fetch("train/000000.tar", size_bytes=3, sha256=sha256(b"tar")).read_bytes()
        == b"tar"
    )
    storage.download("train/000000.tar", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"tar"
    storage.remove("card.json")
    storage.remove("card.json")
    assert storage.size("card.json") is None


def test_a_file_is_replaced(storage: Storage) -> None:
    storage.write("card.json", b"first, and longer")
    storage.write("card.json", b"second")
    assert storage.read("card.json") == b"second"
    assert storage.names() == ["card.json"]


def test_a_file_is_created_only_if_there_is_none(storage: Storage) -> None:
    assert storage.create_if_absent("lease/1", b"first")
    assert not storage.create_if_absent("lease/1", b"other")
    assert storage.read("lease/1") == b"first"
    storage.remove("lease/1")
    assert storage.create_if_absent("lease/1", b"again")
    assert storage.names() == ["lease/1"]


def test_times_are_those_of_the_last_write(storage: Storage) -> None:
    storage.write("lease/1", b"")
    storage.write("lease/2", b"")
    storage.write("other", b"")
    times = storage.times("lease")
    assert list(times) == ["lease/1", "lease/2"]
    assert times["lease/1"] <= times["lease/2"]
    assert abs(times["lease/2"] - time.time()) < 60
    assert storage.times("none") == {}


def test_an_open_file_stays_readable(storage: Storage) -> None:
    storage.write("a.tar", b"shard")
    file = storage.open("a.tar", size_bytes=5, sha256=sha256(b"shard"))
    storage.remove("a.tar")
    assert os.pread(file, 5, 0) == b"shard"
    os.close(file)


def test_a_missing_file_is_an_error_that_names_it(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match=r"card\.json of .*(can't be read|does not exist)"):
        storage.read("card.json")
    with pytest.raises(TesseraError, match=r"a\.tar of "):
        storage.open("a.tar", size_bytes=1, sha256=sha256(b"x"))
    with pytest.raises(TesseraError, match=r"a\.tar of "):
        storage.download("a.tar", tmp_path / "copy")


@pytest.mark.fault(10)
@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "", "s3://b/x", "a\0b"])
def test_a_path_outside_the_storage_is_refused(storage: Storage, path: str, tmp_path: Path) -> None:
    for call in (storage.read, storage.remove, storage.size):
        with pytest.raises(TesseraError, match="not allowed"):
            call(path)
    with pytest.raises(TesseraError, match="not allowed"):
        storage.fetch(path, size_bytes=1, sha256="0" * 64)


def test_only_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_location("set") == str(tmp_path / "set")
    assert absolute_location("s3://bucket/set") == "s3://bucket/set"


def test_the_cache_can_be_configured() -> None:
    settings = CacheSettings(Path("/elsewhere"), 5)
    try:
        use_cache(settings)
        assert current_cache() == settings
        payload = cache_payload()
        use_cache(None)
        use_cache_of(payload)
        assert current_cache() == settings
    finally:
        use_cache(None)
    assert cache_payload() == {}
    assert current_cache().folder == Path.home() / ".cache" / "tessera" / "shards"
