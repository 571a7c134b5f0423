"""Existing WebDataset shards, used in place: a folder or an address with `.tar` files.

In: the location of the shards, or one `.tar` file. Out: only an index and a card are written, by
`packing/in_place.py`.
Folders or file names with train, val (valid, validation) or test in them assign the splits. A
missing val or test split gets a tenth of the train shards, chosen by a hash of seed and path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.data.card import FILE
from pipelines.data.sources import is_image
from pipelines.storage.base import split_location
from pipelines.storage.open import open_storage

NAME = "webdataset"
OPTIONS: Mapping[str, str] = {
    "image": "extensions of the image; default jpg,jpeg,png,webp",
    "label": "cls, txt, json:FIELD, or none",
    "classes": "names of the classes in order, with commas; default the labels that occur",
    "extra": "other members: refuse their samples (default), or skip the members",
    "dot": "first (default, as in WebDataset) or last: the dot of a name where its key ends",
    "keys": "member (default), or shard to prefix keys with the shard's name if they repeat",
    "shards": "the shards, for web servers without a listing: train-{000..012}.tar,val.tar",
}


COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")


def recognises(source: str) -> str:
    if split_location(source)[0] not in ("", "file"):
        return "an address"
    path = Path(source)
    if path.is_file():
        check_compressed([path.name], source)
        return "one tar" if path.suffix == ".tar" else ""
    if not path.is_dir() or (path / FILE).exists():
        return ""
    names = [name for name in open_storage(source).names() if not is_hidden(name)]
    count = sum(1 for name in names if name.endswith(".tar"))
    if not count and not any(map(is_image, names)):
        check_compressed(names, source)
    return f"{count} tars" if count else ""


def locate(source: str) -> tuple[str, str]:
    """(location, shard) of a source: the shard is empty, unless the source is one file."""
    if not source.endswith(".tar") or Path(source).is_dir():
        return source, ""
    folder, _, name = source.rpartition("/")
    return folder or ("/" if source.startswith("/") else "."), name


def is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def check_compressed(names: Iterable[str], where: str) -> None:
    """Raises TesseraError if there are compressed shards: no sample of one can be read alone."""
    packed = [name for name in names if name.lower().endswith(COMPRESSED)]
    if packed:
        more = ", …" if packed[1:] else ""
        raise TesseraError(
            f"{where}: {packed[0]}{more} is a compressed tar ({len(packed):,} in all), and shards "
            "are uncompressed tars",
            hint="if these are WebDataset shards: gunzip each; if a folder of images is in it: "
            "unpack it, and pack the folder",
        )
