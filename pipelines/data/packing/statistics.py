"""What a pack counts: statistics of the images, and rejected samples.

In: decoded images; samples with the reason of their rejection. Out: `ImageCard`, `rejected.jsonl`.
Must not know formats or shards.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from models.core.errors import TesseraError, UsageError
from pipelines.data.card import ImageCard
from pipelines.storage.base import Storage

REJECTED = "rejected.jsonl"
"""One JSON object a line: key, origin, reason, detail, and a hint if there is one. `object` is the
class of an object that its packed image lost, `drop` is "boxes" where `--drop boxes` would keep the
image."""
_SHOWN, _HINTS = 5, 2


class ResumableError(TesseraError):
    """Raised where the finished shards are kept, so that the same command can resume."""


class ImageCounts(BaseModel):
    """`ImageStatistics` as plain data.

    sizes   min and max height, min and max width; None without images
    colour  whether an image has three channels
    pixels  how often each value occurs: int64 (4, 256) of grey, red, green, blue
    several_frames  how many files have frames that are not read
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64"
    )
    sizes: tuple[int, int, int, int] | None
    colour: bool
    pixels: bytes
    several_frames: int = 0


class ImageStatistics:
    """Sizes of all images, and mean and std of the train pixels.

    Each pixel of each image counts once. Mean and std are computed from integers, so they don't
    depend on the order of the images.
    """

    def __init__(self) -> None:
        self._sizes: tuple[int, int, int, int] | None = None
        self._colour = False
        self._pixels = np.zeros((4, 256), np.int64)
        self.several_frames = 0

    def add(self, image: Image.Image, *, counted: bool) -> None:
        """Adds an image of mode L or RGB; `counted` if it is of train."""
        width, height = image.size
        self._widen((height, height, width, width))
        self._colour |= image.mode == "RGB"
        if counted:
            counts = self._pixels[1:] if image.mode == "RGB" else self._pixels[:1]
            counts += np.array(image.histogram(), np.int64).reshape(-1, 256)

    def add_frames(self, frames: int) -> None:
        """Counts a file with this many frames, of which one is read."""
        self.several_frames += frames > 1

    def counts(self) -> ImageCounts:
        return ImageCounts(
            sizes=self._sizes,
            colour=self._colour,
            pixels=self._pixels.tobytes(),
            several_frames=self.several_frames,
        )

    def merge(self, other: ImageCounts) -> None:
        """Adds the counts of another object."""
        if other.sizes:
            self._widen(other.sizes)
        self._colour |= other.colour
        self.several_frames += other.several_frames
        self._pixels += np.frombuffer(other.pixels, np.int64).reshape(4, 256)

    def card(self) -> ImageCard:
        """One channel if every image is grey, else three. Needs at least one train image."""
        assert self._sizes is not None
        grey = self._pixels[:1]
        counts = grey + self._pixels[1:] if self._colour else grey
        moments = [_moments(channel.tolist()) for channel in counts]
        return ImageCard(
            channels=3 if self._colour else 1,
            min_height=self._sizes[0],
            max_height=self._sizes[1],
            min_width=self._sizes[2],
            max_width=self._sizes[3],
            mean=tuple(mean for mean, _ in moments),
            std=tuple(std for _, std in moments),
        )

    def _widen(self, sizes: tuple[int, int, int, int]) -> None:
        low_height, high_height, low_width, high_width = self._sizes or sizes
        self._sizes = (
            min(low_height, sizes[0]),
            max(high_height, sizes[1]),
            min(low_width, sizes[2]),
            max(high_width, sizes[3]),
        )


def _moments(counts: list[int]) -> tuple[float, float]:
    """(mean, std) of pixel values scaled to 0..1, from how often each of 0..255 occurs."""
    pixels = sum(counts)
    total = sum(value * count for value, count in enumerate(counts))
    squares = sum(value * value * count for value, count in enumerate(counts))
    mean = Fraction(total, 255 * pixels)
    variance = Fraction(squares, 255 * 255 * pixels) - mean * mean
    return float(mean), math.sqrt(variance)


