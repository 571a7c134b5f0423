"""A small, strict parser for the members of a tar file.

In: bytes of a tar file. Out: names, positions and sizes of regular files. Must not know what the
files are. Header checksums are verified; links, devices, sparse and pax members are refused by
name. Nothing is ever written to a path that a tar file names.
"""

from __future__ import annotations

from typing import NamedTuple

from models.core.errors import TesseraError

BLOCK = 512


class Member(NamedTuple):
    """A regular file in a tar file. `start` and `size` locate its content, in bytes."""

    name: str
    start: int
    size: int


def members(data: bytes | memoryview, where: str) -> list[Member]:
    """Returns the members that `data` consists of. `where` names the data in errors. Raises
    TesseraError for a damaged header, and for a member that is not a regular file."""
    result = []
    at = 0
    while at < len(data):
        name, size = parse_header(bytes(data[at : at + BLOCK]), where)
        at += BLOCK
        if at + padded(size) > len(data):
            raise damaged(f"{where}: member {name!r} should have {size} bytes and is cut short")
        result.append(Member(name, at, size))
        at += padded(size)
    return result


def parse_header(header: bytes, where: str) -> tuple[str, int]:
    """Returns the name and the size in bytes from a regular file's ustar header of 512 bytes.
    Raises TesseraError."""
    if len(header) != BLOCK:
        raise damaged(f"{where}: a header is cut short")
    if header[257:262] != b"ustar":
        raise damaged(f"{where}: not a ustar header")
    checksum = _octal(header[148:156], where)
    if checksum != sum(header) - sum(header[148:156]) + 8 * 32:
        raise damaged(f"{where}: a header's checksum differs")
    if header[156:157] not in (b"0", b"\0"):
        raise TesseraError(
            f"{where}: a member of type {header[156:157]!r} is refused",
            hint="a shard may contain only regular files: no links, devices, sparse or pax members",
        )
    prefix, name = header[345:500].rstrip(b"\0"), header[:100].rstrip(b"\0")
    full = prefix + b"/" + name if prefix else name
    return full.decode("ascii", "backslashreplace"), _octal(header[124:136], where)


def _octal(field: bytes, where: str) -> int:
    digits = field.strip(b" \0")
    if not digits or not all(48 <= d < 56 for d in digits):
        raise damaged(f"{where}: a header has the invalid number {field!r}")
    return int(digits, 8)


def padded(size: int) -> int:
    """The bytes that content of this size occupies in a tar file: whole blocks of 512."""
    return -(-size // BLOCK) * BLOCK


def damaged(message: str) -> TesseraError:
    """An error for a data set whose files are not what was packed."""
    return TesseraError(
        message, hint="download or pack the data set again; `tessera verify` lists all differences"
    )
