"""MNIST's idx files, plain and compressed."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sample_sources import idx, write_mnist

from models.core.errors import TesseraError, UsageError
from pipelines.data.images import decode_image
from pipelines.data.importers import mnist
from pipelines.data.packing.formats import recognise
from pipelines.data.packing.pack import pack
from pipelines.data.packing.plan import split_items

DATA = Path(__file__).parents[4] / "../shared/data"


@pytest.mark.parametrize("inner", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_recognised_by_its_file_names(
    tmp_path: Path, inner: str, dot: str, packed: bool
) -> None:
    root = tmp_path / "set"
    write_mnist(root / inner, {"train": 40, "t10k": 20}, packed=packed, dot=dot)
    assert recognise(str(root)) == ("mnist", "4 idx files")
    source = mnist.read(str(root), {})
    assert Counter(item.split for item in source.items) == {"train": 40, "test": 20}
    assert source.classes == tuple("0123456789")
    true = np.random.default_rng(1).integers(0, 256, (20, 5, 4), dtype=np.uint8)
    for item in source.items[-20:]:
        pixels = decode_image(source.load(item), 1)[0].numpy()
        np.testing.assert_array_equal(pixels, true[item.row])
        assert item.label == item.row % 10


def test_mnist_is_packed_with_val_taken_from_train(tmp_path: Path) -> None:
    write_mnist(tmp_path / "set", {"train": 200, "t10k": 30})
    card = pack(str(tmp_path / "set"), tmp_path / "out")
    assert {name: s.samples for name, s in card.splits.items()} == {
        "train": 180,
        "val": 20,
        "test": 30,
    }
    assert set(card.splits["val"].class_counts.values()) == {2}
    assert (card.image.channels, card.image.max_height, card.image.max_width) == (1, 5, 4)


def test_a_pack_keeps_its_digest(tmp_path: Path) -> None:
    """The digest that commit 23d2f4f gives: measured results name it."""
    digest = "077904e728d82b4a9942b000f2b28bc331e14cf54344d77e95b8e8045a12f8c8"
    write_mnist(tmp_path / "mnist", {"train": 200, "t10k": 30})
    assert pack(str(tmp_path / "mnist"), tmp_path / "out").digest == digest
    other = pack(str(tmp_path / "mnist"), tmp_path / "other", seed=1)
    assert other.digest != digest  # the control: another cut


def spoiled(data: bytes) -> dict[str, tuple[bytes, str]]:
    return {
        "empty": (b"", "is not an idx file"),
        "head": (data[:10], "is not an idx file"),
        "kind": (data[:2] + b"\x0d" + data[3:], "is not an idx file"),
        "short": (data[:-1], "and has"),
        "long": (data + b"x", "has more"),
        "huge": (data[:4] + b"\xff" * 12 + data[16:], "too many"),
        "html": (b"<html>" * 9, "is not an idx file"),
    }


@pytest.mark.parametrize("case", list(spoiled(b"")))
def test_damaged_idx_files_are_reported(tmp_path: Path, case: str) -> None:
    write_mnist(tmp_path / "set", {"train": 20, "t10k": 10}, packed=False)
    path = tmp_path / "set" / "train-images-idx3-ubyte"
    data, message = spoiled(path.read_bytes())[case]
    path.write_bytes(data)
    with pytest.raises(TesseraError, match=rf"^train-images-idx3-ubyte .*{message}"):
        pack(str(tmp_path / "set"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_gz_files_are_reported(tmp_path: Path) -> None:
    write_mnist(tmp_path / "set", {"train": 20, "t10k": 10})
    path = tmp_path / "set" / "train-labels-idx1-ubyte.gz"
    data = path.read_bytes()
    for damage in (data[:-12], b"\x1f\x8b" + b"\xff" * 30, data[:12] + b"\xff\xff" + data[14:]):
        path.write_bytes(damage)
        with pytest.raises(TesseraError, match=r"^train-labels-idx1-ubyte\.gz "):
            mnist.read(str(tmp_path / "set"), {})


@pytest.mark.fault(12)
def test_a_gz_bomb_is_not_decompressed(tmp_path: Path) -> None:
    write_mnist(tmp_path / "set", {"train": 20, "t10k": 10})
    path = tmp_path / "set" / "train-labels-idx1-ubyte.gz"
    bomb = idx(np.zeros(20, np.uint8)) + b"\0" * (64 << 20)
    path.write_bytes(gzip.compress(bomb, mtime=0))
    with pytest.raises(TesseraError, match="claims 20 bytes and has more"):
        mnist.read(str(tmp_path / "set"), {})


def test_missing_and_unequal_idx_files_are_reported(tmp_path: Path) -> None:
    folder = write_mnist(tmp_path / "set", {"train": 20, "t10k": 10})
    (folder / "t10k-labels-idx1-ubyte.gz").rename(folder / "away")
    with pytest.raises(TesseraError, match="has no test labels"):
        mnist.read(str(folder), {})
    (folder / "away").rename(folder / "t10k-labels-idx1-ubyte.gz")
    labels = np.zeros(19, np.uint8)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels), mtime=0))
    with pytest.raises(TesseraError, match="20 train images and 19 labels"):
        mnist.read(str(folder), {})


@pytest.mark.skipif(not (DATA / "mnist").is_dir(), reason="the MNIST files are not here")
def test_the_real_mnist_has_the_documented_counts() -> None:
    """The counts are those of the set's SOURCE.md."""
    source = mnist.read(str(DATA / "mnist"), {})
    counts = Counter((item.split, item.label) for item in source.items)
    train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert [counts["train", label] for label in range(10)] == train
    assert [counts["test", label] for label in range(10)] == test
    parts = split_items(source.items, 0)
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 54_000,
        "val": 6_000,
        "test": 10_000,
    }


def test_a_small_gz_that_claims_much_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """32 MiB of zeros in 32 KiB: it needs the option."""
    write_mnist(tmp_path, {"train": 1, "t10k": 1}, packed=True)
    path = next(tmp_path.glob("train-images*.gz"))
    shape = (512, 256, 256)
    path.write_bytes(gzip.compress(idx(np.zeros(shape, np.uint8))))
    with pytest.raises(TesseraError, match="512 by 256 by 256 bytes: too many") as caught:
        mnist.read(str(tmp_path), {})
    assert "--option max_bytes=33554432" in (caught.value.hint or "")
    with pytest.raises(TesseraError, match="512 train images and 1 labels"):  # the control
        mnist.read(str(tmp_path), {"max_bytes": "33554432"})
    with pytest.raises(UsageError, match="the option max_bytes can't be 'much'"):
        mnist.read(str(tmp_path), {"max_bytes": "much"})
