"""Injects random faults of one kind; the program that `faults.py` watches.

In: the arguments KIND FIRST COUNT; a case's number seeds its fault. Out: a line for each case on
stdout, its number before it starts and its outcome when it has ended, so that the watcher knows
which case hung or killed the process:

    refused   a TesseraError
    unharmed  everything that was read is equal to what was packed
    accepted  a changed file was read; it has no checksum that could show the change
    wrong     what was read differs from what was packed, without an error
    other     an error that is not a TesseraError
"""

from __future__ import annotations

import atexit
import io
import os
import pickle
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data import annotations, shards
from pipelines.data import card as cards
from pipelines.data.annotations import Mask, Objects
from pipelines.data.card import Card, ImageCard
from pipelines.data.images import decode_image
from pipelines.data.importers import voc
from pipelines.data.inspection import verify
from pipelines.data.loading.loaders import EvalLoader
from pipelines.data.packing import in_place
from pipelines.data.shards import Packed
from pipelines.data.tar import padded
from pipelines.interfaces import World

SIDE, SAMPLES = 24, 12
CLASSES = ("ant", "bee", "cat")
FORMS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
Case = Callable[[Random, Path], str]


def image_file(number: int, form: str) -> bytes:
    """An encoded image; smooth, so that a decoder can often continue after damage."""
    noise = np.random.default_rng(number)
    small = Image.fromarray(noise.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize((SIDE, SIDE)).save(out, format=form)
    return out.getvalue()


def objects(number: int) -> Objects:
    boxes = np.array([[1, 2, 10 + number, 12], [3, 3, 9, 20.5]], np.float64)
    return Objects(boxes, np.array([number % 3, 1]), np.array([False, number % 2 == 1]))


def annotation(task: str, number: int) -> tuple[str, bytes]:
    if task == "classification":
        return "cls", b"%d" % (number % 3)
    if task == "detection":
        return annotations.encode(objects(number))
    pixels = np.random.default_rng(number).integers(0, 3, (SIDE, SIDE), dtype=np.uint8)
    return annotations.encode(Mask(pixels))


@cache
def packed(task: str) -> Path:
    """A data set of JPEGs and PNGs in three shards, deleted when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="tessera-faults-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    samples = (
        Packed(
            f"s{number}",
            ("jpg", image_file(number, "JPEG"))
            if number % 2
            else ("png", image_file(number, "PNG")),
            annotation(task, number),
            number % 3 if task == "classification" else -1,
        )
        for number in range(SAMPLES)
    )
    split = shards.write(folder, "train", samples, shard_samples=SAMPLES // 3)
    sides = dict.fromkeys(("min_height", "max_height", "min_width", "max_width"), SIDE)
    image = ImageCard(channels=3, mean=(0.5,) * 3, std=(1,) * 3, **sides)
    card = Card(name="x", task=task, classes=CLASSES, image=image, splits={"train": split})
    (folder / cards.FILE).write_text(card.sealed().to_json())
    return folder


def load(folder: Path) -> dict[str, object]:
    """All samples of a data set as one batch, as an evaluation gets it."""
    card = cards.read(folder)
    loader = EvalLoader(
        folder, card, card.spec(), batch_size=SAMPLES, world=World(), split="train", cache="none"
    )
    ((_, batch),) = loader.batches()
    return batch


@cache
def truth(task: str) -> dict[str, object]:
    return load(packed(task))


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)  # type: ignore[arg-type]
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# ── damage ────────────────────────────────────────────────────────────────────────────────────


def flip(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        bit = rng.randrange(len(changed) * 8)
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def cut(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data))]


def overwrite(data: bytes, rng: Random) -> bytes:
    """Zeros or bytes from elsewhere in the file at a random position, or a piece removed."""
    start, length = rng.randrange(len(data)), rng.choice((1, 16, 512, 1024))
    other = rng.randrange(len(data))
    replacement = rng.choice((bytes(length), data[other : other + length], b""))
    return data[:start] + replacement + data[start + length :]


DAMAGE = (flip, flip, cut, overwrite)


# ── kinds ─────────────────────────────────────────────────────────────────────────────────────


def damaged_set(task: str, pattern: str) -> Case:
    """Damages a file of a packed data set, then loads and verifies the data set."""

    def case(rng: Random, scratch: Path) -> str:
        folder = scratch / "set"
        shutil.copytree(packed(task), folder)
        file = rng.choice(sorted(folder.glob(pattern)))
        before = file.read_bytes()
        after = rng.choice(DAMAGE)(before, rng)
        file.write_bytes(after)
        # White space in the card's JSON has no meaning; every other byte is under a checksum.
        if after != before and file.name != cards.FILE and not _differs(folder):
            return "wrong"
        return "unharmed" if same(load(folder), truth(task)) else "wrong"

    return case


def _differs(folder: Path) -> bool:
    try:
        return bool(verify.verify(folder, workers=1).differences)
    except TesseraError:
        return True


def damaged_image(form: str) -> Case:
    def case(rng: Random, scratch: Path) -> str:
        del scratch
        data = image_file(rng.randrange(8), form)
        changed = rng.choice(DAMAGE)(data, rng)
        decoded = decode_image(changed, 3)
        if torch.equal(decoded, decode_image(data, 3)):
            return "unharmed"
        return "wrong" if form == "PNG" else "accepted"

    return case


def damaged_json(rng: Random, scratch: Path) -> str:
    """Damages objects as JSON, outside of a shard."""
    del scratch
    data = annotations.encode(objects(rng.randrange(8)))[1]
    changed = rng.choice(DAMAGE)(data, rng)
    size = {"height": SIDE, "width": SIDE, "classes": len(CLASSES), "where": "x"}
    decoded = annotations.decode_objects(changed, **size)
    annotations.check(decoded, **size)
    return "unharmed" if annotations.encode(decoded)[1] == data else "accepted"


def damaged_xml(rng: Random, scratch: Path) -> str:
    """Damages one annotation of a VOC source."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (scratch / folder).mkdir(parents=True)
    side = f"<width>{SIDE}</width><height>{SIDE}</height>"
    box = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>12</xmax><ymax>20</ymax></bndbox>"
    text = f"<annotation><size>{side}</size><object><name>ant</name>{box}</object></annotation>"
    good = text.encode()
    for number, data in enumerate((good, rng.choice(DAMAGE)(good, rng))):
        (scratch / "JPEGImages" / f"{number}.jpg").write_bytes(image_file(number, "JPEG"))
        (scratch / "Annotations" / f"{number}.xml").write_bytes(data)
    (scratch / "ImageSets" / "Main" / "train.txt").write_text("0\n1\n")
    source = voc.read(str(scratch), {})
    item = source.items[1]
    if item.problem:
        return "refused"
    assert source.annotate is not None
    result = source.annotate(item)
    annotations.check(
        result, height=SIDE, width=SIDE, classes=max(len(source.classes), 1), where="x"
    )
    expected = Objects(np.array([[1.0, 2, 12, 20]]), np.array([0]), np.array([False]))
    equal = annotations.encode(result) == annotations.encode(expected) and source.classes == (
        "ant",
    )
    return "unharmed" if equal else "accepted"


def read_in_place(folder: Path, data: bytes) -> str:
    """Indexes a WebDataset shard from elsewhere in place and reads it; every key must be valid."""
    (folder / "in").mkdir()
    (folder / "in" / "train-0.tar").write_bytes(data)
    card = in_place.index(
        str(folder / "in"), folder / "out", options={"extra": "skip"}, allow_rejected="100%"
    )
    batch = load(folder / "out")
    keys: list[str] = batch["key"]  # type: ignore[assignment]
    for key in keys:
        cards.check_key(key, "shard")
    return "accepted" if len(keys) == card.split("train").samples else "wrong"


def good_tar(form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for number in range(6):
            for name, data in (
                (f"{number}.cls", b"1"),
                (f"{number}.jpg", image_file(number, "JPEG")),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def damaged_tar(rng: Random, scratch: Path) -> str:
    form = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    return read_in_place(scratch, rng.choice(DAMAGE)(good_tar(form), rng))


class Marker:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


STEMS = ("..", ".", "", "a", "\x1b[2J", "é", "x" * 90, "a\nb", "%2E", "c;touch marker")
ENDS = (".jpg", ".cls", ".pkl", ".PYD", ".pth", ".pickle.gz", ".npy", ".json", "")


def hostile_tar(rng: Random, scratch: Path) -> str:
    """Valid samples, and one member with an odd name, type or size that holds a pickle."""
    payload = pickle.dumps(Marker(scratch / "marker"))
    member = tarfile.TarInfo("/".join(rng.choices(STEMS, k=rng.randint(1, 3))))
    member.name += rng.choice(ENDS)
    member.type = bytes([rng.choice(b"0000001234567LKSxgVZ")])
    member.linkname = rng.choice(("", "/etc/passwd", "0.jpg"))
    member.size = rng.choice((len(payload), len(payload), 0, 1 << 32))
    content = payload + bytes(-len(payload) % 512) if member.size else b""
    block = member.tobuf(tarfile.GNU_FORMAT) + content
    good = good_tar(tarfile.GNU_FORMAT)
    sample = 2 * 512 + 512 + padded(len(image_file(0, "JPEG")))
    position = rng.choice((0, 1024, sample, sample))  # before, in and after the first sample
    try:
        return read_in_place(scratch, good[:position] + block + good[position:])
    finally:
        assert not (scratch / "marker").exists(), "a pickle was executed"


TASKS = ("classification", "detection", "semantic_segmentation")
KINDS: dict[str, Case] = {
    **{f"shards, {task}": damaged_set(task, "train/*.tar") for task in TASKS},
    "index": damaged_set("classification", "train/index.npy"),
    "card": damaged_set("classification", "card.json"),
    **{f"{form} files": damaged_image(form) for form in FORMS},
    "annotations, JSON": damaged_json,
    "annotations, XML": damaged_xml,
    "shards of others": damaged_tar,
    "hostile members": hostile_tar,
}


def die(rng: Random, scratch: Path) -> str:
    os.abort()


def hang(rng: Random, scratch: Path) -> str:
    while True:
        time.sleep(1)


def lie(rng: Random, scratch: Path) -> str:
    return "wrong"


def fail(rng: Random, scratch: Path) -> str:
    raise KeyError("x")


CONTROLS: dict[str, Case] = {"die": die, "hang": hang, "lie": lie, "fail": fail}
"""Controls: the outcomes that the watcher must notice."""


def main(kind: str, first: int, count: int) -> None:
    torch.set_num_threads(1)
    case = {**KINDS, **CONTROLS}[kind]
    for number in range(first, first + count):
        print(number, end=" ", flush=True)
        with tempfile.TemporaryDirectory(prefix="tessera-fault-") as scratch:
            try:
                outcome = case(Random(f"{kind} {number}"), Path(scratch))
            except TesseraError:
                outcome = "refused"
            except Exception as error:
                outcome = f"other {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(outcome, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
