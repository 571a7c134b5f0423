"""Places: folders and addresses, what they hold, and which addresses are refused."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.core.errors import TesseraError, UsageError
from pipelines.storage.base import (
    CacheSettings,
    Storage,
    absolute_location,
    current_cache,
    use_cache,
)
from pipelines.storage.open import open_storage


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    cache = CacheSettings(tmp_path / "cache")
    where = str(tmp_path / "set") if request.param == "folder" else f"memory://bucket{tmp_path}"
    place = open_storage(where, cache)
    yield place
    for name in place.names():
        place.remove(name)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_what_is_written_is_there(place: Storage, tmp_path: Path) -> None:
    assert place.names() == []
    assert place.size("card.json") is None
    place.write("card.json", b"{}")
    file = tmp_path / "shard"
    file.write_bytes(b"tar")
    place.put(file, "train/000000.tar")
    assert not file.exists()
    assert place.names() == ["card.json", "train/000000.tar"]
    assert place.names("train") == ["train/000000.tar"]
    assert place.names("val") == []
    assert place.read("card.json") == b"{}"
    assert place.size("train/000000.tar") == 3
    assert place.sizes(["train/000000.tar", "train/1.tar", "card.json"]) == {
        "train/000000.tar": 3,
        "card.json": 2,
    }
    assert (
        place.fetch("train/000000.tar", size_bytes=3, sha256=sha256(b"tar")).read_bytes() == b"tar"
    )
    place.download("train/000000.tar", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"tar"
    place.remove("card.json")
    place.remove("card.json")
    assert place.size("card.json") is None


def test_a_file_is_replaced_whole(place: Storage) -> None:
    place.write("card.json", b"first, and longer")
    place.write("card.json", b"second")
    assert place.read("card.json") == b"second"
    assert place.names() == ["card.json"]


def test_an_open_file_stays_readable(place: Storage) -> None:
    place.write("a.tar", b"shard")
    file = place.open("a.tar", size_bytes=5, sha256=sha256(b"shard"))
    place.remove("a.tar")
    assert os.pread(file, 5, 0) == b"shard"
    os.close(file)


def test_what_is_not_there_is_said(place: Storage, tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match=r"card\.json of .*(can't be read|is not there)"):
        place.read("card.json")
    with pytest.raises(TesseraError, match=r"a\.tar of "):
        place.open("a.tar", size_bytes=1, sha256=sha256(b"x"))
    with pytest.raises(TesseraError, match=r"a\.tar of "):
        place.download("a.tar", tmp_path / "copy")


@pytest.mark.fault(10)
@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "", "s3://b/x", "a\0b"])
def test_a_path_that_leads_elsewhere_is_refused(place: Storage, path: str, tmp_path: Path) -> None:
    for act in (place.read, place.remove, place.size):
        with pytest.raises(TesseraError, match="not allowed"):
            act(path)
    with pytest.raises(TesseraError, match="not allowed"):
        place.fetch(path, size_bytes=1, sha256="0" * 64)


# ── addresses ─────────────────────────────────────────────────────────────────────────────────

REFUSED = [
    "pipe:cat /etc/passwd",
    "pipe:touch marker",
    "simplecache::s3://bucket/set",
    "s3://bucket/set::pipe:touch marker",
    "::pipe:touch marker",
    "s3://bucket/${HOME}",
    "${HOME}/set",
    "ftp://host/set",
    "ssh://host/set",
    "sftp://host/set",
    "git://host/set",
    "zip://x.zip",
    "local://x",
    "reference://x",
    "github://a:b@c/x",
    "file:relative",
    "file://host/set",
    "s3:/bucket/set",
    "s3://",
    "s3:///set",
    "s3://bucket//set",
    "s3://bucket/../other",
    "s3://key:secret@bucket/set",
    "s3://bucket/*.tar",
    "s3://bucket/{a,b}",
    "http://host/set?token=1",
    "http://host/set#x",
    "memory://",
    "a\nb",
]


@pytest.mark.fault(14)
@pytest.mark.parametrize("where", REFUSED)
def test_other_addresses_are_refused_and_nothing_runs(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        open_storage(where)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.control(14)
def test_stock_webdataset_runs_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the refusal is for: the same address starts a shell there."""
    import webdataset

    monkeypatch.chdir(tmp_path)
    webdataset.gopen("pipe:touch marker").read()
    assert (tmp_path / "marker").exists()


@pytest.mark.control(14)
def test_fsspec_follows_a_chain(tmp_path: Path) -> None:
    """What the refusal is for: the outer address is not all that is opened."""
    import fsspec

    (tmp_path / "x").write_bytes(b"inner")
    with fsspec.open(f"simplecache::file://{tmp_path}/x") as file:
        assert file.read() == b"inner"


def test_a_login_is_not_repeated() -> None:
    with pytest.raises(UsageError) as refused:
        open_storage("s3://key:secret@bucket/set")
    assert "secret" not in str(refused.value)


def test_a_missing_library_is_named() -> None:
    with pytest.raises(TesseraError, match="gcsfs is not installed"):
        open_storage("gs://bucket/set")


@pytest.mark.parametrize("where", ["set", "./a:b", "/data/set", "C", "~/set"])
def test_folders_are_folders(where: str) -> None:
    assert not open_storage(where).remote


def test_a_file_address_is_a_folder(tmp_path: Path) -> None:
    place = open_storage(f"file://{tmp_path}/with%20blank")
    place.write("x", b"1")
    assert (tmp_path / "with blank" / "x").read_bytes() == b"1"


def test_only_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_location("set") == str(tmp_path / "set")
    assert absolute_location("s3://bucket/set") == "s3://bucket/set"


def test_the_cache_is_told() -> None:
    told = CacheSettings(Path("/elsewhere"), 5)
    try:
        use_cache(told)
        assert current_cache() == told
    finally:
        use_cache(None)
    assert current_cache().folder == Path.home() / ".cache" / "tessera" / "shards"
