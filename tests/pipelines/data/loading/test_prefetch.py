"""Prefetched items arrive in order, errors are unchanged, and no process outlives its iterator."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from models.core.errors import TesseraError, UsageError
from pipelines.data.loading.prefetch import (
    AHEAD_BYTES,
    PROCESS_PREFETCH,
    THREAD_PREFETCH,
    LoaderProcesses,
    bound_prefetch,
    max_prefetched,
    prefetch_in_thread,
)
from pipelines.data.sample_error import SampleError


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def test_processes_return_items_in_order_and_are_reused() -> None:
    processes = LoaderProcesses(square, 2)
    first = list(processes.items(range(20)))
    again = list(processes.items(range(5)))
    processes.close()
    assert [value for value, _ in first + again] == [n * n for n in [*range(20), *range(5)]]
    pids = {pid for _, pid in first}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert {pid for _, pid in again} <= pids


def test_processes_end_with_a_closed_iterator(children: Callable[[], list[int]]) -> None:
    processes = LoaderProcesses(square, 2)
    items = processes.items(range(100))
    next(items)
    assert len(children()) == 2
    del items
    assert not children()
    assert [value for value, _ in processes.items(range(3))] == [0, 1, 4]
    del processes


def test_an_unused_iterator_starts_no_process(children: Callable[[], list[int]]) -> None:
    items = LoaderProcesses(square, 2).items(range(3))
    assert not children()
    del items


@pytest.mark.parametrize(
    "error",
    [
        TesseraError("what was given", hint="how to fix it"),
        UsageError("wrong", hint="right"),
        SampleError("a reason", "a message"),
    ],
)
def test_an_error_arrives_unchanged(error: TesseraError) -> None:
    def fail(number: int) -> int:
        if number == 3:
            raise error
        return number

    items = LoaderProcesses(fail, 2).items(range(10))
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(type(error)) as caught:
        next(items)
    assert (caught.value.message, caught.value.hint) == (error.message, error.hint)
    assert getattr(caught.value, "reason", "") == getattr(error, "reason", "")


@pytest.mark.slow
def test_torch_alone_changes_the_error() -> None:
    """Control: without our wrapper the message is a traceback, and the hint is lost."""

    class Failing(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, key: int) -> int:
            raise TesseraError("what was given", hint="how to fix it")

    loader = torch.utils.data.DataLoader(
        Failing(), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    items = iter(loader)
    with pytest.raises(TesseraError, match="Traceback") as caught:
        next(items)
    assert not caught.value.hint
    del items, caught
    gc.collect()


def test_a_bug_keeps_its_traceback() -> None:
    def fail(number: int) -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*a bug"):
        next(LoaderProcesses(fail, 1).items(range(3)))


@pytest.mark.slow
def test_a_killed_process_is_a_clear_error() -> None:
    def die(number: int) -> int:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    started = time.monotonic()
    with pytest.raises(TesseraError, match="a loader process was killed") as caught:
        list(LoaderProcesses(die, 1).items(range(10)))
    assert "loader workers" in caught.value.hint
    assert time.monotonic() - started < 30


def test_only_a_few_items_are_prefetched() -> None:
    counter = multiprocessing.get_context("fork").Value("i", 0)

    def count(number: int) -> int:
        with counter.get_lock():
            counter.value += 1
        return number

    items = LoaderProcesses(count, 2).items(range(100))
    next(items)
    deadline = time.monotonic() + 10
    while counter.value < 2 * PROCESS_PREFETCH and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert counter.value == max_prefetched(2)
    del items


def test_random_numbers_and_signals_of_the_training_are_unchanged() -> None:
    before = torch.get_rng_state()
    handler = signal.getsignal(signal.SIGCHLD)
    list(LoaderProcesses(square, 1).items(range(3)))
    assert torch.equal(torch.get_rng_state(), before)
    assert signal.getsignal(signal.SIGCHLD) is handler


def test_a_process_inherits_no_connections() -> None:
    """Peers notice a killed rank when all copies of its connections are closed."""
    ours, peer = socket.socketpair()

    def sockets(number: int) -> list[str]:
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if os.path.exists(link)]

    inherited = f"socket:[{os.fstat(ours.fileno()).st_ino}]"
    processes = LoaderProcesses(sockets, 1)
    (open_files,) = processes.items([0])
    ours.close()
    peer.settimeout(5)
    assert peer.recv(1) == b""
    peer.close()
    processes.close()
    assert inherited not in open_files
    assert any(name == "/dev/null" for name in open_files)


ORPHANS = """
import os, sys, time
from pipelines.data.loading.prefetch import LoaderProcesses
def work(number):
    time.sleep(0 if number < 2 else 1000)
    return os.getpid()
items = LoaderProcesses(work, 2).items(range(100))
print(next(items), next(items), flush=True)
time.sleep(1000)
"""


@pytest.mark.slow
def test_processes_end_when_their_parent_is_killed() -> None:
    """At once, even if they are busy."""
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHANS],
        cwd=Path(__file__).parents[4],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(set(pids)) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 3
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_thread_returns_items_in_order_and_ends() -> None:
    items = prefetch_in_thread(lambda: iter(range(30)))
    assert list(items) == list(range(30))
    again = prefetch_in_thread(lambda: iter(range(1000)))
    assert next(again) == 0
    assert any(t.name == "tessera-loading" for t in threading.enumerate())
    del again


def test_a_thread_s_error_is_raised_where_the_item_is_awaited() -> None:
    def make() -> Iterator[int]:
        yield 1
        raise TesseraError("no more")

    items = prefetch_in_thread(make)
    assert next(items) == 1
    with pytest.raises(TesseraError, match="no more"):
        next(items)


@pytest.mark.parametrize("item_bytes", [1, 1 << 20, 300 << 20, 1 << 30, 3 << 30, 9 << 30])
@pytest.mark.parametrize("processes", [0, 1, 2, 7, 64])
def test_items_in_advance_are_bounded_in_bytes(item_bytes: int, processes: int) -> None:
    bounded, ahead = bound_prefetch(item_bytes, processes)
    assert (bounded > 0) == (processes > 0)
    assert bounded <= processes
    items = max_prefetched(bounded, ahead) if processes else ahead + 1
    assert items * item_bytes <= AHEAD_BYTES or items == 2


def test_small_items_are_computed_as_before() -> None:
    """The control: nothing is bounded that fits."""
    assert bound_prefetch(1 << 20, 8) == (8, PROCESS_PREFETCH)
    assert bound_prefetch(1 << 20, 0) == (0, THREAD_PREFETCH)
