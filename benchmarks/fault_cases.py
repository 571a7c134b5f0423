"""One fault of a kind, drawn by a seed, and how it ended; the program that `faults.py` watches.

In: on the command line a kind, the first case, how many. Out: a line for each case on stdout, its
number before it begins and its outcome when it has ended, so that the watcher knows which of them
hung or killed the process:

    refused   a TesseraError
    unharmed  everything read is what was packed
    taken     a file from outside was read though it was changed: there is no checksum to tell
    wrong     what was read differs from what was packed, and nothing said so
    other     an error that is none of ours
"""

from __future__ import annotations

import atexit
import io
import os
import pickle
import random
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

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
Draw = random.Random
Case = Callable[[Draw, Path], str]


def picture(number: int, form: str) -> bytes:
    """Smooth, so that a decoder has something to go on with after damage."""
    random_numbers = np.random.default_rng(number)
    small = Image.fromarray(random_numbers.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize((SIDE, SIDE)).save(out, format=form)
    return out.getvalue()


def objects(number: int) -> Objects:
    boxes = np.array([[1, 2, 10 + number, 12], [3, 3, 9, 20.5]], np.float64)
    return Objects(boxes, np.array([number % 3, 1]), np.array([False, number % 2 == 1]))


def note(task: str, number: int) -> tuple[str, bytes]:
    if task == "classification":
        return "cls", b"%d" % (number % 3)
    if task == "detection":
        return annotations.encode(objects(number))
    pixels = np.random.default_rng(number).integers(0, 3, (SIDE, SIDE), dtype=np.uint8)
    return annotations.encode(Mask(pixels))


@cache
def packed(task: str) -> Path:
    """A data set of JPEGs and PNGs in three shards; lives as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="tessera-faults-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    given = (
        Packed(
            f"s{number}",
            ("jpg", picture(number, "JPEG")) if number % 2 else ("png", picture(number, "PNG")),
            note(task, number),
            number % 3 if task == "classification" else -1,
        )
        for number in range(SAMPLES)
    )
    split = shards.write(folder, "train", given, shard_samples=SAMPLES // 3)
    sides = dict.fromkeys(("min_height", "max_height", "min_width", "max_width"), SIDE)
    image = ImageCard(channels=3, mean=(0.5,) * 3, std=(1,) * 3, **sides)
    card = Card(name="x", task=task, classes=CLASSES, image=image, splits={"train": split})
    (folder / cards.FILE).write_text(card.sealed().to_json())
    return folder


def load(folder: Path) -> dict[str, object]:
    """All of a data set as a training or an evaluation gets it."""
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


def flip(data: bytes, draw: Draw) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        bit = draw.randrange(len(changed) * 8)
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def cut(data: bytes, draw: Draw) -> bytes:
    return data[: draw.randrange(len(data))]


def blot(data: bytes, draw: Draw) -> bytes:
    """Zeros, or bytes from elsewhere in the file, in the midst of it; or a piece is missing."""
    start, length = draw.randrange(len(data)), draw.choice((1, 16, 512, 1024))
    other = draw.randrange(len(data))
    filling = draw.choice((bytes(length), data[other : other + length], b""))
    return data[:start] + filling + data[start + length :]


DAMAGE = (flip, flip, cut, blot)


# ── kinds ─────────────────────────────────────────────────────────────────────────────────────


def damaged_set(task: str, pattern: str) -> Case:
    """A file of a packed set is damaged; then the set is read as in a training, and verified."""

    def case(draw: Draw, scratch: Path) -> str:
        folder = scratch / "set"
        shutil.copytree(packed(task), folder)
        file = draw.choice(sorted(folder.glob(pattern)))
        before = file.read_bytes()
        after = draw.choice(DAMAGE)(before, draw)
        file.write_bytes(after)
        # Blanks in a card's JSON are nobody's content; every other byte is under a checksum.
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
    def case(draw: Draw, scratch: Path) -> str:
        del scratch
        data = picture(draw.randrange(8), form)
        changed = draw.choice(DAMAGE)(data, draw)
        found = decode_image(changed, 3)
        if torch.equal(found, decode_image(data, 3)):
            return "unharmed"
        return "wrong" if form == "PNG" else "taken"

    return case


def damaged_note(draw: Draw, scratch: Path) -> str:
    """Objects as JSON, outside of a shard."""
    del scratch
    data = annotations.encode(objects(draw.randrange(8)))[1]
    changed = draw.choice(DAMAGE)(data, draw)
    size = {"height": SIDE, "width": SIDE, "classes": len(CLASSES), "where": "x"}
    found = annotations.decode_objects(changed, **size)
    annotations.check(found, **size)
    return "unharmed" if annotations.encode(found)[1] == data else "taken"


def damaged_xml(draw: Draw, scratch: Path) -> str:
    """A VOC source, one of whose annotations is damaged."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (scratch / folder).mkdir(parents=True)
    side = f"<width>{SIDE}</width><height>{SIDE}</height>"
    box = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>12</xmax><ymax>20</ymax></bndbox>"
    text = f"<annotation><size>{side}</size><object><name>ant</name>{box}</object></annotation>"
    good = text.encode()
    for number, data in enumerate((good, draw.choice(DAMAGE)(good, draw))):
        (scratch / "JPEGImages" / f"{number}.jpg").write_bytes(picture(number, "JPEG"))
        (scratch / "Annotations" / f"{number}.xml").write_bytes(data)
    (scratch / "ImageSets" / "Main" / "train.txt").write_text("0\n1\n")
    source = voc.read(str(scratch), {})
    item = source.items[1]
    if item.problem:
        return "refused"
    assert source.annotate is not None
    found = source.annotate(item)
    annotations.check(
        found, height=SIDE, width=SIDE, classes=max(len(source.classes), 1), where="x"
    )
    plain = Objects(np.array([[1.0, 2, 12, 20]]), np.array([0]), np.array([False]))
    equal = annotations.encode(found) == annotations.encode(plain) and source.classes == ("ant",)
    return "unharmed" if equal else "taken"


def foreign(folder: Path, data: bytes) -> str:
    """Indexes a shard of others and reads it; no key may be more than a key."""
    (folder / "in").mkdir()
    (folder / "in" / "train-0.tar").write_bytes(data)
    card = in_place.index(
        str(folder / "in"), folder / "out", options={"extra": "skip"}, allow_rejected="100%"
    )
    batch = load(folder / "out")
    keys: list[str] = batch["key"]  # type: ignore[assignment]
    for key in keys:
        cards.check_key(key, "shard")
    return "taken" if len(keys) == card.split("train").samples else "wrong"


def good_tar(form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for number in range(6):
            for name, data in ((f"{number}.cls", b"1"), (f"{number}.jpg", picture(number, "JPEG"))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def damaged_tar(draw: Draw, scratch: Path) -> str:
    form = draw.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    return foreign(scratch, draw.choice(DAMAGE)(good_tar(form), draw))


class Mark:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


STEMS = ("..", ".", "", "a", "\x1b[2J", "é", "x" * 90, "a\nb", "%2E", "c;touch marker")
ENDS = (".jpg", ".cls", ".pkl", ".PYD", ".pth", ".pickle.gz", ".npy", ".json", "")


def hostile_tar(draw: Draw, scratch: Path) -> str:
    """Good samples, and one member of a strange name, kind or size with a pickle in it."""
    payload = pickle.dumps(Mark(scratch / "marker"))
    stranger = tarfile.TarInfo("/".join(draw.choices(STEMS, k=draw.randint(1, 3))))
    stranger.name += draw.choice(ENDS)
    stranger.type = bytes([draw.choice(b"0000001234567LKSxgVZ")])
    stranger.linkname = draw.choice(("", "/etc/passwd", "0.jpg"))
    stranger.size = draw.choice((len(payload), len(payload), 0, 1 << 32))
    content = payload + bytes(-len(payload) % 512) if stranger.size else b""
    member = stranger.tobuf(tarfile.GNU_FORMAT) + content
    good = good_tar(tarfile.GNU_FORMAT)
    sample = 2 * 512 + 512 + padded(len(picture(0, "JPEG")))
    at = draw.choice((0, 1024, sample, sample))  # before, in and after the first sample
    try:
        return foreign(scratch, good[:at] + member + good[at:])
    finally:
        assert not (scratch / "marker").exists(), "a pickle was executed"


TASKS = ("classification", "detection", "semantic_segmentation")
KINDS: dict[str, Case] = {
    **{f"shards, {task}": damaged_set(task, "train/*.tar") for task in TASKS},
    "index": damaged_set("classification", "train/index.npy"),
    "card": damaged_set("classification", "card.json"),
    **{f"{form} files": damaged_image(form) for form in FORMS},
    "annotations, JSON": damaged_note,
    "annotations, XML": damaged_xml,
    "shards of others": damaged_tar,
    "hostile members": hostile_tar,
}


def die(draw: Draw, scratch: Path) -> str:
    os.abort()


def hang(draw: Draw, scratch: Path) -> str:
    while True:
        time.sleep(1)


def lie(draw: Draw, scratch: Path) -> str:
    return "wrong"


def fail(draw: Draw, scratch: Path) -> str:
    raise KeyError("x")


CONTROLS: dict[str, Case] = {"die": die, "hang": hang, "lie": lie, "fail": fail}
"""What the watcher must see."""


def main(kind: str, first: int, count: int) -> None:
    torch.set_num_threads(1)
    case = {**KINDS, **CONTROLS}[kind]
    for number in range(first, first + count):
        print(number, end=" ", flush=True)
        with tempfile.TemporaryDirectory(prefix="tessera-fault-") as scratch:
            try:
                outcome = case(Draw(f"{kind} {number}"), Path(scratch))
            except TesseraError:
                outcome = "refused"
            except Exception as error:
                outcome = f"other {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(outcome, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
