"""Sources and commands that went wrong for other people: each script makes one and judges the
outcome. They lie beside the project; without them nothing is run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.e2e]
ROOT = Path(__file__).parents[2]
CASES = sorted((ROOT.parent / "shared" / "cases").glob("[0-9]*.sh"))


@pytest.mark.parametrize("script", CASES, ids=lambda path: path.stem)
def test_a_case_is_right(script: Path) -> None:
    command = Path(sys.executable).with_name("tessera")
    done = subprocess.run(
        ["bash", script],
        env={**os.environ, "TESSERA": str(command), "PY": sys.executable},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.stdout.splitlines()[-1] == "RIGHT", done.stdout[-3000:] + done.stderr[-1000:]
