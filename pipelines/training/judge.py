"""A trained classifier as the judge of images that another network made.

In: the folder of a registered classifier. Out: a `Judge`, from images to features and
probabilities. Features are what goes into the last layer, as with the Inception network of the
Fréchet distance (https://arxiv.org/abs/1706.08500), but of a network that was trained on the same
kind of images. Must not know who is judged, or why.

    B images, C channels, H height, W width, D features, K classes
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from models.core.errors import TesseraError
from models.core.family import BatchRng, DataSpec, Judge
from pipelines.training import checkpoints


def open_judge(folder: Path, digest: str, data: DataSpec, device: str) -> Judge:
    """The classifier in `folder`, for images as in `data`. In fp32. Raises TesseraError where it is
    no classifier, or of images with other channels."""
    model = checkpoints.read_model(folder, digest)
    recipe = model.recipe
    family = models.get(recipe.family)
    if family.task.name != "classification":
        raise TesseraError(
            f"a {recipe.family} does {family.task.name.replace('_', ' ')} and can't be a judge",
            hint="name a classifier of the same data",
        )
    own = model.card.spec(recipe.data.height, recipe.data.width, reads=family.task.reads)
    if own.channels != data.channels:
        raise TesseraError(
            f"the judge sees images of {own.channels} channels, these have {data.channels}",
            hint="name a classifier of the same data",
        )
    module = family.build(recipe.config(), own)
    module.load_state_dict(model.weights)
    module = module.to(device).eval()
    last = _watch_last_layer(module)
    prepare = family.task.prepare(recipe.augment_settings(), own)

    @torch.no_grad()
    def judge(images: Tensor) -> tuple[Tensor, Tensor]:
        images = _fit(images.to(device), own)
        rows = len(images)
        batch = prepare({"image": images}, BatchRng(0, rows, slice(0, rows)))
        logits: Tensor = module(batch["image"])
        features = _features(*last.pop())
        return features.float().cpu(), logits.float().softmax(1).cpu()

    return judge


def _fit(images: Tensor, data: DataSpec) -> Tensor:
    """uint8 images in the size that the judge sees."""
    size = (data.height, data.width)
    if tuple(images.shape[-2:]) == size:
        return images
    scaled = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
    return scaled.round().clamp(0, 255).to(torch.uint8)


def _watch_last_layer(module: nn.Module) -> list[tuple[nn.Module, Tensor]]:
    """A list that during a forward has the layer that came last, and its input: of the layers that
    multiply by weights, among them convolutions, which end some networks."""
    found: list[tuple[nn.Module, Tensor]] = []

    def note(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        found[:] = [(layer, given[0])]

    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_pre_hook(note)
    return found


def _features(layer: nn.Module, given: Tensor) -> Tensor:
    """(B, D) from a layer's input: the mean over the places in the image, where it has some."""
    if isinstance(layer, nn.Conv2d):
        given = given.flatten(2).transpose(1, 2)
    return given.reshape(len(given), -1, given.shape[-1]).mean(1)
