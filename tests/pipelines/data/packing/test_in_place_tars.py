"""Foreign shards that are damaged or dangerous are refused by name.

Controls show what stock webdataset or tarfile does without the check.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import random
import resource
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from foreign_shards import MB, add, image, read_all, samples, source, write_tar

from models.core.errors import TesseraError
from pipelines.data.card import Card
from pipelines.data.inspection import verify
from pipelines.data.packing import in_place
from pipelines.data.packing.in_place_tars import entries

__all__ = ["add", "source"]  # fixtures


# ── what is wrong with a shard ────────────────────────────────────────────────────────────────


def stock(folder: Path, *, decode: bool = False) -> list[dict[str, Any]]:
    """What stock webdataset reads from the shards of train."""
    import webdataset as library

    urls = [str(path) for path in sorted(folder.glob("*train*.tar"))]
    result = library.WebDataset(urls, shardshuffle=False, empty_check=False)
    return list(result.decode() if decode else result)


@pytest.mark.fault(1)
@pytest.mark.control(1)
@pytest.mark.parametrize("where", ["member", "header", "data", "half"])
def test_a_truncated_shard_is_refused(where: str, source: Path, tmp_path: Path) -> None:
    path = source / "set-train-000000.tar"
    with path.open("rb") as file:
        starts = [entry.start - 512 for entry in entries(file.fileno(), "x")]
    data = path.read_bytes()
    pax = data.index(b"s0003.png") // 512 * 512  # the header of that member, or its pax header
    cut = {"member": pax, "header": pax + 100, "data": starts[6] + 520, "half": len(data) // 2}[
        where
    ]
    path.write_bytes(data[: cut if where != "member" else _before(data, pax)])
    with pytest.raises(TesseraError, match=r"set-train-000000\.tar.*(cut|no end|no ustar)"):
        in_place.index(str(source), tmp_path / "out", options={})
    if where == "member":
        assert len(stock(source)) < 40, "stock webdataset says nothing"


def _before(data: bytes, at: int) -> int:
    """The offset of the pax header before a member, or of the member if it has none."""
    while at >= 1024 and data[at - 1024 + 156 : at - 1024 + 157] == b"x":
        at -= 1024
    return at


@pytest.mark.fault(2)
@pytest.mark.control(2)
def test_zeros_in_a_shard_are_refused(source: Path, tmp_path: Path) -> None:
    path = source / "set-train-000000.tar"
    data = bytearray(path.read_bytes())
    at = _before(bytes(data), data.index(b"s0003.png") // 512 * 512)
    data[at : at + 1024] = bytes(1024)
    path.write_bytes(bytes(data))
    with pytest.raises(TesseraError, match="zeros in the middle"):
        in_place.index(str(source), tmp_path / "out", options={})
    assert len(stock(source)) == 33, "stock webdataset says nothing"


@pytest.mark.fault(2)
def test_every_flipped_header_byte_is_detected(source: Path) -> None:
    data = (source / "set-train-000000.tar").read_bytes()
    rng = random.Random(0)
    start = data.index(b"s0003.png") // 512 * 512
    path = source / "flipped.tar"
    for at in rng.sample(range(start, start + 512), 100):
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
        with path.open("rb") as file, pytest.raises(TesseraError, match=r"flipped\.tar"):
            list(entries(file.fileno(), "flipped.tar"))


@pytest.mark.fault(4)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"<html>" * 200, "no tar"),
        (gzip.compress(b"x" * 5000), "is compressed|no tar|cut short"),
        (bytes(10240), "no train sample"),
    ],
    ids=["empty", "error page", "gzip", "no members"],
)
def test_files_that_are_not_shards_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.tar").write_bytes(data)
    with pytest.raises(TesseraError, match=message):
        in_place.index(str(tmp_path / "in"), tmp_path / "out", options={})
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(12)
def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.tar.gz").write_bytes(b"x")
    with pytest.raises(TesseraError, match=r"train\.tar\.gz is a compressed tar"):
        in_place.index(str(tmp_path / "in"), tmp_path / "out", options={})


@pytest.mark.fault(7)
def test_a_duplicate_key_is_reported_with_both_locations(
    add: Callable[..., Card], source: Path, tmp_path: Path
) -> None:
    with pytest.raises(TesseraError, match=r"the key 's0001' twice, at bytes [\d,]+ and [\d,]+"):
        add(samples(1, 2, 1))
    with pytest.raises(TesseraError, match=r"the member 's0001\.png' twice, at bytes"):
        add(samples(1, 1))
    write_tar(source / "set-train-000009.tar", samples(3))
    with pytest.raises(TesseraError, match=r"'s0003' is in shard .*0000\.tar and in .*0009\.tar"):
        in_place.index(str(source), tmp_path / "out", options={})
    card = in_place.index(str(source), tmp_path / "out", options={"keys": "shard"})
    assert card.splits["train"].samples == 41


# ── what is dangerous ─────────────────────────────────────────────────────────────────────────


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.fault(13)
@pytest.mark.parametrize("extension", ["pkl", "pyd", "pth", "PKL", "pickle", "npy", "extra.pyd"])
@pytest.mark.parametrize("extra", ["skip", "refuse"])
def test_nothing_is_unpickled(
    extension: str, extra: str, add: Callable[..., Card], tmp_path: Path
) -> None:
    payload = pickle.dumps(Bomb(tmp_path / "marker"))
    members = [*samples(1, 2), (f"s0002.{extension}", payload)]
    if extra == "skip":
        card = add(members, extra="skip")
        assert len(list(read_all(tmp_path / "out", card))) == 2
        verify.verify(tmp_path / "out")
    else:
        with pytest.raises(TesseraError, match="unknown member"):
            add(members)
    assert not (tmp_path / "marker").exists()


@pytest.mark.control(13)
def test_stock_webdataset_unpickles_it(tmp_path: Path) -> None:
    payload = pickle.dumps(Bomb(tmp_path / "marker"))
    write_tar(tmp_path / "in" / "train.tar", [*samples(1), ("s0001.extra.pyd", payload)])
    stock(tmp_path / "in", decode=True)
    assert (tmp_path / "marker").exists()


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.BLKTYPE, "a block device"),
        (tarfile.FIFOTYPE, "a fifo"),
        (tarfile.CONTTYPE, "a contiguous file"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"Z", "of type b'Z'"),
    ],
)
def test_members_that_are_not_files_are_refused(kind: bytes, message: str, tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.type, info.linkname = kind, "/etc/passwd"
    header = info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "x.tar").write_bytes(header + bytes(1024))
    with (
        (tmp_path / "x.tar").open("rb") as file,
        pytest.raises(TesseraError, match=f"'a.png'.*{message}"),
    ):
        list(entries(file.fileno(), "x.tar"))


@pytest.mark.fault(10)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../x.png", "refused"),
        ("a/../../x.png", "refused"),
        ("/abs.png", "refused"),
        ("a\nb.png", "refused"),
        ("a\x1b[2Jb.png", "refused"),
        ("x" * 4096 + ".png", "longer than 512 bytes"),
        (b"\xff\xfe.png", "not UTF-8"),
    ],
)
def test_a_member_name_outside_the_folder_is_refused(
    name: str | bytes, message: str, tmp_path: Path
) -> None:
    info = tarfile.TarInfo(os.fsdecode(name))
    data = info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape") + bytes(1024)
    (tmp_path / "x.tar").write_bytes(data)
    with (tmp_path / "x.tar").open("rb") as file, pytest.raises(TesseraError, match=message):
        list(entries(file.fileno(), "x.tar"))


@pytest.mark.fault(10)
def test_a_member_name_with_nul_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x" * 200 + "\0../../evil.png")
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with (tmp_path / "x.tar").open("rb") as file, pytest.raises(TesseraError, match="refused"):
        list(entries(file.fileno(), "x.tar"))


@pytest.mark.fault(10)
def test_unusual_names_become_safe_keys(add: Callable[..., Card], tmp_path: Path) -> None:
    card = add([("./a b/é;x.png", image(1)), ("./a b/é;x.cls", b"1"), *samples(2)])
    result = [s.key for s in read_all(tmp_path / "out", card)]
    assert result == ["a%20b/%C3%A9%3Bx", "s0002"]


@pytest.mark.fault(12)
def test_false_sizes_in_a_header_need_no_memory(tmp_path: Path) -> None:
    """A header that claims 50 GB, a sparse member of 1.5 GB in 10 KB, a pax header of 1 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    big = tarfile.TarInfo("a.png")
    big.size = 50 << 30
    claims = {"cut short": big.tobuf(tarfile.GNU_FORMAT) + bytes(10240)}
    sparse = tarfile.TarInfo("a.png")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": "1500000000"}
    claims["sparse"] = sparse.tobuf(tarfile.PAX_FORMAT) + bytes(10240)
    for message, data in claims.items():
        (tmp_path / "x.tar").write_bytes(data)
        with (tmp_path / "x.tar").open("rb") as file, pytest.raises(TesseraError, match=message):
            list(entries(file.fileno(), "x.tar"))
    hollow = tarfile.TarInfo("a.png")
    hollow.size = 2 << 30
    (tmp_path / "x.tar").write_bytes(hollow.tobuf(tarfile.GNU_FORMAT))
    os.truncate(tmp_path / "x.tar", 3 << 30)  # a hole, so that the bytes are really there
    with (tmp_path / "x.tar").open("rb") as file, pytest.raises(TesseraError, match="too many"):
        list(entries(file.fileno(), "x.tar"))
    long = tarfile.TarInfo("x")
    long.type, long.size = tarfile.XHDTYPE, 1 << 30
    (tmp_path / "x.tar").write_bytes(long.tobuf(tarfile.GNU_FORMAT))
    os.truncate(tmp_path / "x.tar", 2 << 30)
    with (tmp_path / "x.tar").open("rb") as file, pytest.raises(TesseraError, match="header of"):
        list(entries(file.fileno(), "x.tar"))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < 100 * MB


