"""Reference values agree with scikit-learn on a few images."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from packed_sets import pack_set
from PIL import Image

from models.core.errors import UsageError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "references.py"


@pytest.fixture(scope="module")
def references() -> ModuleType:
    spec = importlib.util.spec_from_file_location("references", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pixels(count: int, seed: int) -> np.ndarray:
    """uint8 (N, 9, 7): mixtures of a few waves with noise, clipped to the range of an image."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:9, :7]
    waves = np.stack([np.sin(rows * (k + 1) / 3 + columns * k / 2) for k in range(6)])
    mixed = np.tensordot(rng.normal(0, 60, (count, 6)), waves, 1)
    return (128 + mixed + rng.normal(0, 10, (count, 9, 7))).round().clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "waves"
    splits = {"train": pixels(60, 0), "val": pixels(5, 1), "test": pixels(20, 2)}
    images = {
        split: [(f"{split}-{i}", Image.fromarray(one), None) for i, one in enumerate(rows)]
        for split, rows in splits.items()
    }
    pack_set(folder, "images", images)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("components", [1, 4, 63])
def test_pca_agrees_with_scikit_learn(
    references: ModuleType, packed: Path, components: int
) -> None:
    result = references.pca(str(packed), components)
    train, test = (pixels(*arguments).reshape(-1, 63) / 255 for arguments in ((60, 0), (20, 2)))
    if components == 63:  # scikit-learn allows at most as many as there are images
        assert result["mse"] < 1e-5
        return
    from sklearn.decomposition import PCA

    fitted = PCA(components).fit(train)
    reconstructed = fitted.inverse_transform(fitted.transform(test)).clip(0, 1)
    assert result["mse"] == pytest.approx(np.mean((reconstructed - test) ** 2), rel=1e-3)
    assert result["compression"] == 63 * 8 / (components * 16)


@pytest.mark.slow
def test_script_prints_json(packed: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "pca", str(packed), "--components", "4", "--split", "val"],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert (result["components"], result["split"]) == (4, "val")
    assert result["mse"] > 0


def test_more_components_than_values_are_refused(references: ModuleType, packed: Path) -> None:
    with pytest.raises(UsageError, match="64 components of 63"):
        references.pca(str(packed), 64)
