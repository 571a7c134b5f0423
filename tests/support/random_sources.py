"""Sources made at random, with labels, stray files and damage; and what must come of them.

In: a seed and a folder. Out: files, and a `Truth` that knows each labelled image. `check_pack`
packs the source and lists what went wrong; tests/pipelines/data/packing/test_pack_anything.py and
benchmarks/pack_anything.py use it.
"""

from __future__ import annotations

import functools
import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data.packing.pack import pack

WIDTH, HEIGHT = 24, 16
SPLIT_WORDS = {
    "train": ("train", "Training", "TRAIN", "train_images", "seg_train"),
    "val": ("val", "valid", "Validation", "dev"),
    "test": ("test", "Testing", "test_set"),
}


@dataclass
class Truth:
    """What a source says.

    task     what its labels are for
    classes  names of the classes
    images   path of each labelled image -> (split or None, label: a class, or the classes of its
             objects in order)
    damaged  paths of labelled images that can't be packed
    refused  why the source must be refused, empty if it may be packed
    strays   files that aren't part of the data set
    """

    kind: str
    task: str
    classes: tuple[str, ...]
    images: dict[str, tuple[str | None, Any]] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    refused: str = ""
    strays: list[str] = field(default_factory=list)


@functools.lru_cache
def jpeg(number: int) -> bytes:
    """The file of a picture; no two look alike."""
    pixels = np.random.default_rng(number).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=90)
    return out.getvalue()