def rejection(key: str, origin: str, reason: str, detail: str, hint: str = "") -> dict[str, str]:
    """A row of `rejected.jsonl`."""
    row = {"key": key, "origin": origin, "reason": reason, "detail": detail}
    if hint:
        row["hint"] = hint
    return {name: printable(text) for name, text in row.items()}


def dropped_object(row: dict[str, str], name: str) -> dict[str, str]:
    """A row of `rejected.jsonl` on an object of the class `name`, empty if it isn't known."""
    return {**row, "object": printable(name)}


class Rejections:
    """The images and objects that failed their check, and how many are allowed to.

    `allowed`, of `--allow-rejected`, is a number or a percentage: of the images, and in
    `check_objects` of the objects.
    """

    def __init__(self, allowed: str, total: int) -> None:
        self._given = allowed
        self._allowed, self._total = _parse_allowed(allowed, total), total
        self._rows: list[dict[str, str]] = []

    @property
    def count(self) -> int:
        return len(self._rows)

    def add(self, key: str, origin: str, reason: str, detail: str) -> None:
        self._rows.append(rejection(key, origin, reason, detail))

    def extend(self, rows: Iterable[dict[str, str]]) -> None:
        self._rows += rows

    def check(self, storage: Storage) -> None:
        """Writes `rejected.jsonl`. Raises ResumableError for more samples than allowed."""
        if self._rows:
            storage.write(REJECTED, to_json_lines(self._rows))
        if len(self._rows) > self._allowed:
            reasons = Counter(row["reason"] for row in self._rows)
            counted = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
            share = math.ceil(1000 * len(self._rows) / self._total) / 10
            shown = "; ".join(row["detail"] for row in self._rows[:_SHOWN])
            more = "; …" if len(self._rows) > _SHOWN else ""
            drop = any("drop" in row for row in self._rows)
            objects = "; --drop boxes drops only the damaged objects" if drop else ""
            known = list(dict.fromkeys(row["hint"] for row in self._rows if "hint" in row))
            advice = "".join(f"{hint}; " for hint in known[:_HINTS])
            raise ResumableError(
                f"{len(self._rows)} of {self._total} images can't be packed, {self._allowed} are "
                f"allowed ({counted}): {shown}{more}",
                hint=f"{advice}all are listed in {storage.where}/{REJECTED}; fix or remove them, "
                "or leave them out: the same command with --allow-rejected "
                f"{len(self._rows)} or {share:g}% resumes this pack{objects}",
            )

    def check_objects(
        self, storage: Storage, dropped: Sequence[dict[str, str]], kept: Mapping[str, int]
    ) -> None:
        """Raises ResumableError if more objects are dropped than allowed, or all of a class.

        `dropped` are rows of `dropped_object`, `kept` the packed objects of each class.
        """
        if not dropped:
            return
        storage.write(REJECTED, to_json_lines([*self._rows, *dropped]))
        total = sum(kept.values()) + len(dropped)
        allowed = _parse_allowed(self._given, total)
        hint = f"all are in {storage.where}/{REJECTED}; fix or remove them, or leave them out"
        if len(dropped) > allowed:
            reasons = Counter(row["reason"] for row in dropped)
            counted = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
            shown = "; ".join(row["detail"] for row in dropped[:_SHOWN])
            share = math.ceil(1000 * len(dropped) / total) / 10
            raise ResumableError(
                f"{len(dropped)} of {total} objects can't be packed, {allowed} are allowed "
                f"({counted}): {shown}{'; …' if len(dropped) > _SHOWN else ''}",
                hint=f"{hint}: the same command with --allow-rejected {len(dropped)} or {share:g}%",
            )
        lost = sorted({row["object"] for row in dropped} & {n for n, k in kept.items() if not k})
        if lost and allowed < total:
            raise ResumableError(
                f"no object of the class {lost[0]!r} is left: all that the source has are damaged",
                hint=f"{hint} with --allow-rejected 100%",
            )


def to_json_lines(rows: Iterable[Any]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode()


def printable(text: str) -> str:
    """Escapes what file names may contain: line breaks, terminal codes, bytes that aren't UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _parse_allowed(text: str, total: int) -> int:
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
            f"--allow-rejected {text!r} is not a number of samples",
            hint="give an integer, or a share from 0% to 100%",
        )
    return math.floor(value)
