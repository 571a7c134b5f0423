"""What packing keeps book of: statistics, rejected samples, and a folder that is whole or absent.

In: decoded images and reasons. Out: `ImageCard`, `rejected.jsonl`, a finished folder. Must not know
formats or shards.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.core.errors import TesseraError, UsageError
from pipelines.data.card import FILE, ImageCard

REJECTED = "rejected.jsonl"
"""One JSON object a line: key, origin, reason, detail."""
_SHOWN = 5


class Tally:
    """Sizes of all images, and exact sums over the train pixels.

    mean and std are over pixels, each pixel of each image counted once; they are computed from
    whole numbers, so they don't depend on the order of the images.
    """

    def __init__(self) -> None:
        self._sizes: set[tuple[int, int]] = set()
        self._colour = False
        self._grey_counts = np.zeros((1, 256), np.int64)
        self._rgb_counts = np.zeros((3, 256), np.int64)

    def add(self, image: Image.Image, *, counted: bool) -> None:
        """An image of mode L or RGB; `counted` for those of train."""
        self._sizes.add(image.size)
        self._colour |= image.mode == "RGB"
        if counted:
            counts = self._rgb_counts if image.mode == "RGB" else self._grey_counts
            counts += np.array(image.histogram(), np.int64).reshape(-1, 256)

    def card(self) -> ImageCard:
        """One channel where every image is grey, else three."""
        counts = self._grey_counts + self._rgb_counts if self._colour else self._grey_counts
        moments = [_moments(channel.tolist()) for channel in counts]
        return ImageCard(
            channels=len(counts),
            min_height=min(height for _, height in self._sizes),
            max_height=max(height for _, height in self._sizes),
            min_width=min(width for width, _ in self._sizes),
            max_width=max(width for width, _ in self._sizes),
            mean=tuple(mean for mean, _ in moments),
            std=tuple(std for _, std in moments),
        )


def _moments(counts: list[int]) -> tuple[float, float]:
    """(mean, std) of pixel values scaled to 0..1, from how often each of 0..255 occurs."""
    pixels = sum(counts)
    total = sum(value * count for value, count in enumerate(counts))
    squares = sum(value * value * count for value, count in enumerate(counts))
    mean = Fraction(total, 255 * pixels)
    variance = Fraction(squares, 255 * 255 * pixels) - mean * mean
    return float(mean), math.sqrt(variance)


class Rejections:
    """Samples that failed their check, and how many may."""

    def __init__(self, allowed: str, total: int) -> None:
        self._allowed = _parse_budget(allowed, total)
        self._rows: list[dict[str, str]] = []

    @property
    def count(self) -> int:
        return len(self._rows)

    def add(self, key: str, origin: str, reason: str, detail: str) -> None:
        row = {"key": key, "origin": origin, "reason": reason, "detail": detail}
        self._rows.append({name: _printable(text) for name, text in row.items()})

    def judge(self, folder: Path) -> None:
        """Lists them in `folder`, or raises TesseraError where they are more than allowed."""
        if len(self._rows) > self._allowed:
            reasons = Counter(row["reason"] for row in self._rows)
            counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            shown = "; ".join(row["detail"] for row in self._rows[:_SHOWN])
            more = "; …" if len(self._rows) > _SHOWN else ""
            raise TesseraError(
                f"{len(self._rows)} of the images can't be packed ({counted}), {self._allowed} are "
                f"allowed: {shown}{more}",
                mend="mend or remove them, or leave them out: "
                f"--allow-rejected {len(self._rows)}, or a share like 0.5%",
            )
        if self._rows:
            lines = [json.dumps(row, sort_keys=True) + "\n" for row in self._rows]
            write_last(folder / REJECTED, "".join(lines))


def _printable(text: str) -> str:
    """File names may hold line breaks, terminal codes and bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _parse_budget(text: str, total: int) -> int:
    number = text.strip().removesuffix("%")
    try:
        value = Fraction(number)
    except (ValueError, ZeroDivisionError):
        value = Fraction(-1)
    if text.strip().endswith("%"):
        value = value * total / 100 if value <= 100 else Fraction(-1)
    elif value.denominator != 1:
        value = Fraction(-1)
    if value < 0:
        raise UsageError(
            f"--allow-rejected {text!r} is no number of samples",
            mend="give a whole number, or a share from 0% to 100%",
        )
    return math.floor(value)


@contextmanager
def stage(to: Path) -> Iterator[Path]:
    """A working folder beside `to` that takes its name when the block ends well, and is removed
    when it doesn't. What a killed pack left there is cleared by the next one."""
    to = Path(os.path.abspath(to))
    _refuse_occupied(to)
    work = to.parent / f".{to.name}.packing"
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _unwritable(to, error) from None
    try:
        _claim(lock, to)
        try:
            _empty(work)
            yield work
            _refuse_occupied(to)
            os.rename(work, to)
        except BaseException as error:
            shutil.rmtree(work, ignore_errors=True)
            if isinstance(error, OSError):
                raise _unwritable(to, error) from error
            raise
    finally:
        os.close(lock)


def write_last(path: Path, text: str) -> None:
    """Writes a file whole or not at all, and waits until it is on the disk."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _claim(lock: int, to: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise _unwritable(to, error) from None
        raise TesseraError(
            f"another pack is writing {to}", mend="wait for it, or give another --to"
        ) from None


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _refuse_occupied(to: Path) -> None:
    if os.path.ismount(to):
        raise TesseraError(
            f"{to} is a mount point, which no finished folder can take the place of",
            mend=f"give a folder in it: --to {to / 'NAME'}",
        )
    if to.is_dir():
        if (to / FILE).exists():
            raise TesseraError(
                f"{to} is a packed data set already", mend="give another --to, or remove it"
            )
        if any(to.iterdir()):
            raise TesseraError(
                f"the output folder {to} is not empty", mend="give a new or an empty folder"
            )
    elif to.exists() or to.is_symlink():
        raise TesseraError(f"the output {to} is a file", mend="give a new or an empty folder")


def _unwritable(to: Path, error: Any) -> TesseraError:
    return TesseraError(
        f"{to} can't be written: {error.strerror or error}",
        mend="check the permissions and the free space",
    )
