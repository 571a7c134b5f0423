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
from models.core.family import DataSpec, Draws, Judge
from pipelines import checkpoints


def open_judge(folder: Path, digest: str, data: DataSpec, device: str) -> Judge:
    """The classifier in `folder`, for images as in `data`. In fp32. Raises TesseraError where it is
    no classifier, or of images with other channels."""
    model = checkpoints.read_model(folder, digest)
    recipe = model.recipe
    family = models.get(recipe.family)
    if family.task.name != "classification":
        raise TesseraError(
            f"a {recipe.family} does {family.task.name.replace('_', ' ')} and can't be a judge",
            mend="name a classifier of the same data",
        )
    own = model.card.spec(recipe.data.height, recipe.data.width, reads=family.task.reads)
    if own.channels != data.channels:
        raise TesseraError(
            f"the judge sees images of {own.channels} channels, these have {data.channels}",
            mend="name a classifier of the same data",
        )
    module = family.build(recipe.config(), own)
    module.load_state_dict(model.weights)
    module = module.to(device).eval()
    inputs: list[Tensor] = []
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    prepare = family.task.prepare(recipe.augment_settings(), own)

    @torch.no_grad()
    def judge(images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(device)
        if tuple(images.shape[-2:]) != (own.height, own.width):
            scaled = F.interpolate(
                images.float(), (own.height, own.width), mode="bilinear", antialias=True
            )
            images = scaled.round().clamp(0, 255).to(torch.uint8)
        rows = len(images)
        batch = prepare({"image": images}, Draws(0, rows, slice(0, rows)))
        inputs.clear()
        logits: Tensor = module(batch["image"])
        # The last layer is the one whose input came last; its input has a row an image.
        features = inputs[-1].reshape(rows, -1)
        return features.float().cpu(), logits.float().softmax(1).cpu()

    return judge
