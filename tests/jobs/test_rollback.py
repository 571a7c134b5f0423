"""`tessera rollback` without an earlier champion; that it goes back is tested with `promote`."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runner import Call

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("model", "status", "message"),
    [
        ("digts", 1, "digts"),
        ("digits", 1, "champion"),
        ("digits/1", 1, "champion"),
    ],
)
def test_there_must_be_an_earlier_champion(
    trained_home: Path, call: Call, model: str, status: int, message: str
) -> None:
    done = call("rollback", model)
    assert (done.status, done.out) == (status, "")
    assert message in done.err
