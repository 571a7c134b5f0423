"""Embeddings: any classifier of this folder, trained so that images of one class lie together.

The classifier's logits, normalised, are the embedding. In training its cosine with a direction for each
class is a logit, with a margin that the true class has to keep: Deng et al., ArcFace: Additive
Angular Margin Loss for Deep Face Recognition, 2019. Afterwards the directions are of no use:
whether two images show the same is the cosine of their embeddings, whatever their classes.

Few classes are told apart by few features, which say little of other classes. So more are made of
them. A turned image can be taken for one of another class, as in Vinyals et al., Matching Networks
for One Shot Learning, 2016. And so can the upper half of one image above the lower half of another:
to tell every pair of classes from every other takes features of the parts, of which the images of
unseen classes are made, too.

What lies before the last layers knows more of other classes than what comes out of them, which only
tells apart those of the training: with a projection these layers belong to the training, and the
embedding is what goes into them, as in Chen et al., A Simple Framework for Contrastive Learning of
Visual Representations, 2020.

    B images, C channels, H height, W width, K classes, D numbers of an embedding
    T ways to turn, M = TK classes in training, or TK^2 with halves

    image (B, C, H, W) -> classifier -> (B, D) -> batch norm -> unit length
    in training, with labels (B,): -> made of it (TB, C, H, W) -> embeddings (TB, D)
    -> cosines with the directions of M classes -> logits (TB, M)

    with a projection, without the classifier's last layer: -> (B, D) -> unit length
    in training (TB, D) -> projection -> batch norm -> unit length -> cosines, as above
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from models.blocks.classifier import Classifier
from models.blocks.transfer import check_choice, check_shares, last_layer
from models.core.errors import TesseraError, UsageError, unknown
from models.core.family import Batch, DataSpec, Family, Losses, Prediction
from models.core.serving import ExportModule
from models.core.spaces import Choice, LogUniform, Space, Uniform
from models.tasks.verification import VERIFICATION

Head = Literal["arcface", "cosine"]
MOST_CLASSES = 1 << 18
"""In training."""


@dataclass(frozen=True)
class EmbeddingConfig:
    """`backbone` and `backbone_variant`: the classifier. `dimensions` of the embedding; with a
    projection, of what it makes of it. `projection`: width of its hidden layer, 0 for none. `head`:
    "cosine" asks for no margin. `margin`: an angle in radians. `scale`: what cosines are multiplied
    with to be logits. `dropout`: share of the embedding's numbers left out in training. `turns`: 4
    to train with each image turned by quarters as classes of their own, 8 with its mirror image's,
    too; an epoch takes as many times longer. `join_turns`: an image's embedding is those of its
    turns, one after the other: as many times more numbers, and time. `halves`: every second image gets the lower half of
    another, and each pair of classes is a class."""

    backbone: str = "cnn"
    backbone_variant: str = "base"
    dimensions: int = 64
    projection: int = 0
    head: Head = "arcface"
    margin: float = 0.3
    scale: float = 16.0
    dropout: float = 0.0
    turns: int = 1
    join_turns: bool = False
    halves: bool = False

    def __post_init__(self) -> None:
        if self.dimensions < 2:
            raise UsageError(f"model.dimensions = {self.dimensions}", hint="give 2 or more")
        if self.projection < 0:
            raise UsageError(f"model.projection = {self.projection}", hint="give 0 or more")
        if not 0 <= self.margin < math.pi / 2:
            raise UsageError(
                f"model.margin = {self.margin}", hint="give an angle from 0 to 1.5, like 0.3"
            )
        if not 0 < self.scale < math.inf:
            raise UsageError(f"model.scale = {self.scale}", hint="give a number above 0, like 16")
        check_choice("head", self.head, get_args(Head))
        check_choice("turns", self.turns, (1, 4, 8))
        check_shares(self, "dropout")
        self.find_backbone()

    def find_backbone(self) -> tuple[Classifier[Any], Any]:
        """(family, its config). Raises UsageError for one that isn't a plain classifier."""
        family = None if self.backbone == "embedding" else models.get(self.backbone)
        if not isinstance(family, Classifier) or type(family).loss is not Classifier.loss:
            raise UsageError(
                f"model.backbone = {self.backbone!r} gives more or other than logits",
                hint="name a plain classifier, like cnn, resnet or vit",
            )
        if self.backbone_variant not in family.variants:
            raise unknown(f"variant of {self.backbone}", self.backbone_variant, family.variants)
        return family, family.variants[self.backbone_variant]


