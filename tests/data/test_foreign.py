"""Shards of others: indexed where they lie, and refused by name where something is wrong.

Where a guard is tested, stock webdataset or tarfile shows what happens without it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_server import web_server

from models.core.errors import TesseraError, UsageError
from pipelines.data import card as cards
from pipelines.data import importing, verifying
from pipelines.data.card import Card
from pipelines.data.importers import webdataset
from pipelines.data.importers.support.foreign_tars import entries
from pipelines.data.places import storage
from pipelines.data.places.storage import CacheSettings
from pipelines.data.samples import encode_png, open_image
from pipelines.data.shards import ShardReader

Members = list[tuple[str, bytes]]
MB = 1 << 20


def image(number: int) -> bytes:
    return encode_png(np.full((4, 5, 3), number % 251, np.uint8))


def samples(*numbers: int, extension: str = "png") -> Members:
    return [
        member
        for n in numbers
        for member in ((f"s{n:04d}.{extension}", image(n)), (f"s{n:04d}.cls", b"%d" % (n % 2)))
    ]


def write_tar(path: Path, members: Members, form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six shards of ten samples: four of train, one each of val and test."""
    for number, split in enumerate(["train"] * 4 + ["val", "test"]):
        write_tar(
            tmp_path / "wds" / f"set-{split}-{number:06d}.tar",
            samples(*range(10 * number, 10 * number + 10)),
        )
    return tmp_path / "wds"


@pytest.fixture
def add(tmp_path: Path) -> Callable[..., Card]:
    """Indexes one shard with these members beside two good ones."""

    def index(members: Members, **options: str) -> Card:
        folder = tmp_path / "one"
        write_tar(folder / "train-0.tar", members)
        write_tar(folder / "val-0.tar", samples(1000, 1001))
        write_tar(folder / "test-0.tar", samples(2000, 2001))
        allowed = options.pop("allow_rejected", "0")
        return webdataset.index(
            str(folder), tmp_path / "out", options=options, allow_rejected=allowed
        )

    return index


def read_all(where: str | Path, card: Card, split: str = "train") -> Iterator[Any]:
    reader = ShardReader(where, card, split)
    yield from (reader.read(number) for number in range(len(reader)))


# ── what is understood ────────────────────────────────────────────────────────────────────────


def test_a_folder_is_indexed_where_it_lies(source: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in source.iterdir()}
    card = webdataset.index(str(source), tmp_path / "out", options={})
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    assert sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file()) == [
        "card.json",
        *["index.npy"] * 3,
    ]
    assert {split: held.samples for split, held in card.splits.items()} == {
        "train": 40,
        "val": 10,
        "test": 10,
    }
    assert cards.read(tmp_path / "out") == card
    assert (card.root, card.classes, card.task) == (str(source), ("0", "1"), "classification")
    assert card.splits["train"].class_counts == {"0": 20, "1": 20}
    found = list(read_all(tmp_path / "out", card))
    assert [(s.key, s.label) for s in found] == [(f"s{n:04d}", n % 2) for n in range(40)]
    assert [s.image for s in found] == [image(n) for n in range(40)]
    assert verifying.verify(tmp_path / "out").differences == ()


def test_mean_and_sizes_are_those_of_the_pixels(source: Path, tmp_path: Path) -> None:
    card = webdataset.index(str(source), tmp_path / "out", options={})
    pixels = np.stack([np.asarray(open_image(image(n), "")) for n in range(40)]) / 255
    assert card.image.mean == pytest.approx(tuple(pixels.mean(axis=(0, 1, 2))))
    assert card.image.std == pytest.approx(tuple(pixels.std(axis=(0, 1, 2))))
    assert (card.image.max_height, card.image.max_width) == (4, 5)


def test_the_same_shards_give_the_same_digest(source: Path, tmp_path: Path) -> None:
    digests = {
        webdataset.index(str(source), tmp_path / f"out{n}", options={}).digest for n in range(3)
    }
    assert len(digests) == 1


