"""Finds images that are in two splits, even re-encoded, resized, mirrored or brightened.

In: upright images, later all their fingerprints. Out: pairs of samples of different splits. Must
not know where images are stored or what is done about a pair.

A fingerprint is a digest of the pixels and a perceptual hash of 255 bits: the signs of the 16 by 16
lowest frequencies of the image's grey thumbnail (C. Zauner, "Implementation and Benchmarking of
Perceptual Image Hash Functions", 2010). Mirroring an image flips the signs of the odd horizontal
frequencies, so a mirrored copy is found without a second fingerprint. Everything is computed with
integers: an image has the same fingerprint on every machine.

What the limits achieve, asserted by `tests/pipelines/data/test_duplicates.py`: of photos, every
copy is found that was re-encoded (JPEG quality 30 and more), resized (by 0.5 to 2), mirrored or
brightened, and 98 % of those cropped by 2 % at each side, but none cropped by 5 %. Of images of 32
by 32 pixels, 94 % are found at quality 30 and nearly all at 50, but none cropped by a pixel at each
side. CIFAR-10 has 73 pairs between train and test, and each shows the same scene; in MNIST 12 of
600 million pairs are false.

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
"""Images are near duplicates if at most so many of the 255 bits differ."""
FLAT_LIMIT = 15
"""The same, if one of the two is flat: strokes on an empty background look alike too easily."""
FLAT_SHARE = 0.6
"""An image is flat if this share of its thumbnail is within `FLAT_LEVELS` adjacent grey levels."""
FLAT_LEVELS = 9
BLANK_LEVELS = 4
"""An image is blank, and has no near duplicates, if its thumbnail spans fewer grey levels."""
_DIGEST = 16
_SIDE, _KEPT = 32, 16
ENOUGH = 64
"""Images with so many near duplicates are no longer compared with each other."""
_CHUNK = 1 << 20
_SHIFT = 40
_NONE = np.iinfo(np.int64).max
Array = np.ndarray[Any, Any]
Position = tuple[str, int]
"""A split, and the number of a sample in it."""


class Pair(NamedTuple):
    """Two samples that look the same; the split of `left` comes first. `kind` is "exact" for the
    same pixels, else "near"; `distance` is in bits."""

    left: Position
    right: Position
    kind: Literal["exact", "near"]
    distance: int


def find_copies(fingerprints: Array) -> list[list[int]]:
    """Groups of images with the same pixels, each group and all groups in order.

    Args:
        fingerprints: uint8 (N, `SIZE`).
    """
    digests = np.ascontiguousarray(fingerprints[:, :_DIGEST]).view(f"V{_DIGEST}").ravel()
    order = np.argsort(digests, kind="stable")
    differs = digests[order][1:] != digests[order][:-1]
    groups = np.split(order, np.flatnonzero(differs) + 1)
    return sorted(group.tolist() for group in groups if len(group) > 1)


def find_groups(fingerprints: Array, *, near: bool) -> list[list[int]]:
    """Groups of images that belong together: each image has the same pixels as another one of its
    group, or, with `near`, a near duplicate in it. Each group and all groups are in order.

    Of images with more than `ENOUGH` near duplicates not all are compared with each other.

    Args:
        fingerprints: uint8 (N, `SIZE`).
    """
    groups = _Groups(np.ascontiguousarray(fingerprints, np.uint8))
    for copies in find_copies(fingerprints):
        groups.update(np.array(copies[1:]), np.array(copies[:-1]), np.zeros(len(copies) - 1, int))
    if near:
        _search_all(groups, groups)
    return groups.found()


def fingerprint(image: Image.Image) -> bytes:
    """`SIZE` bytes for an upright image of mode L or RGB.

    16 bytes are of the sha256 of mode, size and pixels. 32 bytes are the signs; the bit of the
    constant term, which has no sign, tells whether the image is flat. A blank image has zeros.
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


