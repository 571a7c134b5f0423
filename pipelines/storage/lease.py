"""A lease: at most one holder at a time, on any number of machines that share nothing but a store.

In: a `Storage` with conditional writes, a folder in it, and who asks. Out: a `Lease` with an
attempt number, renewed in a thread, or an error that names the holder. Must not know what is done
under the lease.

The folder has numbered entries, and the newest one says who holds the lease. Every acquisition,
renewal and release creates the entry with the next number if it is absent, so one of several that
try succeeds. The age of an entry is measured by the clock of the store alone: the time of the entry
and the time of a file that is written to read the clock. A driver that is stopped for a minute:

    time  who  what happens                                                  newest entry
    0 s   a    acquires: creates 1                                           1: a, attempt 1
    10 s  a    renews: creates 2, removes 1                                  2: a, attempt 1
    15 s  b    asks; entry 2 is 5 s old: refused                             2: a, attempt 1
    16 s  a    is stopped by SIGSTOP, or its network is gone                 2: a, attempt 1
    45 s  b    asks again; entry 2 is 35 s old, no sign of life: creates 3   3: b, attempt 2
    76 s  a    continues; before it writes it must renew, for its last renewal was long ago:
               entry 3 exists, so it has lost the lease and writes nothing   3: b, attempt 2

A write that was already on its way when its process was stopped may still arrive. So what is
published under a lease should contain the attempt number, or be checked with `check_attempt`.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from models.core.errors import TesseraError
from pipelines.storage.base import Storage
from pipelines.storage.retry import RetryPolicy, retry_call

FOLDER = "lease"
"""Where the entries of a run's lease are, below its address."""
TTL_SECONDS = 30.0
"""A lease that was not renewed for so long is free for another holder."""
RENEWALS_PER_TTL = 3
_SAFE_PART = 0.7
"""Of the time until the lease expires: as long its holder writes without asking the store."""
_WATCHED_PART = 0.1
"""Of the time until the lease expires: as long an expired lease is watched before another holder
gets it. After an outage of the store its holder needs some time to show itself."""
REQUESTS = RetryPolicy(max_attempts=3, call_seconds=10.0)
"""For a storage that serves leases: a request that hangs must not outlast the lease."""
_OUTAGE = RetryPolicy(max_attempts=None, deadline_seconds=120.0, max_wait_seconds=1.0)
_ENTRY = re.compile(r"\d{9}")
# A machine that sleeps must not believe afterwards that its lease is fresh.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class LeaseLostError(TesseraError):
    """Another holder has the lease now; what was done under it must not go on."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease. `job` is a job's id in a cluster, or empty."""

    host: str
    pid: int
    job: str = ""

    @classmethod
    def this_process(cls, job: str = "") -> Holder:
        return cls(socket.gethostname(), os.getpid(), job)

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}" + (f", job {self.job}" if self.job else "")


@dataclass(frozen=True)
class _Entry:
    number: int
    holder: Holder
    token: str
    attempt: int
    ttl_seconds: float
    released: bool = False

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()


