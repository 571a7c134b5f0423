"""Predicts images without labels.

In: a trained network as weights, recipe and data spec; paths of images. Out: one plain dictionary
per input, in order, also for an input that can't be read; and the image with its prediction drawn
on it. Images are decoded, resized and normalised by the same functions as in training. Must not
know where the network comes from or where the predictions go.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import models
from models.core.errors import TesseraError, UsageError
from models.core.family import BatchRng, DataSpec, Family, Panel, Prediction, Task, View
from pipelines.data.image_formats import list_frames
from pipelines.data.image_reading import ImageReading, reading_images
from pipelines.data.images import check_not_dark, decode_image, extents, fit_image, view
from pipelines.inference.inputs import ImageInput, of_file
from pipelines.recipe import Recipe
from pipelines.training.evaluator import to_device
from pipelines.visuals import draw as visuals_draw

MAX_BATCH_BYTES = 256 * 2**20
"""Most bytes of the images that are predicted together, in the size that the network sees."""
DRAWN_PIXELS = (256, 1024)
"""A drawn image is scaled so that its longer side is between these."""


@dataclass(frozen=True)
class Result:
    """The result for one input. `output` is plain JSON: `path` and the task's fields, or `error`.
    `prediction` is for the image at its original size, None if there is an error. `frames` has the
    file, of which the first is predicted."""

    source: ImageInput
    output: dict[str, Any]
    prediction: Prediction | None = None
    frames: int = 1


class _Fitted(NamedTuple):
    """An image in the size that the network sees, and where its pixels came from."""

    pixels: Tensor
    view: View


class _Loaded(NamedTuple):
    """An input with its image, or why there is none."""

    source: ImageInput
    fitted: _Fitted | None
    error: str = ""
    frames: int = 1


class Predictor:
    """A trained network for predictions, in fp32, whatever precision it was trained in."""

    def __init__(
        self,
        recipe: Recipe,
        data: DataSpec,
        weights: Mapping[str, Tensor],
        *,
        device: str = "cpu",
        reading: ImageReading | None = None,
    ) -> None:
        """`data` is the spec of the training data, `reading` how its image files were read. Raises
        TesseraError for weights of another network."""
        self.reading = reading or ImageReading()
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

    def predict(
        self, inputs: Iterable[Path | ImageInput], reading: ImageReading | None = None
    ) -> Iterator[Result]:
        """Yields the result of each input, in order. Raises UsageError for a network that generates
        images.

        Of the images that are predicted together, one at a time is held in its own size; the others
        are in the size that the network sees, and take `MAX_BATCH_BYTES` at most.
        """
        if not self._task.takes_images:
            raise UsageError(
                f"a {self._family.name} generates images and takes none",
                hint="say how many: --samples 64",
            )
        remaining = (i if isinstance(i, ImageInput) else of_file(i) for i in inputs)
        while chunk := self._load_chunk(remaining, reading or self.reading):
            predictions = self._predict([one.fitted for one in chunk if one.fitted])
            for one in chunk:
                if one.fitted is None:
                    yield Result(one.source, {"path": one.source.name, "error": one.error})
                    continue
                prediction = next(predictions)
                fields = self._task.prediction_to_json(prediction, self._data)
                output = {"path": one.source.name, **fields}
                yield Result(one.source, output, prediction, one.frames)

    def _load_chunk(self, inputs: Iterator[ImageInput], reading: ImageReading) -> list[_Loaded]:
        """Loads the next images that are predicted together; empty where there are no more."""
        chunk: list[_Loaded] = []
        kept_bytes = 0
        for one in itertools.islice(inputs, self._chunk_size):
            try:
                with reading_images(reading):
                    data = one.load()
                    if one.keep:
                        kept_bytes += len(data)
                        one = replace(one, load=partial(bytes, data))
                    check_not_dark(data, one.name)
                    image = decode_image(data, self._data.channels, where=one.name)
                fitted, frames = self._fitted(image), len(list_frames(data))
                chunk.append(_Loaded(one, fitted, frames=frames))
            except TesseraError as error:
                chunk.append(_Loaded(one, None, str(error)))
            if kept_bytes > MAX_BATCH_BYTES:
                break
        return chunk

    @property
    def _chunk_size(self) -> int:
        if self._own_size:
            return 1
        size_bytes = self._data.channels * self._data.height * self._data.width
        return max(1, min(64, self._task.eval_batch, MAX_BATCH_BYTES // size_bytes))

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
        predictions = list(self._predict([self._fitted(image) for image in images]))
        name = self._task.output_name
        if all(name in prediction for prediction in predictions):
            return torch.stack([prediction[name] for prediction in predictions])
        output: Tensor = self.exportable(images.permute(0, 2, 3, 1))
        return output

    def _fitted(self, image: Tensor) -> _Fitted:
        """Fits uint8 (C, H, W) of any size to the size that the network sees."""
        view = self._view(image)
        pixels = fit_image(image, *view.frame, self._fit)
        # A part of an image would keep the memory of all of it.
        return _Fitted(pixels if pixels is image else pixels.clone(), view)

    def _predict(self, images: Sequence[_Fitted]) -> Iterator[Prediction]:
        """Predicts the images together; yields a prediction for each, at its original size."""
        if not images:
            return
        sizes = torch.tensor([one.view.size for one in images])
        frame = images[0].view.frame
        count = len(images)
        with torch.no_grad():
            batch = {
                "image": torch.stack([one.pixels for one in images]),
                "key": [str(index) for index in range(count)],
                "index": torch.arange(count),
                "size": sizes,
                "extent": extents(sizes, *frame, self._fit),
            }
            rng = BatchRng(0, count, slice(0, count))
            batch = self._transform(to_device(batch, self._device), rng)
            predictions = list(self._family.predict(self._module, batch))
        for number, one in enumerate(images):
            prediction, predictions[number] = predictions[number], {}
            with torch.no_grad():
                yield self._task.to_original_size(prediction, one.view)

    def _view(self, image: Tensor) -> View:
        size = (image.shape[-2], image.shape[-1])
        frame = size if self._own_size else (self._data.height, self._data.width)
        return view(size, *frame, self._fit)


def read_image(source: ImageInput, channels: int, reading: ImageReading) -> Tensor:
    """Reads uint8 (C, H, W). Raises TesseraError if it can't be read."""
    with reading_images(reading):
        return decode_image(source.load(), channels, where=source.name)


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


def image_file_name(name: str, taken: set[str]) -> str:
    """Returns a file name for the drawn image of a file of this name: plain characters, no folder,
    and not in `taken` (ignoring case), to which it is added."""
    stem = re.sub(r"[^\w.-]+", "_", Path(name).stem).strip("._")[:80] or "image"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    name = next(name for name in names if name.lower() not in taken)
    taken.add(name.lower())
    return f"{name}.png"


def _shorten(text: str, font: Any, max_pixels: float) -> str:
    """`text` on one line of at most `max_pixels`."""
    text = " ".join(text.split())
    if font.getlength(text) <= max_pixels:
        return text
    while text and font.getlength(text + "…") > max_pixels:
        text = text[:-1]
    return text + "…"