def test_an_address_is_indexed_too(source: Path, tmp_path: Path) -> None:
    storage.use_cache(CacheSettings(tmp_path / "cache"))
    try:
        with web_server(source) as port:
            where = f"http://127.0.0.1:{port}"
            with pytest.raises(TesseraError, match="can't be listed"):
                webdataset.index(where, tmp_path / "out", options={})
            listed = "set-train-{000000..000003}.tar,set-val-000004.tar,set-test-000005.tar"
            card = webdataset.index(where, tmp_path / "out", options={"shards": listed})
            assert card.root == where
            assert [s.image for s in read_all(tmp_path / "out", card, "val")] == [
                image(n) for n in range(40, 50)
            ]
    finally:
        storage.use_cache(None)


def test_pack_knows_the_format(source: Path, tmp_path: Path) -> None:
    assert importing.recognise(str(source))[0] == "webdataset"
    card = importing.pack(str(source), tmp_path / "out", name="wild", licence="MIT")
    assert (card.name, card.licence, card.source) == ("wild", "MIT", "webdataset:wds")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tarfile_writes_it(form: int, tmp_path: Path) -> None:
    long = "f" * 90 + "/" + "g" * 60 if form == tarfile.USTAR_FORMAT else "é" * 60 + "/" + "x" * 100
    names = [f"{long}/{n}.jpg" for n in range(3)]
    path = write_tar(tmp_path / "x.tar", [(name, b"%d" % n) for n, name in enumerate(names)], form)
    with path.open("rb") as file:
        found = list(entries(file.fileno(), "x"))
        assert [entry.name for entry in found] == names
        assert [os.pread(file.fileno(), e.size, e.start) for e in found] == [b"0", b"1", b"2"]


