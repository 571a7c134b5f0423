"""Predicts images without labels.

In: a trained network as weights, recipe and data spec; paths of images. Out: one plain dictionary
per input, in order, also for an input that can't be read; and the image with its prediction drawn
on it. Images are decoded, resized and normalised by the same functions as in training. Must not
know where the network comes from or where the predictions go.
"""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import models
from models.core.errors import TesseraError, UsageError
from models.core.family import BatchRng, DataSpec, Family, Panel, Prediction, Task, View
from pipelines.data.images import decode_image, extents, fit_image, view
from pipelines.data.sources import find_images
from pipelines.recipe import Recipe
from pipelines.training.evaluator import to_device
from pipelines.visuals import draw as visuals_draw

MAX_FILE_BYTES = 512 * 2**20
DRAWN_PIXELS = (256, 1024)
"""A drawn image is scaled so that its longer side is between these."""


@dataclass(frozen=True)
class Result:
    """The result for one input. `output` is plain JSON: `path` and the task's fields, or `error`.
    `prediction` is for the image at its original size, None if there is an error."""

    path: Path
    output: dict[str, Any]
    prediction: Prediction | None = None


class Predictor:
    """A trained network for predictions, in fp32, whatever precision it was trained in."""

    def __init__(
        self,
        recipe: Recipe,
        data: DataSpec,
        weights: Mapping[str, Tensor],
        *,
        device: str = "cpu",
    ) -> None:
        """`data` is the spec of the training data. Raises TesseraError for weights of another
        network."""
        self._family = models.get(recipe.family)
        self._task = self._family.task
        self._data = data
        self._fit = recipe.data.fit
        # Padding only makes images of a batch equally large. A single image needs none.
        fixed = bool(recipe.data.height or recipe.data.width) or not self._family.accepts_any_size
        self._own_size = self._fit == "pad" and not fixed
        self._device = device
        self._transform = self._task.prepare(recipe.augment_settings(), data)
        module = self._family.build(recipe.config(), data)
        try:
            module.load_state_dict(dict(weights))
        except RuntimeError as error:
            line = " ".join(str(error).split())[:300]
            raise TesseraError(
                f"the weights are not those of a {recipe.family} {recipe.variant}: {line}",
                hint="the model is damaged or was assembled by hand: register it again",
            ) from None
        self._module = module.to(device).eval()

    @property
    def task(self) -> Task:
        return self._task

    @property
    def data(self) -> DataSpec:
        return self._data

    def predict(self, paths: Iterable[Path]) -> Iterator[Result]:
        """Yields the result of each path, in order. Raises UsageError for a network that generates
        images."""
        if not self._task.takes_images:
            raise UsageError(
                f"a {self._family.name} generates images and takes none",
                hint="say how many: --samples 64",
            )
        remaining = iter(paths)
        chunk_size = 1 if self._own_size else min(64, self._task.eval_batch)
        while chunk := list(itertools.islice(remaining, chunk_size)):
            images: list[Tensor] = []
            errors: dict[int, str] = {}
            for index, path in enumerate(chunk):
                try:
                    images.append(read_image(path, self._data.channels))
                except TesseraError as error:
                    errors[index] = str(error)
            predictions = iter(self._predict(images))
            for index, path in enumerate(chunk):
                if index in errors:
                    yield Result(path, {"path": str(path), "error": errors[index]})
                    continue
                prediction = next(predictions)
                fields = self._task.prediction_to_json(prediction, self._data)
                yield Result(path, {"path": str(path), **fields}, prediction)

    @torch.no_grad()
    def generate(self, count: int, seed: int) -> Iterator[Prediction]:
        """Generates images. The first ones don't depend on `count`. Raises UsageError for a network
        that doesn't generate."""
        if self._task.takes_images:
            raise UsageError(
                f"a {self._family.name} takes images and generates none",
                hint="name images, or leave --samples out",
            )
        step = self._task.eval_batch
        for start in range(0, count, step):
            index = torch.arange(start, min(start + step, count))
            batch = {"index": index, "key": [str(i) for i in index.tolist()], "seed": seed}
            yield from self._family.predict(self._module, batch)

    @torch.no_grad()
    def decode(self, codes: Sequence[Sequence[float]]) -> list[Prediction]:
        """Decodes codes to images, with a network that encodes."""
        return self._family.decode(self._module, torch.tensor(codes).to(self._device))

    @cached_property
    def exportable(self) -> nn.Module:
        """The network including its preprocessing, for programs without Tessera. Raises
        TesseraError if its output is not one tensor."""
        module = self._family.exportable(self._module, self._data)
        if module is None:
            names = [
                n for n in models.names() if type(models.get(n)).exportable != Family.exportable
            ]
            raise TesseraError(
                f"a {self._family.name} can't be exported: its output is not one tensor of fixed "
                "size",
                hint=f"these can be exported: {', '.join(names)}",
            )
        return module

    @torch.no_grad()
    def exported_output(self, images: Tensor) -> Tensor:
        """The output that `exportable` must have for uint8 images (B, C, H, W) in the size that the
        network sees: the task's prediction, or the network's own output if predictions don't have
        that field."""
        predictions = self._predict(list(images))
        name = self._task.output_name
        if all(name in prediction for prediction in predictions):
            return torch.stack([prediction[name] for prediction in predictions])
        output: Tensor = self.exportable(images.permute(0, 2, 3, 1))
        return output

    @torch.no_grad()
    def _predict(self, images: Sequence[Tensor]) -> list[Prediction]:
        """Predicts uint8 images (C, H, W) of any size, one each, at their original size."""
        if not images:
            return []
        views = [self._view(image) for image in images]
        fitted = [fit_image(i, *v.frame, self._fit) for i, v in zip(images, views)]
        sizes = torch.tensor([view.size for view in views])
        frame = views[0].frame
        count = len(images)
        batch = {
            "image": torch.stack(fitted),
            "key": [str(index) for index in range(count)],
            "index": torch.arange(count),
            "size": sizes,
            "extent": extents(sizes, *frame, self._fit),
        }
        batch = self._transform(to_device(batch, self._device), BatchRng(0, count, slice(0, count)))
        predictions = self._family.predict(self._module, batch)
        return [self._task.to_original_size(p, view) for p, view in zip(predictions, views)]

    def _view(self, image: Tensor) -> View:
        size = (image.shape[-2], image.shape[-1])
        frame = size if self._own_size else (self._data.height, self._data.width)
        return view(size, *frame, self._fit)


