"""COCO's run-length encoding (RLE): a mask as the lengths of its runs of 0 and 1, column by column.

In: run lengths as text or numbers, untrusted. Out: pixels, and COCO's text. Must not know what the
masks show. pycocotools reads beyond its buffers if the lengths don't add up to the image, so text
is parsed here.

In the text, a number is written in groups of 5 bits, low bits first, each as a character from `0`
on; the sixth bit means that more groups follow, and the highest bit of the last group is the sign.
From the fourth number on, the difference to the number two before is written. (pycocotools,
`common/maskApi.c`, `rleToString`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Counts = np.ndarray[Any, Any]
"""int64 run lengths, beginning with zeros; only the first may be 0."""
_GROUPS = 7
"""Most groups of 5 bits in a number: more than a length in any allowed image needs."""


def parse(text: bytes, height: int, width: int) -> Counts:
    """Run lengths from COCO's text. Raises ValueError if they don't fill the image."""
    groups = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not len(groups):
        raise ValueError("it is empty")
    if groups.min() < 0 or groups.max() > 63:
        raise ValueError("it has characters that run lengths don't have")
    more = (groups & 32) != 0
    if more[-1]:
        raise ValueError("it is truncated")
    ends = np.flatnonzero(~more)
    starts = np.concatenate(([0], ends[:-1] + 1))
    sizes = ends - starts + 1
    if sizes.max() > _GROUPS:
        raise ValueError("a run length has too many digits")
    shifts = 5 * (np.arange(len(groups)) - np.repeat(starts, sizes))
    values = np.add.reduceat((groups & 31) << shifts, starts)
    values -= np.where(groups[ends] & 16, np.int64(1) << (5 * sizes), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return check(values, height, width)


def check(counts: Sequence[int] | Counts, height: int, width: int) -> Counts:
    """The run lengths as int64, without empty runs. Raises ValueError if they don't fill the
    image."""
    values = np.asarray(counts, np.int64)
    if values.ndim != 1 or not len(values) or values.min() < 0 or values.max() > height * width:
        raise ValueError("a run length is negative or longer than the image")
    if len(values) > 2 * height * width + 2 or values.sum() != height * width:
        raise ValueError(f"its runs add up to {values.sum()} of {height * width} pixels")
    if (values[1:] == 0).any():
        return _merge(values)
    return values


def _merge(values: Counts) -> Counts:
    """The same pixels without empty runs in between."""
    ends = np.cumsum(values)
    ones = np.arange(len(values)) & 1
    kept = values > 0
    ends, ones = ends[kept], ones[kept]
    last = np.append(ones[1:] != ones[:-1], True)
    lengths = np.diff(ends[last], prepend=0)
    return np.concatenate(([0], lengths)) if ones[0] else lengths


def write(counts: Counts) -> bytes:
    """COCO's text of run lengths."""
    deltas = np.array(counts, np.int64)
    deltas[3:] -= np.asarray(counts, np.int64)[1:-2]
    text = bytearray()
    for delta in deltas.tolist():
        while True:
            group, delta = delta & 31, delta >> 5
            if delta == (-1 if group & 16 else 0):
                text.append(group + 48)
                break
            text.append(group + 32 + 48)
    return bytes(text)


def of_mask(mask: np.ndarray[Any, Any]) -> Counts:
    """Run lengths of a mask (H, W); values other than 0 count as 1."""
    flat = np.asarray(mask, bool).T.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(edges, prepend=0, append=len(flat))
    return np.concatenate(([0], lengths)) if flat[0] else lengths


def to_mask(counts: Counts, height: int, width: int) -> np.ndarray[Any, Any]:
    """uint8 (H, W) of 0 and 1."""
    ones = (np.arange(len(counts)) & 1).astype(np.uint8)
    return np.repeat(ones, counts).reshape(width, height).T


def area(counts: Counts) -> int:
    """Number of pixels that are 1."""
    return int(counts[1::2].sum())


def box(counts: Counts, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the pixels that are 1. There must be at least one."""
    ends = np.cumsum(counts)
    starts, stops = ends[0::2][: len(counts) // 2], ends[1::2] - 1
    left, right = starts[0] // height, stops[-1] // height
    if (starts // height != stops // height).any():  # a run continues in the next column
        top, bottom = 0, height - 1
    else:
        top, bottom = (starts % height).min(), (stops % height).max()
    return int(left), int(top), int(right) + 1, int(bottom) + 1
