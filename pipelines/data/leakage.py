"""The same image in two splits, also where it was re-encoded, resized, mirrored or brightened.

In: upright images, later all their fingerprints. Out: pairs of samples of different splits. Must
not know where images lie or what becomes of a pair.

A fingerprint is a digest of the pixels, and 255 bits of what the image looks like: the signs of the
16 by 16 lowest frequencies of its grey thumbnail (C. Zauner, "Implementation and Benchmarking of
Perceptual Image Hash Functions", 2010). Mirroring an image turns the signs of the odd horizontal
frequencies round, so a mirrored copy is found without a second fingerprint. All is computed with
whole numbers: the same image has the same fingerprint on every machine.

What the limits give, held by `tests/data/test_leakage.py`: of photos every copy that was re-encoded
(JPEG quality 30 and more), resized (0.5 to 2), mirrored or brightened is found, and 98 % of those
that lost 2 % of their sides; not those that lost 5 %. Of images of 32 by 32 pixels 94 % at quality
30 and all but a few at 50, but none that lost a pixel at each side. CIFAR-10 has 73 pairs between
train and test, and a look at each shows the same scene; MNIST has 12 that are none, of 600 million.

    N images
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from pipelines.data.card import SPLITS

SIZE = 48
"""Bytes of a fingerprint."""
LIMIT = 31
"""Pairs that differ in at most so many of the 255 bits are near."""
FLAT_LIMIT = 15
"""The same, where one of the two is flat: strokes on an empty ground look alike too easily."""
FLAT_SHARE = 0.6
"""An image is flat where so much of its thumbnail is within `FLAT_LEVELS` neighbouring greys."""
FLAT_LEVELS = 9
BLANK_LEVELS = 4
"""An image whose thumbnail has fewer greys between darkest and brightest has no looks to compare."""
_DIGEST = 16
_SIDE, _KEPT = 32, 16
_CHUNK = 1 << 20
Array = np.ndarray[Any, Any]


class Pair(NamedTuple):
    """Two samples that look the same, each as (split, number in its split); `left` is of the split
    that comes first. `kind` is "same" for the same pixels, else "near"; `distance` is in bits."""

    left: tuple[str, int]
    right: tuple[str, int]
    kind: Literal["same", "near"]
    distance: int


def fingerprint(image: Image.Image) -> bytes:
    """`SIZE` bytes for an upright image of mode L or RGB.

    16 bytes are of the sha256 of mode, size and pixels. 32 bytes are the signs; the place of the
    constant part, which has no sign, says whether the image is flat. A blank image has zeros.
    """
    head = f"{image.mode} {image.width} {image.height} ".encode()
    digest = hashlib.sha256(head + image.tobytes()).digest()[:_DIGEST]
    grey = image if image.mode == "L" else image.convert("L")
    small = grey.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    pixels = np.asarray(small)
    if int(pixels.max()) - int(pixels.min()) < BLANK_LEVELS:
        return digest + bytes(SIZE - _DIGEST)
    waves = _waves()
    signs = (waves @ pixels @ waves.T).ravel()[_order()] > 0
    levels = np.cumsum(np.bincount(pixels.ravel(), minlength=256))
    levels = np.concatenate([np.zeros(FLAT_LEVELS, levels.dtype), levels])
    signs[0] = (levels[FLAT_LEVELS:] - levels[:-FLAT_LEVELS]).max() > FLAT_SHARE * _SIDE**2
    return digest + np.packbits(signs).tobytes()


def find(prints: Mapping[str, Array], kinds: Collection[str] = ("same", "near")) -> list[Pair]:
    """Pairs of these kinds between different splits, from uint8 (N, `SIZE`) of each split.

    Every image that has the same pixels as one of another split is in a pair, and every image that
    is near to one of another split is in a pair with the nearest; so the list is no longer than
    twice the images, however many are alike. Of images with the same pixels in one split the first
    speaks for all when near ones are sought. No near pair is missed. A million images against a
    tenth of them take half a minute; the time grows with the number of pairs that look alike.
    """
    order: dict[str, int] = {split: place for place, split in enumerate(SPLITS)}
    names = sorted((name for name in prints if len(prints[name])), key=lambda n: order[n])
    pairs: list[Pair] = []
    for left, right in combinations(names, 2):
        a, b = (np.ascontiguousarray(prints[name], np.uint8) for name in (left, right))
        if "same" in kinds:
            pairs += [Pair((left, i), (right, j), "same", 0) for i, j in _same(a, b)]
        if "near" in kinds:
            pairs += [Pair((left, i), (right, j), "near", d) for i, j, d in _near(a, b)]
    return pairs


@cache
def _waves() -> Array:
    """The `_KEPT` lowest cosines of the DCT as whole numbers; in float64 their sums are exact."""
    k = np.arange(_KEPT)[:, None] * (2 * np.arange(_SIDE)[None] + 1)
    waves: Array = np.rint(4096 * np.cos(np.pi * k / (2 * _SIDE)))
    return waves


@cache
def _order() -> Array:
    """Frequencies by band: each band of 16 has one of each row and of each column."""
    band, row = np.divmod(np.arange(_KEPT * _KEPT), _KEPT)
    return np.asarray(row * _KEPT + (band - row) % _KEPT)


@cache
def _mirror() -> Array:
    """uint8 (32,): the bits that a mirrored image has otherwise."""
    return np.packbits(_order() % _KEPT % 2 == 1)


def _digests(prints: Array) -> Array:
    # All have the same length, so that numpy cuts zeros at the end makes no two of them equal.
    return np.ascontiguousarray(prints[:, :_DIGEST]).view(f"S{_DIGEST}").ravel()


def _same(left: Array, right: Array) -> list[tuple[int, int]]:
    a, b = _digests(left), _digests(right)
    known_a, first_a = np.unique(a, return_index=True)
    known_b, first_b = np.unique(b, return_index=True)
    i = np.flatnonzero(np.isin(a, known_b))
    j = np.flatnonzero(np.isin(b, known_a))
    found = set(zip(i.tolist(), first_b[np.searchsorted(known_b, a[i])].tolist()))
    found |= set(zip(first_a[np.searchsorted(known_a, b[j])].tolist(), j.tolist()))
    return sorted(found)


class _Looks:
    """Bits of some of a split's images, ready to be compared."""

    def __init__(self, bits: Array, numbers: Array) -> None:
        self.numbers = numbers
        self.bands = np.ascontiguousarray(bits).view(np.uint16)
        self.words = np.ascontiguousarray(bits).view(np.uint64)

    def mirrored(self) -> _Looks:
        return _Looks(self.words.view(np.uint8) ^ _mirror(), self.numbers)


