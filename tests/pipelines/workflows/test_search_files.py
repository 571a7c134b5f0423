"""The state of a search in an object store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.search import trials as search_trials
from pipelines.search.trials import Trial
from pipelines.storage.open import open_storage
from pipelines.workflows import search_files


@pytest.fixture
def address(tmp_path: Path) -> str:
    return search_files.address(f"memory://bucket/{tmp_path.name}", "search")


def test_the_state_is_fetched_on_another_machine(tmp_path: Path, address: str) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for name in ("search.json", "trials.json"):
        (here / name).write_text(json.dumps(name))
        search_files.publish(address, here, name)
    assert search_files.names(f"memory://bucket/{tmp_path.name}") == ["search"]
    there.mkdir()
    (there / "population.json").write_text("of an earlier state")
    search_files.fetch(address, there)
    assert {p.name: json.loads(p.read_text()) for p in there.iterdir()} == {
        "search.json": "search.json",
        "trials.json": "trials.json",
    }


def test_the_newest_content_of_a_file_is_published(tmp_path: Path, address: str) -> None:
    latest = search_files.LatestFile(address, tmp_path, "trials.json")
    for number in range(50):
        (tmp_path / "trials.json").write_text(str(number))
        latest.changed()
    latest.close()
    assert open_storage(address).read("trials.json") == b"49"


def test_without_a_storage_nothing_is_published(tmp_path: Path) -> None:
    assert search_files.address("", "search") == ""
    search_files.publish("", tmp_path, "missing.json")
    latest = search_files.LatestFile("", tmp_path, "trials.json")
    latest.changed()
    latest.close()


def test_a_failed_upload_is_reported_at_the_end(tmp_path: Path) -> None:
    latest = search_files.LatestFile("https://127.0.0.1:9/read/only", tmp_path, "trials.json")
    (tmp_path / "trials.json").write_text("[]")
    latest.changed()
    with pytest.raises(TesseraError, match="can't be written: it is a web server"):
        latest.close()


@pytest.mark.parametrize("stored", [True, False])
def test_a_trial_is_waited_for_until_the_record_has_it(
    tmp_path: Path, address: str, stored: bool
) -> None:
    """Control: the record of this machine isn't enough where another one reads the storage."""
    where = address if stored else ""
    search_trials.write([Trial("a", 1, {})], tmp_path / "trials.json")
    if stored:
        with pytest.raises(TesseraError, match=f"didn't record trial a in {address}/trials.json"):
            search_files.wait_until_recorded(where, tmp_path, "a", patience_seconds=0.3)
    search_files.publish(where, tmp_path, "trials.json")
    search_files.wait_until_recorded(where, tmp_path, "a")
    with pytest.raises(TesseraError, match="didn't record trial b in"):
        search_files.wait_until_recorded(where, tmp_path, "b", patience_seconds=0.3)
