"""What a data set is. `card.json` is written last: a folder that has one is complete.

In: `card.json`. Out: `Card`. Must not know how shards are read or written.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.core.errors import TesseraError
from models.core.family import DataSpec
from pipelines.storage.base import Storage
from pipelines.storage.open import open_storage

FILE = "card.json"
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
"""Extensions of the image in a shard."""
ANNOTATION_EXTENSIONS = {
    "classification": "cls",
    "detection": "json",
    "instance_segmentation": "json",
    "semantic_segmentation": "mask.png",
    "images": "",
}
"""What a data set can be for, and the extension of what is said of an image: the class index in
ASCII digits, objects as JSON, classes of pixels as a grey PNG, nothing."""
EXTENSIONS = frozenset({*IMAGE_EXTENSIONS, *ANNOTATION_EXTENSIONS.values()} - {""})
"""All that may lie in a shard: a sample is the members KEY.EXTENSION that follow each other."""
MAX_KEY_LENGTH = 92
"""In characters. With dot and extension a key fits the 100 bytes of a tar name."""
MAX_SHARD_SAMPLES = 4_000_000
"""Rows of a shard come into memory together."""
MAX_PIXELS = 100_000_000
"""Of one image."""
_KEY = re.compile(r"[A-Za-z0-9_~%-]+(/[A-Za-z0-9_~%-]+)*")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Side = Annotated[int, Field(ge=1, le=MAX_PIXELS)]


class Shard(_Frozen):
    """One tar. `path` is relative to the card, or to the card's `root`; `rows_sha256` is over the
    shard's rows of the index."""

    path: str
    samples: Annotated[int, Field(ge=0, le=MAX_SHARD_SAMPLES)]
    size_bytes: Count
    sha256: str
    rows_sha256: str


class SplitCard(_Frozen):
    """One split. `index` is the path, relative to the card, of its sample index. `class_counts` are
    images, objects or pixels of each class, whichever carry the classes."""

    samples: Count
    shards: tuple[Shard, ...]
    index: str
    index_bytes: Count
    index_sha256: str
    class_counts: dict[str, Count] = {}


class ImageCard(_Frozen):
    """What the images are. Sizes are in pixels; mean and std are of train pixels scaled to 0..1."""

    channels: Literal[1, 3]
    min_height: Side
    max_height: Side
    min_width: Side
    max_width: Side
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(ge=0)], ...]


class Leakage(_Frozen):
    """Pairs of images in two splits that look the same, as `leakage.jsonl` lists them. Those with
    the same pixels are rejected when packing; these are only near."""

    near: Count = 0
    images: Count = 0


class Card(_Frozen):
    """All that is known of a packed data set. `digest` (64 hex digits) is over everything else.

    `root` is the folder or address of shards that were not made here and lie elsewhere; empty where
    they lie beside the card. `classes` is empty for data of the task `images`.
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
    leakage: Leakage = Leakage()
    digest: str = ""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """What nothing later looks at again: it would be an error of another kind there."""
        if self.task not in ANNOTATION_EXTENSIONS:
            raise ValueError(f"{self.task!r} is no task: {', '.join(ANNOTATION_EXTENSIONS)}")
        channels = self.image.channels
        if not len(self.image.mean) == len(self.image.std) == channels:
            raise ValueError(f"mean and std are not of {channels} channels")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have one name")
        if "" in self.classes:
            raise ValueError("a class has no name")
        for name, split in self.splits.items():
            if split.class_counts.keys() - set(self.classes):
                raise ValueError(f"{name} counts classes that there are not")
        return self

    def sealed(self) -> Card:
        """The same card with its digest."""
        return self.model_copy(update={"digest": self.content_digest()})

    def content_digest(self) -> str:
        content = self.model_dump(mode="json", exclude={"digest"})
        encoded = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(encoded.encode()).hexdigest()

    def can_be_read_as(self, task: str) -> bool:
        """Whether a sample says what data of that task say: instances have boxes, too, and every
        sample has an image."""
        readable = {self.task, "images"}
        if self.task == "instance_segmentation":
            readable.add("detection")
        return task in readable

    def spec(
        self, height: int | None = None, width: int | None = None, *, reads: str | None = None
    ) -> DataSpec:
        """What the network sees: images of `height` by `width`, by default the largest packed, and
        of what is said of them what data of the task `reads` say, by default all. Where all pixels
        are the same, 1 stands for the std, by which they are divided."""
        task = self.task if reads is None else reads
        if not self.can_be_read_as(task):
            raise TesseraError(f"data of {self.task} can't be read as {task}")
        height, width = height or self.image.max_height, width or self.image.max_width
        if height * width > MAX_PIXELS:
            raise TesseraError(
                f"images {width} wide and {height} high are too large",
                hint="say which size the network is to see: data.height and data.width",
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
        """Of each class in train."""
        train = self.splits.get("train")
        return tuple(train.class_counts.get(name, 0) for name in self.classes) if train else ()

    def split(self, name: str) -> SplitCard:
        for known, split in self.splits.items():
            if known == name and split.samples:
                return split
        raise TesseraError(
            f"data set {self.name!r} has no {name!r} split",
            hint=f"it has: {', '.join(self.splits)}",
        )

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"


def check_key(key: str, where: str) -> None:
    """Refuses a key that could be a path elsewhere, or that WebDataset would read otherwise."""
    if not _KEY.fullmatch(key) or len(key) > MAX_KEY_LENGTH:
        raise TesseraError(
            f"{where}: the key {key[:120]!r} is not allowed",
            hint=f"a key has at most {MAX_KEY_LENGTH} of the characters A-Z a-z 0-9 _ - ~ % /",
        )


def parse(text: str | bytes, where: str) -> Card:
    """A card from JSON; refused if it isn't one, or if its digest is not its own."""
    try:
        card = Card.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) + ": " if first["loc"] else ""
        problem = first["msg"].removeprefix("Value error, ")
        raise TesseraError(f"{where} is not a valid card: {field}{problem}") from None
    if card.digest != card.content_digest():
        raise TesseraError(
            f"{where} was changed after it was packed: its digest is not its own",
            hint="pack the data set again",
        )
    if not any(split.samples for split in card.splits.values()):
        raise TesseraError(f"{where} is the card of a data set without samples")
    return card


def read(where: str | Path) -> Card:
    """The card of a packed data set in a folder or at an address."""
    storage = open_storage(where)
    if storage.size(FILE) is None:
        raise TesseraError(f"{where} is no packed data set: it has no {FILE}", hint=_how(storage))
    return parse(storage.read(FILE), f"{storage.where}/{FILE}")


def _how(storage: Storage) -> str:
    """What to do about a place without a card."""
    folder = Path(storage.where)
    if storage.remote or not folder.is_dir() or not any(folder.iterdir()):
        stopped = not storage.remote and (folder.parent / f".{folder.name}.packing").is_dir()
        again = "its pack was stopped: the same tessera pack command goes on"
        return again if stopped else f"pack one: tessera pack SOURCE --to {storage.where}"
    return f"if it is a source, pack it: tessera pack {storage.where} --to DIR, and give that DIR"