class Maker:
    """Writes the files of one source."""

    def __init__(self, folder: Path, dice: random.Random) -> None:
        self.folder, self.dice, self._number = folder, dice, 0

    def image(self, path: str) -> str:
        self.write(path, jpeg(self._number))
        self._number += 1
        return path

    def write(self, path: str, content: bytes | str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    def splits(self, *, always: bool = False) -> dict[str, str | None]:
        """Folder -> split; one folder without a name for a source without splits."""
        if not always and self.dice.random() < 0.4:
            return {"": None}
        names = ["train", *(name for name in ("val", "test") if self.dice.random() < 0.6)]
        if len(names) == 1:
            names.append("test")
        return {f"{self.dice.choice(SPLIT_WORDS[name])}/": name for name in names}

    def classes(self) -> tuple[str, ...]:
        words = ("cat", "dog", "cow", "red fox", "Übel", "0", "10")
        return tuple(sorted(self.dice.sample(words[:5], self.dice.choice((2, 2, 3)))))

    def count(self) -> int:
        return self.dice.randint(4, 5)

    def boxes(self, classes: int) -> list[tuple[int, tuple[int, int, int, int]]]:
        """(class, left, top, width, height) of one or two objects."""
        return [
            (self.dice.randrange(classes), (self.dice.randint(1, 8), self.dice.randint(1, 5), 6, 5))
            for _ in range(self.dice.choice((1, 1, 2)))
        ]


def class_folders(make: Maker) -> Truth:
    truth = Truth("image_folder", "classification", make.classes())
    around = make.dice.choice(("", "", "pets/"))
    for folder, split in make.splits().items():
        for name in truth.classes:
            for number in range(make.count()):
                path = make.image(f"{around}{folder}{name}/{number}.jpg")
                truth.images[path] = (split, name)
    return truth


def table(make: Maker) -> Truth:
    truth = Truth("csv", "classification", make.classes())
    delimiter = make.dice.choice((",", ";", "\t"))
    suffix = make.dice.choice((".jpg", ""))
    place = make.dice.choice(("", "images/", "photos/a/"))
    shown = place if make.dice.random() < 0.5 or not suffix else ""
    rows = [delimiter.join(make.dice.choice((("path", "label"), ("image_id", "class"))))]
    for at, name in enumerate(truth.classes):
        for number in range(make.count()):
            path = make.image(f"{place}x{at}{number}.jpg")
            truth.images[path] = (None, name)
            written = f"{shown}x{at}{number}{suffix}"
            rows.append(f"{written}{delimiter}{name}")
    end = make.dice.choice(("\n", "\r\n"))
    make.write("labels.csv", make.dice.choice(("", "\ufeff")) + end.join(rows) + end)
    return truth


def metadata(make: Maker) -> Truth:
    truth = Truth("huggingface", "classification", make.classes())
    for folder, split in make.splits().items():
        rows = []
        for number in range(4 * len(truth.classes)):
            name = truth.classes[number % len(truth.classes)]
            path = make.image(f"{folder}{number}.jpg")
            truth.images[path] = (split, name)
            rows.append(json.dumps({"file_name": f"{number}.jpg", "label": name}))
        make.write(f"{folder}metadata.jsonl", "\n".join(rows) + "\n")
    return truth


def coco(make: Maker) -> Truth:
    truth = Truth("coco", "detection", make.classes())
    flat = make.dice.random() < 0.4
    splits = {"": None} if flat else {"train/": "train", "valid/": "val"}
    for folder, split in splits.items():
        images, annotations = [], []
        for number in range(6):
            where = f"data/{number}.jpg" if flat else f"{folder}{number}.jpg"
            boxes = make.boxes(len(truth.classes))
            truth.images[make.image(where)] = (split, [truth.classes[label] for label, _ in boxes])
            size = {"width": WIDTH, "height": HEIGHT}
            images.append({"id": number, "file_name": f"{number}.jpg", **size})
            for label, box in boxes:
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": number,
                        "category_id": 7 + label,
                        "bbox": list(box),
                        "iscrowd": 0,
                        "area": box[2] * box[3],
                    }
                )
        categories = [{"id": 7 + at, "name": name} for at, name in enumerate(truth.classes)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        name = "labels.json" if flat else f"{folder}_annotations.coco.json"
        make.write(name, json.dumps(content))
    return truth


def voc(make: Maker) -> Truth:
    truth = Truth("voc", "detection", make.classes())
    seen = set()
    for number in range(8):
        boxes = make.boxes(len(truth.classes))
        names = [truth.classes[label] for label, _ in boxes]
        seen.update(names)
        truth.images[make.image(f"JPEGImages/{number}.jpg")] = (None, names)
        objects = "".join(
            f"<object><name>{truth.classes[label]}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}"
            f"</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for label, (x, y, w, h) in boxes
        )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
        make.write(f"Annotations/{number}.xml", f"<annotation>{size}{objects}</annotation>")
    truth.classes = tuple(sorted(seen))
    return truth


def yolo(make: Maker) -> Truth:
    truth = Truth("yolo", "detection", make.classes())
    for split, word in (("train", "train"), ("val", "val")):
        for number in range(6):
            boxes = make.boxes(len(truth.classes))
            names = [truth.classes[label] for label, _ in boxes]
            truth.images[make.image(f"images/{word}/{number}.jpg")] = (split, names)
            lines = [
                f"{label} {(x + w / 2) / WIDTH} {(y + h / 2) / HEIGHT} {w / WIDTH} {h / HEIGHT}"
                for label, (x, y, w, h) in boxes
            ]
            make.write(f"labels/{word}/{number}.txt", "\n".join(lines) + "\n")
    make.write("data.yaml", f"names: [{', '.join(truth.classes)}]\n")
    return truth


def masks(make: Maker) -> Truth:
    truth = Truth("masks", "semantic_segmentation", ("background", "foreground"))
    for number in range(8):
        truth.images[make.image(f"images/{number}.jpg")] = (None, None)
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
        pixels[2 : 6 + number, 3:9] = 255
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, format="PNG")
        make.write(f"masks/{number}.png", out.getvalue())
    return truth


def unlabelled(make: Maker) -> Truth:
    truth = Truth("images", "images", ())
    for folder, split in make.splits().items():
        for number in range(8):
            truth.images[make.image(f"{folder}{number}.jpg")] = (split, None)
    return truth


KINDS: tuple[Callable[[Maker], Truth], ...] = (
    *(class_folders, table, metadata, coco, voc, yolo, masks, unlabelled),
)
HARMLESS = {
    "README.md": "about",
    "LICENSE": "free",
    ".DS_Store": "\0",
    "._x.jpg": "\0",
    "__MACOSX/x.jpg": "\0",
    "Thumbs.db": "\0",
    "archive.zip": "PK",
    "weights.pt": "x",
    ".git/index.json": "{}",
}
HARMFUL = {
    "drawing.svg": "<svg/>",
    "extra/notes.json": "{}",
    "extra/list.txt": "a",
    "extra/table.xlsx": "x",
    "photo.cr2": "II",
    ".more/hidden.jpg": "jpeg",
}


