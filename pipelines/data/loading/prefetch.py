"""Things made ahead of their use: in a thread, or in forked processes.

In: a function and what to call it with. Out: what it gives, in order. Must not know what that is.
Errors are raised where the thing is waited for, and threads and processes end with the iterator.
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
"""Things that the thread makes ahead."""
PROCESS_PREFETCH = 2
"""Things that each process makes ahead."""
_PUT_SECONDS = 0.1
K = TypeVar("K")
T = TypeVar("T")


def prefetch_in_thread(make: Callable[[], Iterator[T]]) -> Iterator[T]:
    """The items of `make()`, made in a thread a few ahead. The thread starts with the first item
    asked for and has ended when this iterator has, however that comes."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(THREAD_PREFETCH)
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
        # A second pool of OpenMP threads beside the training's would fight it for the cores.
        torch.set_num_threads(1)
        try:
            for item in make():
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # it belongs to whoever waits for the item
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


def max_prefetched(processes: int) -> int:
    """Items that `LoaderProcesses` may have made or be making, with the one given out last."""
    return processes * PROCESS_PREFETCH + 1


class LoaderProcesses(Generic[K, T]):
    """`count` processes that call `make`. They are forked with the first item asked for, and go on
    to the next `items` where the one before came to its end."""

    def __init__(self, make: Callable[[K], T], count: int) -> None:
        self._keys: _Keys[K] = _Keys()
        self._loader: DataLoader[Any] | None = None
        self._iterator: Any = None
        self._make, self._count = make, count

    def items(self, keys: Iterable[K]) -> Iterator[T]:
        """`make(key)` for each of the keys, in their order."""
        self._keys.given = keys
        self._iterator = self._begin()
        done = False
        try:
            for item in _watched(self._iterator):
                if isinstance(item, _Failure):
                    raise item.error
                yield item
            done = True
        finally:
            # What is under way of an epoch that was given up would have to be waited for.
            if not done:
                self.close()

    def close(self) -> None:
        """Ends the processes; `items` would fork new ones."""
        if self._iterator is not None:
            # It would come by itself when nobody has the iterator, but a traceback may have it.
            self._iterator._shutdown_workers()
        self._loader = self._iterator = None

    def _begin(self) -> Iterator[Any]:
        if self._loader is None:
            _hush()
            self._loader = DataLoader(
                _Calls(self._make, os.getpid()),
                batch_size=None,
                sampler=self._keys,
                num_workers=self._count,
                prefetch_factor=PROCESS_PREFETCH,
                multiprocessing_context="fork",
                worker_init_fn=_settle,
                collate_fn=_as_it_is,
                persistent_workers=True,
                # Else it draws from the generator of the training.
                generator=torch.Generator().manual_seed(0),
            )
        if threading.current_thread() is not threading.main_thread():
            return iter(self._loader)
        # torch's handler raises wherever the main thread happens to be; we hear of it in time.
        before = signal.getsignal(signal.SIGCHLD)
        try:
            return iter(self._loader)
        finally:
            signal.signal(signal.SIGCHLD, before)


def _as_it_is(item: T) -> T:
    return item


class _Failure:
    """An error on its way: torch would raise another one, with a traceback for a message."""

    def __init__(self, error: TesseraError) -> None:
        self.error = error


class _Keys(Sampler[K], Generic[K]):
    given: Iterable[K] = ()

    def __iter__(self) -> Iterator[K]:
        return iter(self.given)


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
                "a process that loads data was killed",
                hint="mostly memory or /dev/shm ran out: use fewer loader workers, a smaller batch "
                "or a smaller cache",
            ) from None
        yield item


def _settle(number: int) -> None:
    """What a forked process must not have, or do, of what its parent has."""
    info = torch.utils.data.get_worker_info()
    assert info is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    _leave_sockets()
    parent = os.pidfd_open(info.dataset.parent)  # type: ignore[attr-defined]
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended, killed or not."""
    import select

    select.select([parent], [], [])
    os._exit(1)


def _leave_sockets() -> None:
    """Else the peers of a killed rank would see its connections open as long as this one lives.

    The numbers stay taken, so nobody who still has one closes a file that isn't theirs.
    """
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                os.dup2(nothing, int(name), inheritable=False)
        except OSError:  # the listing's own
            continue
    os.close(nothing)


def _hush() -> None:
    """Warnings that say nothing to the user of a training."""
    for message in ("This DataLoader will create", "This process .* is multi-threaded"):
        if not any(rule[1] and rule[1].pattern == message for rule in warnings.filters):
            warnings.filterwarnings("ignore", message=message)
