"""What every classifier shares: loss, prediction, export, and the settings worth searching.

In: a network from (B, C, H, W) float to (B, K) logits. Out: losses and predictions. Must not know
how the network is built.

    B images, C channels, H height, W width, K classes
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.core.export import ExportModule
from models.core.family import Batch, DataSpec, Defaults, Family, Losses, Prediction
from models.core.fitted import DataFacts, Fitted, flip, length, light, square
from models.core.losses import KINDS, class_losses
from models.core.spaces import Choice, LogUniform, Space, Uniform
from models.tasks.classification import CLASSIFICATION

C = TypeVar("C")
PHOTO_INPUT = 224
"""Side in pixels of the input for photos, by default."""
STEPS = 2000
"""Steps that a network needs that begins with random weights."""
TUNING_STEPS, TUNING_BATCH, TUNING_RATE = 600, 32, 1e-3
"""For a network that begins with weights from elsewhere: its steps, the size of a batch, and the
learning rate of AdamW."""


class Classifier(Family[C], Generic[C]):
    """A family whose network returns logits. A subclass adds `variants` and `build`."""

    task = CLASSIFICATION
    losses = KINDS
    weighs_classes = True

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        """The loss of the recipe, with `target` (B, K) if the batch has it, otherwise with `label`
        (B,)."""
        logits = module(batch["image"]).float()
        correct = (logits.argmax(1) == batch["label"]).float()
        return {"loss": self.class_loss(logits, batch), "accuracy": correct.mean()}

    def class_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean over the images."""
        target = batch["target"] if "target" in batch else batch["label"]
        if self.loss_settings is None:
            return F.cross_entropy(logits, target)
        return class_losses(logits, target, self.loss_settings).mean()

    @torch.no_grad()
    def predict(self, module: nn.Module, batch: Batch) -> list[Prediction]:
        logits: Tensor = module(batch["image"])
        probabilities = logits.float().softmax(1).cpu()  # the only CPU-GPU sync point
        labels = probabilities.argmax(1).tolist()
        # Clones, because pickling a row that is a view would pickle its whole batch.
        return [
            {"probabilities": row.clone(), "label": label}
            for row, label in zip(probabilities, labels)
        ]

    def exportable(self, module: nn.Module, data: DataSpec) -> nn.Module:
        """From uint8 (B, H, W, C) to probabilities (B, K)."""
        return _Probabilities(module, data)

    def fitted_defaults(
        self, config: C, facts: DataFacts, settings: Mapping[str, Any], kept: Container[str]
    ) -> Iterable[Fitted]:
        return fitted_to_images(facts, settings, kept, weights=getattr(config, "weights", ""))


def fitted_to_images(
    facts: DataFacts, settings: Mapping[str, Any], kept: Container[str], *, weights: str
) -> Iterable[Fitted]:
    """Settings for a network that classifies whole images. One that begins with `weights` from
    elsewhere needs fewer steps, and smaller ones."""
    yield from square(facts, PHOTO_INPUT)
    if facts.are_photos:
        reason = "what a photo shows may be of any size and at any place"
        yield Fitted("augment.crop", "random_resized", reason)
        yield Fitted("data.fit", "resize_crop", "photos keep their proportions")
        yield Fitted("augment.label_smoothing", 0.1, "usual for photos")
    else:
        padding = max(1, facts.shorter_side // 14)
        yield Fitted("augment.crop_padding", padding, f"small images, moved by {padding} pixels")
    yield from flip(facts)
    yield from light(facts, brightness=0.2, contrast=0.2, saturation=0.2)
    if not weights:
        yield from length(facts, settings, kept, steps=STEPS)
        return
    is_sgd = settings["optim.model.kind"] == "sgd"
    tuning = {
        "optim.model.kind": "adamw",
        "optim.model.lr": TUNING_RATE if is_sgd else settings["optim.model.lr"] / 10,
        "optim.model.weight_decay": 0.05,
        "train.batch_size": TUNING_BATCH,
    }
    reason = "the network begins with weights from elsewhere"
    yield from (Fitted(path, value, reason) for path, value in tuning.items())
    settings = {**settings, **{path: v for path, v in tuning.items() if path not in kept}}
    yield from length(facts, settings, kept, steps=TUNING_STEPS)


class _Probabilities(ExportModule):
    def finish(self, output: Any) -> Tensor:
        return super().finish(output).softmax(1)


def sgd_defaults(lr: float, *, warmup: float = 0.1) -> Defaults:
    """SGD with Nesterov momentum on a cosine schedule: how convolutional networks are trained."""
    return {
        "optim.model.kind": "sgd",
        "optim.model.lr": lr,
        "optim.model.nesterov": True,
        "optim.model.weight_decay": 5e-4,
        "schedule.kind": "cosine",
        "schedule.warmup": warmup,
    }


def sgd_search_space(highest_lr: float) -> Mapping[str, Space]:
    """The training settings that are worth searching for a classifier trained with SGD."""
    return {
        "optim.model.lr": LogUniform(1e-3, highest_lr),
        "optim.model.weight_decay": LogUniform(1e-5, 1e-2),
        "train.batch_size": Choice((64, 128, 256)),
        "augment.label_smoothing": Uniform(0.0, 0.2),
    }
