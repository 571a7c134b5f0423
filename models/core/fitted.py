"""Defaults that fit the data: what a family's settings should be for a data set's images.

In: the size, number and classes of the training images. Out: settings of the recipe, each with the
reason in words. Must not know files, nor any family. A family says which of these rules it follows
in `Family.fitted_defaults`.

The rules are for a training that begins with a family's name. What the user sets, or a recipe file,
is never changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PHOTO_SIDE = 96
"""Images whose shorter side has at least so many pixels are treated as photos."""
STEPS_AN_EPOCH = 20
"""The batch is halved until an epoch has at least so many steps."""
LEAST_BATCH = 8
MOST_EPOCHS = 100
_ONE_SIDED = re.compile(r"(^|[^a-z])(left|right)([^a-z]|$)|^.$|^[0-9]+$", re.IGNORECASE)
"""Names of classes that a mirror image doesn't belong to: letters, numbers, left and right."""


@dataclass(frozen=True)
class DataFacts:
    """The training images of a data set. Sides are in pixels: the shortest and the longest that
    occur. `classes` are the names."""

    samples: int
    channels: int
    heights: tuple[int, int]
    widths: tuple[int, int]
    classes: tuple[str, ...] = ()

    @property
    def shorter_side(self) -> int:
        """The shorter side of the largest image."""
        return min(self.heights[1], self.widths[1])

    @property
    def longer_side(self) -> int:
        """The longer side of the largest image."""
        return max(self.heights[1], self.widths[1])

    @property
    def are_photos(self) -> bool:
        return self.shorter_side >= PHOTO_SIDE

    @property
    def one_size(self) -> bool:
        """Whether all images have the same size."""
        return self.heights[0] == self.heights[1] and self.widths[0] == self.widths[1]


@dataclass(frozen=True)
class Fitted:
    """A setting of the recipe, by its dotted path, and why it has this value."""

    path: str
    value: Any
    reason: str


def length(
    facts: DataFacts, settings: Mapping[str, Any], kept: Container[str], *, steps: int
) -> Iterator[Fitted]:
    """Batch size, epochs, patience and learning rates. Epochs that are in `kept` are all trained.

    `steps` are those that a training needs: with fewer images it has more epochs than `settings`,
    at most `MOST_EPOCHS`. Unless its size is in `kept`, a batch is halved for few images, down to
    `LEAST_BATCH`, or to the number of workers if there are more. The learning rates of all parts
    follow it: those of SGD by the same factor, those of Adam by its square root.
    """
    images = f"{facts.samples:,} training images"
    usual: int = settings["train.batch_size"]
    workers = int(str(settings["workers.count"]).rpartition(":")[2])
    least = usual if "train.batch_size" in kept else max(LEAST_BATCH, workers)
    batch = usual
    while batch > least and facts.samples < batch * STEPS_AN_EPOCH:
        batch = max(batch // 2, least)
    an_epoch = -(-facts.samples // batch)
    yield Fitted("train.batch_size", batch, f"{images} make {an_epoch:,} steps an epoch")
    if "train.epochs" not in kept:
        epochs = min(MOST_EPOCHS, max(settings["train.epochs"], math.ceil(steps / an_epoch)))
        yield Fitted("train.epochs", epochs, f"{epochs * an_epoch:,} steps in all")
        reason = "stops after a third of the epochs without progress"
        yield Fitted("train.patience", max(5, epochs // 3), reason)
    share = batch / usual
    for path, rate in settings.items():
        if share < 1 and re.fullmatch(r"optim\.[^.]+\.lr", path):
            is_sgd = settings[f"{path.removesuffix('.lr')}.kind"] == "sgd"
            factor = share if is_sgd else math.sqrt(share)
            yield Fitted(path, _rounded(rate * factor), f"batches of {batch} instead of {usual}")


def square(facts: DataFacts, side: int) -> Iterator[Fitted]:
    """A square input of at most `side` pixels, for families that take images as a whole."""
    if facts.are_photos:
        fitting = min(side, facts.shorter_side // 32 * 32)
        yield from _size(fitting, fitting, f"the images have up to {_pixels(facts)}")
    elif not facts.one_size:
        shorter = facts.shorter_side
        yield from _size(shorter, shorter, f"the images have up to {_pixels(facts)}")


def frame(facts: DataFacts, longest: int) -> Iterator[Fitted]:
    """An input with the shape of the largest image and a longer side of at most `longest` pixels,
    in which images of other shapes are padded."""
    factor = longest / facts.longer_side
    if factor < 1:
        height, width = (
            max(32, round(side * factor / 32) * 32) for side in (facts.heights[1], facts.widths[1])
        )
        yield from _size(height, width, f"the images have up to {_pixels(facts)}")
    if not facts.one_size:
        yield Fitted("data.fit", "pad", "images of several sizes keep their proportions")


def flip(facts: DataFacts) -> Iterator[Fitted]:
    """Mirroring, unless a mirror image may be of another class."""
    if facts.are_photos or facts.channels == 3:
        if one := next(filter(_ONE_SIDED.search, facts.classes), None):
            reason = f"a mirror image of class {one} may be of another class"
        else:
            reason = "a mirror image is of the same class"
        yield Fitted("augment.flip", one is None, reason)


def light(facts: DataFacts, **settings: float) -> Iterator[Fitted]:
    """Random changes of light and colour for photos, as settings of `augment`."""
    if facts.are_photos:
        for name, value in settings.items():
            yield Fitted(f"augment.{name}", value, "photos are taken in different light")


def _size(height: int, width: int, reason: str) -> Iterator[Fitted]:
    yield Fitted("data.height", height, reason)
    yield Fitted("data.width", width, reason)


def _pixels(facts: DataFacts) -> str:
    return f"{facts.heights[1]}x{facts.widths[1]} pixels"


def _rounded(rate: float) -> float:
    """To two digits."""
    return float(f"{rate:.2g}")
