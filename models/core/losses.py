"""Losses of classes: their kinds, and weights that let rare classes count as much as others.

In: logits, targets, how many training samples each class has. Out: a loss for each sample. Means
over samples don't depend on how a batch is divided among ranks. Must not know networks.

    B samples, K classes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

LossKind = Literal["cross_entropy", "focal", "bce"]
ClassWeights = Literal["none", "sqrt", "balanced", "effective_number"]
FOCAL_GAMMA = 2.0
"""As in Lin et al., Focal Loss for Dense Object Detection, 2017."""
BETA = 0.9999
"""Of "effective_number", as in Cui et al., Class-Balanced Loss Based on Effective Number of
Samples, 2019."""


@dataclass(frozen=True)
class LossSettings:
    """`weights` has one for each class, or is empty: then all count the same."""

    kind: LossKind = "cross_entropy"
    weights: tuple[float, ...] = ()

    @classmethod
    def of(cls, kind: LossKind, class_weights: ClassWeights, counts: Sequence[int]) -> LossSettings:
        """`counts` are the training samples of each class. If they are not known, all classes
        count the same."""
        if class_weights == "none" or not any(counts):
            return cls(kind)
        return cls(kind, tuple(weights_of(counts, class_weights).tolist()))


def weights_of(counts: Sequence[int], kind: ClassWeights) -> Tensor:
    """float (K,): the weight of a sample of each class, of which there are `counts`. The mean over
    the samples is 1; a class that has none gets 1."""
    numbers = torch.tensor(counts, dtype=torch.float64)
    if kind == "none":
        return torch.ones(len(counts))
    shares = numbers / numbers.sum()
    if kind == "effective_number":
        weights = (1 - BETA) / -torch.expm1(numbers * torch.log(torch.tensor(BETA).double()))
    else:
        weights = 1 / (shares if kind == "balanced" else shares.sqrt())
    weights = weights.where(numbers > 0, 0)
    weights = weights / (weights * shares).sum()
    return weights.where(numbers > 0, 1).float()


def class_losses(logits: Tensor, target: Tensor, settings: LossSettings) -> Tensor:
    """The loss of each sample, float (B,), from logits (B, K) and classes, int64 (B,), or their
    probabilities, float (B, K).

    "cross_entropy"   of the softmax
    "focal"           the same, times (1 - probability)^2: samples that are easy count less
    "bce"             the mean over the classes of the binary cross-entropy of each
    """
    if settings.kind == "cross_entropy":
        losses = F.cross_entropy(logits, target, reduction="none")
    else:
        soft = target if target.ndim == 2 else F.one_hot(target, logits.shape[1]).to(logits)
        if settings.kind == "focal":
            logs = logits.log_softmax(1)
            losses = -(soft * (1 - logs.exp()) ** FOCAL_GAMMA * logs).sum(1)
        else:
            losses = F.binary_cross_entropy_with_logits(logits, soft, reduction="none").mean(1)
    if settings.weights:
        weights = torch.tensor(settings.weights, device=logits.device)
        losses = losses * (weights[target] if target.ndim == 1 else target @ weights)
    return losses


KINDS: tuple[LossKind, ...] = get_args(LossKind)
