"""Which addresses are opened, and which are refused before a library sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.core.errors import TesseraError, UsageError
from pipelines.storage.open import open_storage

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
def test_other_addresses_are_refused_and_run_no_code(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        open_storage(where)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.control(14)
def test_stock_webdataset_runs_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Therefore they are refused: stock webdataset starts a shell for the same address."""
    import webdataset

    monkeypatch.chdir(tmp_path)
    webdataset.gopen("pipe:touch marker").read()
    assert (tmp_path / "marker").exists()


@pytest.mark.control(14)
def test_fsspec_follows_a_chain(tmp_path: Path) -> None:
    """Therefore they are refused: fsspec opens more than the outer address."""
    import fsspec

    (tmp_path / "x").write_bytes(b"inner")
    with fsspec.open(f"simplecache::file://{tmp_path}/x") as file:
        assert file.read() == b"inner"


def test_credentials_in_an_address_are_not_printed() -> None:
    with pytest.raises(UsageError) as refused:
        open_storage("s3://key:secret@bucket/set")
    assert "secret" not in str(refused.value)


def test_a_missing_library_is_reported() -> None:
    with pytest.raises(TesseraError, match="gcsfs is not installed"):
        open_storage("gs://bucket/set")


@pytest.mark.parametrize("where", ["set", "./a:b", "/data/set", "C", "~/set"])
def test_paths_are_local_folders(where: str) -> None:
    assert not open_storage(where).remote


def test_a_file_url_is_a_local_folder(tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}/with%20blank")
    storage.write("x", b"1")
    assert (tmp_path / "with blank" / "x").read_bytes() == b"1"
