"""The members of a tar, by a small strict parser.

In: bytes of a tar. Out: names, places and sizes of regular files. Must not know what the files are.
Header checksums are checked; links, devices, sparse and pax members are refused by name. Nothing is
ever written to a path that a tar names.
"""

from __future__ import annotations

from typing import NamedTuple

from models.core.errors import TesseraError

BLOCK = 512


class Member(NamedTuple):
    """A regular file in a tar. `start` and `size` are of its content, in bytes."""

    name: str
    start: int
    size: int


def members(data: bytes | memoryview, where: str) -> list[Member]:
    """The members that `data` consists of; `where` names it in errors."""
    found = []
    at = 0
    while at < len(data):
        name, size = parse_header(bytes(data[at : at + BLOCK]), where)
        at += BLOCK
        if at + padded(size) > len(data):
            raise damaged(f"{where}: member {name!r} says {size} bytes and is cut short")
        found.append(Member(name, at, size))
        at += padded(size)
    return found


def parse_header(header: bytes, where: str) -> tuple[str, int]:
    """(name, size in bytes) of a regular file's ustar header."""
    if len(header) != BLOCK:
        raise damaged(f"{where}: a header is cut short")
    if header[257:262] != b"ustar":
        raise damaged(f"{where}: no ustar header")
    given = _octal(header[148:156], where)
    if given != sum(header) - sum(header[148:156]) + 8 * 32:
        raise damaged(f"{where}: a header's checksum differs")
    if header[156:157] not in (b"0", b"\0"):
        raise TesseraError(
            f"{where}: a member of type {header[156:157]!r} is refused",
            hint="only regular files may lie in a shard: no links, devices, sparse or pax members",
        )
    prefix, name = header[345:500].rstrip(b"\0"), header[:100].rstrip(b"\0")
    full = prefix + b"/" + name if prefix else name
    return full.decode("ascii", "backslashreplace"), _octal(header[124:136], where)


def _octal(field: bytes, where: str) -> int:
    digits = field.strip(b" \0")
    if not digits or not all(48 <= d < 56 for d in digits):
        raise damaged(f"{where}: a header has the number {field!r}")
    return int(digits, 8)


def padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def damaged(message: str) -> TesseraError:
    return TesseraError(
        message, hint="fetch or pack the data set again; `tessera verify` names all that differs"
    )
