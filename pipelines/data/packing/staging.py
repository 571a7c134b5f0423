"""Where a data set is while it is packed: whole in the end, or absent.

In: a folder or an address that is to hold a data set. Out: a `Stage` to write it in. Must not know
formats, shards or cards' content.

A folder is made in a working folder beside it, `.NAME.packing`, which takes its name in the end. At
an address the files are put where they are to lie, and `card.json` comes last. What a pack needs to
go on after an interruption lies below `.packing/` and is removed in the end.
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

NOTES = ".packing"
"""Folder, in the data set that is packed, of what goes when it is finished."""
SHARDS = f"{NOTES}/shards"
"""Folder of what is known of the shards that are packed."""
_PLAN = f"{NOTES}/plan"


class Stage:
    """A data set in the making. `folder` is its local folder; None at an address."""

    def __init__(self, place: Storage, folder: Path | None) -> None:
        self.place, self.folder = place, folder
        self.fresh = place.size(_PLAN) is None
        self.replaced = False

    def begin(self, plan: str) -> bool:
        """True where an earlier pack of the same plan left its work; else what lies there goes."""
        if not self.fresh and self.place.read(_PLAN) == plan.encode():
            return True
        self.replaced = not self.fresh
        _clear(self.place)
        self.fresh = True
        self.place.write(_PLAN, plan.encode())
        return False

    def scratch(self) -> Path | None:
        """A local folder on the same disk, for files on their way; None at an address."""
        if self.folder is None:
            return None
        scratch = self.folder / NOTES / "parts"
        shutil.rmtree(scratch, ignore_errors=True)  # of workers that were killed
        scratch.mkdir(parents=True)
        return scratch


@contextmanager
def stage(to: str | Path) -> Iterator[Stage]:
    """A stage for a data set at `to`, which is there when the block ends well.

    After a refusal (TesseraError, OSError) nothing of this call is left behind. After an
    interruption, or `ResumableError`, the work stays for the next call.
    """
    place = refuse_occupied(to)
    if place.remote:
        yield from _stage_address(place)
        return
    with ExitStack() as stack:
        yield from _stage_folder(Path(os.path.abspath(place.where)), stack)


def refuse_occupied(to: str | Path) -> Storage:
    """The place, where a data set can be made there; else TesseraError."""
    place = open_storage(to)
    if not place.remote:
        _refuse_folder(Path(os.path.abspath(place.where)))
        return place
    if place.size(FILE) is not None:
        _clear(place, NOTES)
        raise _packed_already(place.where)
    if place.size(_PLAN) is None and place.names():
        raise TesseraError(f"{place.where} is not empty", hint="give another --to")
    return place


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
    shutil.rmtree(to / NOTES, ignore_errors=True)


def _stage_address(place: Storage) -> Iterator[Stage]:
    staged = Stage(place, None)
    try:
        yield staged
    except BaseException as error:
        if not _is_resumable(error, staged):
            _clear(place)
        raise
    _clear(place, NOTES)


def _clear(place: Storage, folder: str = "") -> None:
    for path in place.names(folder):
        place.remove(path)


def _is_resumable(error: BaseException, staged: Stage) -> bool:
    """Whether the work is of use to the next call: a refusal takes away only what is its own."""
    if isinstance(error, TesseraError | OSError) and not isinstance(error, ResumableError):
        return not staged.fresh
    return bool(staged.place.names(SHARDS))


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
            f"{to} is a mount point, which no finished folder can take the place of",
            hint=f"give a folder in it: --to {to / 'NAME'}",
        )
    if to.is_dir():
        if (to / FILE).exists():
            shutil.rmtree(to / NOTES, ignore_errors=True)  # of a pack killed at its last step
            raise _packed_already(str(to))
        if any(to.iterdir()):
            raise TesseraError(
                f"the output folder {to} is not empty", hint="give a new or an empty folder"
            )
    elif to.exists() or to.is_symlink():
        raise TesseraError(f"the output {to} is a file", hint="give a new or an empty folder")


def _packed_already(where: str) -> TesseraError:
    return TesseraError(
        f"{where} is a packed data set already", hint="give another --to, or remove it"
    )


def _unwritable(to: Path, error: Any) -> TesseraError:
    return TesseraError(
        f"{to} can't be written: {error.strerror or error}",
        hint="check the permissions and the free space",
    )
