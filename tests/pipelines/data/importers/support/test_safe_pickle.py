"""Pickles of plain values are read; every other operation is refused."""

from __future__ import annotations

import pickle
import pickletools
from typing import Any

import pytest

from models.core.errors import TesseraError
from pipelines.data.importers.support import safe_pickle

VALUES: list[Any] = [
    {},
    {"a": 1, "b": [1, 2, (3,), (), (1, 2), (1, 2, 3, 4)], "c": None, "d": True},
    [1.5, -3, 10**20, "\u00e9", False],
    {"deep": {"er": [b"bytes" * 100, "text" * 100]}},
]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_read_as_by_pickle(protocol: int) -> None:
    for value in VALUES:
        if protocol < 3 and value is VALUES[3]:
            continue
        assert safe_pickle.read(pickle.dumps(value, protocol), "x") == value
    shared = [1, 2]
    assert safe_pickle.read(pickle.dumps([shared, shared], protocol), "x") == [[1, 2]] * 2


def test_every_other_operation_is_refused() -> None:
    """Only the operations of pickle that plain values need are allowed."""
    known = 0
    for operation in pickletools.opcodes:
        code = operation.code.encode("latin-1")
        for before in (
            b"]",
            b"](",
            b"N)",
            b"](NN",
            b"}(]N",
            b"X\x01\x00\x00\x00aX\x01\x00\x00\x00b",
        ):
            for after in (b"\x01.", b"os\nsystem\n.", b"\x01\x00\x00\x00a.", b"."):
                try:
                    safe_pickle.read(b"\x80\x04" + before + code + after, "x")
                    known += 1
                except TesseraError:
                    pass
    assert known < 200


def test_a_pickle_that_contains_itself_is_read() -> None:
    endless: list[Any] = []
    endless.append(endless)
    result = safe_pickle.read(pickle.dumps(endless, 2), "x")
    assert result[0] is result
    many = b"\x80\x02](" + b"]" * 100_000 + b"e."
    assert len(safe_pickle.read(many, "x")) == 100_000
