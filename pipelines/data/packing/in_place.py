"""Makes index and card of existing WebDataset shards, which are used in place.

In: the location of the shards. Out: an index of each split, and a card. Folders or file names with
train, val (valid, validation) or test in them assign the splits. A missing val or test split gets a
tenth of the train shards, chosen by a hash of seed and path.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from models.core.errors import TesseraError, UsageError
from pipelines.data.card import FILE, SPLITS, Card, Split
from pipelines.data.importers.webdataset import NAME, check_compressed, is_hidden, locate
from pipelines.data.packing import account as account_file
from pipelines.data.packing import in_place_scan
from pipelines.data.packing.account import Account
from pipelines.data.packing.in_place_labels import Label
from pipelines.data.packing.in_place_scan import Progress, SampleLayout, ScannedShard
from pipelines.data.packing.staging import stage
from pipelines.data.packing.statistics import Rejections, ResumableError
from pipelines.data.sources import find_files
from pipelines.storage.base import Storage, absolute_location, check_path
from pipelines.storage.open import open_storage

SHARE = 0.1
"""Share of the train shards that a missing `val` or `test` gets: of three or more, at least one."""


MAX_SHARDS = 100_000


_SPLITS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def index(
    source: str,
    to: str | Path,
    *,
    options: Mapping[str, str],
    name: str | None = None,
    licence: str = "",
    seed: int = 0,
    allow_rejected: str = "0",
    allow_unused: Sequence[str] = (),
    progress: Progress | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Card:
    """Writes index and card of the shards at `source` to `to`, and returns the card.

    The same shards give the same digest. Raises TesseraError, and leaves nothing behind, for a tar
    that is damaged or has refused members (links, devices, sparse files, unsafe names), a duplicate
    key, and more rejected samples than allowed.
    """
    layout = read_options(options)
    source, only = locate(source)
    storage = open_storage(source)
    with stage(to) as staged:
        shards = find_shards(storage, only or options.get("shards", ""))
        # A shard that is no regular file is refused below, with a better reason.
        are_files = not storage.remote and all(Path(storage.where, p).is_file() for p in shards)
        if are_files and not only:
            account = _account_for(Path(storage.where), shards, allow_unused)
            notify(str(account))
            account.check()
        splits = find_splits(shards, seed)
        known = {split: sum(1 for of in splits.values() if of == split) for split in SPLITS}
        notify("shards: " + ", ".join(f"{split} {count}" for split, count in known.items()))
        scanned = in_place_scan.scan_all(storage, splits, layout, progress)
        rejected = _check_rejected(scanned, allow_rejected, staged.storage)
        for extension, count in _count_skipped(scanned).items():
            notify(f"skipped: {count:,} members .{extension}")
        if hidden := sum(shard.hidden for shard in scanned.values()):
            notify(f"skipped: {hidden:,} members of macOS, named ._… or in __MACOSX")
        with tempfile.TemporaryDirectory(prefix="tessera-index-") as folder:
            card = in_place_scan.make_card(scanned, splits, layout, Path(folder))
            for of_split in card.splits.values():
                staged.storage.put(Path(folder) / of_split.index, of_split.index)
        folder_name = Path(only or storage.where).name.removesuffix(".tar")
        more = {
            "name": name or folder_name,
            "source": f"{NAME}:{folder_name}",
            "licence": licence,
            "root": absolute_location(source),
            "rejected": rejected,
        }
        sealed = card.model_copy(update=more).sealed()
        staged.storage.write(FILE, sealed.to_json().encode())
    return sealed


def _account_for(folder: Path, shards: Sequence[str], allow_unused: Sequence[str]) -> Account:
    """What became of the files of a folder with shards. Files that have the name of a shard, such
    as 00000.parquet and 00000_stats.json of img2dataset, belong to it."""
    stems = {path.removesuffix(".tar") for path in shards}
    beside = [
        path
        for path in find_files(folder)
        if os.path.splitext(path)[0].removesuffix("_stats") in stems
    ]
    used = [str(folder / path) for path in {*shards, *beside}]
    return account_file.sort_files(folder, (), used, allow_unused)


def read_options(options: Mapping[str, str]) -> SampleLayout:
    """The layout that the options describe. Raises UsageError for an unknown value."""
    image = options.get("image", "jpg,jpeg,png,webp").lower().split(",")
    kind, _, field = options.get("label", "cls").partition(":")
    if kind not in ("cls", "txt", "json", "none") or bool(field) != (kind == "json"):
        raise UsageError(
            f"label={options['label']} is not known", hint="give cls, txt, json:FIELD or none"
        )
    return SampleLayout(
        image=frozenset(extension.strip().removeprefix(".") for extension in image),
        label=None if kind == "none" else Label(kind, field),
        classes=tuple(filter(None, map(str.strip, options.get("classes", "").split(",")))),
        skip=_one_of(options, "extra", "refuse", "skip") == "skip",
        by_shard=_one_of(options, "keys", "member", "shard") == "shard",
        last_dot=_one_of(options, "dot", "first", "last") == "last",
    )


def find_shards(storage: Storage, given: str) -> list[str]:
    """Paths of the tars, sorted; those that `given` lists, if any."""
    paths = [path for text in given.split(",") if text for path in _expand(text.strip())]
    if not paths:
        names = [name for name in storage.names() if not is_hidden(name)]
        check_compressed(names, storage.where)
        paths = [path for path in names if path.endswith(".tar")]
        if not paths:
            raise TesseraError(
                f"{storage.where} has no .tar in it", hint="shards are uncompressed tars"
            )
    for path in paths:
        check_path(path, storage.where)
    return sorted(paths)


def find_splits(paths: list[str], seed: int) -> dict[str, Split]:
    """The split of each shard, by its path; missing val and test splits are taken from train."""
    splits: dict[str, Split] = {path: _split_in_path(path) or "train" for path in paths}
    train = [path for path, split in splits.items() if split == "train"]
    missing: list[Split] = [split for split in ("val", "test") if split not in splits.values()]
    count = max(int(len(train) * SHARE + 0.5), 1) if len(train) >= 3 else 0
    train.sort(key=lambda path: hashlib.sha256(f"split {seed} {path}".encode()).digest())
    for number, split in enumerate(missing):
        splits.update(dict.fromkeys(train[number * count : (number + 1) * count], split))
    return splits


def _split_in_path(path: str) -> Split | None:
    words = re.split(r"[^a-z]+", path.lower())
    named = {_SPLITS[word] for word in words if word in _SPLITS}
    if len(named) > 1:
        raise TesseraError(
            f"the shard {path} names two splits: {', '.join(sorted(named))}", hint="rename it"
        )
    return named.pop() if named else None


def _expand(text: str) -> list[str]:
    match = _RANGE.search(text)
    if not match:
        return [text]
    low, high = int(match[1]), int(match[2])
    if not 0 <= high - low < MAX_SHARDS:
        raise UsageError(f"{match[0]} is not a range of shards", hint="for example {000..012}")
    width = len(match[1])
    return [
        f"{text[: match.start()]}{n:0{width}}{text[match.end() :]}" for n in range(low, high + 1)
    ]


def _one_of(options: Mapping[str, str], name: str, *allowed: str) -> str:
    value = options.get(name, allowed[0])
    if value not in allowed:
        raise UsageError(f"{name}={value} is not known", hint=f"give {' or '.join(allowed)}")
    return value


def _check_rejected(scanned: Mapping[str, ScannedShard], allowed: str, storage: Storage) -> int:
    samples = sum(len(shard.rows) + len(shard.rejected) for shard in scanned.values())
    rejections = Rejections(allowed, samples)
    for shard in scanned.values():
        for row in shard.rejected:
            rejections.add(*row)
    try:
        rejections.check(storage)
    except ResumableError as error:
        reasons = {row[2] for shard in scanned.values() for row in shard.rejected}
        hint = ""
        if in_place_scan.DOTTED in reasons:
            hint = "rename the members, or let keys end at the last dot: --option dot=last; or "
        elif in_place_scan.UNKNOWN in reasons:
            hint = "skip other members: --option extra=skip; or "
        raise TesseraError(
            error.message,
            hint=f"{hint}fix them, or leave them out: --allow-rejected {rejections.count}",
        ) from None
    return rejections.count


def _count_skipped(scanned: Mapping[str, ScannedShard]) -> dict[str, int]:
    total: dict[str, int] = {}
    for shard in scanned.values():
        for extension, count in shard.skipped.items():
            total[extension] = total.get(extension, 0) + count
    return dict(sorted(total.items()))
