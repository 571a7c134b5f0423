"""Which sources are WebDataset shards; how they are read is tested with packing in place."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.data.importers import webdataset


def make(folder: Path, *names: str) -> str:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"")
    return str(folder)


def test_tars_and_addresses_are_recognised(tmp_path: Path) -> None:
    shards = make(tmp_path / "shards", "a.tar", "b.tar", ".c.tar", "sizes.json")
    assert webdataset.recognises(shards) == "2 tars"
    assert webdataset.recognises(f"{shards}/a.tar") == "one tar"
    assert webdataset.recognises("s3://bucket/shards") == "an address"
    assert webdataset.recognises(make(tmp_path / "photos", "a.jpg")) == ""
    assert webdataset.recognises(str(tmp_path / "nowhere")) == ""


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    shards = make(tmp_path / "shards", "a.tar.gz", "b.tar.gz")
    with pytest.raises(TesseraError, match=r"a.tar.gz, … is a compressed tar \(2 in all\)"):
        webdataset.recognises(shards)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("data/shards", ("data/shards", "")),
        ("data/a.tar", ("data", "a.tar")),
        ("a.tar", (".", "a.tar")),
        ("/a.tar", ("/", "a.tar")),
        ("s3://bucket/x/a.tar", ("s3://bucket/x", "a.tar")),
    ],
)
def test_one_tar_is_a_shard_of_its_folder(source: str, expected: tuple[str, str]) -> None:
    assert webdataset.locate(source) == expected
