"""Shards are standard tars, and a damaged one is an error and never a shorter one."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from models.core.errors import TesseraError
from pipelines.data import shards
from pipelines.data.card import Card, ImageCard, SplitCard
from pipelines.data.shards import Packed, ShardReader, Stored
from pipelines.data.tar import members


def some(count: int, size: int = 700) -> Iterator[Packed]:
    for i in range(count):
        image, note = ("jpg", bytes([i]) * (size + i)), ("cls", b"%d" % (i % 3))
        yield Packed(f"train/a/{i:03d}", image, note, i % 3)


def stored(count: int, size: int = 700) -> list[Stored]:
    return [Stored(p.key, p.image[1], p.note[1], p.label) for p in some(count, size) if p.note]


def card_of(split: SplitCard) -> Card:
    image = ImageCard(
        channels=3,
        min_height=1,
        max_height=1,
        min_width=1,
        max_width=1,
        mean=(0,) * 3,
        std=(1,) * 3,
    )
    classes, task = ("a", "b", "c"), "classification"
    return Card(name="x", task=task, classes=classes, image=image, splits={"train": split})


def reader_of(folder: Path, split: SplitCard) -> ShardReader:
    return ShardReader(folder, card_of(split), "train")


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, SplitCard]:
    return tmp_path, shards.write(tmp_path, "train", some(12), shard_samples=5)


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_every_sample_comes_back(written: tuple[Path, SplitCard]) -> None:
    folder, card = written
    assert [shard.samples for shard in card.shards] == [5, 5, 2]
    reader = reader_of(folder, card)
    assert len(reader) == card.samples == 12
    assert [reader.read(i) for i in range(12)] == stored(12)
    assert reader.read(3) == reader.read(3)


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
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


def test_a_plain_tar_reader_finds_nothing_but_regular_members(
    written: tuple[Path, SplitCard],
) -> None:
    folder, card = written
    with tarfile.open(folder / card.shards[0].path) as tar:
        assert tar.pax_headers == {}
        for member in tar:
            assert member.isreg()
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o444)
            assert not member.pax_headers
    # `extractfile` above goes by tarfile's own knowledge; the type flags are the file's.
    data = (folder / card.shards[0].path).read_bytes()
    assert {
        data[at + 156] for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"
    } == {ord("0")}


def test_stock_webdataset_reads_the_shards(written: tuple[Path, SplitCard]) -> None:
    """In a process of its own: importing webdataset is not this suite's to pay for twice."""
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
def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """Header, payload, padding: each byte of a sample is under its checksum."""
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
def test_a_flipped_payload_goes_unnoticed_by_a_plain_reader(
    written: tuple[Path, SplitCard],
) -> None:
    """The control of the test above."""
    folder, card = written
    path = folder / card.shards[0].path
    flip(path, 512)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 10


@pytest.mark.fault(1)
def test_a_cut_shard_is_named_when_it_is_opened(written: tuple[Path, SplitCard]) -> None:
    folder, card = written
    path = folder / card.shards[1].path
    whole = path.read_bytes()
    for end in range(0, len(whole), 512):
        path.write_bytes(whole[:end])
        with pytest.raises(TesseraError, match=rf"train/000001\.tar .* has {end} bytes"):
            reader_of(folder, card)


@pytest.mark.control(1)
def test_a_cut_shard_reads_as_a_shorter_one_without_the_guard(
    written: tuple[Path, SplitCard],
) -> None:
    """The control: cut at a member boundary, a tar reader sees fewer samples and no error."""
    folder, card = written
    path = folder / card.shards[0].path
    path.write_bytes(path.read_bytes()[: 3 * (512 + 1024 + 1024)])
    with tarfile.open(path) as tar:
        assert 0 < len(tar.getmembers()) < 10


