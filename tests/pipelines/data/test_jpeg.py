"""The fast decoder returns exactly Pillow's pixels or None, and no damaged file crashes it."""

from __future__ import annotations

import io
import random
import sys

import fresh_process
import numpy as np
import pytest
import torch
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data import images
from pipelines.data import jpeg as jpegs
from pipelines.data.image_reading import MAX_PIXELS
from pipelines.data.jpeg import BACKENDS, SHRINKS, FastDecoder, read_header

SIZES = [(1, 1), (1, 7), (7, 1), (8, 8), (9, 17), (15, 16), (17, 33), (31, 32), (33, 31), (64, 65)]


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth shapes and some noise, in colour."""
    rng = np.random.default_rng((height, width, seed))
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth.astype(int) + rng.integers(-20, 20, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def by_pillow(data: bytes, channels: int) -> torch.Tensor:
    return images.to_tensor(images.open_image(data, "image"), channels)


def fast(data: bytes, channels: int = 3) -> torch.Tensor | None:
    return FastDecoder(channels, MAX_PIXELS)(memoryview(data))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each decoder that this machine has, used for the test."""
    decode = BACKENDS[request.param]()
    if decode is None:
        pytest.skip(f"{request.param} has no decoder on this machine")
    monkeypatch.setattr(jpegs, "backend", lambda: decode)
    return str(request.param)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.usefixtures("backend")
def test_the_pixels_equal_pillows(subsampling: int, progressive: bool) -> None:
    for height, width in SIZES:
        for quality, restart in ((5, 0), (50, 1), (90, 3), (100, 0)):
            data = jpeg(
                photo(height, width),
                quality=quality,
                subsampling=subsampling,
                progressive=progressive,
                optimize=True,
                restart_marker_blocks=restart,
            )
            result = fast(data)
            assert result is not None
            assert torch.equal(result, by_pillow(data, 3))


@pytest.mark.usefixtures("backend")
def test_grey_pixels_equal_pillows_in_one_channel_and_in_three() -> None:
    for height, width in SIZES:
        for progressive in (False, True):
            data = jpeg(photo(height, width).convert("L"), progressive=progressive)
            for channels in (1, 3):
                result = fast(data, channels)
                assert result is not None
                assert torch.equal(result, by_pillow(data, channels))


