"""A file that grows, copied to a storage in parts and restored on another machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.storage import appended
from pipelines.storage.appended import AppendedFile
from pipelines.storage.base import Storage
from pipelines.storage.open import open_storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(f"memory://bucket/{tmp_path.name}")


def append(file: Path, data: bytes) -> None:
    with file.open("ab") as out:
        out.write(data)


def test_complete_lines_are_published_in_parts(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appended, "PART_BYTES", 10)
    file = tmp_path / "log"
    copy = AppendedFile(file, storage, "log")
    assert copy.publish() == 0, "there is no file yet"
    append(file, b"one\ntw")
    assert copy.publish() == 4
    append(file, b"o\nthree\n")
    seen: list[bytes] = []
    assert copy.publish(seen.append) == 14
    assert seen == [b"two\nthree\n"]
    append(file, b"four\n")
    assert AppendedFile(file, storage, "log").publish() == 19, "as another process does it"
    parts = storage.names("log")
    assert parts == ["log/000000000000", "log/000000000014"]
    assert b"".join(map(storage.read, parts)) == file.read_bytes()
    assert copy.publish(seen.append) == copy.published() == 19
    assert len(seen) == 1, "nothing was new"


def test_another_machine_restores_the_file_and_continues_it(
    storage: Storage, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there" / "log"
    append(here, b"1\n2\n")
    AppendedFile(here, storage, "log").publish()
    append(here, b"3\n")  # lost with the machine
    other = AppendedFile(there, storage, "log")
    assert other.restore()
    append(there, b"4\n")
    assert other.publish() == 6
    assert AppendedFile(here, storage, "log").restore(), "the other machine went on"
    assert here.read_bytes() == b"1\n2\n4\n"


def test_lines_that_were_not_published_yet_are_kept(storage: Storage, tmp_path: Path) -> None:
    file = tmp_path / "log"
    append(file, b"1\n")
    AppendedFile(file, storage, "log").publish()
    append(file, b"2\n")
    assert not AppendedFile(file, storage, "log").restore()
    assert file.read_bytes() == b"1\n2\n"


def test_a_missing_part_is_reported(storage: Storage, tmp_path: Path) -> None:
    storage.write("log/000000000000", b"1\n")
    storage.write("log/000000000007", b"2\n")
    with pytest.raises(TesseraError, match="doesn't follow the 2 bytes before it"):
        AppendedFile(tmp_path / "log", storage, "log").restore()
    assert not (tmp_path / "log").exists()