class Net(nn.Module):
    """`trained` (M,) says which classes have training images: only these are told apart."""

    trained: Tensor

    def __init__(self, config: EmbeddingConfig, data: DataSpec) -> None:
        super().__init__()
        names = tuple(str(number) for number in range(config.dimensions))
        family, settings = config.find_backbone()
        self.backbone = family.build(settings, dataclasses.replace(data, classes=names, counts=()))
        self.projection = None
        if config.projection:
            features = _take_last_layer(self.backbone, config)
            self.projection = nn.Sequential(
                nn.Linear(features, config.projection, bias=False),
                _Norm(config.projection, affine=False),
                nn.ReLU(),
                nn.Linear(config.projection, config.dimensions),
            )
        self.norm = _Norm(config.dimensions, affine=False)
        self.dropout = nn.Dropout(config.dropout)
        trained = _trained(data)
        if config.halves:
            trained = (trained[:, None] & trained).flatten()
        trained = trained.repeat(config.turns)
        if len(trained) > MOST_CLASSES:
            raise UsageError(
                f"turns and halves make {len(trained):,} classes of {len(data.classes):,}",
                hint=f"more than {MOST_CLASSES:,} take too long: --set model.halves=false",
            )
        self.directions = nn.Parameter(torch.randn(len(trained), config.dimensions))
        self.register_buffer("trained", trained, persistent=False)
        self.turns, self.halves = config.turns, config.halves
        self.views = config.turns if config.join_turns else 1
        self.scale = config.scale
        self.margin = config.margin if config.head == "arcface" else 0.0

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """(B, C, H, W) -> embeddings (B, D) of unit length; with labels (B,) logits (TB, M) of
        what is made of the images, and labels (TB,) in M."""
        if label is None:
            found = [self._embed(turned) for turned in self._turned(image, self.views)]
            return torch.cat(found, dim=1) / math.sqrt(len(found))
        image, label = self._make_classes(image, label)
        features = self.backbone(image).float()
        # Near 1, bf16 knows cosines only to 0.004.
        with torch.autocast(image.device.type, enabled=False):
            if self.projection is not None:
                features = self.projection(features)
            compared = F.normalize(self.dropout(self.norm(features)))
            cosines = compared @ F.normalize(self.directions).T
            logits = self.scale * _with_margin(cosines, label, self.margin)
            return logits.masked_fill(~self.trained, -torch.inf), label

    def _embed(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D) of unit length."""
        features = self.backbone(image).float()
        with torch.autocast(image.device.type, enabled=False):
            if self.projection is None:
                features = self.dropout(self.norm(features))
            return F.normalize(features)

    def _make_classes(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """The images as they are, those that are made of halves, then all turned in one way, and so
        on; with their labels."""
        classes = len(self.trained) // self.turns
        if self.halves:
            half = len(label) // 2
            below = torch.cat([label[:half].roll(1), label[half:]])
            label = label * math.isqrt(classes) + below
            image = torch.cat([_put_together(image[:half]), image[half:]])
        label = torch.cat([label + classes * way for way in range(self.turns)])
        return torch.cat(self._turned(image, self.turns)), label

    def _turned(self, image: Tensor, ways: int) -> list[Tensor]:
        """The images turned in each way. Raises UsageError for images that aren't square."""
        if ways > 1 and image.shape[-2] != image.shape[-1]:
            raise UsageError(
                f"images of {image.shape[-2]} by {image.shape[-1]} pixels can't be turned by "
                "quarters",
                hint="give --set model.turns=1, or the same data.height and data.width",
            )
        return [_turn(image, way) for way in range(ways)]


def _take_last_layer(backbone: nn.Module, config: EmbeddingConfig) -> int:
    """Leaves the backbone without it; gives how many numbers it took."""
    last = last_layer(backbone)
    layer = backbone.get_submodule(last)
    if not isinstance(layer, nn.Linear):
        raise UsageError(
            f"model.backbone = {config.backbone!r} has no dense last layer to leave out",
            hint="give --set model.projection=0",
        )
    parent, _, own = last.rpartition(".")
    setattr(backbone.get_submodule(parent), own, nn.Identity())
    return layer.in_features


