"""ROOM: ONNX. A network as one file that answers without Tessera, and what that file answers.

In: a module from uint8 images to one tensor (`models/core/serving.py`). Out: `write` makes an ONNX
or a pt2 file of it, `load` reads one back as anybody would, `compare` says how far its answers are
from those expected. Must not know which network it is, nor where the images come from.

    B images, H height, W width, C channels

Both are made of the same graph, which torch.export records: no pickle, no code. Height and
width are fixed, the batch is free. What there is to say of the file lies in it.
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
    Ask = Callable[[Array], Array]
    """uint8 images (B, H, W, C) -> answers (B, …)."""

FORMATS = ("onnx", "pt2")
INPUT = "images"
METADATA = "tessera.json"
"""The name, in a pt2 file, of what is said of it; in an ONNX file these are its metadata."""
MOST_BYTES = 2_000_000_000
"""Of the weights in an ONNX file: protobuf ends at 2 GiB, graph included."""


@dataclass(frozen=True)
class ExportCheck:
    """How a file answered `images` images. `largest` is the largest absolute difference, and
    `within` says whether each is tolerable. `other_class` counts the images in which the most
    probable class, in a segmentation that of any pixel, is another; None where there are no
    classes."""

    images: int
    largest: float
    within: bool
    other_class: int | None


def check_installed(form: str) -> None:
    """A TesseraError where libraries are missing that `form` needs."""
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
    """Writes `module` to the file `to`. `shape` is (H, W, C), `output` the name of its answer,
    `metadata` plain data. A TesseraError where no graph can be made of it."""
    import torch

    from models.core.serving import plain_copy, suppress_export_noise

    plain = plain_copy(module)
    # A batch of one would be frozen into the graph.
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
                graph.example_inputs = None  # they would be pickled, and nothing needs them
                extra = {METADATA: json.dumps(dict(metadata), indent=1)}
                torch.export.save(graph, to, extra_files=extra)
    except (OSError, TesseraError):
        raise
    except Exception as error:  # neither library has a common one
        raise TesseraError(f"this network can't be {step}: {_line(error)}", hint=hint) from error


def _write_onnx(
    graph: Any, example: Any, to: Path, output: str, metadata: Mapping[str, Any]
) -> None:
    import torch

    tensors = graph.state_dict.values()
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size_bytes > MOST_BYTES:
        raise TesseraError(
            f"the weights take {size_bytes:,} bytes, an ONNX file has room for {MOST_BYTES:,}",
            hint="use --format pt2",
        )
    program = torch.onnx.export(
        graph,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=[INPUT],
        output_names=[output],
        dynamic_shapes=({0: "batch"},),  # the name that the graph's own symbol gets
    )
    assert program is not None
    for name, value in metadata.items():
        program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    program.save(str(to), external_data=False)


def load(path: Path, form: str) -> Ask:
    """The file's own answers, on the CPU, by the runtime it is meant for."""
    ask = _load_onnx(path) if form == "onnx" else _load_pt2(path)

    def told(images: Array) -> Array:
        try:
            return ask(images)
        except Exception as error:  # the runtimes' own
            raise TesseraError(
                f"the file doesn't answer a batch of {len(images)}: {_line(error)}"
            ) from error

    return told


def _load_onnx(path: Path) -> Ask:
    import onnxruntime

    # Of a machine without a GPU it would say on stderr that it has found none.
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def ask(images: Array) -> Array:
        answer: Array = session.run(None, {INPUT: images})[0]
        return answer

    return ask


def _load_pt2(path: Path) -> Ask:
    import torch

    from models.core.serving import suppress_export_noise

    with suppress_export_noise():
        network = torch.export.load(path).module()

    def ask(images: Array) -> Array:
        with torch.no_grad():
            answer: Array = network(torch.from_numpy(images)).numpy()
        return answer

    return ask


def compare(ask: Ask, pairs: Iterable[tuple[Array, Array]], *, classes: bool) -> ExportCheck:
    """`pairs` are batches of images and the answers (B, …) to be expected; with `classes` the last
    axis of an answer has the probability of each class."""
    import numpy as np

    from models.core.serving import ABSOLUTE, RELATIVE

    images = other = 0
    largest, within = 0.0, True
    for asked, expected in pairs:
        given = ask(asked)
        images += len(asked)
        if given.shape != expected.shape:
            raise TesseraError(
                f"the file answers {given.shape} where the model answers {expected.shape}"
            )
        difference = np.abs(given.astype(np.float64) - expected)
        # What is no number is nowhere near one: `<=` is false of it, and max() would pass it over.
        within &= bool((difference <= ABSOLUTE + RELATIVE * np.abs(expected)).all())
        worst = float(difference.max(initial=0.0))
        largest = max(largest, math.inf if math.isnan(worst) else worst)
        if classes:
            differs = given.argmax(-1) != expected.argmax(-1)
            other += int(differs.reshape(len(asked), -1).any(1).sum())
    return ExportCheck(images, largest, within, other if classes else None)


def _line(error: Exception) -> str:
    """What an error says, in a line that isn't long."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no reason given'}"
