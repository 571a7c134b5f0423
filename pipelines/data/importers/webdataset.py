"""WebDataset shards of others: `--format webdataset`, a folder or an address with `.tar` files.

They stay where they lie; an index and a card are made of them. Splits are told by folders or file
names with train, val (valid, validation) or test in them; without, whole shards are cut off for val
and test, a tenth each, chosen by a hash of seed and path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipelines.data.card import FILE
from pipelines.storage.base import split_location
from pipelines.storage.open import open_storage

NAME = "webdataset"
OPTIONS: Mapping[str, str] = {
    "image": "extensions of the image: jpg,jpeg,png,webp",
    "label": "cls, txt, json:FIELD, or none",
    "classes": "names of the classes, in order: NAME,NAME,…; else what the data says",
    "extra": "what becomes of samples with other members: refuse, or skip the members",
    "keys": "member, or shard where shards repeat keys",
    "shards": "the shards, for web servers, which list nothing: train-{000..012}.tar,val.tar",
}


def recognises(source: str) -> str:
    if split_location(source)[0] not in ("", "file"):
        return "an address"
    folder = Path(source)
    if not folder.is_dir() or (folder / FILE).exists():
        return ""
    count = sum(1 for path in open_storage(source).names() if path.endswith(".tar"))
    return f"{count} tars" if count else ""