class _Norm(nn.BatchNorm1d):
    """Without it embeddings lie about one direction, and all are alike. One image has no spread, and
    is normalised as in evaluation."""

    def forward(self, features: Tensor) -> Tensor:
        training = self.training and len(features) > 1
        return F.batch_norm(
            features, self.running_mean, self.running_var, training=training, momentum=0.1
        )


def _turn(images: Tensor, way: int) -> Tensor:
    """(B, C, H, W) turned by `way` quarters; from 4 on mirrored, too."""
    turned = images.rot90(way % 4, (-2, -1))
    return turned.flip(-1) if way >= 4 else turned


def _put_together(images: Tensor) -> Tensor:
    """(B, C, H, W): each with the lower half of the one before it."""
    middle = images.shape[-2] // 2
    return torch.cat([images[..., :middle, :], images.roll(1, 0)[..., middle:, :]], dim=-2)


def _trained(data: DataSpec) -> Tensor:
    """(K,) bool: classes that have training images; all where that isn't known."""
    counts = torch.tensor(data.counts if any(data.counts) else (1,) * len(data.classes))
    if int((counts > 0).sum()) < 2:
        raise TesseraError(
            "all training images are of one class: there is nothing to tell apart",
            hint="give data with two classes or more",
        )
    return counts > 0


def _with_margin(cosines: Tensor, label: Tensor, margin: float) -> Tensor:
    """cos(angle + margin) in place of the true class's cosine (B, K). Beyond pi - margin, where it
    would rise again, it goes on below the cosine, as in the authors' code. The sine's slope has no
    limit at an angle of 0, so it is kept from there."""
    if not margin:
        return cosines
    true = cosines.gather(1, label[:, None])
    sine = (1 - true.square()).clamp_min(1e-6).sqrt()
    harder = true * math.cos(margin) - sine * math.sin(margin)
    reached = true > math.cos(math.pi - margin)
    harder = torch.where(reached, harder, true - margin * math.sin(margin))
    return cosines.scatter(1, label[:, None], harder)


class Embedding(Family[EmbeddingConfig]):
    task = VERIFICATION
    variants = {
        "base": EmbeddingConfig(),
        "tiny": EmbeddingConfig(backbone_variant="tiny", dimensions=16),
        "cosine": EmbeddingConfig(head="cosine"),
    }
    defaults = {
        "optim.model.kind": "sgd",
        "optim.model.lr": 0.1,
        "optim.model.nesterov": True,
        "optim.model.weight_decay": 5e-4,
        "schedule.kind": "cosine",
        "schedule.warmup": 0.2,
    }

    def build(self, config: EmbeddingConfig, data: DataSpec) -> nn.Module:
        return Net(config, data)

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        """Cross-entropy with the margin."""
        logits, labels = module(batch["image"], batch["label"])
        return {"loss": F.cross_entropy(logits, labels)}

    @torch.no_grad()
    def predict(self, module: nn.Module, batch: Batch) -> list[Prediction]:
        embeddings: Tensor = module(batch["image"]).cpu()  # the one wait for the device
        # Clones, because a row that is a view would carry its whole batch through pickle.
        return [{"embedding": row.clone()} for row in embeddings]

    def exportable(self, module: nn.Module, data: DataSpec) -> nn.Module:
        """From uint8 (B, H, W, C) to embeddings (B, D)."""
        return ExportModule(module, data)

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.model.lr": LogUniform(1e-3, 1.0),
            "optim.model.weight_decay": LogUniform(1e-5, 1e-2),
            "model.head": Choice(("arcface", "cosine")),
            "model.dimensions": Choice((16, 64, 256)),
            "model.projection": Choice((0, 256)),
            "model.margin": Uniform(0.0, 0.5),
            "model.scale": LogUniform(8.0, 64.0),
            "model.dropout": Uniform(0.0, 0.5),
            "model.turns": Choice((1, 4, 8)),
            "model.join_turns": Choice((False, True)),
            "model.halves": Choice((False, True)),
        }


FAMILY = Embedding()
