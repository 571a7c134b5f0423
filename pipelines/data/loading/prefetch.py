"""Computes items before they are used: in a thread, or in forked processes.

In: a function and its arguments. Out: its results, in order. Must not know what they are. Errors
are raised where the result is awaited, and threads and processes end with the iterator.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from models.core.errors import TesseraError

THREAD_PREFETCH = 4
"""Number of items that the thread computes in advance."""
PROCESS_PREFETCH = 2
"""Number of items that each process computes in advance."""
AHEAD_BYTES = 4 << 30
"""Most bytes of the batches that are computed in advance, but for two that always may be. A batch
of 1,024 images of 224 by 224 pixels has 0.15 GiB."""
_PUT_SECONDS = 0.1
K = TypeVar("K")
T = TypeVar("T")


def prefetch_in_thread(
    make: Callable[[], Iterator[T]], ahead: int = THREAD_PREFETCH
) -> Iterator[T]:
    """Yields the items of `make()`, of which a thread computes `ahead` in advance.

    The thread starts with the first item requested, and has ended when this iterator ends or is
    closed.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(ahead)
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put((kind, value), timeout=_PUT_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        # A second pool of OpenMP threads would compete with the training's for the cores.
        torch.set_num_threads(1)
        try:
            for item in make():
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # raised where the item is awaited
            put("error", error)

    thread = threading.Thread(target=work, name="tessera-loading", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stop.set()
        thread.join()


def max_prefetched(processes: int, ahead: int = PROCESS_PREFETCH) -> int:
    """The most items that `LoaderProcesses` holds or computes at a time, with the one yielded
    last."""
    return processes * ahead + 1


def bound_prefetch(item_bytes: int, processes: int) -> tuple[int, int]:
    """(processes, items that each computes in advance), so that all of them take `AHEAD_BYTES` at
    most, or are two. 0 processes stand for the thread, and stay 0."""
    fitting = max(AHEAD_BYTES // max(item_bytes, 1), 2)
    if not processes:
        return 0, min(THREAD_PREFETCH, fitting - 1)
    ahead = max(min(PROCESS_PREFETCH, (fitting - 1) // processes), 1)
    return min(processes, max((fitting - 1) // ahead, 1)), ahead


class LoaderProcesses(Generic[K, T]):
    """`count` processes that call `make`. They are forked when the first item is requested, and are
    kept for the next call of `items` if the one before was exhausted."""

    def __init__(self, make: Callable[[K], T], count: int, ahead: int = PROCESS_PREFETCH) -> None:
        self._keys: _Keys[K] = _Keys()
        self._loader: DataLoader[Any] | None = None
        self._iterator: Any = None
        self._make, self._count, self._ahead = make, count, ahead

    def items(self, keys: Iterable[K]) -> Iterator[T]:
        """Yields `make(key)` for each of the keys, in order. Raises the TesseraError of a process,
        and one if a process was killed."""
        self._keys.keys = keys
        self._iterator = self._begin()
        done = False
        try:
            for item in _watched(self._iterator):
                if isinstance(item, _Failure):
                    raise item.error
                yield item
            done = True
        finally:
            # Items in progress of an abandoned iteration would have to be awaited otherwise.
            if not done:
                self.close()

    def close(self) -> None:
        """Ends the processes; `items` forks new ones."""
        if self._iterator is not None:
            # Without references the iterator does this itself, but a traceback may hold one.
            self._iterator._shutdown_workers()
        self._loader = self._iterator = None

    def _begin(self) -> Iterator[Any]:
        if self._loader is None:
            _ignore_warnings()
            self._loader = DataLoader(
                _Calls(self._make, os.getpid()),
                batch_size=None,
                sampler=self._keys,
                num_workers=self._count,
                prefetch_factor=self._ahead,
                multiprocessing_context="fork",
                worker_init_fn=_set_up_process,
                collate_fn=_identity,
                persistent_workers=True,
                # Without it, DataLoader draws from the global generator, which is the training's.
                generator=torch.Generator().manual_seed(0),
            )
        if threading.current_thread() is not threading.main_thread():
            return iter(self._loader)
        # torch's handler would raise anywhere in the main thread; `_watched` notices it, too.
        before = signal.getsignal(signal.SIGCHLD)
        try:
            return iter(self._loader)
        finally:
            signal.signal(signal.SIGCHLD, before)


def _identity(item: T) -> T:
    return item


class _Failure:
    """Carries an error to the parent: torch would raise another one whose message is a
    traceback."""

    def __init__(self, error: TesseraError) -> None:
        self.error = error


class _Keys(Sampler[K], Generic[K]):
    keys: Iterable[K] = ()

    def __iter__(self) -> Iterator[K]:
        return iter(self.keys)


class _Calls(Dataset[Any]):
    def __init__(self, make: Callable[[Any], Any], parent: int) -> None:
        self.make, self.parent = make, parent

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.make(key)
        except TesseraError as error:
            return _Failure(error)


def _watched(items: Iterator[T]) -> Iterator[T]:
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise TesseraError(
                "a loader process was killed",
                hint="memory or /dev/shm probably ran out: use fewer loader workers, a smaller "
                "batch size or a smaller cache",
            ) from None
        yield item


def _set_up_process(number: int) -> None:
    """Detaches a forked process from its parent's signals and sockets, and lets it end with the
    parent."""
    info = torch.utils.data.get_worker_info()
    assert info is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    _close_sockets()
    parent = os.pidfd_open(info.dataset.parent)  # type: ignore[attr-defined]
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """Ends this process when its parent ends, even if that is killed."""
    import select

    select.select([parent], [], [])
    os._exit(1)


def _close_sockets() -> None:
    """Replaces inherited sockets by /dev/null. Otherwise the peers of a killed rank would see its
    connections open as long as this process lives.

    The descriptors stay in use, so code that still holds one closes no file that isn't its own.
    """
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                os.dup2(nothing, int(name), inheritable=False)
        except OSError:  # the descriptor of the listing itself
            continue
    os.close(nothing)


def _ignore_warnings() -> None:
    """Ignores torch's advice on the number of workers and on forking, which users can't act on."""
    for message in ("This DataLoader will create", "This process .* is multi-threaded"):
        if not any(rule[1] and rule[1].pattern == message for rule in warnings.filters):
            warnings.filterwarnings("ignore", message=message)
