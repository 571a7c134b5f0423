"""The members of an untrusted tar.

In: an open file. Out: names and positions of regular files; contents are not read. Must not know
samples. GNU tar and Python's tarfile (GNU and pax formats) are understood, as far as `path` goes.
Links, devices, pipes, sparse members and unsafe or unprintable names are refused by name, and so is
a tar that ends too early or has zeros in the middle, where other readers would stop.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from models.core.errors import TesseraError
from pipelines.data.tar import BLOCK, damaged, padded

MAX_NAME_BYTES = 512
MAX_MEMBER_BYTES = 1 << 30
MAX_MEMBERS = 4_000_000
"""Of one tar."""
_MAX_HEADER_BYTES = 64 << 10
"""Of a pax header or a long name."""
_CHUNK = 1 << 20
_REGULAR, _FOLDER, _LONG_NAME, _PAX, _PAX_GLOBAL = b"0", b"5", b"L", b"x", b"g"
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a fifo",
    b"7": "a contiguous file",
    b"K": "a link with a long name",
    b"S": "a sparse file",
    b"M": "a part of a file in several volumes",
    b"V": "a volume label",
}
_ONLY = "only regular files may lie in a shard"


class Entry(NamedTuple):
    """A regular file: where its content begins, and how long it is, in bytes."""

    name: str
    start: int
    size: int


def entries(file: int, where: str) -> Iterator[Entry]:
    """The regular files of the tar with the descriptor `file`, in order. `where` names it in
    errors, all of which are TesseraErrors."""
    end = os.fstat(file).st_size
    at, named, count = 0, "", 0
    if not end:
        raise damaged(f"{where} is empty")
    while at < end:
        header = os.pread(file, BLOCK, at)
        if not any(header):
            _check_end(file, at, where)
            return
        kind, name, size = _parse(header, where)
        start, at = at + BLOCK, at + BLOCK + padded(size)
        count += 1
        if count > MAX_MEMBERS:
            raise TesseraError(f"{where} has more than {MAX_MEMBERS:,} members")
        if at > end:
            raise damaged(f"{where}: member {name!r} says {size:,} bytes and is cut short")
        if kind in (_LONG_NAME, _PAX, _PAX_GLOBAL):
            if size > _MAX_HEADER_BYTES:
                raise TesseraError(f"{where}: a header of {size:,} bytes is refused")
            content = os.pread(file, size, start)
            found = (
                _decode(content.rstrip(b"\0"), where)
                if kind == _LONG_NAME
                else _pax(content, where)
            )
            named = named if kind == _PAX_GLOBAL else found
            continue
        name, named = named or name, ""
        _check_name(name, where)
        if kind == _FOLDER:
            continue
        if size > MAX_MEMBER_BYTES:
            raise TesseraError(
                f"{where}: member {name!r} has {size:,} bytes, too many for an image"
            )
        yield Entry(name, start, size)
    raise damaged(f"{where} has no end: it was cut")


def _parse(header: bytes, where: str) -> tuple[bytes, str, int]:
    """(kind, name, size) of a header; a kind that is refused is an error."""
    if len(header) != BLOCK:
        raise damaged(f"{where}: a header is cut short")
    if header[:2] == b"\x1f\x8b":
        raise TesseraError(f"{where} is compressed", hint="unpack it: gunzip")
    if header[257:262] != b"ustar":
        raise damaged(f"{where} is no tar, or damaged: no ustar header")
    if _number(header[148:156], where) != sum(header) - sum(header[148:156]) + 8 * 32:
        raise damaged(f"{where}: a header's checksum differs")
    # GNU's magic has blanks where POSIX has a version, and other fields where the prefix would be.
    prefix = header[345:500].split(b"\0")[0] if header[262:263] == b"\0" else b""
    short = header[:100].split(b"\0")[0]
    name = _decode(prefix + b"/" + short if prefix else short, where)
    kind = header[156:157].replace(b"\0", _REGULAR)
    if kind in _REFUSED:
        raise TesseraError(
            f"{where}: member {name!r} is {_REFUSED[kind]}, which is refused", hint=_ONLY
        )
    if kind not in (_REGULAR, _FOLDER, _LONG_NAME, _PAX, _PAX_GLOBAL):
        raise TesseraError(f"{where}: member {name!r} of type {kind!r} is refused", hint=_ONLY)
    return kind, name, _number(header[124:136], where)


def _number(field: bytes, where: str) -> int:
    if field[:1] == b"\x80":  # GNU's binary form, for what octal digits can't hold
        return int.from_bytes(field[1:])
    digits = field.strip(b" \0")
    if not digits or not all(48 <= digit < 56 for digit in digits):
        raise damaged(f"{where}: a header has the number {field!r}")
    return int(digits, 8)


def _pax(content: bytes, where: str) -> str:
    """The `path` of a pax header; empty where it has none. What changes a member's size or form is
    refused, the rest (times, owners) says nothing of the bytes."""
    path, at = "", 0
    while at < len(content):
        length, blank, _ = content[at : at + 20].partition(b" ")
        if not blank or not length.isdigit() or not 4 < int(length) <= len(content) - at:
            raise damaged(f"{where}: a pax header is damaged")
        record = content[at + len(length) + 1 : at + int(length)]
        keyword, _, value = record.removesuffix(b"\n").partition(b"=")
        if keyword == b"path":
            path = _decode(value, where)
        elif keyword == b"size" or keyword == b"linkpath" or keyword.startswith(b"GNU.sparse"):
            what = "a sparse file" if keyword.startswith(b"GNU") else f"a member with {keyword!r}"
            raise TesseraError(f"{where}: {what} is refused", hint=_ONLY)
        at += int(length)
    return path


def _decode(name: bytes, where: str) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise TesseraError(
            f"{where}: the name {name[:120]!r} is not UTF-8", hint="rename the member"
        ) from None


def _check_name(name: str, where: str) -> None:
    parts = name.split("/")
    if not name or name.startswith("/") or ".." in parts or not name.isprintable():
        raise TesseraError(f"{where}: the name {name[:120]!r} is refused", hint="rename the member")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise TesseraError(
            f"{where}: the name {name[:60]!r}… is longer than {MAX_NAME_BYTES} bytes",
            hint="rename the member",
        )


def _check_end(file: int, at: int, where: str) -> None:
    while block := os.pread(file, _CHUNK, at):
        if block.count(0) != len(block):
            raise damaged(f"{where} has zeros in the middle, at byte {at:,} or before")
        at += len(block)
