"""A trained classifier that judges images which another network made.

In: the folder of a registered classifier. Out: a `Judge`, from images to features and
probabilities. The features are the input of the last layer, as with the Inception network of the
Fréchet distance (https://arxiv.org/abs/1706.08500), but of a network that was trained on the same
kind of images. Must not know which network made the images.

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
    """The classifier in `folder`, in fp32 on `device`, for images as in `data`.

    Raises:
        DamagedError: The files don't have the `digest`.
        TesseraError: The model is not a classifier, or its images have other channels.
    """
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
            f"the judge takes images of {own.channels} channels, these have {data.channels}",
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
    """Scales uint8 images (B, C, H, W) to the size that the judge was trained on."""
    size = (data.height, data.width)
    if tuple(images.shape[-2:]) == size:
        return images
    scaled = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
    return scaled.round().clamp(0, 255).to(torch.uint8)


def _watch_last_layer(module: nn.Module) -> list[tuple[nn.Module, Tensor]]:
    """A list that holds, after a forward pass, the last layer that ran and its input. Only linear
    layers and convolutions count; some networks end with a convolution."""
    last: list[tuple[nn.Module, Tensor]] = []

    def remember(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        last[:] = [(layer, inputs[0])]

    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_pre_hook(remember)
    return last


def _features(layer: nn.Module, x: Tensor) -> Tensor:
    """(B, D) from a layer's input: the mean over the positions in the image, if there are any."""
    if isinstance(layer, nn.Conv2d):
        x = x.flatten(2).transpose(1, 2)
    return x.reshape(len(x), -1, x.shape[-1]).mean(1)
