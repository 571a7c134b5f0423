"""The local folder as a storage; test_base.py has the contract of every storage."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.storage import folder
from pipelines.storage.folder import FolderStorage


def test_a_pipe_and_a_folder_have_no_size(tmp_path: Path) -> None:
    """Reading from a pipe could block forever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "inner").mkdir()
    assert FolderStorage(tmp_path).sizes(["pipe", "inner", "none"]) == {}


def test_a_large_file_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "MAX_READ_BYTES", 1000)
    (tmp_path / "large").write_bytes(bytes(1000))
    assert len(FolderStorage(tmp_path).read("large")) == 1000
    (tmp_path / "large").write_bytes(bytes(1001))
    with pytest.raises(TesseraError, match="larger than 1,000 bytes"):
        FolderStorage(tmp_path).read("large")


def test_a_file_is_opened_without_a_copy(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    storage.write("a.tar", b"shard")
    assert storage.fetch("a.tar", size_bytes=5, sha256="") == tmp_path / "a.tar"
    assert not storage.remote
