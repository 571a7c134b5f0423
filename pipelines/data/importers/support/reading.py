"""What importers share: names of splits, and safe access to the files of a source.

In: a source's folder and names from its files. Out: paths inside the source, bytes, sizes of
images. Must not know any format.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import AnyStr

from models.core.errors import TesseraError, UsageError
from pipelines.data.card import Split
from pipelines.data.image_formats import open_lazily, sniff
from pipelines.data.images import make_key, open_image
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import IMAGE_SUFFIXES, Item, find_folders, is_image, read_file

SPLIT_NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "development"), "val"),
    **dict.fromkeys(("eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
"""Words that mean a split."""
_NEUTRAL = frozenset(
    {
        *("set", "sets", "data", "dataset", "split", "folder", "part", "stage", "seg", "cls"),
        *("image", "images", "img", "imgs", "picture", "pictures", "photo", "photos"),
    }
)
"""Words that say nothing beside the word of a split: train_images, stage1_train."""
SPLIT_ORDER: tuple[Split, ...] = ("train", "val", "test")
IMAGE_NAMES = frozenset({"images", "image", "imgs", "img", "jpegimages"})
LABEL_NAMES = frozenset(
    {
        *("masks", "mask", "labels", "label", "annotations", "annotation", "imagesets"),
        *("segmentationclass", "segmentationobject"),
    }
)
"""Usual names of the folders of images and of labels, if they are separate."""
_ORIENTATION = 0x0112
_WORDS_BEFORE_NUMBER = re.compile(r"([^\W\d_]+(?:[-_ .][^\W\d_]+)*)[-_ .(]*[0-9]")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_BETWEEN_WORDS = re.compile(r"[\W\d_]+")
_GLUED = re.compile(r"^(set|data|images?|imgs?)|(set|data|images?|imgs?)$")


def split_of(name: str) -> Split | None:
    """The split in the name of a folder or file: "train", "Testing", "val2017", "train_images",
    "trainset"; None if it has other words, as "train station" has."""
    word, others = _split_word(name)
    return SPLIT_NAMES[word] if word and not others else None


def find_splits(names: Iterable[str]) -> dict[str, Split]:
    """Name -> split of those folders or files in one place that are splits.

    Names that differ only in the word of the split are splits too: flowers-train, flowers-test.
    """
    words = {name: _split_word(name) for name in names}
    alike: dict[tuple[str, ...], set[Split]] = {(): set(SPLIT_ORDER)}
    for word, others in words.values():
        if word:
            alike.setdefault(others, set()).add(SPLIT_NAMES[word])
    return {
        name: SPLIT_NAMES[word]
        for name, (word, others) in words.items()
        if word and len(alike[others]) > 1 and "train" in alike[others]
    }


def _split_word(name: str) -> tuple[str, tuple[str, ...]]:
    """(word of the split, the other words that mean something); the first is empty if no word or
    more than one means a split."""
    plain = name if name.isascii() else unicodedata.normalize("NFC", name)
    words = [word for word in _BETWEEN_WORDS.split(_CAMEL.sub("_", plain).lower()) if word]
    means = [word if word in SPLIT_NAMES else _GLUED.sub("", word) for word in words]
    found = [word for word in means if word in SPLIT_NAMES]
    others = tuple(
        word for word, mean in zip(words, means) if mean not in SPLIT_NAMES and word not in _NEUTRAL
    )
    return (found[0], others) if len(found) == 1 else ("", others)


def class_in_name(path: str) -> str:
    """The words before the first number in the name of an image: cat for cat.12.jpg; empty if it
    doesn't begin with a word or has no number."""
    match = _WORDS_BEFORE_NUMBER.match(path.rpartition("/")[2])
    return match[1] if match else ""


def are_classes_in_names(paths: Iterable[str]) -> bool:
    """Whether the names of images look like classes: a few words with numbers behind them."""
    counts = Counter(map(class_in_name, paths))
    return len(counts) > 1 and "" not in counts and min(counts.values()) > 1


def need_folder(source: str) -> Path:
    folder = Path(source)
    if not folder.is_dir():
        raise TesseraError(f"there is no folder {source}")
    return folder


def nearby(source: str, depth: int = 2) -> list[Path]:
    """The folder, and the folders in it down to `depth`: archives often unpack to nested folders.
    Levels with more than 64 folders are not searched."""
    folder = Path(source)
    found = [folder] if folder.is_dir() else []
    level = found
    for _ in range(depth):
        level = [inner for outer in level for inner in find_folders(outer)]
        if len(level) > 64:
            break
        found = found + level
    return found


