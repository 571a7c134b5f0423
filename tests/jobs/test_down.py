"""`tessera down` where nothing is up; what it ends is tested with real services."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runner import Call


def test_there_may_be_nothing_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path))
    done = call("down")
    assert (done.status, done.out) == (0, "nothing is up\n")