@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax", "posix", "ustar"])
def test_tar_writes_it(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    names = [f"{'d' * 60}/{'e' * 60}/{n}.jpg" for n in range(3)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    subprocess.run(
        ["tar", f"--format={form}", "--sort=name", "-cf", tmp_path / "x.tar", "-C", folder, "."],
        check=True,
    )
    with (tmp_path / "x.tar").open("rb") as file:
        found = list(entries(file.fileno(), "x"))
    assert [entry.name.removeprefix("./") for entry in found] == names


def test_webdataset_writes_it(tmp_path: Path) -> None:
    from webdataset import ShardWriter

    (tmp_path / "wds").mkdir()
    pattern = str(tmp_path / "wds" / "train-%06d.tar")
    with ShardWriter(pattern, maxcount=4, verbose=0) as writer:
        for n in range(10):
            writer.write({"__key__": f"a/b{n}", "png": image(n), "cls": n % 3})
    card = webdataset.index(str(tmp_path / "wds"), tmp_path / "out", options={})
    found = [s for split in card.splits for s in read_all(tmp_path / "out", card, split)]
    assert sorted((s.key, s.label) for s in found) == [(f"a/b{n}", n % 3) for n in range(10)]


def test_whole_shards_are_cut_off_where_no_split_is_told() -> None:
    paths = [f"part-{n:03d}.tar" for n in range(40)]
    splits = webdataset.find_splits(paths, seed=0)
    assert splits == webdataset.find_splits(paths[::-1], seed=0)
    assert splits != webdataset.find_splits(paths, seed=1)
    assert sorted(splits.values()) == ["test"] * 4 + ["train"] * 32 + ["val"] * 4
    told = webdataset.find_splits(["a/train/0.tar", "a/validation-1.tar", "my_TEST.tar"], seed=0)
    assert sorted(told.values()) == ["test", "train", "val"]
    with pytest.raises(TesseraError, match="names two splits"):
        webdataset.find_splits(["train/val-0.tar"], seed=0)


@pytest.mark.parametrize(
    ("label", "options", "classes"),
    [
        ({"cls": b"7\n"}, {}, ("3", "7")),
        ({"cls": b"cat"}, {"classes": "3,cat"}, ("3", "cat")),
        ({"txt": b" cat \n"}, {"label": "txt"}, ("cat", "dog")),
        ({"json": b'{"y": 7}'}, {"label": "json:y"}, ("3", "7")),
        ({"json": b'{"y": "cat", "z": [1]}'}, {"label": "json:y"}, ("cat", "dog")),
    ],
)
def test_labels_are_written_in_many_ways(
    label: dict[str, bytes], options: dict[str, str], classes: tuple[str, ...], tmp_path: Path
) -> None:
    ((extension, data),) = label.items()
    other = data.replace(b"cat", b"dog" if b"3" not in str(classes).encode() else b"3")
    other = other.replace(b"7", b"3")
    members = []
    for n in range(4):
        members += [(f"{n}.png", image(n)), (f"{n}.{extension}", data if n % 2 else other)]
    write_tar(tmp_path / "in" / "train.tar", members)
    card = webdataset.index(str(tmp_path / "in"), tmp_path / "out", options=options)
    assert card.classes == classes
    known = [classes[s.label] for s in read_all(tmp_path / "out", card)]
    assert len(set(known)) == 2
    assert known == known[:2] * 2


def test_images_alone_have_no_classes(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "train.tar", [(f"{n}.png", image(n)) for n in range(3)])
    card = webdataset.index(str(tmp_path / "in"), tmp_path / "out", options={"label": "none"})
    assert (card.task, card.classes) == ("images", ())
    assert [s.label for s in read_all(tmp_path / "out", card)] == [-1] * 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"label": "json"}, "label=json"),
        ({"label": "xml"}, "label=xml"),
        ({"extra": "run"}, "extra=run"),
        ({"keys": "x"}, "keys=x"),
        ({"shards": "a{5..1}.tar"}, "no range"),
        ({"shards": "a{0..999999999}.tar"}, "no range"),
    ],
)
def test_options_are_checked(
    options: dict[str, str], said: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        webdataset.index(str(source), tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


# ── what is wrong with a sample ───────────────────────────────────────────────────────────────


@pytest.mark.fault(8, 27)
@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.png", image(1))], "no label"),
        ([("a.cls", b"1")], "no image"),
        ([("a.png", image(1)), ("a.jpg", image(1)), ("a.cls", b"1")], "several images"),
        ([("a.png", b"GIF8"), ("a.cls", b"1")], "unreadable image"),
        ([("a.png", b""), ("a.cls", b"1")], "unreadable image"),
        ([("a.png", image(1)), ("a.cls", b"-1")], "unknown class"),
        ([("a.png", image(1)), ("a.cls", b"-100")], "unknown class"),
        ([("a.png", image(1)), ("a.cls", b"1.5")], "unknown class"),
        ([("a.png", image(1)), ("a.cls", b"9" * 30)], "unknown class"),
        ([("a.png", image(1)), ("a.cls", b"")], "unknown class"),
        ([("a.png", image(1)), ("a.cls", b"\xff\xfe")], "unknown class"),
        ([("a.png", image(1)), ("a.cls", b"x" * 2000)], "unknown class"),
        ([("a.png", image(1)), ("a.cls", b"a\x1b[2Jb")], "unknown class"),
        ([("a.png", image(1)), ("a.cls", b"1"), ("a.txt", b"x")], "unknown member"),
        ([("README", b"x")], "unknown member"),
    ],
)
def test_a_bad_sample_is_counted_against_a_budget(
    members: Members, reason: str, add: Callable[..., Card], tmp_path: Path
) -> None:
    with pytest.raises(TesseraError, match=f"{reason}: 1"):
        add([*samples(1, 2), *members])
    assert not (tmp_path / "out").exists()
    card = add([*samples(1, 2), *members], allow_rejected="1")
    assert card.rejected == 1
    assert [s.key for s in read_all(tmp_path / "out", card)] == ["s0001", "s0002"]
    row = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert row["reason"] == reason


@pytest.mark.fault(27, 28)
@pytest.mark.parametrize(
    "data",
    [
        b'{"y": NaN}',
        b'{"y": 1, "y": 2}',
        b'{"y": ' + b"[" * 200_000,
        b"",
        b"{}",
        b'{"y": true}',
        b'{"y": [1]}',
        b'{"y": -1}',
        b'{"y": 1e9}',
        b'{"y": ' + b"9" * 30 + b"}",
    ],
    ids=lambda data: data[:20].decode(),
)
def test_a_bad_json_label_is_rejected(data: bytes, add: Callable[..., Card]) -> None:
    good = [("g.png", image(1)), ("g.json", b'{"y": 1}')]
    with pytest.raises(TesseraError, match=r"(unreadable label|unknown class): 1"):
        add([*good, ("a.png", image(1)), ("a.json", data)], label="json:y", extra="skip")


