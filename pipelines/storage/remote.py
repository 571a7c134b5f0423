"""What all storages behind a network share: retries, the cache, prefetching.

In: the requests of one kind of server, which a subclass makes (`_read`, `_size`, `_sizes`, …).
Out: a `Storage`. Must not know the libraries that talk to the servers.

A file is read in blocks, and each block is retried by itself, so that a broken connection costs one
block. A server that has responded before gets all attempts of the policy, over a minute and more.
One that never has gets a few seconds: there the address is more often wrong than the server down.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeVar

from models.core.errors import TesseraError
from pipelines.storage.base import MAX_READ_BYTES, CacheSettings, FileInfo, check_path
from pipelines.storage.cache import Cache
from pipelines.storage.retry import RetryPolicy, TransientError, retry_call

BLOCK_BYTES = 8 << 20
"""With `RetryPolicy.call_seconds` it sets the slowest accepted transfer: 140 kB/s."""
PREFETCH_THREADS = 4
_FIRST_ATTEMPTS = 4
"""Attempts for a server that has never responded."""
T = TypeVar("T")


class RemoteStorage:
    """A `Storage` whose requests a subclass makes.

    The methods may be called from several threads, and after a fork. The requests, `_read` to
    `_delete`, raise FileNotFoundError, PermissionError, `TransientError`, or TesseraError if
    another attempt is useless. `seconds` is the timeout of one request.
    """

    remote = True

    def __init__(
        self,
        where: str,
        cache: CacheSettings,
        policy: RetryPolicy,
        *,
        has_responded: bool = False,
    ) -> None:
        self.where = where
        self._cache = Cache(cache.folder, cache.limit_bytes)
        self._policy = policy
        self._has_responded = has_responded
        self._prefetcher = _Prefetcher()

    # Requests, made by subclasses.

    def _read(self, path: str, start: int, stop: int, seconds: float) -> bytes:
        """Returns bytes `start` to `stop`, fewer if the file or the response ends early."""
        raise NotImplementedError

    def _size(self, path: str, seconds: float) -> int:
        """Returns the size of a file in bytes."""
        raise NotImplementedError

    def _sizes(self, folder: str, seconds: float) -> dict[str, int]:
        """Returns the sizes in bytes of all files below a folder, by path in this storage; nothing
        if there is no such folder."""
        raise NotImplementedError

    def _folders(self, folder: str, seconds: float) -> list[str]:
        """Returns the names of the folders directly below a folder."""
        raise NotImplementedError

    def _upload(self, file: Path, path: str, seconds: float) -> None:
        raise NotImplementedError

    def _create(self, path: str, data: bytes, seconds: float) -> None:
        """Writes a file unless there is one: then raises FileExistsError."""
        raise NotImplementedError

    def _times(self, folder: str, seconds: float) -> dict[str, float]:
        """Returns the times of the last write of all files below a folder."""
        raise NotImplementedError

    def _delete(self, path: str, seconds: float) -> None:
        raise NotImplementedError

    # The methods of `Storage`.

    def read(self, path: str) -> bytes:
        check_path(path, self.where)
        size, data = self._retry(path, partial(self._read_small, path))
        if size > MAX_READ_BYTES:
            raise TesseraError(
                f"{path} of {self.where} has {size:,} bytes, too many to read at once"
            )
        return b"".join(self._blocks(path, size)) if data is None else data

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        check_path(path, self.where)
        data = self._retry(path, partial(self._range, path, start, stop))
        if len(data) != stop - start:
            raise TesseraError(f"{path} of {self.where} ends before byte {stop:,}")
        return data

    def size(self, path: str) -> int | None:
        check_path(path, self.where)

        def size_or_none() -> int | None:
            try:
                return self._size(path, self._policy.call_seconds)
            except FileNotFoundError:
                return None

        return self._retry(path, size_or_none)

    def sizes(self, paths: Sequence[str]) -> dict[str, int]:
        folders = {path.rpartition("/")[0] for path in paths}
        listed: dict[str, int] = {}
        for folder in sorted(folders):
            listed.update(self._list(folder))
        return {path: listed[path] for path in paths if path in listed}

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

    def discard_damaged(self, path: str, *, sha256: str) -> bool:
        return self._cache.discard_damaged(sha256)

    def prefetch(self, files: Sequence[FileInfo]) -> None:
        missing = [file for file in files if not self._cache.has(file.sha256, file.size_bytes)]
        if self._prefetcher.pid != os.getpid():
            self._prefetcher = _Prefetcher()
        self._prefetcher.replace_list(missing, self._prefetch_file)

    def _prefetch_file(self, file: FileInfo, cancelled: Callable[[], bool]) -> None:
        """Makes one attempt only: `fetch` and `open` retry, and raise, when the file is needed."""
        once = replace(self._policy, max_attempts=1)

        def blocks() -> Iterator[bytes]:
            for block in self._blocks(file.path, file.size_bytes, once):
                if cancelled():
                    raise TesseraError("cancelled")
                yield block

        # The workers of a machine prefetch the same files: each takes one that no other has begun.
        self._cache.fetch_unless_busy(file.sha256, file.size_bytes, blocks, file.path)

    def download(self, path: str, to: Path) -> None:
        check_path(path, self.where)
        size = self._retry(path, partial(self._size, path, self._policy.call_seconds))
        with to.open("wb") as out:
            for block in self._blocks(path, size):
                out.write(block)

    def put(self, file: Path, path: str) -> None:
        self.upload(file, path)
        file.unlink()

    def upload(self, file: Path, path: str) -> None:
        size = file.stat().st_size
        # An upload gets the timeout of one block for each block of the file.
        seconds = self._policy.call_seconds * (1 + size // BLOCK_BYTES)
        check_path(path, self.where)
        self._retry(path, lambda: self._upload(file, path, seconds))
        stored = self.size(path)
        if stored != size:
            raise TesseraError(f"{path} of {self.where} has {stored} bytes, {size} were uploaded")

    def write(self, path: str, data: bytes) -> None:
        import tempfile

        with tempfile.TemporaryDirectory(prefix="tessera-") as folder:
            file = Path(folder, "file")
            file.write_bytes(data)
            self.put(file, path)

    def create_if_absent(self, path: str, data: bytes) -> bool:
        check_path(path, self.where)
        seconds, attempts = self._policy.call_seconds, count()

        def create() -> bool:
            earlier = next(attempts)
            try:
                self._create(path, data, seconds)
            except FileExistsError:
                # An earlier attempt may have arrived although its response didn't.
                return earlier > 0 and self._read(path, 0, len(data) + 1, seconds) == data
            return True

        return self._retry(path, create)

    def times(self, folder: str) -> dict[str, float]:
        folder = "/".join(check_path(folder, self.where))
        return self._retry(folder, partial(self._times, folder, self._policy.call_seconds))

    def remove(self, path: str) -> None:
        check_path(path, self.where)

        def delete() -> None:
            try:
                self._delete(path, self._policy.call_seconds)
            except FileNotFoundError:
                return

        self._retry(path, delete)

    def names(self, folder: str = "") -> list[str]:
        folder = "/".join(check_path(folder, self.where)) if folder else ""
        return sorted(self._list(folder))

    def folders(self, folder: str = "") -> list[str]:
        folder = "/".join(check_path(folder, self.where)) if folder else ""
        call = partial(self._folders, folder, self._policy.call_seconds)
        return sorted(self._retry(folder, call))

    def _read_small(self, path: str) -> tuple[int, bytes | None]:
        """The size of a file; and its content, if it has only one block. That is read in one
        request, because another machine may replace the file at any time."""
        size = self._size(path, self._policy.call_seconds)
        if size > BLOCK_BYTES:
            return size, None
        # One byte more than it has, to see whether it has grown meanwhile.
        data = self._read(path, 0, size + 1, self._policy.call_seconds) if size else b""
        if len(data) != size:
            raise TransientError(f"{len(data):,} bytes arrived of a file of {size:,}")
        return size, data

    def _list(self, folder: str) -> dict[str, int]:
        return self._retry(folder, partial(self._sizes, folder, self._policy.call_seconds))

    # Retries.

    def _blocks(
        self, path: str, size_bytes: int, policy: RetryPolicy | None = None
    ) -> Iterator[bytes]:
        check_path(path, self.where)
        for start in range(0, size_bytes, BLOCK_BYTES):
            stop = min(start + BLOCK_BYTES, size_bytes)
            yield self._retry(path, partial(self._block, path, start, stop, size_bytes), policy)

    def _range(self, path: str, start: int, stop: int) -> bytes:
        data = self._read(path, start, stop, self._policy.call_seconds)
        if len(data) < stop - start and self._size(path, self._policy.call_seconds) >= stop:
            raise TransientError(f"only {len(data):,} of {stop - start:,} bytes arrived")
        return data

    def _block(self, path: str, start: int, stop: int, size_bytes: int) -> bytes:
        data = self._read(path, start, stop, self._policy.call_seconds)
        if len(data) == stop - start:
            return data
        size = self._size(path, self._policy.call_seconds)
        if size != size_bytes:
            raise TesseraError(
                f"{path} of {self.where} has {size:,} bytes, the card says {size_bytes:,}",
                hint="upload the file again, or pack the data set again",
            )
        raise TransientError(f"only {len(data):,} of {stop - start:,} bytes arrived")

    def _retry(self, path: str, call: Callable[[], T], policy: RetryPolicy | None = None) -> T:
        """Calls `call` with retries. A missing or forbidden file becomes a TesseraError."""
        policy = policy or self._policy
        if not self._has_responded:
            attempts = min(policy.max_attempts or _FIRST_ATTEMPTS, _FIRST_ATTEMPTS)
            policy = replace(policy, max_attempts=attempts)
        what = f"{path or 'the listing'} of {self.where}"
        try:
            result = retry_call(call, policy, what)
        except FileNotFoundError as error:
            self._has_responded = True
            raise TesseraError(
                f"{what} does not exist{_because(error)}",
                hint="check the address, or upload the file again",
            ) from None
        except PermissionError as error:
            raise TesseraError(
                f"{what}: access is denied{_because(error)}",
                hint="check the credentials and their permissions",
            ) from None
        self._has_responded = True
        return result


def _because(error: OSError) -> str:
    return f": {error}" if str(error) else ""


class _Prefetcher:
    """A list of files that up to `PREFETCH_THREADS` threads work through. The threads end with the
    list, and with the process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._waiting: deque[FileInfo] = deque()
        self._running: set[str] = set()
        self._wanted: set[str] = set()
        self._lock = threading.Lock()

    def replace_list(
        self, files: Sequence[FileInfo], fetch: Callable[[FileInfo, Callable[[], bool]], None]
    ) -> None:
        """Replaces the files that wait, in this order; downloads of other files are cancelled."""
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
                fetch(file, partial(self._cancelled, file.sha256))
            with self._lock:
                self._running.discard(file.sha256)
                if not self._waiting:
                    return
                file = self._waiting.popleft()
                self._running.add(file.sha256)

    def _cancelled(self, sha256: str) -> bool:
        return sha256 not in self._wanted
