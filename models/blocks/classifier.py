"""What every family that classifies shares: loss, prediction, and the module for serving.

In: a network from (B, C, H, W) float to (B, K) logits. Out: losses and predictions. Must not know
how the network is built.

    B images, C channels, H height, W width, K classes
"""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.core.family import Batch, DataSpec, Family, Losses, Prediction
from models.core.serving import ExportModule
from models.tasks.classification import CLASSIFICATION

C = TypeVar("C")


class Classifier(Family[C], Generic[C]):
    """A family whose network gives logits; `build` is what is left to say."""

    task = CLASSIFICATION

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        """Cross-entropy with `target` (B, K) where there is one, otherwise with `label` (B,)."""
        logits = module(batch["image"]).float()
        target = batch["target"] if "target" in batch else batch["label"]
        right = (logits.argmax(1) == batch["label"]).float()
        return {"loss": F.cross_entropy(logits, target), "accuracy": right.mean()}

    @torch.no_grad()
    def predict(self, module: nn.Module, batch: Batch) -> list[Prediction]:
        logits: Tensor = module(batch["image"])
        probabilities = logits.float().softmax(1).cpu()  # the one wait for the device
        labels = probabilities.argmax(1).tolist()
        # Clones, because a row that is a view would carry its whole batch through pickle.
        return [
            {"probabilities": row.clone(), "label": label}
            for row, label in zip(probabilities, labels)
        ]

    def exportable(self, module: nn.Module, data: DataSpec) -> nn.Module:
        """From uint8 (B, H, W, C) to probabilities (B, K)."""
        return _Probabilities(module, data)


class _Probabilities(ExportModule):
    def finish(self, output: Tensor) -> Tensor:
        return output.softmax(1)
