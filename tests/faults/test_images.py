"""Images that crash a decoder, need too much memory, or are easily misread.

Tested on every path that decodes images and, as controls, with the libraries alone."""

from __future__ import annotations

import io
import json
import random
import signal
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import fresh_process
import numpy as np
import pytest
import torch
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data import annotations, images, shards
from pipelines.data.annotations import Mask
from pipelines.data.card import Card, ImageCard
from pipelines.data.inspection import survey
from pipelines.data.loading.loaders import EvalLoader
from pipelines.data.packing import pack
from pipelines.data.shards import Packed
from pipelines.interfaces import World

ROOT = Path(__file__).parents[2]
MB = 1 << 20


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format=form, **options)
    return out.getvalue()


def noise(height: int = 20, width: int = 30, channels: int = 3) -> Image.Image:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def flip(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def make(folder: Path, image: bytes, mask: bytes | None = None, channels: int = 3) -> Card:
    """A data set of one image with correct checksums, as if it had been packed like this."""
    note = ("mask.png", mask) if mask else None
    split = shards.write(folder, "train", [Packed("a", ("png", image), note)])
    sizes = {"min_height": 20, "max_height": 20, "min_width": 30, "max_width": 30}
    about = ImageCard(channels=channels, mean=(0.5,) * channels, std=(1,) * channels, **sizes)
    task = "semantic_segmentation" if mask else "images"
    classes = ("no", "yes") if mask else ()
    card = Card(name="x", task=task, classes=classes, image=about, splits={"train": split})
    (folder / "card.json").write_text(card.sealed().to_json())
    return card.sealed()


def load(folder: Path, card: Card) -> torch.Tensor:
    """The image as training and evaluation decode it."""
    loader = EvalLoader(folder, card, card.spec(), batch_size=9, world=World(), split="train")
    ((_, batch),) = loader.batches()
    image: torch.Tensor = batch["image"][0]
    return image


# ── a bit of a PNG ────────────────────────────────────────────────────────────────────────────

STOCK_DECODER = """
import sys, torch
from torchvision.io import decode_image
for data in sys.stdin.buffer.read().split(b"--between--"):
    pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    print(list(decode_image(pixels).shape), flush=True)
"""


@pytest.mark.slow
@pytest.mark.control(20)
def test_torchvision_crashes_on_a_flipped_bit() -> None:
    data = encoded(noise())
    given = data + b"--between--" + flip(data, len(data) * 4)
    done = fresh_process.run(STOCK_DECODER, stdin=given)
    assert done.stdout == b"[3, 20, 30]\n"
    assert done.returncode == -signal.SIGSEGV


@pytest.mark.fault(20)
def test_a_flipped_bit_raises_an_error_on_every_path(tmp_path: Path) -> None:
    """Packing, loading, inspecting and predicting; as an image and as a mask."""
    data = encoded(noise())
    grey = annotations.encode(Mask(np.asarray(noise(channels=1)) % 2))[1]
    folder, source = tmp_path / "set", tmp_path / "source"
    for name in ("a/0.png", "b/1.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    bits = random.Random(0).sample(range(len(data) * 8), 12)
    for bit in bits:
        damaged = flip(data, bit)
        card = make(folder, damaged)
        with pytest.raises(TesseraError, match="the image of sample a"):
            load(folder, card)
        with pytest.raises(TesseraError, match="sample a"):
            survey.take(folder, card, samples=1)
        with pytest.raises(TesseraError, match=r"cat\.png"):
            images.decode_image(damaged, 3, where="cat.png")  # as predictions do
        card = make(folder, data, flip(grey, bit % (len(grey) * 8)))
        with pytest.raises(TesseraError, match="sample a"):
            load(folder, card)
    (source / "b/1.png").write_bytes(damaged)
    with pytest.raises(TesseraError, match=r"unreadable image: 1"):
        pack.pack(str(source), tmp_path / "out")


# ── decompression bombs ───────────────────────────────────────────────────────────────────────


def claim(form: str, width: int, height: int) -> bytes:
    """An image of 16 by 16 pixels whose header claims more."""
    data = bytearray(encoded(noise(16, 16), form))
    if form == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif form == "JPEG":
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    elif form == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
        at = data.rindex(b",\0\0\0\0\x10\0\x10\0")
        data[at + 5 : at + 9] = struct.pack("<HH", width, height)
    elif form == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif form == "WEBP":
        at = data.index(b"\x9d\x01\x2a") + 3
        data[at : at + 4] = struct.pack("<HH", width, height)
    else:
        for tag, value in ((256, width), (257, height)):
            at = next(
                at for at in range(0, len(data), 2) if data[at : at + 2] == struct.pack("<H", tag)
            )
            data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, value)
    return bytes(data)


PEAK = """
def peak():  # in bytes; getrusage's maximum would include the parent process
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) * 1024
"""
DECODE = """
import json, sys
from models.core.errors import TesseraError
from pipelines.data import images
folder, good, *bad = sys.argv[1:]
images.decode_image(open(f"{folder}/{good}", "rb").read(), 3)
before = peak()
for name in bad:
    try:
        images.decode_image(open(f"{folder}/{name}", "rb").read(), 3)
        message = "decoded"
    except TesseraError as error:
        message = error.message
    print(json.dumps([name, message, peak() - before]))
"""
BOMB_SIDES = {
    form: [(13_000, 13_000), (16_000, 16_000) if form == "WEBP" else (19_000, 19_000)]
    for form in ("PNG", "GIF", "BMP", "WEBP", "TIFF")
}
"""Width and height; WEBP has 14 bits for each."""


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """For each file that one new process decodes in turn, the message, and the most memory in bytes
    that this file or one before it took."""
    files = {"good": encoded(noise())}
    for form, sizes in BOMB_SIDES.items():
        files[form] = encoded(noise(16, 16), form)
        for width, height in sizes:
            files[f"{form} {width}"] = claim(form, width, height)
    files.update((name, make()) for name, make in COMPRESSED.items())
    folder = tmp_path_factory.mktemp("bombs")
    for name, data in files.items():
        (folder / name).write_bytes(data)
    done = fresh_process.run(PEAK + DECODE, str(folder), *files)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = map(json.loads, done.stdout.decode().splitlines())
    return {name: (message, grown) for name, message, grown in rows}


@pytest.mark.slow
@pytest.mark.fault(22)
@pytest.mark.parametrize("form", BOMB_SIDES)
def test_a_decompression_bomb_is_refused_without_allocating_memory(
    form: str, decoded: dict[str, tuple[str, int]]
) -> None:
    assert decoded[form][0] == "decoded"
    bombs = [decoded[f"{form} {width}"] for width, _ in BOMB_SIDES[form]]
    assert all("pixels" in message for message, _ in bombs), bombs
    assert all(grown < 50 * MB for _, grown in bombs)


@pytest.mark.slow
@pytest.mark.control(22)
def test_pillow_alone_decodes_the_decompression_bomb() -> None:
    program = """
import io, sys, warnings
from PIL import Image
warnings.simplefilter("ignore")
image = Image.open(io.BytesIO(sys.stdin.buffer.read()))
before = peak()
image.load()
print(peak() - before)
"""
    rows = zlib.compress(bytes(13_001 * 13_000), 1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        total = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + total

    head = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    bomb = b"\x89PNG\r\n\x1a\n" + parts
    with pytest.raises(TesseraError, match="13000 by 13000 pixels"):
        images.decode_image(bomb, 1)
    done = fresh_process.run(PEAK + program, stdin=bomb)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 150 * MB


# ── one conversion ────────────────────────────────────────────────────────────────────────────


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(noise(), "JPEG", exif=exif, quality=95)


def odd_images() -> dict[str, bytes]:
    grey = noise(channels=1)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    files = {
        "CMYK": encoded(noise().convert("CMYK"), "JPEG"),
        "palette": encoded(noise().quantize(16)),
        "transparent palette": encoded(noise().quantize(16), transparency=3),
        "RGBA": encoded(noise(channels=4)),
        "LA": encoded(noise().convert("LA")),
        "1 bit": encoded(grey.convert("1")),
        "grey": encoded(grey),
        "16 bits": encoded(deep),
    }
    return files | {f"orientation {n}": rotated(n) for n in range(1, 9)}


@pytest.mark.fault(23, 24)
@pytest.mark.parametrize("name", odd_images())
def test_training_and_prediction_see_the_same_pixels(name: str, tmp_path: Path) -> None:
    data = odd_images()[name]
    card = make(tmp_path, data)
    predicted = images.fit_image(images.decode_image(data, 3), 20, 30, "stretch")
    assert torch.equal(load(tmp_path, card), predicted)


@pytest.mark.control(23, 24)
def test_libraries_alone_ignore_orientation_and_clip_16_bits() -> None:
    from torchvision.io import decode_image

    data = rotated(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's deprecations
        bare = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    assert bare.shape == (3, 20, 30)
    assert images.decode_image(data, 3).shape == (3, 30, 20)
    ramp = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    deep = encoded(Image.fromarray(ramp))
    clipped = np.asarray(Image.open(io.BytesIO(deep)).convert("L"))
    assert (clipped == 255).mean() > 0.9
    ours = images.decode_image(deep, 1)[0].numpy()
    assert np.abs(ours - ramp / 257).max() <= 0.5


# ── metadata ─────────────────────────────────────────────────────────────────────────────────


def png_with(kind: bytes, content: bytes) -> bytes:
    data = encoded(noise())
    total = struct.pack(">I", zlib.crc32(kind + content))
    return data[:33] + struct.pack(">I", len(content)) + kind + content + total + data[33:]


COMPRESSED: dict[str, Callable[[], bytes]] = {
    "text": lambda: png_with(b"zTXt", b"a\0\0" + zlib.compress(bytes(300 * MB), 9)),
    "many texts": lambda: png_with(b"tEXt", b"a\0" + b"x" * 20 * MB),
    "profile": lambda: png_with(b"iCCP", b"a\0\0" + zlib.compress(bytes(300 * MB), 9)),
}


@pytest.mark.slow
@pytest.mark.fault(12, 22)
@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_metadata_is_never_decompressed(
    name: str, decoded: dict[str, tuple[str, int]]
) -> None:
    """It is refused or skipped."""
    assert decoded[name][1] < 100 * MB
