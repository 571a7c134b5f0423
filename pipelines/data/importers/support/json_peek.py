"""Tells a JSON file's form from its first and last bytes.

In: a path. Out: the keys in its first bytes, with those around them, and words. Must not know any
format. Costs one read of a few hundred KiB, however large the file is.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

_BYTES = 128 << 10
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\]:,]', re.S)
_KEY = re.compile(rb'"((?:[^"\\]|\\.){1,80})"\s*:')
_DEPTH = 4


class Peek(NamedTuple):
    """keys: such as ("images", "file_name") for {"images": [{"file_name": …}]}. words: keys at any
    depth, in the last bytes too."""

    keys: frozenset[tuple[str, ...]]
    words: frozenset[str]


def read_ends(path: Path) -> tuple[bytes, bytes]:
    """The first and the last bytes of a file, without those that are among the first. Empty for
    what can't be read and for what isn't a regular file, as a FIFO."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return b"", b""
            head = file.read(_BYTES)
            size = os.fstat(file.fileno()).st_size
            file.seek(max(size - _BYTES, len(head)))
            return head, file.read(_BYTES)
    except OSError:
        return b"", b""


def peek(path: Path) -> Peek:
    """Empty for a file that can't be read or isn't JSON."""
    head, tail = read_ends(path)
    words = {match.decode("utf-8", "replace") for match in _KEY.findall(head + b"\n" + tail)}
    return Peek(frozenset(_keys(head)), frozenset(words))


def _keys(head: bytes) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    # For each open brace or bracket: whether it is an object, and the key that it is at.
    around: list[tuple[bool, str]] = []
    text = b""
    for match in _TOKEN.finditer(head):
        token = match[0]
        if token in b"{[":
            around.append((token == b"{", ""))
        elif token in b"}]":
            if around:
                around.pop()
        elif token == b":":
            if around and around[-1][0] and text:
                key = text[1:-1].decode("utf-8", "replace")
                around[-1] = (True, key)
                if len(around) <= _DEPTH * 2:
                    path = tuple(key for is_object, key in around if is_object)
                    found.add(path[:_DEPTH])
        elif token != b",":
            text = token
    return found