def _looks(prints: Array) -> tuple[_Looks, _Looks]:
    """The images that are not flat, and those that are."""
    first = np.unique(_digests(prints), return_index=True)[1]
    bits = prints[:, _DIGEST:]
    first = np.sort(first[bits[first].any(axis=1)])
    bits = bits[first]
    flat = bits[:, 0] >> 7 == 1
    bits[:, 0] &= 0x7F
    return _Looks(bits[~flat], first[~flat]), _Looks(bits[flat], first[flat])


def _near(left: Array, right: Array) -> list[tuple[int, int, int]]:
    """(number in left, number in right, distance): for each image its nearest near one."""
    none = np.iinfo(np.int64).max
    best_a, best_b = np.full(len(left), none), np.full(len(right), none)
    same = _digests(left), _digests(right)
    (rich_a, flat_a), (rich_b, flat_b) = _looks(left), _looks(right)
    searches = [(rich_a, rich_b, LIMIT)]
    searches += [(a, b, FLAT_LIMIT) for a, b in ((flat_a, flat_b), (flat_a, rich_b))]
    searches += [(rich_a, flat_b, FLAT_LIMIT)]
    for a, b, limit in searches:
        for i, j, distance in _search(a, b, limit):
            other = same[0][i] != same[1][j]
            i, j, distance = i[other], j[other], distance[other].astype(np.int64)
            np.minimum.at(best_a, i, distance << 40 | j)
            np.minimum.at(best_b, j, distance << 40 | i)
    mask = (1 << 40) - 1
    i, j = np.flatnonzero(best_a < none), np.flatnonzero(best_b < none)
    found = {(x, best & mask, best >> 40) for x, best in zip(i.tolist(), best_a[i].tolist())}
    found |= {(best & mask, x, best >> 40) for x, best in zip(j.tolist(), best_b[j].tolist())}
    return sorted(found)


def _search(a: _Looks, b: _Looks, limit: int) -> Iterator[tuple[Array, Array, Array]]:
    """Numbers and distances of all pairs within `limit` bits, also mirrored; a pair may come again.

    Of 16 bands, one differs in at most `limit // 16` bits, which are 0 or 1: so those that share a
    band, or all but one bit of it, are the candidates.
    """
    few, many, turned = (a, b, False) if len(a.numbers) <= len(b.numbers) else (b, a, True)
    if not len(few.numbers):
        return
    flips = [0] if limit < 16 else [0, *(1 << bit for bit in range(16))]
    sides = (few, few.mirrored())
    for band in range(16):
        order = np.argsort(many.bands[:, band], kind="stable")
        starts = np.zeros(65537, np.int64)
        np.cumsum(np.bincount(many.bands[:, band], minlength=65536), out=starts[1:])
        words = many.words[order].T.copy()
        for side in sides:
            asked = np.argsort(side.bands[:, band], kind="stable")
            keys = side.bands[asked, band]
            for flip in flips:
                for q, r, distance in _compare(
                    side.words[asked].T, keys ^ flip, starts, words, limit
                ):
                    x, y = few.numbers[asked[q]], many.numbers[order[r]]
                    yield (y, x, distance) if turned else (x, y, distance)


def _compare(
    asked: Array, keys: Array, starts: Array, words: Array, limit: int
) -> Iterator[tuple[Array, Array, Array]]:
    """Places and distances of the near ones among all that have the same key, a part at a time."""
    counts = starts[keys + np.int64(1)] - starts[keys]
    ends = np.cumsum(counts)
    first = 0
    while first < len(keys):
        done = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, done + _CHUNK, side="right")), first + 1)
        part = counts[first:last]
        q = np.repeat(np.arange(first, last), part)
        r = np.arange(len(q)) + np.repeat(
            starts[keys[first:last]] - (ends[first:last] - part), part
        )
        r += done
        distance = np.zeros(len(q), np.uint8)
        for word in range(4):
            distance = distance + np.bitwise_count(asked[word, q] ^ words[word, r])
            kept = distance <= limit
            q, r, distance = q[kept], r[kept], distance[kept]
        if len(q):
            yield q, r, distance
        first = last
