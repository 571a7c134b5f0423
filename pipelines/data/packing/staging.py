"""Where a data set is written while it is packed: it appears complete, or not at all.

In: the folder or address of the new data set. Out: a `Stage` to write it in. Must not know formats,
shards or what is in a card.

A folder is written as `.NAME.packing` beside it, which is renamed at the end. At an address, the
files are written in their final location, and `card.json` comes last. What a pack needs to resume
is below `.packing/` and is removed at the end.

    pack photos --to data/photos   writes data/.photos.packing/{train/000000.tar, .packing/…}
    killed
    the same command again         finds .packing/plan with the same digest, keeps finished shards
    done                           renamed to data/photos, without .packing
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from models.core.errors import TesseraError
from pipelines.data.card import FILE
from pipelines.data.packing.statistics import ResumableError
from pipelines.storage.base import Storage
from pipelines.storage.open import open_storage

WORK = ".packing"
"""Folder in the new data set that is removed when the pack is done."""
SHARDS = f"{WORK}/shards"
"""Folder of the records of packed shards."""
_PLAN = f"{WORK}/plan"


class Stage:
    """A data set that is being written.

    storage   where it is written
    folder    the same as a local folder; None at an address
    fresh     whether this pack began it
    replaced  whether it replaced an interrupted pack of another plan
    """

    def __init__(self, storage: Storage, folder: Path | None) -> None:
        self.storage, self.folder = storage, folder
        self.fresh = storage.size(_PLAN) is None
        self.replaced = False

    def begin(self, plan: str) -> bool:
        """Whether an interrupted pack of the same plan can be resumed; otherwise removes its
        files."""
        if not self.fresh and self.storage.read(_PLAN) == plan.encode():
            return True
        self.replaced = not self.fresh
        _clear(self.storage)
        self.fresh = True
        self.storage.write(_PLAN, plan.encode())
        return False

    def scratch(self) -> Path | None:
        """An empty local folder on the same disk for temporary files; None at an address."""
        if self.folder is None:
            return None
        scratch = self.folder / WORK / "parts"
        shutil.rmtree(scratch, ignore_errors=True)  # of workers that were killed
        scratch.mkdir(parents=True)
        return scratch


@contextmanager
def stage(to: str | Path) -> Iterator[Stage]:
    """A stage for a data set at `to`, which exists once the block ends without an error.

    After a TesseraError or OSError nothing of this call is left behind. After an interruption or a
    ResumableError the work stays for the next call.
    """
    storage = refuse_occupied(to)
    if storage.remote:
        yield from _stage_address(storage)
        return
    with ExitStack() as stack:
        yield from _stage_folder(Path(os.path.abspath(storage.where)), stack)


def refuse_occupied(to: str | Path) -> Storage:
    """The storage at `to`. Raises TesseraError if a data set can't be created there."""
    storage = open_storage(to)
    if not storage.remote:
        _refuse_folder(Path(os.path.abspath(storage.where)))
        return storage
    if storage.size(FILE) is not None:
        _clear(storage, WORK)
        raise _packed_already(storage.where)
    if storage.size(_PLAN) is None and storage.names():
        raise TesseraError(f"{storage.where} is not empty", hint="give another --to")
    return storage


def _stage_folder(to: Path, stack: ExitStack) -> Iterator[Stage]:
    work = to.parent / f".{to.name}.packing"
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, lock)
        _claim(lock, to)
        staged = Stage(open_storage(work), work)
    except OSError as error:
        raise _unwritable(to, error) from None
    try:
        yield staged
        _refuse_folder(to)
        os.rename(work, to)
    except BaseException as error:
        if not _is_resumable(error, staged):
            shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            raise _unwritable(to, error) from error
        raise
    shutil.rmtree(to / WORK, ignore_errors=True)


def _stage_address(storage: Storage) -> Iterator[Stage]:
    staged = Stage(storage, None)
    try:
        yield staged
    except BaseException as error:
        if not _is_resumable(error, staged):
            _clear(storage)
        raise
    _clear(storage, WORK)


def _clear(storage: Storage, folder: str = "") -> None:
    for path in storage.names(folder):
        storage.remove(path)


def _is_resumable(error: BaseException, staged: Stage) -> bool:
    """Whether the next call can resume. An error removes only what this pack began itself."""
    if isinstance(error, TesseraError | OSError) and not isinstance(error, ResumableError):
        return not staged.fresh
    return bool(staged.storage.names(SHARDS))


def _claim(lock: int, to: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise TesseraError(
            f"another pack is writing {to}", hint="wait for it, or give another --to"
        ) from None


def _refuse_folder(to: Path) -> None:
    if os.path.ismount(to):
        raise TesseraError(
            f"{to} is a mount point, which can't be replaced by the finished folder",
            hint=f"give a folder in it: --to {to / 'NAME'}",
        )
    if to.is_dir():
        if (to / FILE).exists():
            shutil.rmtree(to / WORK, ignore_errors=True)  # of a pack killed at its last step
            raise _packed_already(str(to))
        if any(to.iterdir()):
            raise TesseraError(
                f"the output folder {to} is not empty", hint="give a new or an empty folder"
            )
    elif to.exists() or to.is_symlink():
        raise TesseraError(f"the output {to} is a file", hint="give a new or an empty folder")


def _packed_already(where: str) -> TesseraError:
    return TesseraError(
        f"{where} is already a packed data set", hint="give another --to, or remove it"
    )


def _unwritable(to: Path, error: Any) -> TesseraError:
    return TesseraError(
        f"{to} can't be written: {error.strerror or error}",
        hint="check the permissions and the free space",
    )
