"""A guard for code of others that reads files: in it a pickle builds nothing but arrays.

In: nothing. Out: a context. Must not know whose code runs. Python tells its audit hooks of every
name that a pickle asks for, of connections and of processes that are started; a hook that raises
stops them. A hook can't be taken away again, so it looks whether its thread is in the context. It
is no sandbox: it stops what a file does, not a hostile program.
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
    """Within it, TesseraError that begins with `what` for a pickle that asks for anything but
    NumPy's builders of arrays, for a connection, and for a new process."""
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
            f"{what} holds a pickle that asks for {'.'.join(map(str, arguments))}: refused",
            hint="nothing is built from pickles but arrays; fetch the data set anew",
        )
    if event in _REFUSED:
        raise TesseraError(f"{what} would do {event}: refused", hint="nothing is fetched here")
