"""What the tests of MLflow's registry and of its models share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder as a registered model has it: weights, and a file in a folder."""
    folder = tmp_path / "package"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(bytes(range(256)))
    (folder / "inner" / "recipe.json").write_text("{}")
    return folder
