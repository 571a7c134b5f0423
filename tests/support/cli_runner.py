"""The result of a command that a test runs with the fixture `call` of `conftest.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Done(NamedTuple):
    status: int
    out: str
    err: str


Call = Callable[..., Done]