def test_classes_are_those_that_are_told(add: Callable[..., Card]) -> None:
    with pytest.raises(TesseraError, match="unknown class"):
        add([*samples(1, 2), ("a.png", image(1)), ("a.cls", b"bird")], classes="cat,dog")
    with pytest.raises(TesseraError, match="some labels are numbers and some are names"):
        add([*samples(1, 2), ("a.png", image(1)), ("a.cls", b"bird")])


@pytest.mark.fault(30)
def test_a_class_that_train_lacks_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "train.tar", samples(2, 4))
    write_tar(tmp_path / "in" / "val.tar", samples(1))
    with pytest.raises(TesseraError, match="val has the class '1', train has not"):
        webdataset.index(str(tmp_path / "in"), tmp_path / "out", options={})


# ── what is wrong with a shard ────────────────────────────────────────────────────────────────


def stock(folder: Path, *, decode: bool = False) -> list[dict[str, Any]]:
    """What stock webdataset makes of the shards of train."""
    import webdataset as library

    urls = [str(path) for path in sorted(folder.glob("*train*.tar"))]
    found = library.WebDataset(urls, shardshuffle=False, empty_check=False)
    return list(found.decode() if decode else found)


@pytest.mark.fault(1)
@pytest.mark.control(1)
@pytest.mark.parametrize("where", ["member", "header", "data", "half"])
def test_a_cut_shard_is_refused(where: str, source: Path, tmp_path: Path) -> None:
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
        webdataset.index(str(source), tmp_path / "out", options={})
    if where == "member":
        assert len(stock(source)) < 40, "stock webdataset says nothing"


def _before(data: bytes, at: int) -> int:
    """Where the pax header before a member begins, if it has one."""
    while at >= 1024 and data[at - 1024 + 156 : at - 1024 + 157] == b"x":
        at -= 1024
    return at