def read_image(path: Path, channels: int) -> Tensor:
    """Reads uint8 (C, H, W) from a file. Raises TesseraError if it can't be read."""
    return decode_image(read_file(path), channels, where=str(path))


def expand(inputs: Iterable[str | Path]) -> Iterator[Path]:
    """Yields files as they are, the images below a folder, and the files that match a glob, both
    sorted. An input without files is yielded as it is, and results in an error line of its own."""
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            yield from _images_or_itself(path)
        elif path.exists() or not glob.has_magic(str(text)):
            yield path
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(text), recursive=True))]
            files = [match for match in matches if not match.is_dir()]
            yield from files or [path]


def read_file(path: Path) -> bytes:
    """Reads a regular file. Raises TesseraError for anything else, and never blocks."""
    try:
        if path.is_dir():
            raise TesseraError(f"{path} is a folder without images, or can't be listed")
        if not path.exists():
            raise TesseraError(f"{path} doesn't exist")
        if not path.is_file():
            raise TesseraError(f"{path} is not a regular file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise TesseraError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise TesseraError(f"{path} can't be read: {reason}") from None


def draw_panels(panels: Sequence[Panel], classes: Sequence[str]) -> Image.Image:
    """Draws panels side by side, each with its caption below. Small images are enlarged without
    smoothing, so their pixels stay visible."""
    low, high = DRAWN_PIXELS
    longest = max(max(panel.image.shape[-2:]) for panel in panels)
    side = high if longest > high else longest * max(1, low // longest)
    tiles = []
    for panel in panels:
        scale = side / longest
        tile = visuals_draw.draw(panel, classes, side=round(max(panel.image.shape[-2:]) * scale))
        tiles.append((tile, panel.caption))
    size = 20
    gap = size if len(tiles) > 1 else 0
    widths = [max(tile.width, low // 2) for tile, _ in tiles]
    band = 2 * size if any(caption for _, caption in tiles) else 0
    height = max(tile.height for tile, _ in tiles)
    canvas = Image.new("RGB", (sum(widths) + gap * (len(tiles) - 1), height + band), "white")
    pen = ImageDraw.Draw(canvas)
    letters = visuals_draw.font(size)
    left = 0
    for (tile, caption), width in zip(tiles, widths):
        canvas.paste(tile, (left + (width - tile.width) // 2, 0))
        text = _shorten(caption, letters, width - size)
        position = (left + size // 2, height + size)
        pen.text(position, text, fill="black", font=letters, anchor="lm")
        left += width + gap
    return canvas


def save_image(pixels: Tensor | None, to: Path) -> bool:
    """Writes uint8 (C, H, W) or (H, W) as PNG. Returns False for None."""
    if pixels is None:
        return False
    array = pixels.cpu().numpy()
    if array.ndim == 3:
        array = array[0] if len(array) == 1 else array.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(array)).save(to, format="PNG")
    return True


def image_file_name(path: Path, taken: set[str]) -> str:
    """Returns a file name for the drawn image of `path`: plain characters, no folder, and not in
    `taken` (ignoring case), to which it is added."""
    stem = re.sub(r"[^\w.-]+", "_", path.stem).strip("._")[:80] or "image"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    name = next(name for name in names if name.lower() not in taken)
    taken.add(name.lower())
    return f"{name}.png"


def _images_or_itself(folder: Path) -> Iterator[Path]:
    is_complete = False
    try:
        for name in find_images(folder):
            yield folder / name
            is_complete = True
    except TesseraError:  # a folder that can't be listed
        is_complete = False
    if not is_complete:
        yield folder


def _shorten(text: str, font: Any, max_pixels: float) -> str:
    """`text` on one line of at most `max_pixels`."""
    text = " ".join(text.split())
    if font.getlength(text) <= max_pixels:
        return text
    while text and font.getlength(text + "…") > max_pixels:
        text = text[:-1]
    return text + "…"
