"""Which classes the pixels of masks are.

In: all masks of a source, and what the user says about their values. Out: `MaskClasses`, which maps
the pixels of a mask to class indices. Must not know where the files are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from models.core.errors import TesseraError, UsageError
from pipelines.data.annotations import IGNORED
from pipelines.data.importers.support.mask_files import Array, MaskPixels
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import AmbiguousError, Reading

Palette = Literal["index", "colour"]
MAX_COLOURS = 64
"""Most colours without names: more come from blending or from JPEG."""
IGNORED_NAME = "ignored"
LOWEST_LEVEL = 32
"""Grey values that are all at least this, but for 0, are levels of grey and no class numbers."""
MAX_LEVELS = 16
SOFT_VALUES = 8
"""A soft edge has at least this many different values between its two sides."""
SOFT_SHARE = 0.75
"""Least share of the pixels that are 0 or 255 where masks only have soft edges."""
_LOOKED_AT = 12
"""Masks whose objects are counted, to tell numbers of objects from numbers of classes."""
_COLOUR = re.compile(r"\s*([^=,]+?)\s*=\s*#?([0-9a-fA-F]{6})\s*")
_VALUE = re.compile(r"\s*([^=,]+?)\s*=\s*([0-9]{1,9})\s*")


@dataclass(frozen=True)
class MaskClasses:
    """The classes of a data set's masks.

    colours    whether the masks have colours rather than values
    values     value or colour of each class, in the order of the classes; None if values are
               classes
    ignored    values or colours without a class
    note       a line for the user
    palette    the palette that all files must have, whose entries are the values; None where
               palettes are resolved to colours
    threshold  brightness from which on a pixel is of class 1; None for exact values
    """

    classes: tuple[str, ...]
    colours: bool
    values: tuple[int, ...] | None
    ignored: tuple[int, ...]
    note: str
    palette: tuple[int, ...] | None = None
    threshold: int | None = None

    def apply(self, raw: MaskPixels, where: str) -> Array:
        """uint8 (H, W) of class indices and `IGNORED`. Raises SampleError."""
        shown = raw.resolved()
        if self.palette is None:
            raw = shown
        elif raw.palette is not None and not _is_same(raw.palette, self.palette):
            raise SampleError("another palette", f"{where} has another palette than other masks")
        pixels = raw.pixels.astype(np.int64)
        if self.colours and not raw.colours:
            pixels = pixels * 0x010101
        elif raw.colours and not self.colours:
            raise SampleError("unknown class", f"{where} has colours, while others have values")
        values = range(len(self.classes)) if self.values is None else self.values
        known = np.array([*values, *self.ignored], np.int64)
        classes = np.array([*range(len(values)), *([IGNORED] * len(self.ignored))], np.uint8)
        order = np.argsort(known)
        at = np.searchsorted(known[order], pixels).clip(max=len(known) - 1)
        found = order[at]
        strange = pixels != known[found]
        if strange.any():
            value = int(pixels[strange][0])
            name = f"#{value:06x}" if self.colours else str(value)
            if shown.colours and not self.colours:
                name += f" (#{int(shown.pixels[strange][0]):06x})"
            raise SampleError(
                "unknown class", f"{where} has the value {name}, which is not a class"
            )
        return np.asarray(classes[found])


def infer_classes(
    masks: Iterable[tuple[str, MaskPixels]],
    names: Sequence[str] = (),
    *,
    values: str = "",
    palette: Palette | None = None,
) -> MaskClasses:
    """Infers the classes from all masks. `names` are the classes, `values` are NAME=VALUE,…, and
    `palette` says how masks with a palette are read, if the user gives them."""
    seen = _Seen(check_objects=not names and not values)
    for where, raw in masks:
        seen.add(raw, where)
    if not seen.masks:
        raise TesseraError("no mask of the source can be read")
    by_index = seen.by_index(palette)
    found = seen.colours(by_index)
    if found is not None:
        if values:
            raise UsageError("the masks have colours", hint="name them by --option colours=…")
        return _of_colours(sorted(found), names)
    grey = seen.values(by_index)
    if values:
        return _of_named_values(grey, values, by_index)
    if not by_index:
        seen.check_soft_edges()
    seen.check_objects(by_index)
    if not names:
        seen.check_two_scales(grey)
    return _of_values(grey, names, by_index)


class _Seen:
    """The values and colours of all masks.

    A palette is resolved to colours, unless all files have the same: it says which number an entry
    has in one file, and another palette may say something else.
    """

    def __init__(self, *, check_objects: bool) -> None:
        self.masks = 0
        self._check = check_objects
        self._indexes: set[int] = set()
        self._resolved: set[int] = set()  # colours of the palettes' entries that are used
        self._grey: set[int] = set()
        self._colours: set[int] = set()
        self._palette: tuple[int, ...] = ()
        self._differ = ""
        self._counts = np.zeros(256, np.int64)
        self._looked_at: list[Array] = []
        self._of_ones, self._of_255 = "", ""  # files with 1 or 255, and no other value but 0
        self._has_both = False

    def add(self, raw: MaskPixels, where: str) -> None:
        self.masks += 1
        found = np.unique(raw.pixels).tolist()
        if raw.palette is not None:
            self._indexes.update(found)
            shown = raw.resolved()
            used = np.unique(shown.pixels)
            self._resolved.update(
                (used.astype(np.int64) * (1 if shown.colours else 65793)).tolist()
            )
            if self._palette and not _is_same(raw.palette, self._palette):
                self._differ = where
            self._palette = max(self._palette, raw.palette, key=len)
        elif raw.colours:
            self._colours.update(found)
        else:
            self._grey.update(found)
            self._of_ones = where if found[-1] == 1 else self._of_ones
            self._of_255 = where if found in ([0, IGNORED], [IGNORED]) else self._of_255
            self._has_both |= IGNORED in found and 1 in found
            if raw.pixels.dtype == np.uint8:
                self._counts += np.bincount(raw.pixels.ravel(), minlength=256)
        if self._check and not raw.colours and len(self._looked_at) < _LOOKED_AT:
            self._looked_at.append(raw.pixels)
        count = len(self._colours) or max(len(self._grey), len(self._indexes))
        if count > (MAX_COLOURS if self._colours else IGNORED + 1):
            raise TesseraError(
                f"the masks up to {where} have {count} values: too many for classes",
                hint="numbers of objects: --format instance_masks; blended or depth images are not "
                "masks; name colours with --option colours=…",
            )

    def by_index(self, wanted: Palette | None) -> tuple[int, ...] | None:
        """The palette whose entries are the values; None if palettes are resolved."""
        if not self._palette or wanted == "colour":
            return None
        if self._differ:
            if wanted == "index":
                raise UsageError(
                    f"the masks have different palettes: that of {self._differ} differs",
                    hint="an entry means another colour in each file: leave palette=index out",
                )
            return None
        if wanted is None and self._colours:
            return None
        if wanted is None and self._grey and not all(map(_is_grey, self._resolved)):
            raise AmbiguousError(
                "some masks have a palette of colours, and some grey values",
                readings=[
                    Reading("masks", {"palette": "index"}, "the palette's entries are the classes"),
                    Reading(
                        "masks", {"palette": "colour"}, "the palette's colours are the classes"
                    ),
                ],
            )
        return self._palette

    def colours(self, by_index: tuple[int, ...] | None) -> set[int] | None:
        """All colours, if any isn't grey."""
        found = self._colours | (set() if by_index else self._resolved)
        if by_index and self._colours:
            raise UsageError(
                "some masks have a palette, and some colours", hint="leave palette=index out"
            )
        if all(map(_is_grey, found)):
            return None
        return found | {value * 0x010101 for value in self._grey}

    def values(self, by_index: tuple[int, ...] | None) -> set[int]:
        inner = self._indexes if by_index else {colour & 255 for colour in self._resolved}
        return self._grey | inner

    def check_soft_edges(self) -> None:
        """Raises UsageError for masks of 0 and 255 with values between, as blurring, resizing and
        JPEG make them."""
        between = int((self._counts[LOWEST_LEVEL:255] > 0).sum())
        share = int(self._counts[[0, 255]].sum()) / max(int(self._counts.sum()), 1)
        if min(self._counts[[0, 255]]) and between >= SOFT_VALUES and share >= SOFT_SHARE:
            named = {"values": "NAME=0,NAME=1,NAME=255"}
            raise AmbiguousError(
                f"the masks have soft edges: {100 * share:.1f} % of their pixels are 0 or 255, the "
                f"others have {between} values between",
                readings=[
                    Reading("masks", {"threshold": "128"}, "two classes, darker and brighter"),
                    Reading("masks", named, "each value is a class, with the name that you give"),
                ],
            )

    def check_objects(self, by_index: tuple[int, ...] | None) -> None:
        """Raises UsageError for masks whose values seem to be numbers of objects."""
        if (by_index or not self._palette) and _number_objects(self._looked_at):
            most = max(int(pixels.max()) for pixels in self._looked_at)
            names = ",".join(map(str, range(most + 1)))
            raise AmbiguousError(
                f"the values of the masks could be the numbers of objects: 1 to {most} in one "
                "mask, fewer in others, each value in one piece",
                readings=[
                    Reading("instance_masks", {}, "each value is an object of one class"),
                    Reading("masks", {"classes": names}, "each value is a class; name them"),
                ],
            )

    def check_two_scales(self, values: set[int]) -> None:
        """Raises UsageError where some masks have 0 and 1 and others 0 and 255, as two programs
        write the same: by the rule for class numbers 255 would be ignored."""
        if values == {0, 1, IGNORED} and self._of_ones and self._of_255 and not self._has_both:
            named = {"classes": "background,foreground"}
            raise AmbiguousError(
                f"some masks have the values 0 and 1, as {self._of_ones}, and some 0 and 255, as "
                f"{self._of_255}",
                readings=[
                    Reading("masks", {"threshold": "1"}, "1 and 255 are both the foreground"),
                    Reading("masks", named, "1 is the foreground, 255 is ignored"),
                ],
            )


