"""Each test here leaves no thread and no process behind."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator

import pytest

Children = Callable[[], list[int]]
"""The pids of this process's children that the test has started. Those that other tests keep don't
count."""


@pytest.fixture(autouse=True)
def children() -> Iterator[Children]:
    processes = {child.pid for child in multiprocessing.active_children()}
    threads = set(threading.enumerate())

    def started() -> list[int]:
        pids = (child.pid for child in multiprocessing.active_children())
        return [pid for pid in pids if pid and pid not in processes]

    yield started
    assert not started()
    deadline = time.monotonic() + 5  # a queue's own thread ends a moment after its queue
    while set(threading.enumerate()) - threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [t.name for t in threading.enumerate() if t not in threads]
