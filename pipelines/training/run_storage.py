"""The files of a run, or of a search, in an object store.

In: the address of the store and local files. Out: the same files there, and back on another
machine. Must not know what the files are for, nor who trains.

A folder is published with its files first and its manifest.json last, and removed the other way
round. So a folder with a manifest is complete, unless it was damaged: `fetch_folder` compares every
file with the checksums in the manifest. What a crash leaves has no manifest and is never used.

    1  put checkpoints/step-000000036/weights.safetensors
    2  put checkpoints/step-000000036/optimizer.safetensors …
       killed here: step-000000036 is partial, and the checkpoint before it is the newest
    3  put checkpoints/step-000000036/manifest.json            from now on it is complete
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.storage.atomic import replace_file, replace_folder
from pipelines.storage.base import Storage
from pipelines.storage.lease import FOLDER, check_attempt
from pipelines.storage.open import open_storage
from pipelines.storage.retry import RetryPolicy
from pipelines.training.checkpoints import MANIFEST, DamagedError, parse_manifest, verify

PATIENCE = RetryPolicy(max_attempts=None, deadline_seconds=300.0)
"""How long a store may be down before a training that writes to it ends."""


class RunStorage:
    """The files below the address of one run. All methods raise TesseraError if the store stays
    unreachable or refuses.

    `attempt` is the number of the driver's lease, if it has one. What publishes for a driver that
    was replaced gets a LeaseLostError, and publishes nothing.
    """

    def __init__(self, storage: Storage, attempt: int = 0) -> None:
        self.storage = storage
        self.where = storage.where
        self._attempt = attempt

    @classmethod
    def open(cls, address: str, *, has_responded: bool = False, attempt: int = 0) -> RunStorage:
        """Opens the storage at an address without a connection. With `has_responded` the address
        is known to be right, so that a store which is down is waited for, as in `PATIENCE`."""
        storage = open_storage(address, policy=PATIENCE, has_responded=has_responded)
        return cls(storage, attempt)

    def check(self) -> None:
        """Raises LeaseLostError if another driver has replaced the one that this works for."""
        if self._attempt:
            check_attempt(self.storage, FOLDER, self.where.rpartition("/")[2], self._attempt)

    # ── files ────────────────────────────────────────────────────────────────────────────────

    def publish_file(self, file: Path, path: str) -> None:
        """Uploads a file, which appears complete or not at all."""
        self.check()
        self.storage.upload(file, path)

    def fetch_file(self, path: str, to: Path) -> None:
        """Downloads a file to a local path, where it appears complete or not at all."""
        to.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(to) as part:
            self.storage.download(path, part)

    def fetch_files(self, folder: str, to: Path) -> None:
        """Downloads all files below a folder, which needs no manifest, into the local folder."""
        for path in self.storage.names(folder):
            self.fetch_file(path, to / Path(path).relative_to(folder))

    # ── folders with a manifest ──────────────────────────────────────────────────────────────

    def publish_folder(
        self, folder: Path, path: str, *, complete: Callable[[], None] | None = None
    ) -> None:
        """Uploads a folder that has a manifest. One that is there already, complete and with the
        same content, is left as it is; any other is replaced. `complete` is called when all files
        but the manifest are there."""
        self.check()
        raw = (folder / MANIFEST).read_bytes()
        present = self.storage.names(path)
        if f"{path}/{MANIFEST}" in present:
            if self.storage.read(f"{path}/{MANIFEST}") == raw:
                return
            self.storage.remove(f"{path}/{MANIFEST}")
        wanted = [name for name, _, _ in parse_manifest(raw, folder.name)]
        for stale in {name.removeprefix(f"{path}/") for name in present} - {*wanted, MANIFEST}:
            self.storage.remove(f"{path}/{stale}")
        for name in wanted:
            self.storage.upload(folder / name, f"{path}/{name}")
        if complete is not None:
            complete()
        self.check()  # the uploads took a while
        self.storage.upload(folder / MANIFEST, f"{path}/{MANIFEST}")

    def complete_folders(self, path: str) -> tuple[list[str], list[str]]:
        """The names of the folders below `path` that have a manifest, and of those that have none;
        both sorted."""
        files = [name.removeprefix(f"{path}/").split("/", 1) for name in self.storage.names(path)]
        named = {parts[0] for parts in files if len(parts) == 2}
        complete = {parts[0] for parts in files if parts[1:] == [MANIFEST]}
        return sorted(complete), sorted(named - complete)

    def fetch_folder(self, path: str, to: Path) -> Path:
        """Makes the local folder `to` a verified copy, and returns it. What is there already and
        has the same content is kept. Of several processes of a machine one downloads, and the
        others wait.

        Raises DamagedError if the folder isn't complete, or if a checksum differs after a second
        download too.
        """
        with _locked(to.parent):
            raw = self._manifest(path)
            if _has(to, raw):
                return to
            try:
                self._download(path, raw, to)
            except DamagedError:
                self._download(path, raw, to)
            return to

    def remove_folder(self, path: str) -> None:
        """Removes a folder, its manifest first."""
        self.check()
        self.storage.remove(f"{path}/{MANIFEST}")
        for name in self.storage.names(path):
            self.storage.remove(name)

    def remove_all(self) -> None:
        """Removes all files."""
        for name in self.storage.names():
            self.storage.remove(name)

    def _manifest(self, path: str) -> bytes:
        if self.storage.size(f"{path}/{MANIFEST}") is None:
            raise DamagedError(f"{path.rpartition('/')[2]} has no readable {MANIFEST}")
        return self.storage.read(f"{path}/{MANIFEST}")

    def _download(self, path: str, raw: bytes, to: Path) -> None:
        try:
            entries = parse_manifest(raw, to.name)
            sizes = self.storage.sizes([f"{path}/{name}" for name, _, _ in entries])
            with replace_folder(to) as part:
                for name, size_bytes, _ in entries:
                    if sizes.get(f"{path}/{name}") != size_bytes:
                        raise DamagedError(f"file {name} is missing or has another size")
                    (part / name).parent.mkdir(parents=True, exist_ok=True)
                    self.storage.download(f"{path}/{name}", part / name)
                (part / MANIFEST).write_bytes(raw)
                verify(part)
        except OSError as error:
            raise TesseraError(
                f"{path} of {self.where} can't be copied to {to}: {error.strerror or error}",
                hint="free some space there",
            ) from error


def address_of(storage: str, kind: str, name: str) -> str:
    """The address of a run or a search in a remote storage; `kind` is "runs", "searches" or
    "temporary". Empty if `storage` is empty."""
    return f"{storage}/{kind}/{name}" if storage else ""


def scratch_folder(folder: Path) -> Path:
    """`folder`, or a folder of temporary files if this machine's user can't create it: a worker's
    machine need not have the home folder of the driver's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError:
        import tempfile

        own = Path(tempfile.gettempdir(), f"tessera-{os.getuid()}")
        own.mkdir(exist_ok=True, mode=0o700)
        if own.is_symlink() or own.stat().st_uid != os.getuid():  # anybody may make such a folder
            raise TesseraError(
                f"{own} belongs to another user", hint="set TMPDIR to a folder of your own"
            ) from None
        own.chmod(0o700)
        scratch = own / folder.name
        scratch.mkdir(exist_ok=True)
        return scratch


def _has(folder: Path, raw: bytes) -> bool:
    """Whether the folder is intact and has this manifest."""
    try:
        if (folder / MANIFEST).read_bytes() != raw:
            return False
        verify(folder)
    except (OSError, TesseraError):
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".fetch.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
