"""`tessera verify` as a user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_runner import Call


@pytest.fixture
def packed(digits: Path, tmp_path: Path) -> Path:
    shutil.copytree(digits, tmp_path / "digits")
    return tmp_path / "digits"


def test_verify_prints_what_was_checked(packed: Path, call: Call) -> None:
    done = call("verify", packed)
    assert done.status == 0, done.err
    lines = dict(line.split(None, 1) for line in done.out.splitlines())
    assert lines["checked"] == "1,797 samples in 3 shards"
    assert lines["differs"] == "nothing"
    as_json = call("verify", packed, "--json", "--workers", 2)
    report = json.loads(as_json.out)
    assert (report["same"], report["samples"], report["differences"]) == (True, 1797, [])


def test_verify_lists_differences_and_exits_with_1(packed: Path, call: Call) -> None:
    path = packed / "val" / "000000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(bytes(data))
    (packed / "test" / "000000.tar").unlink()
    done = call("verify", packed)
    assert done.status == 1
    assert "differs: shard test/000000.tar is missing" in done.out
    assert "differs: shard val/000000.tar: checksum differs; 1 of " in done.out
    as_json = call("verify", packed, "--json")
    assert as_json.status == 1
    report = json.loads(as_json.out)
    assert not report["same"]
    assert len(report["differences"]) == 2


def test_verify_refuses_a_folder_that_is_not_a_data_set(tmp_path: Path, call: Call) -> None:
    done = call("verify", tmp_path)
    assert done.status == 1
    assert "is not a packed data set" in done.err
    assert call("verify", "pipe:cat x").status == 2
    assert call("verify", "ftp://host/set").status == 2
