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
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import models
from models.core.errors import TesseraError
from models.core.family import DataSpec, Draws
from pipelines.data.samples import decode_image, fit_image, open_image
from pipelines.data.sources import find_images
from pipelines.recipe import Recipe

MAX_FILE_BYTES = 512 * 2**20
DRAWN_PIXELS = (256, 1024)
"""A drawn image's longer side is brought between these."""


class Predictor:
    """A trained network that answers. Figures in fp32, whatever it was trained in."""

    def __init__(
        self,
        recipe: Recipe,
        data: DataSpec,
        weights: Mapping[str, Tensor],
        *,
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        """`data` is what the network was trained on. Weights of another network are refused."""
        self._family = models.get(recipe.family)
        self._data = data
        self._fit = recipe.data.fit
        self._device = device
        self._batch_size = batch_size
        self._transform = self._family.augment(recipe.augment_settings(), data, train=False)
        module = self._family.build(recipe.config(), data)
        try:
            module.load_state_dict(dict(weights))
        except RuntimeError as error:
            line = " ".join(str(error).split())[:300]
            raise TesseraError(
                f"the weights are not those of a {recipe.family} {recipe.variant}: {line}",
                mend="the model is damaged or was put together by hand: register it again",
            ) from None
        self._module = module.to(device).eval()

    def predict(self, paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
        """For each path, in order, {"path", …the task's answer} or {"path", "error"}."""
        remaining = iter(paths)
        while chunk := list(itertools.islice(remaining, self._batch_size)):
            images: list[Tensor] = []
            errors: dict[int, str] = {}
            for place, path in enumerate(chunk):
                try:
                    images.append(self._read(path))
                except TesseraError as error:
                    errors[place] = str(error)
            answers = iter(self._answer(images))
            for place, path in enumerate(chunk):
                found = {"error": errors[place]} if place in errors else next(answers)
                yield {"path": str(path), **found}

    def _read(self, path: Path) -> Tensor:
        image = decode_image(read_file(path), self._data.channels, where=str(path))
        return fit_image(image, self._data.height, self._data.width, self._fit)

    @torch.no_grad()
    def _answer(self, images: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Answers for images (C, H, W) uint8, one each."""
        if not images:
            return []
        count = len(images)
        batch = {
            "image": torch.stack(list(images)).to(self._device),
            "key": [str(place) for place in range(count)],
        }
        batch = self._transform(batch, Draws(0, count, slice(0, count)))
        predictions = self._family.predict(self._module, batch)
        return [self._family.task.answer(prediction, self._data) for prediction in predictions]


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


def draw(path: Path, answer: Mapping[str, Any]) -> Image.Image:
    """The image, RGB, with its answer on a band below it. Small images are enlarged without
    smoothing, so that their pixels can be seen."""
    image = open_image(read_file(path), str(path)).convert("RGB")
    low, high = DRAWN_PIXELS
    longest = max(image.size)
    if longest > high:
        image.thumbnail((high, high))
    elif longest < low:
        image = image.resize(
            (image.width * (low // longest), image.height * (low // longest)),
            Image.Resampling.NEAREST,
        )
    text = str(answer.get("class", ""))
    right = f"{answer['probability']:.0%}" if "probability" in answer else ""
    size = 20
    font = ImageFont.load_default(size)
    canvas = Image.new("RGB", (max(image.width, low // 2), image.height + 2 * size), "white")
    canvas.paste(image, ((canvas.width - image.width) // 2, 0))
    pen = ImageDraw.Draw(canvas)
    middle = image.height + size
    room = canvas.width - size - (font.getlength(right) + size / 2 if right else 0)
    pen.text((size // 2, middle), _shorten(text, font, room), fill="black", font=font, anchor="lm")
    pen.text((canvas.width - size // 2, middle), right, fill="black", font=font, anchor="rm")
    return canvas


def picture_name(path: Path, taken: set[str]) -> str:
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