def test_without_a_fast_decoder_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is missing, or has no decoder any more, is not taken for a damaged file."""
    monkeypatch.setattr(jpegs, "backend", lambda: None)
    data = jpeg(photo(33, 31))
    assert fast(data) is None
    assert torch.equal(images.decode_image(data, 3), by_pillow(data, 3))


@pytest.mark.parametrize("missing", BACKENDS)
def test_a_missing_library_leaves_the_next_one(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert BACKENDS[missing]() is None
    jpegs.backend.cache_clear()
    try:
        assert jpegs.backend() is not None
        data = jpeg(photo(33, 31))
        assert torch.equal(images.decode_image(data, 3), by_pillow(data, 3))
    finally:
        jpegs.backend.cache_clear()


@pytest.mark.parametrize(("mode", "subsampling"), [("RGB", 0), ("RGB", 1), ("RGB", 2), ("L", 0)])
def test_shrunk_pixels_equal_pillows(mode: str, subsampling: int, backend: str) -> None:
    """libjpeg's own reduction, which Pillow calls a draft; torchvision has none."""
    for height, width in SIZES:
        for progressive in (False, True):
            options = {"quality": 90, "subsampling": subsampling, "progressive": progressive}
            data = jpeg(photo(height, width).convert(mode), **options)
            for shrink in SHRINKS:
                if min(height, width) < 8:
                    continue
                result = FastDecoder(3, MAX_PIXELS)(memoryview(data), shrink=shrink)
                if backend == "torchvision":
                    assert result is None
                    continue
                draft = Image.open(io.BytesIO(data))
                draft.draft(None, (width // shrink, height // shrink))
                assert result is not None
                assert result.shape == (3, -(-height // shrink), -(-width // shrink))
                assert torch.equal(result, images.to_tensor(draft, 3))


def test_one_decoder_reads_several_files() -> None:
    """It caches the last header; a file of another size or kind must not be read with it."""
    decoder = FastDecoder(3, MAX_PIXELS)
    files = [jpeg(photo(16, 24, seed), quality=90) for seed in range(3)]
    files += [jpeg(photo(24, 16)), jpeg(photo(8, 8).convert("L")), files[0]]
    for data in files:
        result = decoder(memoryview(data))
        assert result is not None
        assert torch.equal(result, by_pillow(data, 3))
    for data in (b"", b"\xff\xd8", files[0][:100], jpeg(photo(8, 8).convert("CMYK"))):
        assert decoder(memoryview(data)) is None


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x010F] = "maker"
    if orientation:
        made[0x0112] = orientation
    return made


XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation='6'/>"


def app(data: bytes, marker: int, content: bytes) -> bytes:
    """The file with a segment inserted after its first marker."""
    segment = bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content
    return data[:2] + segment + data[2:]


def other_files() -> dict[str, bytes]:
    image = photo(24, 40)
    plain = jpeg(image)
    lossy = {"quality": 80, "subsampling": 0}
    frame = plain.index(b"\xff\xc0")
    twelve, names, high = bytearray(plain), bytearray(jpeg(image, **lossy)), bytearray(plain)
    twelve[frame + 4] = 12
    at = bytes(names).index(b"\xff\xc0") + 10
    names[at], names[at + 3], names[at + 6] = b"RGB"
    high[frame + 11] = 0x12  # twice the rows
    return {
        "turned": jpeg(image, exif=exif(6)),
        "mirrored": jpeg(image, exif=exif(2)),
        "turned by XMP": app(plain, 0xE1, XMP),
        "CMYK": jpeg(image.convert("CMYK")),
        "Adobe": app(plain, 0xEE, b"Adobe\0\x64\0\0\0\0\0"),
        "several images": app(plain, 0xE2, b"MPF\0" + b"\0" * 8),
        "12 bits": bytes(twelve),
        "RGB by name": bytes(names),
        "4:4:0": bytes(high),
        "RGB kept": jpeg(image, keep_rgb=True),
        "no JPEG": images.encode_png(np.asarray(image)),
        "two frames": plain[:frame] + plain[frame : frame + 19] + plain[frame:],
        "arithmetic": plain.replace(b"\xff\xc0", b"\xff\xc9", 1),
        "no height": plain[: frame + 5] + b"\0\0" + plain[frame + 7 :],
    }


@pytest.mark.parametrize("name", other_files())
def test_other_files_are_decoded_by_pillow(name: str) -> None:
    data = other_files()[name]
    assert read_header(data) is None
    assert fast(data) is None
    results = []
    for decode in (by_pillow, images.decode_image):
        try:
            results.append(decode(data, 3).tolist())
        except TesseraError as error:
            results.append(str(error))
    assert results[0] == results[1]


@pytest.mark.control(24)
def test_the_decoder_alone_ignores_orientation() -> None:
    """Control: therefore Pillow decodes rotated files."""
    import torchvision  # noqa: F401

    data = jpeg(photo(24, 40), exif=exif(6))
    bare = torch.ops.image.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), 3)
    assert bare.shape == (3, 24, 40)
    assert images.decode_image(data, 3).shape == (3, 40, 24)


@pytest.mark.parametrize("orientation", [0, 1])
def test_upright_photos_with_exif_use_the_fast_decoder(orientation: int) -> None:
    data = jpeg(photo(24, 40), exif=exif(orientation))
    result = fast(data)
    assert result is not None
    assert torch.equal(result, by_pillow(data, 3))


def test_colour_is_converted_to_grey_as_by_pillow() -> None:
    data = jpeg(photo(24, 40))
    assert fast(data, 1) is None
    assert torch.equal(images.decode_image(data, 1), by_pillow(data, 1))


@pytest.mark.fault(21)
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_is_refused(progressive: bool) -> None:
    data = jpeg(photo(40, 56), quality=85, progressive=progressive)
    for end in {len(data) * percent // 100 for percent in range(100)} | {len(data) - 1}:
        assert fast(data[:end]) is None
        with pytest.raises(TesseraError):
            images.decode_image(data[:end], 3)


FUZZ = """
import random, sys, torch
from models.core.errors import TesseraError
from pipelines.data import images
from pipelines.data.image_reading import MAX_PIXELS
from pipelines.data.jpeg import FastDecoder
files = [bytes.fromhex(line) for line in sys.stdin.read().split()]
random.seed(int(sys.argv[1]))
decoded = refused = 0
for number in range(int(sys.argv[2])):
    data = bytearray(files[number % len(files)])
    for _ in range(random.choice((1, 1, 2, 8))):
        bit = random.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
    data = bytes(data)
    try:
        expected = images.to_tensor(images.open_image(data, "image"), 3)
    except TesseraError:
        expected = None
    found = FastDecoder(3, MAX_PIXELS)(memoryview(data))
    if found is not None and expected is not None:
        assert torch.equal(found, expected), data.hex()
    try:
        images.decode_image(data, 3)
        decoded += 1
    except TesseraError:
        refused += 1
print(decoded, refused)
"""
FLIPPED = 3000


@pytest.mark.slow
@pytest.mark.fault(3)
def test_flipped_bits_crash_no_process() -> None:
    """In a new process, to survive a crash. If both decoders accept a damaged file, their pixels
    are equal."""
    image = photo(24, 40)
    files = [
        jpeg(image, quality=85, subsampling=subsampling, progressive=progressive)
        for subsampling in (0, 2)
        for progressive in (False, True)
    ]
    given = "\n".join(data.hex() for data in files)
    done = fresh_process.run(FUZZ, "7", str(FLIPPED), stdin=given.encode())
    assert done.returncode == 0, done.stderr[-2000:]
    decoded, refused = map(int, done.stdout.split())
    assert decoded + refused == FLIPPED
    assert refused > 0


def test_any_bytes_can_be_parsed_as_a_header() -> None:
    random.seed(3)
    data = jpeg(photo(8, 8))
    for _ in range(2000):
        cut = bytearray(data[: random.randrange(len(data))] + random.randbytes(8))
        cut[random.randrange(len(cut))] = random.randrange(256)
        header = read_header(bytes(cut))
        assert header is None or header[0] * header[1] > 0


BOMB = """
import sys
from models.core.errors import TesseraError
from pipelines.data import images
from pipelines.data.image_reading import MAX_PIXELS
import torchvision
def peak():  # in kB; getrusage's would begin with that of the process that started this one
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1])
for good in sys.argv[1:]:
    images.decode_image(bytes.fromhex(good), 3)
before = peak()
for good in sys.argv[1:]:
    for height, width in ((13_000, 13_000), (19_000, 19_000), (65_000, 65_000)):
        data = bytearray.fromhex(good)
        at = data.index(b"\\xff\\xc0" if b"\\xff\\xc0" in data else b"\\xff\\xc2")
        data[at + 5 : at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        try:
            images.decode_image(bytes(data), 3)
            raise SystemExit("taken")
        except TesseraError as error:
            assert "pixels" in str(error), error
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.fault(22)
def test_a_jpeg_bomb_is_refused_from_its_header() -> None:
    files = [jpeg(photo(16, 16), progressive=progressive) for progressive in (False, True)]
    done = fresh_process.run(BOMB, *(data.hex() for data in files))
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 50_000
