"""Every byte of a data set is compared with card and index; differences are listed by name."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faulty_server import web_server

from models.core.errors import TesseraError
from pipelines.data.annotations import Mask, Objects, encode
from pipelines.data.card import Card, ImageCard
from pipelines.data.images import encode_png
from pipelines.data.inspection import verify
from pipelines.data.shards import Packed, write

MakeSet = Callable[..., tuple[Path, Card]]


def differences(folder: Path | str) -> list[str]:
    return list(verify.verify(folder, workers=2).differences)


@pytest.fixture
def packed(make_set: MakeSet) -> Path:
    """12 samples of 3 classes in 2 shards of 6; the same split is used for train and test."""
    folder, card = make_set(12, shard_samples=6)
    counts = {"a": 4, "b": 4, "c": 4}
    split = card.splits["train"].model_copy(update={"class_counts": counts})
    sealed = card.model_copy(update={"splits": {"train": split}}).sealed()
    (folder / "card.json").write_text(sealed.to_json())
    return folder


def test_an_intact_data_set_has_no_differences(packed: Path) -> None:
    steps: list[tuple[int, int]] = []
    report = verify.verify(packed, workers=2, progress=lambda *step: steps.append(step))
    size = sum(path.stat().st_size for path in packed.rglob("*.tar"))
    assert report == verify.Report(2, 12, size, ())
    assert len(steps) == 2
    assert steps[-1] == (size, size)


def test_data_sets_of_every_task_are_verified(tmp_path: Path) -> None:
    boxes = Objects(np.array([[0.0, 0, 2, 2]]), np.array([0]), np.array([False]))
    notes = {
        "detection": encode(boxes),
        "semantic_segmentation": encode(Mask(np.zeros((4, 4), np.uint8))),
        "images": None,
    }
    image = ImageCard(
        channels=1, min_height=4, max_height=4, min_width=4, max_width=4, mean=(0.5,), std=(1,)
    )
    png = ("png", encode_png(np.zeros((4, 4), np.uint8)))
    for task, note in notes.items():
        folder = tmp_path / task
        split = write(folder, "train", [Packed(f"s{n}", png, note) for n in range(3)])
        classes = () if task == "images" else ("a",)
        card = Card(name="x", task=task, classes=classes, image=image, splits={"train": split})
        (folder / "card.json").write_text(card.sealed().to_json())
        assert differences(folder) == []
        wrong = card.model_copy(update={"task": "classification"}).sealed()
        (folder / "card.json").write_text(wrong.to_json())
        (line,) = differences(folder)
        assert "3 of 3 samples differ" in line


@pytest.mark.fault(3)
@pytest.mark.parametrize("at", [1000, 3000, 9000])
def test_a_flipped_bit_is_reported_with_its_sample(packed: Path, at: int) -> None:
    path = packed / "train" / "000001.tar"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))
    (line,) = differences(packed)
    assert line.startswith("shard train/000001.tar: checksum differs; 1 of 6 samples differ, the")
    assert "first is s00" in line


def test_every_flipped_bit_is_detected(packed: Path) -> None:
    path = packed / "train" / "000000.tar"
    good = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(good), 40).tolist():
        data = bytearray(good)
        data[at] ^= 1
        path.write_bytes(bytes(data))
        (line,) = differences(packed)
        assert "shard train/000000.tar: checksum differs" in line


@pytest.mark.fault(1)
def test_a_truncated_shard_is_reported_with_its_lost_samples(packed: Path) -> None:
    path = packed / "train" / "000000.tar"
    data = path.read_bytes()
    path.write_bytes(data[: 3 * 2048])  # three samples: a header and a block, twice
    (line,) = differences(packed)
    size = f"{3 * 2048:,} bytes, the card says {len(data):,}"
    assert line.startswith(f"shard train/000000.tar: has {size}; 3 of 6 samples differ")


@pytest.mark.fault(2)
def test_zeros_in_a_shard_are_reported(packed: Path) -> None:
    path = packed / "train" / "000000.tar"
    data = bytearray(path.read_bytes())
    data[2048:3072] = bytes(1024)
    path.write_bytes(bytes(data))
    (line,) = differences(packed)
    assert "1 of 6 samples differ, the first is s0001" in line


@pytest.mark.fault(4)
def test_missing_and_empty_shards_are_reported(packed: Path) -> None:
    (packed / "train" / "000000.tar").unlink()
    (packed / "train" / "000001.tar").write_bytes(b"")
    first, second = differences(packed)
    assert first == "shard train/000000.tar is missing"
    assert "has 0 bytes" in second
    assert "6 of 6 samples differ" in second


def test_swapped_shards_are_reported(packed: Path) -> None:
    one, two = (packed / "train" / f"00000{n}.tar" for n in range(2))
    shutil.move(one, packed / "x")
    shutil.move(two, one)
    shutil.move(packed / "x", two)
    assert len(differences(packed)) == 2


@pytest.mark.parametrize("at", [10, 200, -10])
def test_a_changed_index_is_reported(packed: Path, at: int) -> None:
    path = packed / "train" / "index.npy"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))
    lines = differences(packed)
    assert lines
    assert all("index" in line for line in lines)


def test_a_missing_index_is_reported_and_the_shards_are_still_read(packed: Path) -> None:
    (packed / "train" / "index.npy").unlink()
    path = packed / "train" / "000001.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    index, shard = differences(packed)
    assert index.startswith("index train/index.npy")
    assert shard == "shard train/000001.tar: checksum differs"


def test_an_index_that_differs_from_the_shards_is_reported(packed: Path, make_set: MakeSet) -> None:
    """All checksums are valid, but the class in the tar differs from the index: the result of a
    faulty packer."""
    from pipelines.data.index import Index, write_index
    from pipelines.storage.open import open_storage

    card = Card.model_validate_json((packed / "card.json").read_text())
    split = card.splits["train"]
    tables = [Index(open_storage(packed), split).rows(n).copy() for n in range(2)]
    tables[0]["label"][2] = 1
    tables[1]["image"][0] += 1
    sums, size, sha256 = write_index(packed / split.index, tables)
    shards = tuple(s.model_copy(update={"rows_sha256": t}) for s, t in zip(split.shards, sums))
    update = {"shards": shards, "index_bytes": size, "index_sha256": sha256}
    changed = split.model_copy(update=update)
    sealed = card.model_copy(update={"splits": {"train": changed}}).sealed()
    (packed / "card.json").write_text(sealed.to_json())
    classes, first, second = sorted(differences(packed), key=lambda line: line.split()[0][::-1])
    assert {classes, first, second} == {
        "split train: the index counts other classes than the card",
        "shard train/000000.tar: differs from the index; 1 of 6 samples differ, the "
        "first is s0002 (its class differs from the index)",
        "shard train/000001.tar: differs from the index; 1 of 6 samples differ, the "
        "first is s0006 (its image isn't at the indexed offset)",
    }


def test_a_changed_card_is_refused(packed: Path) -> None:
    text = (packed / "card.json").read_text()
    (packed / "card.json").write_text(text.replace('"name": "set"', '"name": "sex"'))
    with pytest.raises(TesseraError, match="its digest does not match its content"):
        verify.verify(packed)


def test_a_remote_data_set_is_verified_and_damage_reported(packed: Path) -> None:
    with web_server(packed) as port:
        where = f"http://127.0.0.1:{port}"
        assert differences(where) == []
        path = packed / "train" / "000001.tar"
        data = bytearray(path.read_bytes())
        data[600] ^= 1
        path.write_bytes(bytes(data))
        (packed / "train" / "000000.tar").unlink()
        missing, damaged = differences(where)
        assert "shard train/000000.tar" in missing
        assert "does not exist" in missing
        assert "1 of 6 samples differ" in damaged


def test_bytes_outside_of_samples_are_verified_by_sha256(packed: Path) -> None:
    """Bytes after the last sample aren't covered by the checksum of a sample."""
    path = packed / "train" / "000000.tar"
    data = bytearray(path.read_bytes())
    end = len(data) - 100
    assert not any(data[end:])
    data[end] = 1
    path.write_bytes(bytes(data))
    assert zlib.crc32(bytes(data)) != 0
    assert differences(packed) == ["shard train/000000.tar: checksum differs"]
