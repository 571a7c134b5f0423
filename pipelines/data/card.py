"""The card of a packed data set. `card.json` is written last: a folder that has one is complete.

In: `card.json`. Out: `Card`. Must not know how shards are read or written.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from models.core.errors import TesseraError, value_problem
from models.core.family import DataSpec
from pipelines.data.image_reading import MAX_PIXELS, MOST_PIXELS, ImageReading
from pipelines.storage.base import Storage
from pipelines.storage.open import open_storage

FILE = "card.json"
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
"""Extensions of images in a shard."""
ANNOTATION_EXTENSIONS = {
    "classification": "cls",
    "detection": "json",
    "instance_segmentation": "json",
    "semantic_segmentation": "mask.png",
    "images": "",
}
"""Tasks of data sets, and the extension of an image's annotation: the class index in ASCII digits,
objects as JSON, classes of pixels as a grey PNG, none."""
EXTENSIONS = frozenset({*IMAGE_EXTENSIONS, *ANNOTATION_EXTENSIONS.values()} - {""})
"""All extensions in a shard. A sample consists of consecutive members KEY.EXTENSION."""
MAX_KEY_LENGTH = 92
"""With a dot and an extension, a key of this many characters fits the 100 bytes of a tar name."""
MAX_SHARD_SAMPLES = 4_000_000
"""All rows of a shard are in memory at the same time."""
_KEY = re.compile(r"[A-Za-z0-9_~%-]+(/[A-Za-z0-9_~%-]+)*")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Side = Annotated[int, Field(ge=1, le=MOST_PIXELS)]


class Shard(_Frozen):
    """One tar file. `path` is relative to the card's folder, or to the card's `root`. `rows_sha256`
    is the checksum of the shard's rows in the index."""

    path: str
    samples: Annotated[int, Field(ge=0, le=MAX_SHARD_SAMPLES)]
    size_bytes: Count
    sha256: str
    rows_sha256: str


class SplitCard(_Frozen):
    """One split. `index` is the path of its sample index, relative to the card's folder.
    `class_counts` counts the images, objects or pixels of each class, whichever have classes."""

    samples: Count
    shards: tuple[Shard, ...]
    index: str
    index_bytes: Count
    index_sha256: str
    class_counts: dict[str, Count] = {}


class ImageCard(_Frozen):
    """Properties of the images. Sizes are in pixels; mean and std of each channel are those of
    train pixels, scaled to 0..1.

    `range` and `max_pixels` are the options that the image files were read with; None for the rules
    that hold without one.
    """

    channels: Literal[1, 3]
    min_height: Side
    max_height: Side
    min_width: Side
    max_width: Side
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(ge=0)], ...]
    range: tuple[float, float] | None = None
    max_pixels: Annotated[int, Field(ge=1, le=MOST_PIXELS)] | None = None

    @model_serializer(mode="wrap")
    def _omit_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The fields; options only if they were given, so that other digests don't change."""
        fields: dict[str, Any] = handler(self)
        for name in ("range", "max_pixels"):
            if fields.get(name) is None:
                fields.pop(name, None)
        return fields

    def read_with(self, reading: ImageReading) -> ImageCard:
        """The card of images whose files were read so."""
        raised = reading.max_pixels if reading.max_pixels != MAX_PIXELS else None
        return self.model_copy(update={"range": reading.range, "max_pixels": raised})

    @property
    def reading(self) -> ImageReading:
        """How further files of such images are read."""
        return ImageReading(self.range, max_pixels=self.max_pixels or MAX_PIXELS)


LEAKAGE_LIMIT = 0.02
"""The share of a split's images that may be near duplicates of training images: small simple
images, like digits, can look alike without being the same."""


class NearDuplicates(_Frozen):
    """Near duplicates in different splits, listed in `near_duplicates.jsonl`: `near` pairs of
    `images` images. Images with identical pixels are rejected during packing and don't count."""

    near: Count = 0
    images: Count = 0


class AppliedCorrections(_Frozen):
    """Corrections that `tessera fix` has made: `data_digest` is that of the data set before,
    `file_sha256` the checksum of the corrections file. `relabelled` and `dropped` count images."""

    data_digest: str
    file_sha256: str
    relabelled: Count = 0
    dropped: Count = 0


