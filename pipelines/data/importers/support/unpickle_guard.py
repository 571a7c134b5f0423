"""A guard for third-party code that reads files: pickles can build arrays only.

In: nothing. Out: a context manager. Must not know which code runs in it. Python calls its audit
hooks for every name that a pickle loads, for connections and for new processes; a hook that raises
prevents them. A hook can't be removed, so it checks whether its thread is in the context. This is
not a sandbox: it stops what a file does, not a hostile program.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from models.core.errors import TesseraError

_ALLOWED = frozenset(
    {
        *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }
)
_REFUSED = frozenset(
    {"socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}
)
_here = threading.local()


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Inside it, a pickle that loads anything but NumPy's array constructors, a connection and a
    new process raise TesseraError. `what` names the data set in the message."""
    _install()
    before = getattr(_here, "what", "")
    _here.what = what
    try:
        yield
    finally:
        _here.what = before


@lru_cache(1)
def _install() -> None:
    sys.addaudithook(_look)


def _look(event: str, arguments: tuple[Any, ...]) -> None:
    what = getattr(_here, "what", "")
    if not what:
        return
    if event == "pickle.find_class" and arguments not in _ALLOWED:
        raise TesseraError(
            f"{what} has a pickle that loads {'.'.join(map(str, arguments))}: refused",
            hint="pickles may build arrays only; download the data set again",
        )
    if event in _REFUSED:
        raise TesseraError(f"{what} would do {event}: refused", hint="nothing is downloaded here")
