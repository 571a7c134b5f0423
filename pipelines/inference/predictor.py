"""Answers for images that nobody labelled.

In: a trained network as weights, recipe and data spec; paths of images. Out: one plain dict an
input, in order, also for an input that can't be read; and the image with its answer written in.
Images are decoded, resized and normalised as in training, by the same functions. Must not know
where the network came from or where the answers go.
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
"""A drawn image's longer side is brought between these."""


@dataclass(frozen=True)
class Result:
    """The result for one input. `output` is plain JSON: `path` and the task's fields, or `error`;
    `prediction` is for the image in its own size, None where there is an error."""

    path: Path
    output: dict[str, Any]
    prediction: Prediction | None = None


class Predictor:
    """A trained network that answers. In fp32, whatever it was trained in."""

    def __init__(
        self,
        recipe: Recipe,
        data: DataSpec,
        weights: Mapping[str, Tensor],
        *,
        device: str = "cpu",
    ) -> None:
        """`data` is what the network was trained on. Weights of another network are refused."""
        self._family = models.get(recipe.family)
        self._task = self._family.task
        self._data = data
        self._fit = recipe.data.fit
        # Padded is only what has to fit a frame together with others; alone an image is its own.
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
                hint="the model is damaged or was put together by hand: register it again",
            ) from None
        self._module = module.to(device).eval()

    @property
    def task(self) -> Task:
        return self._task

    @property
    def data(self) -> DataSpec:
        return self._data

    def predict(self, paths: Iterable[Path]) -> Iterator[Result]:
        """What is found of each path, in order."""
        if not self._task.takes_images:
            raise UsageError(
                f"a {self._family.name} makes images and isn't asked about some",
                hint="say how many: --samples 64",
            )
        remaining = iter(paths)
        many = 1 if self._own_size else min(64, self._task.eval_batch)
        while chunk := list(itertools.islice(remaining, many)):
            images: list[Tensor] = []
            errors: dict[int, str] = {}
            for place, path in enumerate(chunk):
                try:
                    images.append(read_image(path, self._data.channels))
                except TesseraError as error:
                    errors[place] = str(error)
            predictions = iter(self._predict(images))
            for place, path in enumerate(chunk):
                if place in errors:
                    yield Result(path, {"path": str(path), "error": errors[place]})
                    continue
                prediction = next(predictions)
                answer = self._task.prediction_to_json(prediction, self._data)
                yield Result(path, {"path": str(path), **answer}, prediction)

    @torch.no_grad()
    def generate(self, count: int, seed: int) -> Iterator[Prediction]:
        """New images, of a network that makes them. The first of them don't depend on `count`."""
        if self._task.takes_images:
            raise UsageError(
                f"a {self._family.name} answers about images and makes none up",
                hint="name images, or leave --samples out",
            )
        step = self._task.eval_batch
        for start in range(0, count, step):
            index = torch.arange(start, min(start + step, count))
            batch = {"index": index, "key": [str(i) for i in index.tolist()], "seed": seed}
            yield from self._family.predict(self._module, batch)

    @torch.no_grad()
    def decode(self, codes: Sequence[Sequence[float]]) -> list[Prediction]:
        """What codes stand for, of a network that encodes."""
        return self._family.decode(self._module, torch.tensor(codes).to(self._device))

    @cached_property
    def exportable(self) -> nn.Module:
        """The network with its preprocessing in it, for readers that have no Tessera; a TesseraError
        where an answer is not one tensor."""
        made = self._family.exportable(self._module, self._data)
        if made is None:
            names = [
                n for n in models.names() if type(models.get(n)).exportable != Family.exportable
            ]
            raise TesseraError(
                f"a {self._family.name} has no answer that is one tensor of one size: there is "
                "nothing to export",
                hint=f"these can be exported: {', '.join(names)}",
            )
        return made

    @torch.no_grad()
    def tensor(self, images: Tensor) -> Tensor:
        """What `exportable` has to answer for images (B, C, H, W) uint8 in the size that the network
        sees: what is predicted for them, or of a task whose predictions have no such field what
        the network itself gives."""
        found = self._predict(list(images))
        if all(self._task.output_name in prediction for prediction in found):
            return torch.stack([prediction[self._task.output_name] for prediction in found])
        answer: Tensor = self.exportable(images.permute(0, 2, 3, 1))
        return answer

    @torch.no_grad()
    def _predict(self, images: Sequence[Tensor]) -> list[Prediction]:
        """Predictions for images (C, H, W) uint8 of any size, one each, in the images' own size."""
        if not images:
            return []
        views = [self._view(image) for image in images]
        fitted = [fit_image(i, *v.frame, self._fit) for i, v in zip(images, views)]
        sizes = torch.tensor([view.size for view in views])
        frame = views[0].frame
        count = len(images)
        batch = {
            "image": torch.stack(fitted),
            "key": [str(place) for place in range(count)],
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
    """uint8 (C, H, W) from a file; TesseraError where it can't be read."""
    return decode_image(read_file(path), channels, where=str(path))


def expand(inputs: Iterable[str | Path]) -> Iterator[Path]:
    """Files as they are; the images below a folder, sorted; the files that a glob matches, sorted.

    An input that gives nothing comes out as it is, so that its line can say so.
    """
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
    """The bytes of a regular file; anything else is a TesseraError that doesn't block."""
    try:
        if path.is_dir():
            raise TesseraError(f"{path} is a folder without images, or not to be read in full")
        if not path.exists():
            raise TesseraError(f"{path} doesn't exist")
        if not path.is_file():
            raise TesseraError(f"{path} is no regular file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise TesseraError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise TesseraError(f"{path} can't be read: {reason}") from None


def draw(panels: Sequence[Panel], classes: Sequence[str]) -> Image.Image:
    """Panels side by side, RGB, each with its caption on a band below it. Small images are enlarged
    without smoothing, so that their pixels can be seen."""
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
        place = (left + size // 2, height + size)
        pen.text(place, text, fill="black", font=letters, anchor="lm")
        left += width + gap
    return canvas


def save_image(pixels: Tensor | None, to: Path) -> bool:
    """Writes uint8 (C, H, W) or (H, W) as PNG; False where there is none."""
    if pixels is None:
        return False
    array = pixels.cpu().numpy()
    if array.ndim == 3:
        array = array[0] if len(array) == 1 else array.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(array)).save(to, format="PNG")
    return True


def image_file_name(path: Path, taken: set[str]) -> str:
    """A file name for the picture of `path`: plain characters, no folder in it, not one of `taken`
    (letter case apart), to which it is added."""
    stem = re.sub(r"[^\w.-]+", "_", path.stem).strip("._")[:80] or "image"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    name = next(name for name in names if name.lower() not in taken)
    taken.add(name.lower())
    return f"{name}.png"


def _images_or_itself(folder: Path) -> Iterator[Path]:
    whole = False
    try:
        for name in find_images(folder):
            yield folder / name
            whole = True
    except TesseraError:  # a folder that can't be listed
        whole = False
    if not whole:
        yield folder


def _shorten(text: str, font: Any, room: float) -> str:
    """`text` as one line that is at most `room` pixels wide."""
    text = " ".join(text.split())
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"