def _is_same(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two palettes agree: programs leave out the last entries if no pixel has them."""
    length = min(len(one), len(other))
    return tuple(one[:length]) == tuple(other[:length])


def _is_grey(colour: int) -> bool:
    return colour == (colour & 255) * 0x010101


def _number_objects(masks: Sequence[Array]) -> bool:
    """Whether each mask has the values 1 to n, each in one piece, and n varies."""
    numbers = [[value for value in np.unique(pixels).tolist() if value] for pixels in masks]
    counts = Counter(map(len, numbers))
    if len(counts) < 2 or sum(counts[n] for n in counts if n >= 3) * 2 < len(masks):
        return False
    if any(found != list(range(1, len(found) + 1)) for found in numbers):
        return False
    from scipy import ndimage

    eight = np.ones((3, 3))
    return all(
        ndimage.label(pixels == value, eight)[1] == 1
        for pixels, found in zip(masks, numbers)
        for value in found
    )


def _of_colours(values: Sequence[int], names: Sequence[str]) -> MaskClasses:
    classes = tuple(names) or tuple(f"#{value:06x}" for value in values)
    if len(classes) != len(values):
        raise UsageError(
            f"the masks have {len(values)} colours, but {len(classes)} classes are named",
            hint="give each colour a name: --option colours=road=#804080,sky=#4682b4",
        )
    note = f"the {len(values)} colours of the masks are the classes, sorted by red, green and blue"
    return MaskClasses(classes, True, tuple(values), (), note)


def _of_values(
    values: set[int], names: Sequence[str], palette: tuple[int, ...] | None
) -> MaskClasses:
    if values <= {0, IGNORED} and len(names) in (0, 2):
        classes = tuple(names) or ("background", "foreground")
        note = f"masks of 0 and 255: 0 is {classes[0]}, 255 is {classes[1]}"
        return MaskClasses(classes, False, (0, IGNORED), (), note, palette)
    if palette is None and _are_levels(values) and len(names) in (0, len(values)):
        levels = sorted(values)
        classes = tuple(names) or tuple(map(str, levels))
        listed = ", ".join(map(str, levels))
        example = ",".join(f"NAME={level}" for level in levels)
        note = f"the grey values {listed} of the masks are the classes, none is ignored"
        if not names:
            note += f"; name them, or leave one out as {IGNORED_NAME}: --option values={example}"
        return MaskClasses(classes, False, tuple(levels), (), note)
    most = max(values - {IGNORED}, default=0)
    if most >= IGNORED:
        raise TesseraError(
            f"the masks have values up to {most}; a class is a value from 0 to {IGNORED - 1}",
            hint="masks with numbers of objects have no classes: --format instance_masks",
        )
    classes = tuple(names) or tuple(str(value) for value in range(most + 1))
    if most >= len(classes):
        raise UsageError(
            f"the masks have the value {most}, but {len(classes)} classes are named",
            hint="name all of them, with commas, from the value 0 on",
        )
    ignored = ""
    if IGNORED in values:
        ignored = (
            f" and 255 is ignored, as in class numbers (a class: --option values=…,NAME={255})"
        )
    what = "entries of the palette" if palette else "values"
    note = f"the {what} of the masks are the classes, 0 to {len(classes) - 1}{ignored}"
    return MaskClasses(classes, False, None, (IGNORED,), note, palette)


def _are_levels(values: set[int]) -> bool:
    """Whether grey values, such as 0, 128 and 255, are far apart, unlike numbers of classes."""
    above = values - {0}
    return 1 < len(values) <= MAX_LEVELS and min(above) >= LOWEST_LEVEL and max(above) <= IGNORED


def _of_named_values(found: set[int], text: str, palette: tuple[int, ...] | None) -> MaskClasses:
    kept, ignored = _parse_pairs("values", text, _VALUE, "cup=0,disc=128,ignored=255", 10)
    missing = sorted(found - {value for _, value in kept} - set(ignored))
    if missing:
        raise UsageError(
            f"the masks have the value {missing[0]}, which --option values doesn't name",
            hint=f"add NAME={missing[0]}, or {IGNORED_NAME}={missing[0]}",
        )
    return MaskClasses(
        tuple(name for name, _ in kept),
        False,
        tuple(value for _, value in kept),
        ignored,
        f"{len(kept)} values are classes, from --option values",
        palette,
    )


def parse_colours(text: str) -> MaskClasses:
    """NAME=#rrggbb,NAME=#rrggbb: the classes in this order. Raises UsageError."""
    kept, ignored = _parse_pairs("colours", text, _COLOUR, "road=#804080,sky=#4682b4", 16)
    return of_named_colours(kept, ignored, "--option colours")


def of_named_colours(
    kept: Sequence[tuple[str, int]], ignored: tuple[int, ...], where: str
) -> MaskClasses:
    """The classes that `where` names, as (name, 0xrrggbb)."""
    return MaskClasses(
        tuple(name for name, _ in kept),
        True,
        tuple(value for _, value in kept),
        ignored,
        f"{len(kept)} colours are classes, from {where}",
    )


def of_threshold(threshold: int, names: Sequence[str]) -> MaskClasses:
    """Two classes: pixels darker than the threshold, and the others. Raises UsageError."""
    if len(names) not in (0, 2):
        raise UsageError(f"a threshold makes 2 classes, {len(names)} are named", hint="name two")
    classes = tuple(names) or ("background", "foreground")
    note = f"pixels of brightness {threshold} and more are {classes[1]}, others {classes[0]}"
    return MaskClasses(classes, False, (0, IGNORED), (), note, threshold=threshold)


def _parse_pairs(
    option: str, text: str, pattern: re.Pattern[str], example: str, base: int
) -> tuple[list[tuple[str, int]], tuple[int, ...]]:
    """((name, value) of each class, values without a class) of NAME=VALUE,…"""
    pairs = []
    for part in text.split(","):
        match = pattern.fullmatch(part)
        if not match:
            raise UsageError(f"the option {option} can't be {part!r}", hint=f"give {example}")
        pairs.append((match[1], int(match[2], base)))
    kept = [(name, value) for name, value in pairs if name != IGNORED_NAME]
    if len({name for name, _ in kept}) != len(kept) or len({v for _, v in pairs}) != len(pairs):
        raise UsageError(f"the option {option} {text!r} has a duplicate name or {option[:-1]}")
    if not 0 < len(kept) < IGNORED:
        raise UsageError(f"the option {option} names {len(kept)} classes", hint="name 1 to 254")
    return kept, tuple(value for name, value in pairs if name == IGNORED_NAME)