class Card(_Frozen):
    """The description of a packed data set. `digest` (64 hex digits) covers all other fields.

    `root` is the folder or address of shards that were indexed in place; empty if the shards are
    beside the card. `classes` is empty for the task `images`. `corrections` are those made since
    `source` was packed, the first first.
    """

    version: Literal[2] = 2
    name: str
    task: str
    classes: tuple[str, ...]
    image: ImageCard
    splits: dict[Split, SplitCard]
    source: str = ""
    licence: str = ""
    root: str = ""
    rejected: Count = 0
    leakage: NearDuplicates = NearDuplicates()
    corrections: tuple[AppliedCorrections, ...] = ()
    digest: str = ""

    @model_serializer(mode="wrap")
    def _omit_no_corrections(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The fields; `corrections` only if there are any, so that other digests don't change."""
        fields: dict[str, Any] = handler(self)
        if not self.corrections:
            fields.pop("corrections", None)
        return fields

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        """Checks what no later code checks, where it would cause confusing errors."""
        if self.task not in ANNOTATION_EXTENSIONS:
            raise ValueError(
                f"{self.task!r} is not a valid task: use one of {', '.join(ANNOTATION_EXTENSIONS)}"
            )
        channels = self.image.channels
        if not len(self.image.mean) == len(self.image.std) == channels:
            raise ValueError(f"mean and std must have {channels} values")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have the same name")
        if "" in self.classes:
            raise ValueError("a class has no name")
        for name, split in self.splits.items():
            if split.class_counts.keys() - set(self.classes):
                raise ValueError(f"{name} counts classes that the card does not have")
        return self

    def sealed(self) -> Card:
        """Returns a copy with its digest set."""
        return self.model_copy(update={"digest": self.content_digest()})

    def content_digest(self) -> str:
        """Returns the sha256, 64 hex digits, of all fields but `digest`."""
        content = self.model_dump(mode="json", exclude={"digest"})
        encoded = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(encoded.encode()).hexdigest()

    def can_be_read_as(self, task: str) -> bool:
        """Whether the data set can be used for data of another task: instances have boxes, too, and
        every sample has an image."""
        readable = {self.task, "images"}
        if self.task == "instance_segmentation":
            readable.add("detection")
        return task in readable

    def spec(
        self, height: int | None = None, width: int | None = None, *, reads: str | None = None
    ) -> DataSpec:
        """The data as the network sees it.

        Images have `height` by `width` pixels, by default the largest of the data set. `reads` is
        the task whose annotations are read, by default the data set's own. A std of 0, of constant
        pixels, becomes 1, because pixels are divided by it. Raises TesseraError if the data can't
        be read for that task, or the size exceeds the most pixels of an image.
        """
        task = self.task if reads is None else reads
        if not self.can_be_read_as(task):
            raise TesseraError(f"data of {self.task} can't be read as {task}")
        height, width = height or self.image.max_height, width or self.image.max_width
        if height * width > self.image.reading.max_pixels:
            raise TesseraError(
                f"images of {width} by {height} pixels are too large",
                hint="set the size that the network sees: data.height and data.width",
            )
        return DataSpec(
            task=task,
            channels=self.image.channels,
            height=height,
            width=width,
            classes=() if task == "images" else self.classes,
            mean=self.image.mean,
            std=tuple(value or 1.0 for value in self.image.std),
            counts=() if task == "images" else self._counts(),
        )

    def _counts(self) -> tuple[int, ...]:
        """Counts of each class in the train split; empty without one."""
        train = self.splits.get("train")
        return tuple(train.class_counts.get(name, 0) for name in self.classes) if train else ()

    def split(self, name: str) -> SplitCard:
        """Returns a split. Raises TesseraError if there is none of that name, or it is empty."""
        for known, split in self.splits.items():
            if known == name and split.samples:
                return split
        raise TesseraError(
            f"data set {self.name!r} has no {name!r} split",
            hint=f"it has: {', '.join(self.splits)}",
        )

    def to_json(self) -> str:
        """Returns the content of `card.json`."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"


def check_key(key: str, where: str) -> None:
    """Raises TesseraError for a key that leads to another path, or that WebDataset would parse
    differently."""
    if not _KEY.fullmatch(key) or len(key) > MAX_KEY_LENGTH:
        raise TesseraError(
            f"{where}: the key {key[:120]!r} is not allowed",
            hint=f"a key has at most {MAX_KEY_LENGTH} characters, of A-Z a-z 0-9 _ - ~ % /",
        )


def parse(text: str | bytes, where: str) -> Card:
    """Parses a card. `where` names it in errors. Raises TesseraError if it is invalid, empty, or
    its digest doesn't match its content."""
    try:
        card = Card.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) + ": " if first["loc"] else ""
        problem = value_problem(first["msg"])
        raise TesseraError(f"{where} is not a valid card: {field}{problem}") from None
    if card.digest != card.content_digest():
        raise TesseraError(
            f"{where} was changed after packing: its digest does not match its content",
            hint="pack the data set again",
        )
    if not any(split.samples for split in card.splits.values()):
        raise TesseraError(f"{where} describes a data set without samples")
    return card


def read(where: str | Path) -> Card:
    """Reads the card of a packed data set in a folder or at an address. Raises TesseraError if
    there is none, or it is invalid."""
    storage = open_storage(where)
    if storage.size(FILE) is None:
        raise TesseraError(
            f"{where} is not a packed data set: it has no {FILE}", hint=_hint(storage)
        )
    return parse(storage.read(FILE), f"{storage.where}/{FILE}")


def _hint(storage: Storage) -> str:
    """What to do about a folder or an address without a card."""
    folder = Path(storage.where)
    if storage.remote or not folder.is_dir() or not any(folder.iterdir()):
        interrupted = not storage.remote and (folder.parent / f".{folder.name}.packing").is_dir()
        if interrupted:
            return "its pack was interrupted: run the same tessera pack command again to resume it"
        return f"pack one: tessera pack SOURCE --to {shlex.quote(storage.where)}"
    where = shlex.quote(storage.where)
    return f"if it is a source, run tessera pack {where} --to DIR, and use DIR"
