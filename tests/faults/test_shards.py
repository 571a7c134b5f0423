"""Damaged shards, in Tessera and, as controls, in stock webdataset.

Tested on every path that reads shards: before training (`check_feedable`), during training
(`TrainLoader`), and in `verify`. A damaged shard raises an error that names it. It never leads to a
shorter epoch or to an image with a wrong label.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data.card import Card
from pipelines.data.images import encode_png, open_image
from pipelines.data.inspection import verify
from pipelines.data.loading import preflight
from pipelines.data.loading.loaders import TrainLoader
from pipelines.data.packing import in_place
from pipelines.data.shards import ShardReader
from pipelines.data.tar import BLOCK
from pipelines.interfaces import World
from pipelines.storage.base import CacheSettings, use_cache

MakeSet = Callable[..., tuple[Path, Card]]
SAMPLES = 6
SAMPLE_BYTES = 4 * BLOCK
"""A header and a block of content, for the image and for the label."""


@pytest.fixture
def packed(make_set: MakeSet) -> tuple[Path, Card, Path]:
    """Six samples in one shard: the folder, the card and the shard."""
    folder, card = make_set(SAMPLES, shard_samples=SAMPLES)
    return folder, card, folder / card.splits["train"].shards[0].path


def train(folder: str | Path, card: Card) -> list[str]:
    """The keys of an epoch."""
    spec = card.spec()
    loader = TrainLoader(folder, card, spec, batch_size=2, seed=0, world=World(0, 1), cache="none")
    return [key for step in loader.epoch(0) for key in step.batch["key"]]


def check(folder: Path, card: Card) -> None:
    """The check before a training starts."""
    preflight.check_feedable(card, workers=1, batch_size=2, where=folder)


def stock(*shards: Path, **options: Any) -> list[dict[str, Any]]:
    import webdataset as library

    urls = [str(path) for path in shards]
    return list(library.WebDataset(urls, shardshuffle=False, empty_check=False, **options))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def image(number: int) -> bytes:
    return encode_png(np.full((4, 5, 3), number, np.uint8))


# ── truncated, flipped, replaced ──────────────────────────────────────────────────────────────


@pytest.mark.fault(1)
def test_a_truncated_shard_is_reported_with_its_lost_samples(
    packed: tuple[Path, Card, Path],
) -> None:
    """Truncated at each member boundary, in each header, and in the data."""
    folder, card, shard = packed
    whole = shard.read_bytes()
    assert len(train(folder, card)) == SAMPLES
    for end in range(0, len(whole), BLOCK // 2):
        shard.write_bytes(whole[:end])
        lost = SAMPLES - min(end // SAMPLE_BYTES, SAMPLES)
        expected = rf"train/000000\.tar .*has {end} bytes, the card says {len(whole)}"
        for read in (check, train):
            with pytest.raises(TesseraError) as refused:
                read(folder, card)
            assert re.search(expected, re.sub(r"(?<=\d),(?=\d)", "", refused.value.message))
        line = verify.verify(folder, workers=1).differences[0]
        counted = f"; {lost} of 6 samples differ, the first is s{SAMPLES - lost:04d}"
        assert line.endswith(counted if lost else f"the card says {len(whole):,}")


@pytest.mark.control(1, 2)
def test_stock_webdataset_reads_a_damaged_shard_as_a_shorter_one(
    packed: tuple[Path, Card, Path],
) -> None:
    _, _, shard = packed
    whole = shard.read_bytes()
    half = 3 * SAMPLE_BYTES
    assert len(stock(shard)) == SAMPLES
    flipped = bytearray(whole)
    flipped[half + 5] ^= 1
    zeros = whole[:half] + bytes(2 * BLOCK) + whole[half + 2 * BLOCK :]
    for damaged in (whole[:half], bytes(flipped), zeros):
        shard.write_bytes(damaged)
        assert [sample["__key__"] for sample in stock(shard)] == ["s0000", "s0001", "s0002"]


@pytest.mark.fault(2, 3)
def test_damage_that_keeps_the_file_size_is_reported(packed: tuple[Path, Card, Path]) -> None:
    """A flipped bit in a header and in the data, zeros, and the second half replaced."""
    folder, card, shard = packed
    whole = shard.read_bytes()
    half = 3 * SAMPLE_BYTES
    cases = [bytearray(whole) for _ in range(4)]
    cases[0][half + 5] ^= 1
    cases[1][half + BLOCK + 30] ^= 1
    cases[2][half : half + 1024] = bytes(1024)
    cases[3][half:] = bytes(len(whole) - half)
    for case in cases:
        shard.write_bytes(case)
        with pytest.raises(TesseraError, match=r"train/000000\.tar, sample \d: checksum differs"):
            train(folder, card)
        (line,) = verify.verify(folder, workers=1).differences[:1]
        assert "checksum differs" in line
        assert "of 6 samples differ, the first is s0003" in line


@pytest.mark.control(3)
def test_pillow_decodes_jpegs_with_a_flipped_bit() -> None:
    """Therefore each sample has a checksum."""
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, format="JPEG", quality=90)
    data, accepted = out.getvalue(), 0
    truth = np.asarray(open_image(data, "image"))
    for bit in np.random.default_rng(1).integers(len(data) * 4, len(data) * 8, 50).tolist():
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            accepted += not np.array_equal(np.asarray(open_image(bytes(flipped), "image")), truth)
        except TesseraError:
            continue
    assert accepted > 25, "most flipped bits must change pixels without an error"


REPLACED = {
    "empty": b"",
    "an error page": b"<html><h1>502 Bad Gateway</h1></html>",
    "an empty tar": bytes(10240),
    "an error page of the same size": b"<html>".ljust(20480, b" "),
    "an empty tar of the same size": bytes(20480),
}


@pytest.mark.fault(4)
@pytest.mark.parametrize("name", [*REPLACED, "missing"])
def test_a_replaced_shard_is_reported_before_training(
    name: str, packed: tuple[Path, Card, Path]
) -> None:
    """A file of the same size is reported when its first sample is read."""
    folder, card, shard = packed
    size = shard.stat().st_size
    shard.unlink()
    if name != "missing":
        shard.write_bytes(REPLACED[name])
        same_size = shard.stat().st_size == size
    else:
        same_size = False
    if same_size:
        check(folder, card)
        expected = "sample .*checksum differs"
    else:
        with pytest.raises(TesseraError, match=r"train/000000\.tar (is missing|has [\d,]+ bytes)"):
            check(folder, card)
        expected = "is missing|has [0-9,]+ bytes"
    with pytest.raises(TesseraError, match=expected):
        train(folder, card)
    assert "train/000000.tar" in verify.verify(folder, workers=1).differences[0]


@pytest.mark.control(4)
def test_stock_webdataset_accepts_an_empty_tar(tmp_path: Path) -> None:
    import webdataset as library

    for name, data in REPLACED.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(data)
        assert stock(path, handler=library.ignore_and_continue) == []
    assert stock(tmp_path / "an empty tar.tar") == []


# ── members ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.control(7, 8)
def test_stock_webdataset_returns_duplicate_keys_and_incomplete_samples(tmp_path: Path) -> None:
    a, b = (("a.png", image(1)), ("a.cls", b"0")), (("b.png", image(2)), ("b.cls", b"1"))
    apart = write_tar(tmp_path / "apart.tar", [*a, *b, *a])
    assert [sample["__key__"] for sample in stock(apart)] == ["a", "b", "a"]
    other = write_tar(tmp_path / "other.tar", list(a))
    assert [sample["__key__"] for sample in stock(apart, other)] == ["a", "b", "a", "a"]
    half = write_tar(tmp_path / "half.tar", [a[0], b[1]])
    assert [sorted(sample.keys() & {"png", "cls"}) for sample in stock(half)] == [["png"], ["cls"]]


def torn(folder: Path) -> list[Path]:
    """Two shards with the same key: the first is truncated between the image and its class."""
    first = write_tar(folder / "train-0.tar", [("x.png", image(1)), ("x.cls", b"0")])
    data = first.read_bytes()
    first.write_bytes(data[: BLOCK + BLOCK // 2])
    second = write_tar(folder / "train-1.tar", [("x.cls", b"7"), ("y.png", image(2))])
    return [first, second]


@pytest.mark.control(9)
def test_stock_webdataset_pairs_an_image_with_the_class_of_another(tmp_path: Path) -> None:
    import webdataset as library

    first, *_ = stock(*torn(tmp_path / "in"), handler=library.ignore_and_continue)
    assert (first["__key__"], first["png"], first["cls"]) == ("x", image(1), b"7")


@pytest.mark.fault(9)
def test_an_image_and_its_label_never_come_from_two_shards(tmp_path: Path) -> None:
    first, second = torn(tmp_path / "in")
    for number, name in enumerate(("train-2", "val-0", "test-0")):
        members = [(f"z{number}.png", image(3)), (f"z{number}.cls", b"1")]
        write_tar(tmp_path / "in" / f"{name}.tar", members)
    allow = {"options": {}, "allow_rejected": "3"}
    with pytest.raises(TesseraError, match=r"train-0\.tar.* (has no end|cut short)"):
        in_place.index(str(first.parent), tmp_path / "out", **allow)
    first.write_bytes(
        first.read_bytes() + bytes(2 * BLOCK + BLOCK // 2)
    )  # a valid tar with one image
    card = in_place.index(str(second.parent), tmp_path / "out", **allow)
    assert card.rejected == 3
    reader = ShardReader(tmp_path / "out", card, "train")
    assert [(s.key, s.image, s.label) for s in _all(reader)] == [("z0", image(3), 0)]


def _all(reader: ShardReader) -> Iterator[Any]:
    return (reader.read(number) for number in range(len(reader)))


# ── paths in a tar ────────────────────────────────────────────────────────────────────────────


@pytest.mark.control(10, 11)
def test_tarfile_writes_outside_of_the_folder_and_in_place_refuses_the_shard(
    tmp_path: Path,
) -> None:
    """By a name, and through a link. Tessera never writes to a path named in a tar file."""
    (tmp_path / "out" / "deep").mkdir(parents=True)
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("../by-name.png")
        tar.addfile(info)
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("link/by-link.png"))
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "out" / "deep", filter="fully_trusted")
    assert (tmp_path / "out" / "by-name.png").exists()
    assert (tmp_path / "by-link.png").exists()
    assert [sample["__key__"] for sample in stock(path)] == ["../by-name", "link/by-link"]
    write_tar(tmp_path / "in" / "train.tar", [("good.png", image(1))])
    (tmp_path / "in" / "evil.tar").write_bytes(path.read_bytes())
    with pytest.raises(TesseraError, match=r"evil\.tar.*'\.\./by-name\.png' is refused"):
        in_place.index(str(tmp_path / "in"), tmp_path / "index", options={"label": "none"})


def test_a_damaged_copy_in_the_cache_is_fetched_again(
    packed: tuple[Path, Card, Path], tmp_path: Path
) -> None:
    import fsspec

    folder, card, _ = packed
    where = f"memory://bucket/{tmp_path.name}"
    fsspec.filesystem("memory").put(str(folder), where, recursive=True)
    settings = CacheSettings(tmp_path / "cache")
    use_cache(settings)
    try:
        keys = train(where, card)
        copy = settings.folder / card.splits["train"].shards[0].sha256
        content = bytearray(copy.read_bytes())
        content[3 * BLOCK : 4 * BLOCK] = b"?" * BLOCK
        for damage in (bytes(content), b"?" * len(content)):
            copy.write_bytes(damage)
            assert train(where, card) == keys
            assert hashlib.sha256(copy.read_bytes()).hexdigest() == copy.name
        # The control: where the file itself is damaged, it stays an error.
        shard = card.splits["train"].shards[0].path
        fsspec.filesystem("memory").pipe(f"{where}/{shard}", b"?" * len(content))
        copy.write_bytes(b"?" * len(content))
        with pytest.raises(TesseraError, match="checksum differs"):
            train(where, card)
    finally:
        use_cache(None)
