"""Shards are standard tar files. A damaged shard is an error, never a shorter shard."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tarfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from small_shards import flip, reader_of, some, stored

from models.core.errors import TesseraError
from pipelines.data import shards
from pipelines.data.card import SplitCard
from pipelines.data.shards import Packed, Stored


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, SplitCard]:
    return tmp_path, shards.write(tmp_path, "train", some(12), shard_samples=5)


@pytest.mark.fault(4)
def test_a_missing_shard_is_reported(written: tuple[Path, SplitCard]) -> None:
    folder, card = written
    (folder / card.shards[2].path).rename(folder / "away")
    with pytest.raises(TesseraError, match=r"shard train/000002\.tar .* is missing"):
        reader_of(folder, card)
    (folder / "away").rename(folder / card.shards[2].path)


def test_every_sample_is_read_as_written(written: tuple[Path, SplitCard]) -> None:
    folder, card = written
    assert [shard.samples for shard in card.shards] == [5, 5, 2]
    reader = reader_of(folder, card)
    assert len(reader) == card.samples == 12
    assert [reader.read(i) for i in range(12)] == stored(12)
    assert reader.read(3) == reader.read(3)


def test_the_same_samples_are_written_to_the_same_bytes(tmp_path: Path) -> None:
    one = shards.write(tmp_path / "one", "train", some(12), shard_samples=5)
    two = shards.write(tmp_path / "two", "train", some(12), shard_samples=5)
    assert one == two
    for path in [*(shard.path for shard in one.shards), one.index]:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def test_a_shard_ends_before_it_is_too_large(tmp_path: Path) -> None:
    card = shards.write(tmp_path, "train", some(6, 3000), shard_bytes=10_000)
    assert [shard.samples for shard in card.shards] == [2, 2, 2]
    reader = reader_of(tmp_path, card)
    assert [sample.key for sample in map(reader.read, range(6))] == [
        sample.key for sample in some(6)
    ]


def test_a_tar_reader_sees_only_regular_members(
    written: tuple[Path, SplitCard],
) -> None:
    folder, card = written
    with tarfile.open(folder / card.shards[0].path) as tar:
        assert tar.pax_headers == {}
        for member in tar:
            assert member.isreg()
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o444)
            assert not member.pax_headers
    # `isreg` is tarfile's interpretation; these are the type flags in the file.
    data = (folder / card.shards[0].path).read_bytes()
    assert {
        data[at + 156] for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"
    } == {ord("0")}


@pytest.mark.slow
def test_stock_webdataset_reads_the_shards(written: tuple[Path, SplitCard]) -> None:
    """In a new process, because importing webdataset is slow."""
    folder, card = written
    program = """
import sys, webdataset
files = sys.argv[1:]
for sample in webdataset.WebDataset(files, shardshuffle=False, empty_check=False):
    print(sample["__key__"], len(sample["jpg"]), sample["cls"].decode())
