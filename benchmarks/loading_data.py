"""The two image sets that data loading is measured on, in each format that a contender reads.

In: the raw archives. Out: a folder per class, a packed data set (standard WebDataset shards, which
other loaders read too), and one file with all images for the raw limit. Written once and kept in
the work folder. Must not know the contenders.

    cifar10   the 50,000 train images of CIFAR-10 as JPEGs of 32 by 32
    photos    3,000 photos of about 500 by 375, cropped from CBSD68 and BCCD, JPEG quality 90
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.data import card as cards
from pipelines.data import shards
from pipelines.data.card import Card, ImageCard
from pipelines.data.shards import Packed

PHOTOS = 3000
QUALITY = 90
SIDES = ((480, 520), (360, 390))
"""Widths and heights of the photos, in pixels."""
DONE = "done.json"


class ImageSet(NamedTuple):
    """The archives of an image set, the side of the centre crop (None: no crop), and the number of
    images per shard."""

    archives: tuple[str, ...]
    crop: int | None
    shard_samples: int


SETS = {
    "cifar10": ImageSet(("cifar10-jpeg/cifar10-jpeg.tar.gz",), None, 1000),
    "photos": ImageSet(("sr-bsd68-set5/CBSD68.tar", "bccd/BCCD.tar"), 224, 250),
}


class MissingData(Exception):
    """Raised if an archive of the raw data is missing."""


def prepare(name: str, raw: Path, work: Path, photos: int = PHOTOS) -> Path:
    """The folder of an image set, with `folder/CLASS/*.jpg`, `shards/` with a card, `blob.bin` with
    `blob.npy`, and `done.json`; written if it doesn't exist."""
    chosen = SETS[name]
    missing = [archive for archive in chosen.archives if not (raw / archive).exists()]
    folder = work / (f"{name}-{photos}" if name == "photos" else name)
    if (folder / DONE).exists():
        return folder
    if missing:
        raise MissingData(f"{raw} has no {', '.join(missing)}")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if name == "cifar10":
        _unpack_train(raw / chosen.archives[0], part / "folder")
    else:
        _cut_photos([raw / archive for archive in chosen.archives], part / "folder", photos)
    facts = _pack(part, name, chosen)
    (part / DONE).write_text(json.dumps(facts))
    part.rename(folder)
    return folder


def _unpack_train(archive: Path, to: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith("train/"):
                path = to / member.name.removeprefix("train/")
                path.parent.mkdir(parents=True, exist_ok=True)
                stream = tar.extractfile(member)
                assert stream is not None
                path.write_bytes(stream.read())


def _cut_photos(archives: list[Path], to: Path, count: int) -> None:
    """Writes `count` JPEGs, as many from each archive; always the same ones."""
    rng = np.random.default_rng(0)
    sources = [list(_photos(archive)) for archive in archives]
    for number in range(count):
        kind = number % len(sources)
        photo = sources[kind][number // len(sources) % len(sources[kind])]
        width, height = (int(rng.integers(low, high + 1)) for low, high in SIDES)
        scale = rng.uniform(0.7, 1.0) * min(photo.width / width, photo.height / height)
        left = int(rng.integers(0, int(photo.width - width * scale) + 1))
        top = int(rng.integers(0, int(photo.height - height * scale) + 1))
        box = (left, top, left + width * scale, top + height * scale)
        path = to / archives[kind].stem / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.resize((width, height), box=box).save(path, quality=QUALITY)


def _photos(archive: Path) -> Iterator[Any]:
    from PIL import Image

    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if member.isfile() and member.name.endswith((".png", ".jpg")):
                stream = tar.extractfile(member)
                assert stream is not None
                with Image.open(io.BytesIO(stream.read())) as photo:
                    yield photo.convert("RGB")


def _pack(part: Path, name: str, chosen: ImageSet) -> dict[str, Any]:
    """Writes the shards, the card and the blob of the images in `part/folder`, in random order."""
    from PIL import Image

    paths = sorted((part / "folder").rglob("*.jpg"))
    classes = tuple(sorted(folder.name for folder in (part / "folder").iterdir()))
    shuffled = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))]
    sizes = np.array([Image.open(path).size for path in paths])
    to = part / "shards"
    (to / "train").mkdir(parents=True)
    written = []
    for number, start in enumerate(range(0, len(shuffled), chosen.shard_samples)):
        shard = f"train/{number:06d}.tar"
        packed = [_packed(path, classes) for path in shuffled[start : start + chosen.shard_samples]]
        written.append(shards.write_shard(to / shard, shard, packed))
    half = (0.5, 0.5, 0.5)
    (low_width, low_height), (width, height) = sizes.min(0).tolist(), sizes.max(0).tolist()
    card = Card(
        name=name,
        task="classification",
        classes=classes,
        image=ImageCard(
            channels=3,
            min_height=low_height,
            max_height=height,
            min_width=low_width,
            max_width=width,
            mean=half,
            std=half,
        ),
        splits={"train": shards.finish_split(to, "train", written)},
    ).sealed()
    (to / cards.FILE).write_text(card.to_json())
    ends = np.cumsum([0, *(path.stat().st_size for path in shuffled)])
    np.save(part / "blob.npy", ends)
    with (part / "blob.bin").open("wb") as blob:
        blob.writelines(path.read_bytes() for path in shuffled)
    return {
        "images": len(paths),
        "shards": len(written),
        "mean_bytes": round(float(ends[-1]) / len(paths)),
        "mean_size": [round(float(side)) for side in sizes.mean(0)],
    }


def _packed(path: Path, classes: tuple[str, ...]) -> Packed:
    label = classes.index(path.parent.name)
    annotation = ("cls", str(label).encode())
    return Packed(f"{path.parent.name}/{path.stem}", ("jpg", path.read_bytes()), annotation, label)
