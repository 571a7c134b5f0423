"""Models that MLflow's own tools serve: they need no Tessera, and hold no pickle and no code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.tracking import mlflow_runs, mlflow_store
from pipelines.tracking.mlflow_model import save_exportable
from pipelines.tracking.mlflow_registry import MlflowRegistry

pytestmark = pytest.mark.usefixtures("mlflow_settings")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Net(nn.Module):
    """uint8 (B, H, W, C) in, probabilities (B, 10) out; with every layer that eval mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image.permute(0, 3, 1, 2).float() / 255
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return torch.softmax(self.head(self.drop(x)), dim=1)


def images(count: int) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, 9, 12, 3), dtype=np.uint8)


@pytest.mark.slow
def test_a_process_without_tessera_predicts_the_same(
    store: Path, package: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = Net().train()
    before = contents(package)
    example = images(6)[::3]  # a view with strides of its own
    assert save_exportable(net, example, package, metadata={"classes": ["a", "b"]}) is None
    assert not list(package.rglob("*input_example*")), "it is larger than most weights"
    assert net.training
    assert {k: v for k, v in contents(package).items() if k in before} == before
    uri, artifacts = mlflow_store.embedded_uri(store), mlflow_store.embedded_artifacts(store)
    run = mlflow_runs.open_run(uri, experiment="e", name="n", tags={}, artifact_root=artifacts)
    registry = MlflowRegistry(uri)
    registry.register("served", package, run_id=run.run_id, tags={})

    inputs = images(5)
    np.save(tmp_path / "inputs.npy", inputs)
    code = (
        "import sys, json, numpy, mlflow.pyfunc\n"
        "model = mlflow.pyfunc.load_model('models:/served/1')\n"
        "numpy.save('predictions.npy', model.predict(numpy.load('inputs.npy')))\n"
        "print(json.dumps(model.metadata.metadata), 'pipelines' in sys.modules)"
    )
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")},
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == '{"classes": ["a", "b"]} False'
    with torch.no_grad():
        expected = net.eval()(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(
        np.load(tmp_path / "predictions.npy"), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_the_stored_flavor_has_no_pickle_and_no_code(package: Path) -> None:
    import yaml

    assert save_exportable(Net(), images(1), package, metadata={}) is None
    model = yaml.safe_load((package / "MLmodel").read_text())
    flavor = model["flavors"]["python_function"]
    assert flavor["loader_module"] == "mlflow.pytorch"
    assert not flavor.get("code")
    assert flavor["config"] == {"device": "cpu"}, "else a machine with a GPU refuses it"
    assert "model_code_path" not in flavor
    assert json.loads(model["signature"]["inputs"]) == [
        {"type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": [-1, 9, 12, 3]}}
    ]
    assert json.loads(model["signature"]["outputs"])[0]["tensor-spec"]["shape"] == [-1, 10]
    requirements = (package / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in requirements} == {"mlflow", "torch", "numpy"}
    assert not any("+" in line for line in requirements)
    assert save_exportable(Net(), images(2), package, metadata={}) is None, "a second time"


class Stubborn(nn.Module):
    """Its control flow depends on the pixels, which no graph can express."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.float() if image.float().mean() > 3 else image.float() * 2


class Batchy(nn.Module):
    """Accepts only batches of two."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.float().reshape(2, 9, -1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Stubborn, Batchy])
def test_a_network_that_cannot_be_exported_is_reported_with_the_reason(
    kind: type[nn.Module], package: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = contents(package)
    reason = save_exportable(kind(), images(2), package, metadata={})
    assert reason
    assert "\n" not in reason
    assert contents(package) == before
    assert list(package.parent.glob(".servable*")) == []
    output = capfd.readouterr()
    assert output.out + output.err == ""
