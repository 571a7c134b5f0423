"""Existing WebDataset shards, used in place: a folder or an address with `.tar` files.

In: the location of the shards. Out: only an index and a card are written, by `packing/in_place.py`.
Folders or file names with train, val (valid, validation) or test in them assign the splits. A
missing val or test split gets a tenth of the train shards, chosen by a hash of seed and path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipelines.data.card import FILE
from pipelines.storage.base import split_location
from pipelines.storage.open import open_storage

NAME = "webdataset"
OPTIONS: Mapping[str, str] = {
    "image": "extensions of the image; default jpg,jpeg,png,webp",
    "label": "cls, txt, json:FIELD, or none",
    "classes": "names of the classes in order, with commas; default the labels that occur",
    "extra": "other members: refuse their samples (default), or skip the members",
    "keys": "member (default), or shard to prefix keys with the shard's name if they repeat",
    "shards": "the shards, for web servers without a listing: train-{000..012}.tar,val.tar",
}


def recognises(source: str) -> str:
    if split_location(source)[0] not in ("", "file"):
        return "an address"
    folder = Path(source)
    if not folder.is_dir() or (folder / FILE).exists():
        return ""
    count = sum(1 for path in open_storage(source).names() if path.endswith(".tar"))
    return f"{count} tars" if count else ""
