"""A pack to a real S3 server is killed and resumed; the result equals that of an undisturbed
pack."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from s3_server import missing

from pipelines.data import card as cards
from pipelines.data.inspection.verify import verify
from pipelines.data.packing.fix import fix
from pipelines.data.packing.pack import pack
from pipelines.data.packing.staging import SHARDS
from pipelines.storage.base import Storage
from pipelines.storage.open import open_storage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing() or "there is one"),
]
ROOT = Path(__file__).parents[2]


def shard_records(storage: Storage) -> int:
    return sum(name.endswith(".json") for name in storage.names(SHARDS))


@pytest.mark.cluster
def test_a_pack_that_is_killed_twice_resumes(
    tmp_path: Path, s3: str, make_folder: Callable[..., Path]
) -> None:
    source = make_folder(tmp_path / "pets", ["cat", "dog"], 60)
    storage = open_storage(s3)
    command = [sys.executable, "-m", "jobs.pack", str(source), "--to", s3, "--shard-samples", "8"]
    before = 0
    for _ in range(2):
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 120
            while shard_records(storage) < before + 3:
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.kill()
        before = shard_records(storage)
        assert storage.size("card.json") is None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = re.search(r"resuming: (\d+) of \d+ shards are packed", done.stderr)
    # One that was on its way when its sender died may have arrived.
    assert result
    assert before <= int(result[1]) <= before + 1
    pack(str(source), tmp_path / "here", shard_samples=8)
    here = {
        path.relative_to(tmp_path / "here").as_posix(): path.read_bytes()
        for path in (tmp_path / "here").rglob("*")
        if path.is_file()
    }
    assert {name: storage.read(name) for name in storage.names()} == here
    assert not verify(s3).differences
    _check_corrections(tmp_path, s3)


def _check_corrections(tmp_path: Path, data: str) -> None:
    """Two corrections in a row, from address to address: the last card lists both."""
    file = tmp_path / "corrections.csv"
    digests = []
    for number, row in enumerate(("cat/000,dog", "dog/001,drop")):
        file.write_text(f"sample,action\n{row}\n")
        digests.append(cards.read(data).digest)
        card = fix(data, file, f"{data}-{number}")
        data = f"{data}-{number}"
        assert not verify(data).differences
    assert [made.data_digest for made in card.corrections] == digests
    assert [(made.relabelled, made.dropped) for made in card.corrections] == [(1, 0), (0, 1)]