@pytest.mark.fault(4)
def test_missing_shards_and_indices_are_named(written: tuple[Path, SplitCard]) -> None:
    folder, card = written
    (folder / card.shards[2].path).rename(folder / "away")
    with pytest.raises(TesseraError, match=r"shard train/000002\.tar .* is missing"):
        reader_of(folder, card)
    (folder / "away").rename(folder / card.shards[2].path)
    index = (folder / card.index).read_bytes()
    (folder / card.index).unlink()
    with pytest.raises(TesseraError, match=r"index train/index\.npy .* is missing"):
        reader_of(folder, card)
    for damage in (b"", index[:-1], index[:70]):
        (folder / card.index).write_bytes(damage)
        with pytest.raises(TesseraError, match=r"index train/index\.npy .*(is no index|rows, the)"):
            reader_of(folder, card)
    (folder / card.index).write_bytes(index[:-1] + b"x")
    with pytest.raises(TesseraError, match=r"index train/index\.npy .*shard 2: checksum differs"):
        reader_of(folder, card).read(11)


def reindexed(folder: Path, card: SplitCard, index: np.ndarray) -> SplitCard:
    """The card of a data set whose index was swapped by somebody who can compute checksums."""
    out = io.BytesIO()
    np.save(out, index, allow_pickle=index.dtype == object)
    data = out.getvalue()
    (folder / card.index).write_bytes(data)
    forged, at = [], 0
    for shard in card.shards:
        rows = index[at : at + shard.samples]
        sha256 = "" if index.dtype == object else hashlib.sha256(rows.tobytes()).hexdigest()
        forged.append(shard.model_copy(update={"rows_sha256": sha256}))
        at += shard.samples
    update = {"index_sha256": hashlib.sha256(data).hexdigest(), "index_bytes": len(data)}
    return card.model_copy(update={**update, "shards": tuple(forged)})


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("offset", 1 << 40, "behind the end of a shard"),
        ("offset", 2**64 - 512, "behind the end of a shard"),
        ("size", 1 << 40, "more than"),
        ("image", 1 << 20, "behind the end of a sample"),
        ("image_size", 2**32 - 1, "behind the end of a sample"),
        ("note_size", 1 << 20, "behind the end of a sample"),
    ],
)
def test_a_forged_index_is_refused(
    written: tuple[Path, SplitCard], field: str, value: int, says: str
) -> None:
    folder, card = written
    index = np.load(folder / card.index)
    index[field][2] = value
    with pytest.raises(TesseraError, match=says):
        reader_of(folder, reindexed(folder, card, index)).read(2)


def test_an_index_that_only_claims_to_be_the_same_is_refused(
    written: tuple[Path, SplitCard],
) -> None:
    """Its rows are under a checksum of their shard, which is read with the first of them."""
    folder, card = written
    index = np.load(folder / card.index)
    index["label"][7] = 0
    np.save(folder / card.index, index)
    reader = reader_of(folder, card)
    assert reader.read(0) == stored(12)[0]
    with pytest.raises(TesseraError, match=r"index train/index\.npy .*shard 1: checksum differs"):
        reader.read(7)


class Payload:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.fault(13)
@pytest.mark.control(13)
def test_a_pickled_index_is_not_executed(written: tuple[Path, SplitCard]) -> None:
    folder, card = written
    mark = folder / "mark"
    forged = np.array([Payload(mark)] * 12, dtype=object)
    card = reindexed(folder, card, forged)
    with pytest.raises(TesseraError, match=r"is no index|rows of another form"):
        reader_of(folder, card)
    assert not mark.exists()
    np.load(folder / card.index, allow_pickle=True)  # the control: it would have run
    assert mark.exists()


