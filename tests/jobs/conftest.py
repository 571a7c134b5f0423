"""Calling the command in this process."""

from __future__ import annotations

import pytest
from calling import Call, Done

from jobs.cli import run, tessera


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs `tessera ARGUMENTS` in this process, by the way that the command takes."""

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run(tessera, "tessera", [str(a) for a in arguments])
        assert isinstance(left.value.code, int)
        return Done(left.value.code, *capsys.readouterr())

    return call