class Lease:
    """A lease that was acquired; see `held`. `attempt` counts the holders from 1."""

    def __init__(
        self,
        entries: _Entries,
        entry: _Entry,
        began: float,
        on_lost: Callable[[LeaseLostError], None],
    ) -> None:
        self.attempt = entry.attempt
        self._entries, self._entry, self._on_lost = entries, entry, on_lost
        self._renewed = began
        self._lost: LeaseLostError | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease-renewal", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> LeaseLostError | None:
        """Why the lease is lost; None while nothing of that is known."""
        return self._lost

    def check(self, patience_seconds: float = 120.0) -> None:
        """Returns if the lease is held; call it before each write. Asks the store only if the last
        renewal was long ago, and then waits `patience_seconds` for a store that is down. Raises
        LeaseLostError if another holder has it now, and TesseraError if the store is down."""
        if self._lost:
            raise self._lost
        if _now() - self._renewed < self._entry.ttl_seconds * _SAFE_PART:
            return
        policy = replace(_OUTAGE, deadline_seconds=patience_seconds)
        retry_call(self._renew, policy, None, transient=_may_pass)

    def release(self) -> None:
        """Ends the lease, so that the next holder need not wait. Does nothing if it is lost."""
        self._ended.set()
        self._thread.join()
        with self._lock, suppress(TesseraError):
            if not self._lost:
                self._advance(released=True)

    def _keep(self) -> None:
        """Renews the lease until it is released or lost."""
        wait = self._entry.ttl_seconds / RENEWALS_PER_TTL
        while not self._ended.wait(wait):
            wait = self._entry.ttl_seconds / RENEWALS_PER_TTL
            known = self._lost is not None
            try:
                self._renew()
            except LeaseLostError as error:
                if not known:
                    self._on_lost(error)
                return
            except TesseraError:
                wait = min(wait, 1.0)  # the store is down

    def _renew(self) -> None:
        began = _now()
        with self._lock:
            if self._lost:
                raise self._lost
            if self._renewed < began:  # otherwise another thread renewed while this one waited
                self._advance()
                self._renewed = began

    def _advance(self, *, released: bool = False) -> None:
        """Creates the next entry. Raises LeaseLostError if somebody else has."""
        ours = self._entry
        entry = _Entry(ours.number + 1, ours.holder, ours.token, ours.attempt, ours.ttl_seconds)
        if released:
            entry = _Entry(**{**vars(entry), "released": True})
        if not self._entries.create(entry) or not self._entries.is_newest(entry):
            actual = self._entries.newest()
            if actual is None or actual.token != ours.token:
                self._lost = _lost(self._entries.what, ours.attempt, actual)
                raise self._lost
            entry = actual  # an earlier request had arrived after all
        self._entry = entry
        self._entries.prune(entry.number)


@contextmanager
def held(
    storage: Storage,
    folder: str,
    what: str,
    *,
    holder: Holder,
    patience_seconds: float = 0.0,
    ttl_seconds: float | None = None,
    on_lost: Callable[[LeaseLostError], None] = lambda error: None,
    on_wait: Callable[[str], None] = lambda text: None,
) -> Iterator[Lease]:
    """Holds the lease whose entries are in `folder`, and releases it at the end.

    Args:
        storage: With conditional writes; opened with the policy `REQUESTS`.
        what: What the lease is for, such as the name of a run, for messages.
        patience_seconds: How long to watch a holder that shows no sign of life. One that does is
            not waited for.
        ttl_seconds: After so long without a renewal another holder can get the lease; by default
            `TTL_SECONDS`.
        on_lost: Called in a thread when another holder has got it.
        on_wait: Called with a line when a holder is waited for.

    Raises TesseraError if somebody else holds the lease, or if the store has no conditional writes.
    """
    entries = _Entries(storage, folder, what)
    ttl_seconds = TTL_SECONDS if ttl_seconds is None else ttl_seconds
    lease = _acquire(entries, holder, patience_seconds, ttl_seconds, on_lost, on_wait)
    try:
        yield lease
    finally:
        lease.release()


def check_attempt(storage: Storage, folder: str, what: str, attempt: int) -> None:
    """Raises LeaseLostError if an attempt after `attempt` has begun. For processes that work for
    the holder, before they publish anything; costs two requests."""
    newest = _Entries(storage, folder, what).newest()
    if newest is not None and newest.attempt > attempt:
        raise _lost(what, attempt, newest)


def _acquire(
    entries: _Entries,
    holder: Holder,
    patience_seconds: float,
    ttl_seconds: float,
    on_lost: Callable[[LeaseLostError], None],
    on_wait: Callable[[str], None],
) -> Lease:
    began = watched = _now()
    seen: _Entry | None = None
    announced = False
    while True:
        asked = _now()
        newest = entries.newest()
        if newest != seen:
            if seen is not None and newest is not None and not newest.released:
                raise _refusal(entries.what, newest, 0.0)
            seen, watched = newest, asked
        age = 0.0
        if newest is None or newest.released:
            free = True
        else:
            age = entries.age_seconds(newest.number)
            watch = newest.ttl_seconds * _WATCHED_PART
            free = age > newest.ttl_seconds and asked - watched >= watch
        if free:
            number, attempt = (newest.number, newest.attempt) if newest else (0, 0)
            entry = _Entry(number + 1, holder, uuid.uuid4().hex, attempt + 1, ttl_seconds)
            if entries.create(entry) and entries.is_newest(entry):
                entries.check_conditional(entry)
                entries.prune(entry.number)
                return Lease(entries, entry, asked, on_lost)
            continue
        assert newest is not None
        if age <= newest.ttl_seconds and asked - began >= patience_seconds:
            raise _refusal(entries.what, newest, age)
        if not announced:
            announced = True
            on_wait(
                f"{entries.what} was being trained by {newest.holder}, last seen {age:.0f} s ago; "
                f"waiting up to {newest.ttl_seconds:.0f} s for a sign of life"
            )
        time.sleep(newest.ttl_seconds * _WATCHED_PART / 3)


