"""Shards are standard tars, and a damaged one is an error and never a shorter one."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from models.core.errors import TesseraError
from pipelines.data import shards
from pipelines.data.card import Card, SplitCard


def some(count: int, size: int = 700) -> Iterator[tuple[str, dict[str, bytes]]]:
    for i in range(count):
        yield f"train/a/{i:03d}", {"jpg": bytes([i]) * (size + i), "cls": b"%d" % (i % 3)}


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
    reader = shards.ShardReader(folder, card)
    assert len(reader) == card.samples == 12
    assert [reader.read(i) for i in range(12)] == list(some(12))
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
    reader = shards.ShardReader(tmp_path, card)
    assert [key for key, _ in map(reader.read, range(6))] == [key for key, _ in some(6)]


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
    expected = [f"{key} {len(f['jpg'])} {f['cls'].decode()}" for key, f in some(12)]
    assert done.stdout.splitlines() == expected


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """Header, payload, padding: each byte of a sample is under its checksum."""
    card = shards.write(tmp_path, "train", some(2, 20), shard_samples=5)
    path = tmp_path / card.shards[0].path
    end = 2 * 1024
    for at in range(0, end, 7):
        flip(path, at, at % 8)
        reader = shards.ShardReader(tmp_path, card)
        with pytest.raises(
            TesseraError, match=r"^shard train/000000\.tar, sample 0: checksum differs"
        ):
            reader.read(0)
        assert reader.read(1)[0] == "train/a/001"
        flip(path, at, at % 8)
    assert shards.ShardReader(tmp_path, card).read(0)[0] == "train/a/000"


def test_a_flipped_payload_goes_unnoticed_by_a_plain_reader(
    written: tuple[Path, SplitCard],
) -> None:
    """The control of the test above."""
    folder, card = written
    path = folder / card.shards[0].path
    flip(path, 512)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 10


def test_a_cut_shard_is_named_when_it_is_opened(written: tuple[Path, SplitCard]) -> None:
    folder, card = written
    path = folder / card.shards[1].path
    whole = path.read_bytes()
    for end in range(0, len(whole), 512):
        path.write_bytes(whole[:end])
        with pytest.raises(TesseraError, match=rf"train/000001\.tar .* has {end} bytes"):
            shards.ShardReader(folder, card)


def test_a_cut_shard_reads_as_a_shorter_one_without_the_guard(
    written: tuple[Path, SplitCard],
) -> None:
    """The control: cut at a member boundary, a tar reader sees fewer samples and no error."""
    folder, card = written
    path = folder / card.shards[0].path
    path.write_bytes(path.read_bytes()[: 3 * (512 + 1024 + 1024)])
    with tarfile.open(path) as tar:
        assert 0 < len(tar.getmembers()) < 10


def test_missing_shards_and_indices_are_named(written: tuple[Path, SplitCard]) -> None:
    folder, card = written
    (folder / card.shards[2].path).rename(folder / "away")
    with pytest.raises(TesseraError, match=r"shard train/000002\.tar .* is missing"):
        shards.ShardReader(folder, card)
    (folder / "away").rename(folder / card.shards[2].path)
    index = (folder / card.index).read_bytes()
    (folder / card.index).unlink()
    with pytest.raises(TesseraError, match=r"index train/index\.npy .* is missing"):
        shards.ShardReader(folder, card)
    for damage in (b"", index[:-1], index[:-1] + b"x"):
        (folder / card.index).write_bytes(damage)
        with pytest.raises(TesseraError, match=r"index train/index\.npy .*: checksum differs"):
            shards.ShardReader(folder, card)


def reindexed(folder: Path, card: SplitCard, index: np.ndarray) -> SplitCard:
    """The card of a data set whose index was swapped by somebody who can compute a checksum."""
    import hashlib

    out = io.BytesIO()
    np.save(out, index, allow_pickle=index.dtype == object)
    (folder / card.index).write_bytes(out.getvalue())
    digest = hashlib.sha256(out.getvalue()).hexdigest()
    return card.model_copy(update={"index_sha256": digest})


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("shard", 7, "a shard that the card doesn't have"),
        ("shard", 1, "counts other samples"),
        ("offset", 1 << 40, "behind the end"),
        ("offset", 2**64 - 512, "behind the end"),
        ("size", 1 << 40, "more than"),
    ],
)
def test_a_forged_index_is_refused(
    written: tuple[Path, SplitCard], field: str, value: int, says: str
) -> None:
    folder, card = written
    index = np.load(folder / card.index)
    index[field][2] = value
    with pytest.raises(TesseraError, match=says):
        shards.ShardReader(folder, reindexed(folder, card, index))


class Payload:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.mark),))


def test_a_pickled_index_is_not_executed(written: tuple[Path, SplitCard]) -> None:
    folder, card = written
    mark = folder / "mark"
    forged = np.array([Payload(mark)] * 12, dtype=object)
    card = reindexed(folder, card, forged)
    with pytest.raises(TesseraError, match="is no index"):
        shards.ShardReader(folder, card)
    assert not mark.exists()
    np.load(folder / card.index, allow_pickle=True)  # the control: it would have run
    assert mark.exists()


@pytest.mark.parametrize(
    "path", ["../x.tar", "/etc/passwd", "train/../../x", "pipe:cat x", "s3://a/b", ""]
)
def test_paths_out_of_the_folder_are_refused(written: tuple[Path, SplitCard], path: str) -> None:
    folder, card = written
    bad = card.shards[0].model_copy(update={"path": path})
    with pytest.raises(TesseraError, match="is not allowed"):
        shards.ShardReader(folder, card.model_copy(update={"shards": (bad, *card.shards[1:])}))


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, size: int | None = None
) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data) if size is None else size
    info.linkname = "target" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    return info.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % 512)


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
        (member("/a.jpg"), "is not allowed"),
        (member("../a.jpg"), "refused|is not allowed"),
        (member("b/../../a.jpg"), "is not allowed"),
        (member("a\nb.jpg"), "is not allowed"),
        (member("é.jpg"), "is not allowed"),
        (member("a.pyd"), "'a.pyd' is refused"),
        (member("a.extra.pyd"), "is refused"),
        (member("a.PKL"), "is refused"),
        (member("a.pkl.gz"), "is refused"),
        (member("a.npy"), "is refused"),
        (member("a.JPG"), "is refused"),
        (member("a"), "is refused"),
        (member("a.jpg", b"x") + member("b.cls", b"1"), "members of two samples"),
        (member("a.jpg", b"x") + member("a.jpg", b"x"), "two members"),
        (member("a.jpg", size=7 << 30), "cut short"),
        (b"\0" * 124 + b"\x80" + b"\0" * 132 + b"ustar\0" + b"\0" * 249, "has the number"),
        (member("a.jpg", size=513) + b"\0" * 512, "cut short"),
        (member("a.jpg")[:300], "cut short"),
        (b"\0" * 1024, "no ustar header"),
        (b"<html>" + b" " * 506, "no ustar header"),
        (b"", "no members"),
    ],
)
def test_strange_members_are_refused_by_name(data: bytes, says: str) -> None:
    with pytest.raises(TesseraError, match=rf"^here: .*({says})"):
        shards.parse_sample(data, "here")


def test_a_good_sample_parses() -> None:
    data = member("d/a.cls", b"1") + member("d/a.png", b"x" * 600)
    assert shards.parse_sample(data, "here") == ("d/a", {"cls": b"1", "png": b"x" * 600})


@pytest.mark.parametrize("sample", [("a.b", {"jpg": b""}), ("a", {"pyd": b""}), ("a", {})])
def test_strange_samples_are_not_written(
    tmp_path: Path, sample: tuple[str, dict[str, bytes]]
) -> None:
    with pytest.raises(TesseraError):
        shards.write(tmp_path, "train", [sample])


def test_full_verification_finds_what_lies_between_samples(
    make_set: Callable[..., tuple[Path, Card]],
) -> None:
    folder, card = make_set(12)
    shards.verify(folder, card, full=True)
    path = folder / card.splits["train"].shards[1].path
    flip(path, path.stat().st_size - 1)
    shards.verify(folder, card)
    with pytest.raises(TesseraError, match=r"train/000001\.tar .*checksum differs"):
        shards.verify(folder, card, full=True)


def test_a_reader_goes_through_pickle(written: tuple[Path, SplitCard]) -> None:
    folder, card = written
    reader = shards.ShardReader(folder, card)
    reader.read(0)
    again = pickle.loads(pickle.dumps(reader))
    assert again.read(11) == reader.read(11)


def test_a_forked_process_reads_the_same(written: tuple[Path, SplitCard]) -> None:
    folder, card = written
    reader = shards.ShardReader(folder, card)
    first = [reader.read(i) for i in range(12)]
    with get_context("fork").Pool(2) as pool:
        assert pool.map(reader.read, range(12)) == first


def test_many_shards_don_t_use_up_the_file_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 3)
    card = shards.write(tmp_path, "train", some(10), shard_samples=1)
    reader = shards.ShardReader(tmp_path, card)
    before = len(os.listdir("/proc/self/fd"))
    assert [reader.read(i) for i in range(10)] == list(some(10))
    assert len(os.listdir("/proc/self/fd")) == before + 3
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert reader.read(0)[0] == "train/a/000"


def test_an_empty_split_can_be_written_and_opened(tmp_path: Path) -> None:
    card = shards.write(tmp_path, "test", [])
    assert len(shards.ShardReader(tmp_path, card)) == 0
