"""ROOM: ONNX. Exports a network to one file that predicts without Tessera.

In: a module from uint8 images to one tensor (`models/core/export.py`). Out: `write` makes an ONNX
or a pt2 file of it, `load` reads one as other programs would, `compare` measures how far its output
is from the expected one. Must not know which network it is, nor where the images come from.

    B images, H height, W width, C channels

Both formats have the same graph, which torch.export records: no pickle, no code. Height and width
are fixed, the batch size is free. The file contains its own metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.core.errors import TesseraError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    Array = np.ndarray[Any, Any]
    Network = Callable[[Array], Array]
    """uint8 images (B, H, W, C) -> output (B, …)."""

FORMATS = ("onnx", "pt2")
INPUT = "images"
METADATA = "tessera.json"
"""The entry of a pt2 file with its metadata; an ONNX file has them as metadata properties."""
MOST_BYTES = 2_000_000_000
"""The most that the weights in an ONNX file may take: protobuf is limited to 2 GiB."""


@dataclass(frozen=True)
class ExportCheck:
    """The outputs of a file beside the expected ones, for `images` images. `largest` is the largest
    absolute difference, and `within` says whether all are within tolerance. `other_class` counts
    the images whose most probable class differs (in a segmentation: that of any pixel); None
    without classes."""

    images: int
    largest: float
    within: bool
    other_class: int | None


def check_installed(form: str) -> None:
    """Raises TesseraError if a library that the format needs is missing."""
    if form != "onnx":
        return
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise TesseraError(
            f"--format onnx needs {error.name}, which isn't installed",
            hint="pip install 'tessera-train[onnx]', or --format pt2",
        ) from None


def write(
    module: nn.Module,
    shape: tuple[int, int, int],
    to: Path,
    *,
    form: str,
    output: str,
    metadata: Mapping[str, Any],
) -> None:
    """Writes `module` to the file `to`. `shape` is (H, W, C), `output` the name of the output,
    `metadata` plain data. Raises TesseraError if the network can't be recorded as a graph."""
    import torch

    from models.core.export import plain_copy, suppress_export_noise

    plain = plain_copy(module)
    # torch.export would make a batch of one a constant of the graph.
    example = torch.zeros(2, *shape, dtype=torch.uint8)
    step, hint = "recorded as a graph", ""
    try:
        with suppress_export_noise(), torch.no_grad():
            shapes = ({0: torch.export.Dim("batch")},)
            graph = torch.export.export(plain, (example,), dynamic_shapes=shapes)
            if form == "onnx":
                step, hint = "written as onnx", "use --format pt2"
                _write_onnx(graph, example, to, output, metadata)
            else:
                step = "written as pt2"
                graph.example_inputs = None  # they would be pickled, and are not needed
                extra = {METADATA: json.dumps(dict(metadata), indent=1)}
                torch.export.save(graph, to, extra_files=extra)
    except (OSError, TesseraError):
        raise
    except Exception as error:  # neither library has a common base error
        raise TesseraError(f"this network can't be {step}: {_line(error)}", hint=hint) from error


def _write_onnx(
    graph: Any, example: Any, to: Path, output: str, metadata: Mapping[str, Any]
) -> None:
    import torch

    tensors = graph.state_dict.values()
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size_bytes > MOST_BYTES:
        raise TesseraError(
            f"the weights take {size_bytes:,} bytes, and an ONNX file can hold {MOST_BYTES:,}",
            hint="use --format pt2",
        )
    program = torch.onnx.export(
        graph,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=[INPUT],
        output_names=[output],
        dynamic_shapes=({0: "batch"},),  # the name that replaces the graph's own symbol
    )
    assert program is not None
    for name, value in metadata.items():
        program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    program.save(str(to), external_data=False)


def load(path: Path, form: str) -> Network:
    """Returns the file as a function, on the CPU, with the runtime that it is made for. It
    raises TesseraError if the runtime fails."""
    network = _load_onnx(path) if form == "onnx" else _load_pt2(path)

    def run(images: Array) -> Array:
        try:
            return network(images)
        except Exception as error:  # of the runtime's own types
            raise TesseraError(
                f"the file fails for a batch of {len(images)}: {_line(error)}"
            ) from error

    return run


def _load_onnx(path: Path) -> Network:
    import onnxruntime

    # Otherwise it warns on stderr that it has found no GPU.
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Array) -> Array:
        output: Array = session.run(None, {INPUT: images})[0]
        return output

    return run


def _load_pt2(path: Path) -> Network:
    import torch

    from models.core.export import suppress_export_noise

    with suppress_export_noise():
        module = torch.export.load(path).module()

    def run(images: Array) -> Array:
        with torch.no_grad():
            output: Array = module(torch.from_numpy(images)).numpy()
        return output

    return run


def compare(
    network: Network, pairs: Iterable[tuple[Array, Array]], *, classes: bool
) -> ExportCheck:
    """Compares a network with `pairs` of images and expected outputs (B, …). With `classes` the
    last axis of an output has the probability of each class."""
    import numpy as np

    from models.core.export import ABSOLUTE, RELATIVE

    count = other = 0
    largest, within = 0.0, True
    for images, expected in pairs:
        output = network(images)
        count += len(images)
        if output.shape != expected.shape:
            raise TesseraError(
                f"the file's output has shape {output.shape}, the model's {expected.shape}"
            )
        difference = np.abs(output.astype(np.float64) - expected)
        # NaN counts as infinitely far: `<=` is false for it, and max() would ignore it.
        within &= bool((difference <= ABSOLUTE + RELATIVE * np.abs(expected)).all())
        worst = float(difference.max(initial=0.0))
        largest = max(largest, math.inf if math.isnan(worst) else worst)
        if classes:
            differs = output.argmax(-1) != expected.argmax(-1)
            other += int(differs.reshape(len(images), -1).any(1).sum())
    return ExportCheck(count, largest, within, other if classes else None)


def _line(error: Exception) -> str:
    """The error in one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no reason given'}"
