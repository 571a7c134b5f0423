"""What all places behind a network have in common: patience, the cache, fetching ahead.

In: four requests that a kind of server answers (`_read`, `_size`, `_sizes`, …). Out: a
`storage.Place`. Must not know the servers' libraries.

A file comes in blocks, each of which is tried again by itself, so that a break costs one block. A
server that has answered once gets the whole patience, a minute and more; one that never has gets
a few seconds: there the address is wrong more often than the server is away.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from models.core.errors import TesseraError
from pipelines.storage.base import MAX_READ_BYTES, CacheSettings, FileInfo, check_path
from pipelines.storage.cache import Cache
from pipelines.storage.retry import RetryPolicy, TransientError, retry_call

BLOCK_BYTES = 8 << 20
"""With `RetryPolicy.call_seconds` it says how slow a server may drip: 140 kB/s."""
PREFETCH_THREADS = 4
T = TypeVar("T")


class RemoteStorage:
    """A `storage.Place` whose requests a subclass makes. Its methods may be called from several
    threads, and after a fork. The requests raise FileNotFoundError, PermissionError or `TransientError`;
    a TesseraError where trying again is no use."""

    remote = True

    def __init__(self, where: str, cache: CacheSettings, policy: RetryPolicy) -> None:
        self.where = where
        self._cache = Cache(cache.folder, cache.limit_bytes)
        self._policy = policy
        self._answered = False
        self._prefetcher = _Prefetcher()

    # What a kind of server is asked.

    def _read(self, path: str, start: int, stop: int, seconds: float) -> bytes:
        """The bytes from `start` to `stop`, or fewer where the file ends or the body breaks."""
        raise NotImplementedError

    def _size(self, path: str, seconds: float) -> int:
        raise NotImplementedError

    def _sizes(self, folder: str, seconds: float) -> dict[str, int]:
        """Of all files below a folder, which need not be there; paths are relative to the place."""
        raise NotImplementedError

    def _upload(self, file: Path, path: str, seconds: float) -> None:
        raise NotImplementedError

    def _delete(self, path: str, seconds: float) -> None:
        raise NotImplementedError

    # The place.

    def read(self, path: str) -> bytes:
        check_path(path, self.where)
        size = self._ask(path, partial(self._size, path, self._policy.call_seconds))
        if size > MAX_READ_BYTES:
            raise TesseraError(f"{path} of {self.where} has {size:,} bytes, too many for a card")
        return b"".join(self._blocks(path, size))

    def size(self, path: str) -> int | None:
        check_path(path, self.where)

        def look() -> int | None:
            try:
                return self._size(path, self._policy.call_seconds)
            except FileNotFoundError:
                return None

        return self._ask(path, look)

    def sizes(self, paths: Sequence[str]) -> dict[str, int]:
        folders = {path.rpartition("/")[0] for path in paths}
        found: dict[str, int] = {}
        for folder in sorted(folders):
            found.update(self._listed(folder))
        return {path: found[path] for path in paths if path in found}

    def fetch(self, path: str, *, size_bytes: int, sha256: str) -> Path:
        check_path(path, self.where)
        return self._cache.fetch(
            sha256, size_bytes, lambda: self._blocks(path, size_bytes), f"{path} of {self.where}"
        )

    def open(self, path: str, *, size_bytes: int, sha256: str) -> int:
        check_path(path, self.where)
        return self._cache.open(
            sha256, size_bytes, lambda: self._blocks(path, size_bytes), f"{path} of {self.where}"
        )

    def prefetch(self, files: Sequence[FileInfo]) -> None:
        wanted = [file for file in files if not self._cache.has(file.sha256, file.size_bytes)]
        if self._prefetcher.pid != os.getpid():
            self._prefetcher = _Prefetcher()
        self._prefetcher.want(wanted, self._prefetch_file)

    def _prefetch_file(self, file: FileInfo, given_up: Callable[[], bool]) -> None:
        """Without patience: what fails here is tried again, and told, when it is needed."""
        hasty = replace(self._policy, max_attempts=1)

        def blocks() -> Iterator[bytes]:
            for block in self._blocks(file.path, file.size_bytes, hasty):
                if given_up():
                    raise TesseraError("no longer wanted")
                yield block

        self._cache.fetch(file.sha256, file.size_bytes, blocks, file.path)

    def download(self, path: str, to: Path) -> None:
        check_path(path, self.where)
        size = self._ask(path, partial(self._size, path, self._policy.call_seconds))
        with to.open("wb") as out:
            for block in self._blocks(path, size):
                out.write(block)

    def put(self, file: Path, path: str) -> None:
        size = file.stat().st_size
        # The time that a block may take, for each block of it.
        seconds = self._policy.call_seconds * (1 + size // BLOCK_BYTES)
        check_path(path, self.where)
        self._ask(path, lambda: self._upload(file, path, seconds))
        found = self.size(path)
        if found != size:
            raise TesseraError(f"{path} of {self.where} has {found} bytes, {size} were put there")
        file.unlink()

    def write(self, path: str, data: bytes) -> None:
        import tempfile

        with tempfile.TemporaryDirectory(prefix="tessera-") as folder:
            file = Path(folder, "file")
            file.write_bytes(data)
            self.put(file, path)

    def remove(self, path: str) -> None:
        check_path(path, self.where)

        def delete() -> None:
            try:
                self._delete(path, self._policy.call_seconds)
            except FileNotFoundError:
                return

        self._ask(path, delete)

    def names(self, folder: str = "") -> list[str]:
        folder = "/".join(check_path(folder, self.where)) if folder else ""
        return sorted(self._listed(folder))

    def _listed(self, folder: str) -> dict[str, int]:
        return self._ask(folder, partial(self._sizes, folder, self._policy.call_seconds))

    # Patience.

    def _blocks(
        self, path: str, size_bytes: int, policy: RetryPolicy | None = None
    ) -> Iterator[bytes]:
        check_path(path, self.where)
        for start in range(0, size_bytes, BLOCK_BYTES):
            stop = min(start + BLOCK_BYTES, size_bytes)
            yield self._ask(path, partial(self._block, path, start, stop, size_bytes), policy)

    def _block(self, path: str, start: int, stop: int, size_bytes: int) -> bytes:
        data = self._read(path, start, stop, self._policy.call_seconds)
        if len(data) == stop - start:
            return data
        found = self._size(path, self._policy.call_seconds)
        if found != size_bytes:
            raise TesseraError(
                f"{path} of {self.where} has {found:,} bytes, the card says {size_bytes:,}",
                hint="pack the data set again, or put the file there again",
            )
        raise TransientError(f"of {stop - start:,} bytes {len(data):,} came")

    def _ask(self, path: str, act: Callable[[], T], policy: RetryPolicy | None = None) -> T:
        """`act` with patience, and what it says of files that are missing or closed as our error."""
        policy = policy or self._policy
        if not self._answered:
            policy = replace(policy, max_attempts=min(policy.max_attempts or 4, 4))
        what = f"{path or 'the listing'} of {self.where}"
        try:
            found = retry_call(act, policy, what)
        except FileNotFoundError as error:
            self._answered = True
            raise TesseraError(
                f"{what} is not there{_because(error)}",
                hint="check the address, or put the file there again",
            ) from None
        except PermissionError as error:
            raise TesseraError(
                f"{what}: access is denied{_because(error)}",
                hint="check the credentials and what they may do there",
            ) from None
        self._answered = True
        return found


def _because(error: OSError) -> str:
    return f": {error}" if str(error) else ""


class _Prefetcher:
    """A queue that a few threads empty; they end with it, and with the process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._waiting: deque[FileInfo] = deque()
        self._running: set[str] = set()
        self._wanted: set[str] = set()
        self._lock = threading.Lock()

    def want(
        self, files: Sequence[FileInfo], fetch: Callable[[FileInfo, Callable[[], bool]], None]
    ) -> None:
        """These and no others, in this order."""
        with self._lock:
            self._wanted = {file.sha256 for file in files}
            self._waiting = deque(file for file in files if file.sha256 not in self._running)
            for _ in range(min(PREFETCH_THREADS - len(self._running), len(self._waiting))):
                file = self._waiting.popleft()
                self._running.add(file.sha256)
                threading.Thread(
                    target=self._work, args=(file, fetch), name="tessera-prefetch", daemon=True
                ).start()

    def _work(self, file: FileInfo, fetch: Callable[[FileInfo, Callable[[], bool]], None]) -> None:
        while True:
            with suppress(TesseraError):
                fetch(file, partial(self._given_up, file.sha256))
            with self._lock:
                self._running.discard(file.sha256)
                if not self._waiting:
                    return
                file = self._waiting.popleft()
                self._running.add(file.sha256)

    def _given_up(self, sha256: str) -> bool:
        return sha256 not in self._wanted