"""
    files = [str(folder / shard.path) for shard in card.shards]
    done = subprocess.run(
        [sys.executable, "-c", program, *files], capture_output=True, text=True, check=True
    )
    expected = [f"{s.key} {len(s.image)} {s.note.decode()}" for s in stored(12)]
    assert done.stdout.splitlines() == expected


@pytest.mark.fault(2, 3)
def test_any_flipped_bit_is_detected(tmp_path: Path) -> None:
    """The checksum covers each byte of a sample: header, content and padding."""
    card = shards.write(tmp_path, "train", some(2, 20), shard_samples=5)
    path = tmp_path / card.shards[0].path
    end = 2 * 1024
    for at in range(0, end, 7):
        flip(path, at, at % 8)
        reader = reader_of(tmp_path, card)
        with pytest.raises(
            TesseraError, match=r"^shard train/000000\.tar, sample 0: checksum differs"
        ):
            reader.read(0)
        assert reader.read(1).key == "train/a/001"
        flip(path, at, at % 8)
    assert reader_of(tmp_path, card).read(0)[0] == "train/a/000"


@pytest.mark.control(3)
def test_a_tar_reader_does_not_detect_a_flipped_bit(
    written: tuple[Path, SplitCard],
) -> None:
    """Control of the test above."""
    folder, card = written
    path = folder / card.shards[0].path
    flip(path, 512)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 10


@pytest.mark.fault(1)
def test_a_truncated_shard_is_reported_when_it_is_opened(written: tuple[Path, SplitCard]) -> None:
    folder, card = written
    path = folder / card.shards[1].path
    whole = path.read_bytes()
    for end in range(0, len(whole), 512):
        path.write_bytes(whole[:end])
        with pytest.raises(TesseraError, match=rf"train/000001\.tar .* has {end} bytes"):
            reader_of(folder, card)


@pytest.mark.control(1)
def test_a_tar_reader_reads_a_truncated_shard_as_a_shorter_one(
    written: tuple[Path, SplitCard],
) -> None:
    """Control: a shard truncated at a member boundary has fewer samples."""
    folder, card = written
    path = folder / card.shards[0].path
    path.write_bytes(path.read_bytes()[: 3 * (512 + 1024 + 1024)])
    with tarfile.open(path) as tar:
        assert 0 < len(tar.getmembers()) < 10


@pytest.mark.fault(10, 14)
@pytest.mark.parametrize(
    "path", ["../x.tar", "/etc/passwd", "train/../../x", "pipe:cat x", "s3://a/b", ""]
)
def test_paths_outside_the_folder_are_refused(written: tuple[Path, SplitCard], path: str) -> None:
    folder, card = written
    bad = card.shards[0].model_copy(update={"path": path})
    with pytest.raises(TesseraError, match="is not allowed"):
        reader_of(folder, card.model_copy(update={"shards": (bad, *card.shards[1:])}))


IMAGE = ("jpg", b"x")


@pytest.mark.fault(10, 13)
@pytest.mark.parametrize(
    "sample",
    [
        Packed("a.b", IMAGE),
        Packed("../a", IMAGE),
        Packed("a\n", IMAGE),
        Packed("a", ("pyd", b"x")),
        Packed("a", ("PKL", b"x")),
        Packed("a", ("cls", b"1")),
        Packed("a", IMAGE, ("pkl", b"x")),
        Packed("a", IMAGE, ("", b"x")),
        Packed("a", IMAGE, ("json.gz", b"x")),
    ],
)
def test_samples_with_other_keys_or_extensions_are_not_written(
    tmp_path: Path, sample: Packed
) -> None:
    with pytest.raises(TesseraError):
        shards.write(tmp_path, "train", [sample])


def test_a_sample_without_an_annotation_and_one_with_a_mask(tmp_path: Path) -> None:
    samples = [Packed("a", IMAGE), Packed("b", ("png", b"y" * 600), ("mask.png", b"z"))]
    card = shards.write(tmp_path, "train", samples)
    reader = reader_of(tmp_path, card)
    assert reader.read(0) == Stored("a", b"x", b"", -1)
    assert reader.read(1) == Stored("b", b"y" * 600, b"z", -1)


def test_samples_are_read_in_pieces_of_a_limited_size(
    written: tuple[Path, SplitCard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the requested order, also the same sample twice, and one that exceeds the limit."""
    folder, card = written
    reader = reader_of(folder, card)
    wanted = np.array([11, 0, 4, 4, 5, 9])
    for limit in (1, 6000, 1 << 20):
        monkeypatch.setattr(shards, "PIECE_BYTES", limit)
        result: list[bytes] = []
        sizes = []
        for piece in reader.pieces(wanted, *reader.index.gather(wanted)):
            sizes.append(len(piece.data))
            for start, row in zip(piece.starts.tolist(), piece.rows):
                begin = start + int(row["image"])
                result.append(piece.data[begin : begin + int(row["image_size"])].tobytes())
        assert result == [stored(12)[i].image for i in wanted.tolist()]
        assert max(sizes) <= max(limit, 2560)
    assert len(sizes) == 1


def test_a_reader_can_be_pickled(written: tuple[Path, SplitCard]) -> None:
    folder, card = written
    reader = reader_of(folder, card)
    reader.read(0)
    again = pickle.loads(pickle.dumps(reader))
    assert again.read(11) == reader.read(11)


def test_a_forked_process_reads_the_same(written: tuple[Path, SplitCard]) -> None:
    folder, card = written
    reader = reader_of(folder, card)
    first = [reader.read(i) for i in range(12)]
    with get_context("fork").Pool(2) as pool:
        assert pool.map(reader.read, range(12)) == first


def test_few_file_descriptors_are_used_for_many_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 3)
    card = shards.write(tmp_path, "train", some(10), shard_samples=1)
    reader = reader_of(tmp_path, card)
    before = len(os.listdir("/proc/self/fd"))
    assert [reader.read(i) for i in range(10)] == stored(10)
    assert len(os.listdir("/proc/self/fd")) == before + 3
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert reader.read(0)[0] == "train/a/000"


def test_an_empty_split_can_be_written_but_not_read(tmp_path: Path) -> None:
    card = shards.write(tmp_path, "train", [])
    assert (card.samples, card.shards) == (0, ())
    with pytest.raises(TesseraError, match="no 'train' split"):
        reader_of(tmp_path, card)
