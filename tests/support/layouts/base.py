"""What a row of docs/layouts.md is made of: a layout, the tool that exports it, and the outcome.

In: nothing. Out: `Layout`, and small images to build sources with. Each of `folders.py`, `boxes.py`
and `pixels.py` has a list `LAYOUTS`; tests/pipelines/data/test_every_layout.py packs each of them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PETS = ("cat", "dog")
CUT = {"train": 4, "val": 2, "test": 2}
"""Of two classes of four images, without splits."""


@dataclass(frozen=True)
class Layout:
    """A layout of a source.

    name     as in the docs: the format, and what is special about it; unique
    tool     the tool or data set that has this layout
    build    writes the source into a folder
    task     task of the packed set; empty where it is refused
    classes  names of the classes in order
    samples  split -> samples in the pack, with splits that are taken from train
    objects  objects of all splits; None for tasks without
    format   `--format`; None where the layout is recognised
    options  `--option`s
    allow    `--allow-unused`s
    refused  regular expression of the error's message and hint, for a layout that is refused
    inside   the folder or file below the built folder that is packed
    """

    name: str
    tool: str
    build: Callable[[Path], object]
    task: str = "classification"
    classes: tuple[str, ...] = ()
    samples: Mapping[str, int] = field(default_factory=dict)
    objects: int | None = None
    format: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    allow: tuple[str, ...] = ()
    refused: str = ""
    inside: str = ""

    def row(self) -> str:
        """The row of the table in docs/layouts.md."""
        given = [f"--format {self.format}"] if self.format else []
        given += [f"--option {shlex.quote(f'{k}={v}')}" for k, v in self.options.items()]
        given += [f"--allow-unused {shlex.quote(pattern)}" for pattern in self.allow]
        options = f"`{' '.join(given)}`" if given else ""
        task = self.task.replace("_", " ")
        how = options or "recognised"
        if self.refused:
            task, how = "-", f"stops and says why{' with ' + options if options else ''}"
        return f"| {self.name} | {self.tool} | {task} | {how} |"


def picture(
    path: Path, seed: int = 0, *, width: int = 24, height: int = 16, form: str = ""
) -> Path:
    """Writes an image of soft colours: no two seeds look alike. `form` is Pillow's name of the
    format, by default that of the suffix."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    image.save(path, format=form or None)
    return path


def text(path: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    return text(path, "".join(json.dumps(row) + "\n" for row in rows))
