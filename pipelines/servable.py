"""ROOM: MLflow, the form of a model that MLflow's own tools can serve.

In: a module. Out: `save_servable`. No pickle, no code. Must not know the registry.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import logging
import os
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


def save_servable(
    module: nn.Module, example: np.ndarray[Any, Any], directory: Path, *, metadata: dict[str, Any]
) -> str | None:
    """Writes MLflow's `pytorch` flavor into `directory`, so that `mlflow models serve` and
    `mlflow.pyfunc` answer without this project.

    `module` takes a uint8 tensor (batch, height, width, channels) and gives one float32 tensor
    (batch, …), preprocessing included; `example` is such an input. Height and width are fixed, the
    batch is free. The graph is stored with torch.export: no pickle, no code. Gives None, or in a
    line why this network can't be stored so; then `directory` is as before.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".servable-") as scratch:
        flavor = Path(scratch) / "flavor"
        try:
            with _quiet():
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

    plain = _plain_copy(module)
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

    batch = torch.from_numpy(np.ascontiguousarray(np.resize(example, (3, *example.shape[1:]))))
    stored = torch.export.load(flavor / "data" / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(
            stored(batch), _plain_copy(module)(batch), rtol=1e-3, atol=1e-4, check_stride=False
        )


def _plain_copy(module: nn.Module) -> nn.Module:
    """On the CPU, in eval mode, without a wrapper: the only form that exports well."""
    import torch

    inner: Any = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    copied: nn.Module = copy.deepcopy(inner).cpu().eval()
    return copied.to(memory_format=torch.contiguous_format)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.export warns, logs and prints for its developers."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(_OthersOnly(sys.stderr)):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _OthersOnly(io.TextIOBase):
    """What other threads write is passed on: they may be showing something."""

    def __init__(self, real: TextIO) -> None:
        self._real = real
        self._silent = threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._silent else self._real.write(text)

    def flush(self) -> None:
        self._real.flush()


def _version(name: str) -> str:
    return importlib.metadata.version(name).partition("+")[0]  # an index has no local versions
