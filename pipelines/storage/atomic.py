"""Atomic file writers: a file appears complete or not at all.

In: a path and what to write. Out: the file, written under another name in the same folder and then
renamed, so that a reader never sees a part of it. Must not know what the files are for.

A process that is killed while it writes leaves `.NAME.part`, which the next write overwrites. One
process at a time may write a path; only the names that `replace_file` gives are unique.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_STREAMS = re.compile(r"/dev/(stdin|stdout|stderr|fd/\d+)")


@contextmanager
def write_atomic(path: Path, *, durable: bool = False) -> Iterator[IO[str]]:
    """Opens a UTF-8 text file that appears at `path` when the block ends without an error.

    Missing parent folders are created. A pipe, a device and `/dev/stdout` are written to directly
    and not replaced; of a symbolic link the target is replaced. With `durable` the file survives a
    power failure after the block, which costs two waits for the disk. Raises OSError.
    """
    if _is_stream(path):
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    with _part_of(path, durable) as part, part.open("w", encoding="utf-8") as file:
        yield file
        if durable:
            _sync(file)


def write_text_atomic(path: Path, text: str, *, durable: bool = False) -> None:
    """Writes `text` as UTF-8, under the rules of `write_atomic`."""
    with write_atomic(path, durable=durable) as file:
        file.write(text)


def write_json_atomic(path: Path, content: Any, *, durable: bool = False) -> None:
    """Writes `content` as JSON, indented by one space, under the rules of `write_atomic`."""
    write_text_atomic(path, json.dumps(content, indent=1), durable=durable)


def write_bytes_atomic(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Writes `data`, under the rules of `write_atomic`."""
    if _is_stream(path):
        path.write_bytes(data)
        return
    with _part_of(path, durable) as part, part.open("wb") as file:
        file.write(data)
        if durable:
            _sync(file)


def move_atomic(file: Path, path: Path) -> None:
    """Moves `file`, also from another disk, to `path`, where it replaces what is there."""
    with _part_of(path, durable=False) as part:
        shutil.move(file, part)


def copy_atomic(file: Path, path: Path) -> None:
    """Copies `file` to `path`, where the copy replaces what is there."""
    with _part_of(path, durable=False) as part:
        shutil.copyfile(file, part)


@contextmanager
def replace_file(path: Path, suffix: str | None = None) -> Iterator[Path]:
    """Yields an unused path in the folder of `path`, for a library that writes to a path. It ends
    in `suffix`, by default that of `path`. The file that the block makes there is renamed to
    `path`, or removed when the block raises. Raises OSError, also when the block made no file."""
    end = path.suffix if suffix is None else suffix
    part = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{end}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yields a new, empty folder beside `path`. When the block ends without an error it becomes
    `path`, in place of a folder that is there; otherwise it is removed.

    A process that is killed leaves `.NAME-XXXXXXXX`. Between the removal of an old folder and the
    rename there is neither: a folder can't be exchanged in one step. Raises OSError.
    """
    part = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    part.mkdir(parents=True)
    try:
        yield part
        if path.exists():
            shutil.rmtree(path)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _is_stream(path: Path) -> bool:
    return bool(_STREAMS.fullmatch(str(path))) or (path.exists() and not path.is_file())


@contextmanager
def _part_of(path: Path, durable: bool) -> Iterator[Path]:
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
        if durable:
            _sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """The rename is on the disk only when the folder is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
