"""ROOM: MLflow, saving a model so that MLflow's own tools can serve it.

In: a module. Out: `save_exportable`, which writes MLflow's `pytorch` flavor. No pickle, no code.
Must not know the registry.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


def save_exportable(
    module: nn.Module, example: np.ndarray[Any, Any], directory: Path, *, metadata: dict[str, Any]
) -> str | None:
    """Writes MLflow's `pytorch` flavor into `directory`, so that `mlflow models serve` and
    `mlflow.pyfunc` can predict without Tessera.

    `module` takes a uint8 tensor (batch, height, width, channels) and returns one float32 tensor
    (batch, …), preprocessing included; `example` is such an input. Height and width are fixed, the
    batch size is free. The graph is stored with torch.export: no pickle, no code. Returns None, or
    one line that says why this network can't be exported; `directory` is then unchanged.
    """
    from models.core.export import suppress_export_noise

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".export-") as scratch:
        flavor = Path(scratch) / "flavor"
        try:
            with suppress_export_noise():
                _write_flavor(module, example, flavor, metadata)
                _compare(module, example, flavor)
        except Exception as error:  # torch.export has no common base error
            lines = str(error).strip().splitlines()
            return f"{type(error).__name__}: {lines[0][:200] if lines else 'no reason given'}"
        for path in flavor.iterdir():
            if (directory / path.name).is_dir():
                shutil.rmtree(directory / path.name)
            os.replace(path, directory / path.name)
    return None


def _write_flavor(
    module: nn.Module, example: np.ndarray[Any, Any], to: Path, metadata: dict[str, Any]
) -> None:
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    from models.core.export import plain_copy

    plain = plain_copy(module)
    # torch.export would make a batch of one, and the strides of a slice, constants of the graph.
    batch = np.ascontiguousarray(np.resize(example, (2, *example.shape[1:])))
    with torch.no_grad():
        out = plain(torch.from_numpy(batch))
    # With named specs pyfunc would pass a dict, which the flavor doesn't accept.
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *batch.shape[1:]))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *out.shape[1:]))]),
    )
    mlflow.pytorch.save_model(
        plain,
        str(to),
        signature=signature,
        input_example=batch,
        pip_requirements=[f"{name}=={_version(name)}" for name in ("mlflow", "torch", "numpy")],
        metadata=metadata,
        serialization_format="pt2",
    )
    saved = Model.load(str(to))
    # The shape in the signature says the same as the example, which would be much larger than most
    # weights: 57 MB of JSON for two images of 1,024 x 1,024.
    saved.saved_input_example_info = None
    for example_file in ("input_example.json", "serving_input_example.json"):
        (to / example_file).unlink(missing_ok=True)
    # The graph was traced on the CPU and can't be moved: without this it fails on a GPU machine.
    saved.flavors["python_function"]["config"] = {"device": "cpu"}
    saved.save(str(to / "MLmodel"))


def _compare(module: nn.Module, example: np.ndarray[Any, Any], flavor: Path) -> None:
    """Raises if the stored graph and the module differ on a batch of another size."""
    import numpy as np
    import torch

    from models.core.export import ABSOLUTE, RELATIVE, plain_copy

    batch = torch.from_numpy(np.ascontiguousarray(np.resize(example, (3, *example.shape[1:]))))
    stored = torch.export.load(flavor / "data" / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(
            stored(batch),
            plain_copy(module)(batch),
            rtol=RELATIVE,
            atol=ABSOLUTE,
            check_stride=False,
        )


def _version(name: str) -> str:
    return importlib.metadata.version(name).partition("+")[0]  # no index has local versions
