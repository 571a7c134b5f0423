"""Calling the command in this process, with a store of the file's own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="module")
def own_home(prepared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty store for all tests of a file: what TESSERA_HOME names meanwhile."""
    root = tmp_path_factory.mktemp("home") / ".tessera"
    shutil.copytree(prepared_store, root)
    before = os.environ.get("TESSERA_HOME")
    os.environ["TESSERA_HOME"] = str(root)
    yield root
    os.environ.pop("TESSERA_HOME")
    if before:
        os.environ["TESSERA_HOME"] = before