def find_pairs(
    prints: Mapping[str, Array], kinds: Collection[str] = ("exact", "near")
) -> list[Pair]:
    """Pairs of these kinds between different splits, from uint8 (N, `SIZE`) of each split.

    Each image with the same pixels as one of another split is in a pair, and each with a near
    duplicate in another split is in a pair with the nearest one. So there are at most twice as many
    pairs as images, however many are alike. Of images of one split with the same pixels only the
    first is compared for near duplicates. No image that has a near duplicate is missed; if it has
    more than `ENOUGH`, the one reswapped may not be the nearest. A million images against a tenth
    of them take 40 s on one core.
    """
    order: dict[str, int] = {split: index for index, split in enumerate(SPLITS)}
    names = sorted((name for name in prints if len(prints[name])), key=lambda n: order[n])
    pairs: list[Pair] = []
    for left, right in combinations(names, 2):
        a, b = (np.ascontiguousarray(prints[name], np.uint8) for name in (left, right))
        if "exact" in kinds:
            pairs += [Pair((left, i), (right, j), "exact", 0) for i, j in _same(a, b)]
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
    """uint8 (32,): the bits that mirroring flips."""
    return np.packbits(_order() % _KEPT % 2 == 1)


def _digests(prints: Array) -> Array:
    # NumPy ignores zeros at the end of a string. All have the same length, so none become equal.
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


class _Nearest:
    """For each image of a split, the nearest image of the other split so far."""

    def __init__(self, prints: Array) -> None:
        self.digests = _digests(prints)
        self.nearest = np.full(len(prints), _NONE)
        """Distance and the other's number in one integer, so that the smallest is the nearest."""
        self.hits = np.zeros(len(prints), np.int32)
        first = np.unique(self.digests, return_index=True)[1]
        bits = prints[:, _DIGEST:]
        first = np.sort(first[bits[first].any(axis=1)])
        bits = bits[first]
        flat = bits[:, 0] >> 7 == 1
        bits[:, 0] &= 0x7F
        self.rich, self.flat = _Hashes(bits[~flat], first[~flat]), _Hashes(bits[flat], first[flat])

    def update(self, numbers: Array, others: Array, distance: Array) -> None:
        np.minimum.at(self.nearest, numbers, distance << _SHIFT | others)
        np.add.at(self.hits, numbers, 1)

    def settled(self, numbers: Array) -> Array:
        """Which of the images have enough near duplicates already."""
        return np.asarray(self.hits[numbers] >= ENOUGH)