def choose(options: Mapping[str, str], name: str, allowed: Iterable[str], default: str) -> str:
    """The value of an option. Raises UsageError if it isn't one of `allowed`."""
    value = options.get(name, default)
    if value not in (known := list(allowed)):
        raise UsageError(
            f"the option {name} can't be {value!r}", hint=f"allowed: {', '.join(known)}"
        )
    return value


MAX_BYTES_OPTION: Mapping[str, str] = {
    "max_bytes": "most bytes that one file or array may decompress to",
}


def read_max_bytes(options: Mapping[str, str]) -> int | None:
    """The most bytes that a file may decompress to; None for the default. Raises UsageError."""
    if "max_bytes" not in options:
        return None
    text = options["max_bytes"]
    if text.isascii() and text.isdigit() and int(text[:18]) > 0 and len(text) <= 18:
        return int(text)
    raise UsageError(f"the option max_bytes can't be {text!r}", hint="give a number of bytes")


def is_plain(name: str) -> bool:
    """Whether a path, as it is written, is relative and stays in its folder."""
    parts = name.replace("\\", "/").split("/")
    return bool(name) and "\0" not in name and ".." not in parts and not os.path.isabs(name)


def locate(folder: Path, name: str) -> Path:
    """The path of a file that is named in a source. Raises SampleError if it is outside `folder`,
    links included."""
    path = folder / name
    if is_plain(name):
        inside = os.path.realpath(folder)
        if os.path.commonpath([inside, os.path.realpath(path)]) == inside:
            return path
    raise SampleError(OUTSIDE, f"{name!r} is outside {folder}")


OUTSIDE = "path outside the source"


def find_problem(folder: Path, name: str) -> tuple[str, str] | None:
    """The `Item.problem` of a file that is named in a source, without reading it."""
    if not is_plain(name):
        return OUTSIDE, f"{name!r} is outside {folder}"
    try:
        found = (folder / name).is_file()
    except OSError:  # the name is too long
        found = False
    return None if found else ("missing image", f"there is no {name!r} in {folder}")


def load(folder: Path, item: Item) -> bytes:
    """`Source.load` for items whose origin is the path of the image in `folder`."""
    return read_inside(folder, item.origin)


def read_inside(folder: Path, name: str) -> bytes:
    return read_file(locate(folder, name), name)


def make_keys(paths: Iterable[AnyStr]) -> Iterator[str]:
    """The keys of images, from their paths without suffix; of two images that differ in nothing
    else, the second has its suffix in its key."""
    seen: set[str] = set()
    for path in paths:
        key = make_key(os.path.splitext(path)[0])
        if key in seen:
            key = make_key(path)
        seen.add(key)
        yield key


def list_stems(folder: Path) -> dict[str, str]:
    """Name without suffix -> name of the images in `folder`; the first of two counts."""
    stems: dict[str, str] = {}
    with os.scandir(folder) as entries:
        for name in sorted(entry.name for entry in entries):
            if is_image(name) and not name.startswith("."):
                stems.setdefault(os.path.splitext(name)[0], name)
    return stems


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """(height, width) of the image after EXIF rotation, from its header. Raises TesseraError."""
    form = sniff(data)
    # A PNG's orientation may come after its pixels; some Pillow versions rotate a TIFF's size.
    if form in (None, "TIFF") or (form == "PNG" and b"eXIf" in data):
        return open_image(data, where).size[::-1]
    try:
        with open_lazily(data, form or "") as image:
            width, height = image.size
            turned = form != "PNG" and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # opening it raises the proper error
        return open_image(data, where).size[::-1]
    return (width, height) if turned else (height, width)


def check_stated_size(stated: tuple[int, int], true: tuple[int, int], where: str) -> None:
    """Raises SampleError if an annotation is for an image of another (height, width)."""
    if stated != true:
        raise SampleError(
            "annotation of another size",
            f"{where}: its annotation is for an image {stated[1]} wide and {stated[0]} high, the "
            f"image is {true[1]} wide and {true[0]} high",
        )


def no_images(source: str | Path) -> TesseraError:
    return TesseraError(
        f"{source} has no images", hint=f"images are files named {' '.join(sorted(IMAGE_SUFFIXES))}"
    )