class _Entries:
    """The entries of a lease in a folder of a storage."""

    def __init__(self, storage: Storage, folder: str, what: str) -> None:
        self.what = what
        self._storage, self._folder = storage, folder

    def newest(self) -> _Entry | None:
        """The entry with the highest number."""
        while number := self.newest_number():
            try:
                content: dict[str, Any] = json.loads(self._storage.read(self._path(number)))
            except TesseraError:
                if self.newest_number() == number:
                    raise
                continue  # its holder renewed and removed it
            return _Entry(**{**content, "holder": Holder(**content["holder"])})
        return None

    def newest_number(self) -> int:
        return max(self._numbers(), default=0)

    def age_seconds(self, number: int) -> float:
        """Seconds since an entry was written, by the store's clock."""
        probe = f"{self._folder}/now-{uuid.uuid4().hex}"
        self._storage.write(probe, b"")
        try:
            times = self._storage.times(self._folder)
        finally:
            self._storage.remove(probe)
        return max(0.0, times[probe] - times.get(self._path(number), times[probe]))

    def create(self, entry: _Entry) -> bool:
        return self._storage.create_if_absent(self._path(entry.number), entry.to_json())

    def is_newest(self, entry: _Entry) -> bool:
        """Whether an entry that was created is the newest. Otherwise it is removed: those between
        were removed before, so nobody else had its number."""
        if self.newest_number() == entry.number:
            return True
        self.remove(entry.number)
        return False

    def check_conditional(self, entry: _Entry) -> None:
        """Raises TesseraError if the store ignores the condition of a conditional write."""
        if self._storage.create_if_absent(self._path(entry.number), entry.to_json() + b" "):
            self.remove(entry.number)
            raise TesseraError(
                f"{self._storage.where} ignores the condition of a conditional write, so two "
                f"processes could work on {self.what} at the same time",
                hint="use a store that supports If-None-Match, or a folder that all machines share",
            )

    def remove(self, number: int) -> None:
        self._storage.remove(self._path(number))

    def prune(self, newest: int) -> None:
        """Removes the entries before the newest. What can't be removed now is removed later."""
        with suppress(TesseraError):
            for number in self._numbers():
                if number < newest:
                    self.remove(number)

    def _numbers(self) -> list[int]:
        names = (path.rpartition("/")[2] for path in self._storage.names(self._folder))
        return [int(name) for name in names if _ENTRY.fullmatch(name)]

    def _path(self, number: int) -> str:
        return f"{self._folder}/{number:09d}"


def _refusal(what: str, newest: _Entry, age_seconds: float) -> TesseraError:
    return TesseraError(
        f"{what} is being trained by {newest.holder}, renewed {age_seconds:.0f} s ago; "
        f"it can be replaced {newest.ttl_seconds:.0f} s after the last sign of life",
        hint="wait for it, or stop it first",
    )


def _lost(what: str, attempt: int, newest: _Entry | None) -> LeaseLostError:
    by = f"attempt {newest.attempt}, {newest.holder}," if newest else "another process"
    return LeaseLostError(
        f"{by} has replaced attempt {attempt} of {what}, which gave no sign of life: "
        f"attempt {attempt} stops here"
    )


def _may_pass(error: Exception) -> bool:
    return isinstance(error, TesseraError) and not isinstance(error, LeaseLostError)


def _now() -> float:
    return time.clock_gettime(_CLOCK)
