"""What a data set is. `card.json` is written last: a folder that has one is complete.

In: `card.json`. Out: `Card`. Must not know how shards are read or written.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from models.core.errors import TesseraError
from models.core.family import DataSpec

FILE = "card.json"
SPLITS = ("train", "val", "test")
Split = Literal["train", "val", "test"]
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
"""Extensions of the image in a shard."""
LABEL_EXTENSION = "cls"
"""Extension of the class index: ASCII digits."""
EXTENSIONS = frozenset({*IMAGE_EXTENSIONS, LABEL_EXTENSION})
"""All that may lie in a shard: a sample is the members KEY.EXTENSION that follow each other."""
MAX_KEY_LENGTH = 92
"""In characters. With dot and extension a key fits the 100 bytes of a tar name."""
_KEY = re.compile(r"[A-Za-z0-9_~%-]+(/[A-Za-z0-9_~%-]+)*")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Frozen):
    """One tar. `path` is relative to the card."""

    path: str
    samples: int
    size_bytes: int
    sha256: str


class SplitCard(_Frozen):
    """One split. `index` is the path, relative to the card, of its sample index."""

    samples: int
    shards: tuple[Shard, ...]
    index: str
    index_sha256: str
    class_counts: dict[str, int] = {}


class ImageCard(_Frozen):
    """What the images are. Sizes are in pixels; mean and std are of train pixels scaled to 0..1."""

    channels: int
    min_height: int
    max_height: int
    min_width: int
    max_width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Card(_Frozen):
    """All that is known of a packed data set. `digest` (64 hex digits) is over everything else."""

    version: int = 1
    name: str
    task: str
    classes: tuple[str, ...]
    image: ImageCard
    splits: dict[Split, SplitCard]
    source: str = ""
    licence: str = ""
    rejected: int = 0
    digest: str = ""

    def sealed(self) -> Card:
        """The same card with its digest."""
        return self.model_copy(update={"digest": self.content_digest()})

    def content_digest(self) -> str:
        content = self.model_dump(mode="json", exclude={"digest"})
        encoded = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(encoded.encode()).hexdigest()

    def spec(self, height: int | None = None, width: int | None = None) -> DataSpec:
        """What the network sees: images of `height` by `width`, by default the largest packed."""
        return DataSpec(
            task=self.task,
            channels=self.image.channels,
            height=height or self.image.max_height,
            width=width or self.image.max_width,
            classes=self.classes,
            mean=self.image.mean,
            std=self.image.std,
        )

    def split(self, name: str) -> SplitCard:
        for known, split in self.splits.items():
            if known == name and split.samples:
                return split
        raise TesseraError(
            f"data set {self.name!r} has no {name!r} split",
            mend=f"it has: {', '.join(self.splits)}",
        )

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"


def check_key(key: str, where: str) -> None:
    """Refuses a key that could be a path elsewhere, or that WebDataset would read otherwise."""
    if not _KEY.fullmatch(key) or len(key) > MAX_KEY_LENGTH:
        raise TesseraError(
            f"{where}: the key {key[:120]!r} is not allowed",
            mend=f"a key has at most {MAX_KEY_LENGTH} of the characters A-Z a-z 0-9 _ - ~ % /",
        )


def parse(text: str | bytes, where: str) -> Card:
    """A card from JSON; refused if it isn't one, or if its digest is not its own."""
    try:
        card = Card.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise TesseraError(f"{where} is no card: {place}: {first['msg']}") from None
    if card.digest != card.content_digest():
        raise TesseraError(
            f"{where} was changed after it was packed: its digest is not its own",
            mend="pack the data set again",
        )
    return card


def read(folder: Path) -> Card:
    """The card of a packed data set."""
    path = folder / FILE
    if not path.is_file():
        raise TesseraError(
            f"{folder} is no packed data set: it has no {FILE}",
            mend=f"pack one: tessera pack SOURCE --to {folder}",
        )
    return parse(path.read_bytes(), str(path))
