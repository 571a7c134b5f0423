"""What a call of the command gives, in tests; the fixture `call` is in `conftest.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Done(NamedTuple):
    status: int
    out: str
    err: str


Call = Callable[..., Done]