@pytest.mark.fault(2)
@pytest.mark.control(2)
def test_zeros_in_the_midst_are_refused(source: Path, tmp_path: Path) -> None:
    path = source / "set-train-000000.tar"
    data = bytearray(path.read_bytes())
    at = _before(bytes(data), data.index(b"s0003.png") // 512 * 512)
    data[at : at + 1024] = bytes(1024)
    path.write_bytes(bytes(data))
    with pytest.raises(TesseraError, match="zeros in its midst"):
        webdataset.index(str(source), tmp_path / "out", options={})
    assert len(stock(source)) == 33, "stock webdataset says nothing"


@pytest.mark.fault(2)
def test_every_flipped_header_byte_is_seen(source: Path) -> None:
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
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"<html>" * 200, "no tar"),
        (gzip.compress(b"x" * 5000), "is compressed|no tar|cut short"),
        (bytes(10240), "no train sample"),
    ],
    ids=["empty", "error page", "gzip", "no members"],
)
def test_what_is_no_shard_is_named(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.tar").write_bytes(data)
    with pytest.raises(TesseraError, match=said):
        webdataset.index(str(tmp_path / "in"), tmp_path / "out", options={})
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(12)
def test_compressed_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.tar.gz").write_bytes(b"x")
    with pytest.raises(TesseraError, match=r"train\.tar\.gz, which is compressed"):
        webdataset.index(str(tmp_path / "in"), tmp_path / "out", options={})


@pytest.mark.fault(7)
def test_a_key_that_is_there_twice_is_named_with_both_places(
    add: Callable[..., Card], source: Path, tmp_path: Path
) -> None:
    with pytest.raises(TesseraError, match=r"the key 's0001' twice, at bytes [\d,]+ and [\d,]+"):
        add(samples(1, 2, 1))
    with pytest.raises(TesseraError, match=r"the member 's0001\.png' twice, at bytes"):
        add(samples(1, 1))
    write_tar(source / "set-train-000009.tar", samples(3))
    with pytest.raises(TesseraError, match=r"'s0003' is in shard .*0000\.tar and in .*0009\.tar"):
        webdataset.index(str(source), tmp_path / "out", options={})
    card = webdataset.index(str(source), tmp_path / "out", options={"keys": "shard"})
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
        verifying.verify(tmp_path / "out")
    else:
        with pytest.raises(TesseraError, match="unknown member"):
            add(members)
    assert not (tmp_path / "marker").exists()


@pytest.mark.control(13)
def test_stock_webdataset_runs_it(tmp_path: Path) -> None:
    payload = pickle.dumps(Bomb(tmp_path / "marker"))
    write_tar(tmp_path / "in" / "train.tar", [*samples(1), ("s0001.extra.pyd", payload)])
    stock(tmp_path / "in", decode=True)
    assert (tmp_path / "marker").exists()


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    ("kind", "said"),
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
def test_what_is_no_file_is_refused_by_name(kind: bytes, said: str, tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.type, info.linkname = kind, "/etc/passwd"
    header = info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "x.tar").write_bytes(header + bytes(1024))
    with (
        (tmp_path / "x.tar").open("rb") as file,
        pytest.raises(TesseraError, match=f"'a.png'.*{said}"),
    ):
        list(entries(file.fileno(), "x.tar"))


@pytest.mark.fault(10)
@pytest.mark.parametrize(
    ("name", "said"),
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
def test_a_name_that_leads_elsewhere_is_refused(
    name: str | bytes, said: str, tmp_path: Path
) -> None:
    info = tarfile.TarInfo(os.fsdecode(name))
    data = info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape") + bytes(1024)
    (tmp_path / "x.tar").write_bytes(data)
    with (tmp_path / "x.tar").open("rb") as file, pytest.raises(TesseraError, match=said):
        list(entries(file.fileno(), "x.tar"))


@pytest.mark.fault(10)
def test_a_name_after_nul_is_not_seen(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x" * 200 + "\0../../evil.png")
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with (tmp_path / "x.tar").open("rb") as file, pytest.raises(TesseraError, match="refused"):
        list(entries(file.fileno(), "x.tar"))


@pytest.mark.fault(10)
def test_strange_names_become_plain_keys(add: Callable[..., Card], tmp_path: Path) -> None:
    card = add([("./a b/é;x.png", image(1)), ("./a b/é;x.cls", b"1"), *samples(2)])
    found = [s.key for s in read_all(tmp_path / "out", card)]
    assert found == ["a%20b/%C3%A9%3Bx", "s0002"]


@pytest.mark.fault(12)
def test_claims_of_a_header_cost_no_memory(tmp_path: Path) -> None:
    """A header that says 50 GB, a sparse member of 1.5 GB in 10 KB, a pax header of 1 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    big = tarfile.TarInfo("a.png")
    big.size = 50 << 30
    claims = {"cut short": big.tobuf(tarfile.GNU_FORMAT) + bytes(10240)}
    sparse = tarfile.TarInfo("a.png")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": "1500000000"}
    claims["sparse"] = sparse.tobuf(tarfile.PAX_FORMAT) + bytes(10240)
    for said, data in claims.items():
        (tmp_path / "x.tar").write_bytes(data)
        with (tmp_path / "x.tar").open("rb") as file, pytest.raises(TesseraError, match=said):
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
def test_the_library_reads_a_sparse_member_whole(tmp_path: Path) -> None:
    """What the refusal is for: ten kilobytes become as many bytes as they say."""
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


def test_random_damage_never_raises_anything_else(source: Path, tmp_path: Path) -> None:
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
def test_damage_after_indexing_is_seen_when_it_is_read(source: Path, tmp_path: Path) -> None:
    card = webdataset.index(str(source), tmp_path / "out", options={})
    path = source / "set-train-000001.tar"
    data = bytearray(path.read_bytes())
    at = data.index(image(13))
    data[at + 60] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(TesseraError, match=r"set-train-000001\.tar.*checksum differs"):
        list(read_all(tmp_path / "out", card))
    (line,) = verifying.verify(tmp_path / "out").differences
    assert line.startswith("shard set-train-000001.tar: checksum differs; 1 of 10 samples differ")
    assert hashlib.sha256(bytes(data)).hexdigest() != card.splits["train"].shards[1].sha256
    shutil.rmtree(source)