@pytest.mark.control(12)
def test_tarfile_expands_a_sparse_member(tmp_path: Path) -> None:
    """Therefore they are refused: ten kilobytes expand to as many bytes as they claim."""
    path = tmp_path / "big"
    path.touch()
    os.truncate(path, 50 << 20)
    subprocess.run(["tar", "-S", "-cf", tmp_path / "train.tar", "-C", tmp_path, "big"], check=True)
    assert (tmp_path / "train.tar").stat().st_size <= 10240
    with tarfile.open(tmp_path / "train.tar") as tar:
        member = tar.extractfile("big")
        assert member is not None
        assert len(member.read()) == 50 << 20
    with (tmp_path / "train.tar").open("rb") as file, pytest.raises(TesseraError, match="sparse"):
        list(entries(file.fileno(), "x.tar"))


def test_random_damage_raises_only_tessera_errors(source: Path, tmp_path: Path) -> None:
    data = (source / "set-train-000000.tar").read_bytes()
    rng = random.Random(1)
    outcomes = {"refused": 0, "read": 0}
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 4, 64])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        if rng.random() < 0.3:
            del changed[rng.randrange(len(changed)) :]
        (tmp_path / "x.tar").write_bytes(bytes(changed))
        try:
            with (tmp_path / "x.tar").open("rb") as file:
                names = [entry.name for entry in entries(file.fileno(), "x.tar")]
            assert all(".." not in name and name.isprintable() for name in names)
            outcomes["read"] += 1
        except TesseraError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0


@pytest.mark.fault(3)
def test_damage_after_indexing_is_detected_when_read(source: Path, tmp_path: Path) -> None:
    card = in_place.index(str(source), tmp_path / "out", options={})
    path = source / "set-train-000001.tar"
    data = bytearray(path.read_bytes())
    at = data.index(image(13))
    data[at + 60] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(TesseraError, match=r"set-train-000001\.tar.*checksum differs"):
        list(read_all(tmp_path / "out", card))
    (line,) = verify.verify(tmp_path / "out").differences
    assert line.startswith("shard set-train-000001.tar: checksum differs; 1 of 10 samples differ")
    assert hashlib.sha256(bytes(data)).hexdigest() != card.splits["train"].shards[1].sha256
    shutil.rmtree(source)
