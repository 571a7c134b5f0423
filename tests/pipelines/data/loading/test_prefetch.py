"""What is made ahead comes in order, errors come as they are, and nothing outlives its iterator."""

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
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models.core.errors import TesseraError, UsageError
from pipelines.data.loading.prefetch import (
    PROCESS_PREFETCH,
    LoaderProcesses,
    max_prefetched,
    prefetch_in_thread,
)
from pipelines.data.sample_error import SampleError


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    threads = set(threading.enumerate())
    yield
    assert not multiprocessing.active_children()
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [t.name for t in threading.enumerate() if t not in threads]


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def test_processes_give_everything_in_order_and_go_on_to_the_next() -> None:
    processes = LoaderProcesses(square, 2)
    first = list(processes.items(range(20)))
    again = list(processes.items(range(5)))
    processes.close()
    assert [value for value, _ in first + again] == [n * n for n in [*range(20), *range(5)]]
    pids = {pid for _, pid in first}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert {pid for _, pid in again} <= pids


def test_processes_end_with_the_iterator_that_is_given_up() -> None:
    processes = LoaderProcesses(square, 2)
    items = processes.items(range(100))
    next(items)
    assert len(multiprocessing.active_children()) == 2
    del items
    assert not multiprocessing.active_children()
    assert [value for value, _ in processes.items(range(3))] == [0, 1, 4]
    del processes


def test_no_process_is_started_for_an_iterator_never_begun() -> None:
    items = LoaderProcesses(square, 2).items(range(3))
    assert not multiprocessing.active_children()
    del items


@pytest.mark.parametrize(
    "error",
    [
        TesseraError("what was given", hint="how to mend it"),
        UsageError("wrong", hint="right"),
        SampleError("a reason", "a message"),
    ],
)
def test_an_error_comes_as_it_is(error: TesseraError) -> None:
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


def test_torch_alone_would_give_another_error() -> None:
    """The control: without the wrapping the message is a traceback, and the advice is lost."""

    class Failing(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, key: int) -> int:
            raise TesseraError("what was given", hint="how to mend it")

    loader = torch.utils.data.DataLoader(
        Failing(), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    items = iter(loader)
    with pytest.raises(TesseraError, match="Traceback") as caught:
        next(items)
    assert not caught.value.hint
    del items, caught
    gc.collect()


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    def fail(number: int) -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*a bug"):
        next(LoaderProcesses(fail, 1).items(range(3)))


def test_a_killed_process_is_a_clear_error() -> None:
    def die(number: int) -> int:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    started = time.monotonic()
    with pytest.raises(TesseraError, match="a process that loads data was killed") as caught:
        list(LoaderProcesses(die, 1).items(range(10)))
    assert "loader workers" in caught.value.hint
    assert time.monotonic() - started < 30


def test_no_more_than_a_few_are_made_ahead() -> None:
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


def test_the_training_s_random_numbers_and_signals_are_left_alone() -> None:
    before = torch.get_rng_state()
    handler = signal.getsignal(signal.SIGCHLD)
    list(LoaderProcesses(square, 1).items(range(3)))
    assert torch.equal(torch.get_rng_state(), before)
    assert signal.getsignal(signal.SIGCHLD) is handler


def test_a_process_holds_none_of_its_parent_s_connections() -> None:
    """Peers hear of a killed rank when its connections close: all copies of them."""
    ours, peer = socket.socketpair()

    def sockets(number: int) -> list[str]:
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if os.path.exists(link)]

    given = f"socket:[{os.fstat(ours.fileno()).st_ino}]"
    processes = LoaderProcesses(sockets, 1)
    (found,) = processes.items([0])
    ours.close()
    peer.settimeout(5)
    assert peer.recv(1) == b""
    peer.close()
    processes.close()
    assert given not in found
    assert any(name == "/dev/null" for name in found)


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


def test_processes_end_when_their_parent_is_killed() -> None:
    """Also one that is at work, and at once."""
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


def test_a_thread_gives_everything_in_order_and_ends() -> None:
    items = prefetch_in_thread(lambda: iter(range(30)))
    assert list(items) == list(range(30))
    again = prefetch_in_thread(lambda: iter(range(1000)))
    assert next(again) == 0
    assert any(t.name == "tessera-loading" for t in threading.enumerate())
    del again


def test_a_thread_s_error_is_raised_where_the_item_is_waited_for() -> None:
    def make() -> Iterator[int]:
        yield 1
        raise TesseraError("no more")

    items = prefetch_in_thread(make)
    assert next(items) == 1
    with pytest.raises(TesseraError, match="no more"):
        next(items)