def build(folder: Path, seed: int) -> Truth:
    """Writes the source of a seed: its labels, then stray files, then damage."""
    dice = random.Random(seed)
    make = Maker(folder, dice)
    truth = dice.choice(KINDS)(make)
    for name in dice.sample(sorted(HARMLESS), dice.randrange(4)):
        make.write(name, HARMLESS[name])
        truth.strays.append(name)
    if dice.random() < 0.3:
        _add_harmful(make, truth)
    if not truth.refused and dice.random() < 0.3:
        _damage(make, truth)
    return truth


def _add_harmful(make: Maker, truth: Truth) -> None:
    if make.dice.random() < 0.3:
        first = sorted(truth.images)[0]
        name = os.path.join(os.path.dirname(first), "gone.jpg")
        (make.folder / name).symlink_to("nowhere.jpg")
    else:
        name = make.dice.choice(sorted(HARMFUL))
        content = HARMFUL[name]
        make.write(name, jpeg(999) if content == "jpeg" else content)
    truth.strays.append(name)
    truth.refused = f"{name} belongs to nothing"


def _damage(make: Maker, truth: Truth) -> None:
    path = make.dice.choice(sorted(truth.images))
    file = make.folder / path
    if make.dice.random() < 0.5:
        file.write_bytes(file.read_bytes()[:100])
        truth.damaged.add(path)
    elif truth.kind not in ("image_folder", "images"):
        file.unlink()  # its label is still there
        truth.damaged.add(path)
    else:
        file.write_bytes(b"<html>not found</html>")
        truth.damaged.add(path)


def files_of(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def check_pack(folder: Path, to: Path, truth: Truth, **options: Any) -> tuple[str, list[str]]:
    """Packs a source; returns "packed" or the error's message, and what is wrong with it."""
    try:
        card = pack(
            str(folder), to, near_duplicates=False, allow_rejected="1", shard_samples=64, **options
        )
    except TesseraError as error:
        if truth.refused or truth.damaged:
            return str(error), []
        return str(error), [f"refused without a reason: {error}"]
    wrong = []
    if truth.refused:
        wrong.append(f"packed, but {truth.refused}")
    if card.task != truth.task:
        wrong.append(f"the task is {card.task}, not {truth.task}")
    if truth.kind != "masks" and card.classes != truth.classes:
        wrong.append(f"the classes are {card.classes}, not {truth.classes}")
    found = json.loads((to / "account.json").read_text())
    parts = found["images"] + found["labels"] + found["documents"] + found["allowed"]
    if not parts + sum(found["others"].values()) == found["files"] == files_of(folder):
        wrong.append(f"the account doesn't add up: {found}, {files_of(folder)} files")
    return "packed", wrong + list(_compare(folder, to, card, truth))


def _compare(folder: Path, to: Path, card: Any, truth: Truth) -> Iterator[str]:
    """Differences between the labelled images and what is in the shards."""
    packed = {data: (split, label) for split, data, label in _samples(to, card)}
    for path, (split, label) in truth.images.items():
        data = (folder / path).read_bytes() if (folder / path).exists() else b""
        if path in truth.damaged:
            if data and data in packed:
                yield f"{path} is damaged, and packed"
            continue
        if data not in packed:
            yield f"{path} is lost"
            continue
        found, given = packed[data]
        if label is not None and given != label:
            yield f"{path} has the label {given}, not {label}"
        if split in ("val", "test") and found != split:
            yield f"{path} is in {found}, not in {split}"
    if len(packed) != len(truth.images) - len(truth.damaged):
        yield f"{len(packed)} images are packed of {len(truth.images)}"


def _samples(to: Path, card: Any) -> Iterator[tuple[str, bytes, Any]]:
    """(split, image file, class or classes of the objects) of each sample."""
    for shard in sorted(to.glob("*/*.tar")):
        members: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                members.setdefault(key, {})[suffix] = file.read()
        for parts in members.values():
            label: Any = None
            if "cls" in parts:
                label = card.classes[int(parts["cls"])]
            elif "json" in parts:
                label = [card.classes[n] for n in json.loads(parts["json"])["labels"]]
            yield shard.parent.name, parts["jpg"], label
