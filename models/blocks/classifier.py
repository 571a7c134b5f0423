"""What every classifier shares: loss, prediction, export, and the settings worth searching.

In: a network from (B, C, H, W) float to (B, K) logits. Out: losses and predictions. Must not know
how the network is built.

    B images, C channels, H height, W width, K classes
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.core.export import ExportModule
from models.core.family import Batch, DataSpec, Defaults, Family, Losses, Prediction
from models.core.spaces import Choice, LogUniform, Space, Uniform
from models.tasks.classification import CLASSIFICATION

C = TypeVar("C")


class Classifier(Family[C], Generic[C]):
    """A family whose network returns logits. A subclass adds `variants` and `build`."""

    task = CLASSIFICATION

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        """Cross-entropy with `target` (B, K) if the batch has it, otherwise with `label` (B,)."""
        logits = module(batch["image"]).float()
        target = batch["target"] if "target" in batch else batch["label"]
        correct = (logits.argmax(1) == batch["label"]).float()
        return {"loss": F.cross_entropy(logits, target), "accuracy": correct.mean()}

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