class _Groups(_Nearest):
    """The images of one set, and which of them belong together."""

    def __init__(self, prints: Array) -> None:
        super().__init__(prints)
        self._root = np.arange(len(prints))
        """A member of each image's group; that of the whole group points to itself."""

    def update(self, numbers: Array, others: Array, distance: Array) -> None:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        np.add.at(self.hits, numbers, 1)
        one, other = self._find(numbers), self._find(others)
        new = one != other
        if not new.any():
            return
        roots, at = np.unique(np.concatenate([one[new], other[new]]), return_inverse=True)
        edges = (np.ones(len(at) // 2, bool), np.split(at, 2))
        graph = coo_array(edges, shape=(len(roots), len(roots)))
        _, component = connected_components(graph, directed=False)
        first = np.full(len(roots), _NONE)
        np.minimum.at(first, component, roots)
        self._root[roots] = first[component]

    def found(self) -> list[list[int]]:
        roots = self._find(np.arange(len(self._root)))
        order = np.argsort(roots, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(roots[order])) + 1)
        return sorted(group.tolist() for group in groups if len(group) > 1)

    def _find(self, numbers: Array) -> Array:
        """The member that stands for the group of each image."""
        roots = self._root[numbers]
        while (self._root[roots] != roots).any():
            roots = self._root[roots]
        return np.asarray(roots)


class _Hashes:
    """The hashes of some images, without the flag, and the images' numbers in their split."""

    def __init__(self, bits: Array, numbers: Array) -> None:
        self.numbers = numbers
        self.bands = np.ascontiguousarray(bits).view(np.uint16)
        self.words = np.ascontiguousarray(bits).view(np.uint64)

    def mirrored(self) -> _Hashes:
        return _Hashes(self.words.view(np.uint8) ^ _mirror(), self.numbers)


class _BandTable:
    """Some of the images, sorted by one band of 16 bits of their hashes."""

    def __init__(self, hashes: _Hashes, band: int, chosen: Array) -> None:
        chosen = np.flatnonzero(chosen)
        chosen = chosen[np.argsort(hashes.bands[chosen, band], kind="stable")]
        self.numbers = hashes.numbers[chosen]
        self.keys = hashes.bands[chosen, band]
        self.words = hashes.words[chosen].T.copy()
        self.starts = np.zeros(65537, np.int64)
        np.cumsum(np.bincount(self.keys, minlength=65536), out=self.starts[1:])


def _near(left: Array, right: Array) -> list[tuple[int, int, int]]:
    """(number in left, number in right, distance) of each image and its nearest near duplicate."""
    a, b = _Nearest(left), _Nearest(right)
    _search_all(a, b)
    found = set()
    for side, swapped in ((a, False), (b, True)):
        numbers = np.flatnonzero(side.nearest < _NONE)
        for number, best in zip(numbers.tolist(), side.nearest[numbers].tolist()):
            pair = (number, best & (1 << _SHIFT) - 1)
            found.add((*(reversed(pair) if swapped else pair), best >> _SHIFT))
    return sorted(found)


def _search_all(a: _Nearest, b: _Nearest) -> None:
    """Updates both sides with their near duplicates."""
    _search(a, a.rich, b, b.rich, LIMIT)
    for of_a, of_b in ((a.flat, b.flat), (a.flat, b.rich), (a.rich, b.flat)):
        _search(a, of_a, b, of_b, FLAT_LIMIT)


def _search(a: _Nearest, of_a: _Hashes, b: _Nearest, of_b: _Hashes, limit: int) -> None:
    """Updates both sides with the pairs within `limit` bits, mirrored ones included.

    If at most `limit` bits differ, then in one of the 16 bands at most `limit // 16` do, which is 0
    or 1. So the candidates are the pairs that share a band, or all but one bit of it.
    """
    if len(of_a.numbers) > len(of_b.numbers):
        a, of_a, b, of_b = b, of_b, a, of_a
    if not len(of_a.numbers):
        return
    flips = [0] if limit < 16 else [0, *(1 << bit for bit in range(16))]
    hashes = (of_a, of_a.mirrored())
    for band in range(16):
        whole = _BandTable(of_b, band, np.ones(len(of_b.numbers), bool))
        for hashed in hashes:
            busy = a.settled(hashed.numbers)
            searches = [(_BandTable(hashed, band, ~busy), whole)]
            if busy.any():
                rest = _BandTable(of_b, band, ~b.settled(of_b.numbers))
                searches.append((_BandTable(hashed, band, busy), rest))
            for queries, table in searches:
                for flip in flips:
                    for i, j, distance in _compare(queries, table, flip, limit):
                        other = a.digests[i] != b.digests[j]
                        i, j, distance = i[other], j[other], distance[other].astype(np.int64)
                        a.update(i, j, distance)
                        b.update(j, i, distance)


def _compare(
    queries: _BandTable, table: _BandTable, flip: int, limit: int
) -> Iterator[tuple[Array, Array, Array]]:
    """Numbers and distances of the near duplicates among the images whose bands differ by `flip`,
    in chunks that bound the memory."""
    keys = (queries.keys ^ flip).astype(np.int64)
    starts = table.starts[keys]
    counts = table.starts[keys + 1] - starts
    if not counts.any():  # nearly always in a small data set
        return
    ends = np.cumsum(counts)
    first = 0
    while first < len(keys):
        done = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, done + _CHUNK, side="right")), first + 1)
        part = slice(first, last)
        q = np.repeat(np.arange(first, last), counts[part])
        r = np.arange(len(q)) + np.repeat(starts[part] - ends[part] + counts[part], counts[part])
        r += done
        distance = np.zeros(len(q), np.uint8)
        for word in range(4):
            distance = distance + np.bitwise_count(queries.words[word, q] ^ table.words[word, r])
            kept = distance <= limit
            q, r, distance = q[kept], r[kept], distance[kept]
        if len(q):
            yield queries.numbers[q], table.numbers[r], distance
        first = last
