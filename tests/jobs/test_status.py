"""`tessera status` where nothing is up; what it says of services is tested with real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import Call


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path))


def test_nothing_up_is_status_1(call: Call) -> None:
    done = call("status")
    assert (done.status, "nothing is up" in done.out) == (1, True)


def test_json_has_the_same_form_without_services(call: Call) -> None:
    done = call("status", "--json")
    assert done.status == 1
    assert json.loads(done.out) == {"up": False, "services": [], "environment": {}}