@pytest.mark.fault(10, 14)
@pytest.mark.parametrize(
    "path", ["../x.tar", "/etc/passwd", "train/../../x", "pipe:cat x", "s3://a/b", ""]
)
def test_paths_out_of_the_folder_are_refused(written: tuple[Path, SplitCard], path: str) -> None:
    folder, card = written
    bad = card.shards[0].model_copy(update={"path": path})
    with pytest.raises(TesseraError, match="is not allowed"):
        reader_of(folder, card.model_copy(update={"shards": (bad, *card.shards[1:])}))


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, size: int | None = None
) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data) if size is None else size
    info.linkname = "target" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    return info.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % 512)


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (member("a.jpg", kind=tarfile.SYMTYPE), "type b'2' is refused"),
        (member("a.jpg", kind=tarfile.LNKTYPE), "type b'1' is refused"),
        (member("a.jpg", kind=tarfile.FIFOTYPE), "type b'6' is refused"),
        (member("a.jpg", kind=tarfile.CHRTYPE), "type b'3' is refused"),
        (member("a.jpg", kind=tarfile.GNUTYPE_SPARSE), "type b'S' is refused"),
        (member("a.jpg", kind=tarfile.XHDTYPE), "type b'x' is refused"),
        (member("a.jpg", kind=tarfile.DIRTYPE), "type b'5' is refused"),
        (member("a.jpg", size=7 << 30), "cut short"),
        (b"\0" * 124 + b"\x80" + b"\0" * 132 + b"ustar\0" + b"\0" * 249, "has the number"),
        (member("a.jpg", size=513) + b"\0" * 512, "cut short"),
        (member("a.jpg")[:300], "cut short"),
        (b"\0" * 1024, "no ustar header"),
        (b"<html>" + b" " * 506, "no ustar header"),
    ],
)
def test_strange_members_are_refused_by_name(data: bytes, says: str) -> None:
    with pytest.raises(TesseraError, match=rf"^here: .*({says})"):
        members(data, "here")


def test_good_members_are_found() -> None:
    data = member("d/a.cls", b"1") + member("d/a.png", b"x" * 600)
    assert members(data, "here") == [("d/a.cls", 512, 1), ("d/a.png", 1536, 600)]


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
def test_strange_samples_are_not_written(tmp_path: Path, sample: Packed) -> None:
    with pytest.raises(TesseraError):
        shards.write(tmp_path, "train", [sample])


def test_a_sample_without_a_note_and_one_with_a_mask(tmp_path: Path) -> None:
    samples = [Packed("a", IMAGE), Packed("b", ("png", b"y" * 600), ("mask.png", b"z"))]
    card = shards.write(tmp_path, "train", samples)
    reader = reader_of(tmp_path, card)
    assert reader.read(0) == Stored("a", b"x", b"", -1)
    assert reader.read(1) == Stored("b", b"y" * 600, b"z", -1)


def test_samples_come_in_pieces_of_a_limited_size(
    written: tuple[Path, SplitCard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order asked for, also the same one twice, and one that is larger than the limit."""
    folder, card = written
    reader = reader_of(folder, card)
    wanted = np.array([11, 0, 4, 4, 5, 9])
    for limit in (1, 6000, 1 << 20):
        monkeypatch.setattr(shards, "PIECE_BYTES", limit)
        found: list[bytes] = []
        sizes = []
        for piece in reader.pieces(wanted, *reader.index.gather(wanted)):
            sizes.append(len(piece.data))
            for start, row in zip(piece.starts.tolist(), piece.rows):
                begin = start + int(row["image"])
                found.append(piece.data[begin : begin + int(row["image_size"])].tobytes())
        assert found == [stored(12)[i].image for i in wanted.tolist()]
        assert max(sizes) <= max(limit, 2560)
    assert len(sizes) == 1


def test_a_reader_goes_through_pickle(written: tuple[Path, SplitCard]) -> None:
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


def test_many_shards_don_t_use_up_the_file_descriptors(
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


def test_an_empty_split_can_be_written_and_is_refused_by_name(tmp_path: Path) -> None:
    card = shards.write(tmp_path, "train", [])
    assert (card.samples, card.shards) == (0, ())
    with pytest.raises(TesseraError, match="no 'train' split"):
        reader_of(tmp_path, card)
