"""WebDataset shards that Tessera didn't write: six in a folder, or one with chosen members."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.data.card import Card
from pipelines.data.images import encode_png
from pipelines.data.packing import in_place
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
    """Six shards of ten samples: four for train, one each for val and test."""
    for number, split in enumerate(["train"] * 4 + ["val", "test"]):
        write_tar(
            tmp_path / "wds" / f"set-{split}-{number:06d}.tar",
            samples(*range(10 * number, 10 * number + 10)),
        )
    return tmp_path / "wds"


@pytest.fixture
def add(tmp_path: Path) -> Callable[..., Card]:
    """Indexes one shard with these members, together with two valid ones."""

    def index(members: Members, **options: str) -> Card:
        folder = tmp_path / "one"
        write_tar(folder / "train-0.tar", members)
        write_tar(folder / "val-0.tar", samples(1000, 1001))
        write_tar(folder / "test-0.tar", samples(2000, 2001))
        allowed = options.pop("allow_rejected", "0")
        return in_place.index(
            str(folder), tmp_path / "out", options=options, allow_rejected=allowed
        )

    return index


def read_all(where: str | Path, card: Card, split: str = "train") -> Iterator[Any]:
    reader = ShardReader(where, card, split)
    yield from (reader.read(number) for number in range(len(reader)))
