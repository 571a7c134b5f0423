"""ROOM: MLflow, the form of a model that MLflow's own tools can serve.

In: a module. Out: `save_exportable`. No pickle, no code. Must not know the registry.
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
    `mlflow.pyfunc` answer without this project.

    `module` takes a uint8 tensor (batch, height, width, channels) and gives one float32 tensor
    (batch, …), preprocessing included; `example` is such an input. Height and width are fixed, the
    batch is free. The graph is stored with torch.export: no pickle, no code. Gives None, or in a
    line why this network can't be stored so; then `directory` is as before.
    """
    from models.core.serving import suppress_export_noise

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".servable-") as scratch:
        flavor = Path(scratch) / "flavor"
        try:
            with suppress_export_noise():
                _write_flavor(module, example, flavor, metadata)
                _compare(module, example, flavor)
        except Exception as error:  # torch.export has no common error
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

    from models.core.serving import plain_copy

    plain = plain_copy(module)
    # A batch of one would be frozen into the graph, and so would the strides of a slice.
    batch = np.ascontiguousarray(np.resize(example, (2, *example.shape[1:])))
    with torch.no_grad():
        out = plain(torch.from_numpy(batch))
    # Named specs would make pyfunc hand over a dict, which the flavor doesn't take.
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
    # The graph was traced on the CPU and can't move: without this, a machine with a GPU refuses it.
    saved.flavors["python_function"]["config"] = {"device": "cpu"}
    saved.save(str(to / "MLmodel"))


def _compare(module: nn.Module, example: np.ndarray[Any, Any], flavor: Path) -> None:
    """Raises if the stored graph doesn't answer a batch of another size as the module does."""
    import numpy as np
    import torch

    from models.core.serving import ABSOLUTE, RELATIVE, plain_copy

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
    return importlib.metadata.version(name).partition("+")[0]  # an index has no local versions
