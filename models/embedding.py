"""Embeddings: a classifier trained so that images of one class are close together.

The embedding is the classifier's normalised output. In training, its cosine with a learned
direction for each class is the logit of that class, with a margin for the true one: Deng et al.,
ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019. After training the directions
are not used: the similarity of two images is the cosine of their embeddings, whatever their
classes.

A few features are enough to tell a few classes apart, and they say little about other classes. So
there are two ways to create more classes for training. `turns`: a rotated image counts as one of
another class, as in Vinyals et al., Matching Networks for One Shot Learning, 2016. `halves`: so
does the upper half of one image on the lower half of another; to tell all pairs of classes apart
takes features of the parts of images, which also occur in unseen classes.

The layers before the last ones generalise better to other classes than the output, which is
specialised to those of the training. With `projection`, the last layers are used in training only
and the embedding is their input, as in Chen et al., A Simple Framework for Contrastive Learning of
Visual Representations, 2020.

    B images, C channels, H height, W width, K classes, D numbers of an embedding
    T ways to turn, M = TK classes in training, or TK^2 with halves

    image (B, C, H, W) -> classifier -> (B, D) -> batch norm -> unit length
    in training, with labels (B,): -> turned images (TB, C, H, W) -> embeddings (TB, D)
    -> cosines with the directions of M classes -> logits (TB, M)

    with a projection, without the classifier's last layer: -> (B, D) -> unit length
    in training (TB, D) -> projection -> batch norm -> unit length -> cosines, as above
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from models.blocks.classifier import Classifier, fitted_to_images
from models.blocks.transfer import check_choice, check_shares, last_layer
from models.core.errors import TesseraError, UsageError, unknown
from models.core.export import ExportModule
from models.core.family import Batch, DataSpec, Family, Losses, Prediction
from models.core.fitted import DataFacts, Fitted
from models.core.spaces import Choice, LogUniform, Space, Uniform
from models.tasks.verification import VERIFICATION

Head = Literal["arcface", "cosine"]
MOST_CLASSES = 1 << 18
"""At most so many classes in training."""


@dataclass(frozen=True)
class EmbeddingConfig:
    backbone: str = "cnn"
    """The family of the classifier."""
    backbone_variant: str = "base"
    """Its variant."""
    dimensions: int = 64
    """Size of the embedding; with a projection, the size of the projection's output."""
    projection: int = 0
    """Hidden units of a projection that is used in training only; 0 for none."""
    head: Head = "arcface"
    """The loss: "arcface" with the margin, "cosine" without."""
    margin: float = 0.3
    """ArcFace's margin, an angle in radians."""
    scale: float = 16.0
    """Factor of the cosines to make them logits."""
    dropout: float = 0.0
    """Dropout rate of the embedding in training."""
    turns: int = 1
    """Train with each image in so many orientations, each a class of its own: 4 for the rotations
    by multiples of 90 degrees, 8 with their mirror images. An epoch takes as many times longer."""
    join_turns: bool = False
    """Concatenate the embeddings of all `turns` of an image: as many times the size and the
    time."""
    halves: bool = False
    """In training every second image gets the lower half of another one, and each pair of classes
    is a class."""

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
        """The family of the backbone and its config. Raises UsageError if it is not a plain
        classifier."""
        family = None if self.backbone == "embedding" else models.get(self.backbone)
        if not isinstance(family, Classifier) or type(family).loss is not Classifier.loss:
            raise UsageError(
                f"model.backbone = {self.backbone!r} doesn't return plain logits",
                hint="name a plain classifier, like cnn, resnet or vit",
            )
        if self.backbone_variant not in family.variants:
            raise unknown(f"variant of {self.backbone}", self.backbone_variant, family.variants)
        return family, family.variants[self.backbone_variant]


class Net(nn.Module):
    """`trained` (M,) bool: the classes with training images. Only these get logits."""

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
        """(B, C, H, W) -> embeddings (B, D) of unit length. With labels (B,): logits (TB, M) and
        labels (TB,) of the images' turns and halves."""
        if label is None:
            views = [self._embed(turned) for turned in self._turned(image, self.views)]
            return torch.cat(views, dim=1) / math.sqrt(len(views))
        image, label = self._make_classes(image, label)
        features = self.backbone(image).float()
        # Near 1, bf16 has a resolution of only 0.004.
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
        """All images, half of them composed of two, in the first orientation, then all in the
        second, and so on; and their labels."""
        classes = len(self.trained) // self.turns
        if self.halves:
            half = len(label) // 2
            lower = torch.cat([label[:half].roll(1), label[half:]])
            label = label * math.isqrt(classes) + lower
            image = torch.cat([_combine_halves(image[:half]), image[half:]])
        label = torch.cat([label + classes * way for way in range(self.turns)])
        return torch.cat(self._turned(image, self.turns)), label

    def _turned(self, image: Tensor, ways: int) -> list[Tensor]:
        """The images in each orientation. Raises UsageError for images that aren't square."""
        if ways > 1 and image.shape[-2] != image.shape[-1]:
            raise UsageError(
                f"images of {image.shape[-2]} by {image.shape[-1]} pixels can't be rotated "
                "by 90 degrees",
                hint="give --set model.turns=1, or the same data.height and data.width",
            )
        return [_turn(image, way) for way in range(ways)]


def _take_last_layer(backbone: nn.Module, config: EmbeddingConfig) -> int:
    """Removes the last layer of the backbone. Returns the number of its inputs."""
    last = last_layer(backbone)
    layer = backbone.get_submodule(last)
    if not isinstance(layer, nn.Linear):
        raise UsageError(
            f"model.backbone = {config.backbone!r} has no dense last layer to remove",
            hint="give --set model.projection=0",
        )
    parent, _, own = last.rpartition(".")
    setattr(backbone.get_submodule(parent), own, nn.Identity())
    return layer.in_features


class _Norm(nn.BatchNorm1d):
    """Batch norm that also takes a single image, which it normalises as in evaluation. Without a
    norm all embeddings point in about the same direction."""

    def forward(self, features: Tensor) -> Tensor:
        training = self.training and len(features) > 1
        return F.batch_norm(
            features, self.running_mean, self.running_var, training=training, momentum=0.1
        )


def _turn(images: Tensor, way: int) -> Tensor:
    """(B, C, H, W) rotated by `way` times 90 degrees; from 4 on also mirrored."""
    turned = images.rot90(way % 4, (-2, -1))
    return turned.flip(-1) if way >= 4 else turned


def _combine_halves(images: Tensor) -> Tensor:
    """(B, C, H, W): each image with the lower half of the one before it."""
    middle = images.shape[-2] // 2
    return torch.cat([images[..., :middle, :], images.roll(1, 0)[..., middle:, :]], dim=-2)


def _trained(data: DataSpec) -> Tensor:
    """(K,) bool: the classes with training images; all of them if that isn't known."""
    counts = torch.tensor(data.counts if any(data.counts) else (1,) * len(data.classes))
    if int((counts > 0).sum()) < 2:
        raise TesseraError(
            "all training images are of one class, so there is nothing to compare",
            hint="use data with two classes or more",
        )
    return counts > 0


def _with_margin(cosines: Tensor, label: Tensor, margin: float) -> Tensor:
    """Cosines (B, K) with cos(angle + margin) for the true class.

    Beyond pi - margin, where this would rise again, it continues linearly below the cosine, as in
    the authors' code. The sine is clamped because its gradient is infinite at an angle of 0.
    """
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

    def fitted_defaults(
        self,
        config: EmbeddingConfig,
        facts: DataFacts,
        settings: Mapping[str, Any],
        kept: Container[str],
    ) -> Iterable[Fitted]:
        return fitted_to_images(facts, settings, kept, weights="")

    def build(self, config: EmbeddingConfig, data: DataSpec) -> nn.Module:
        return Net(config, data)

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        """Cross-entropy with the margin."""
        logits, labels = module(batch["image"], batch["label"])
        return {"loss": F.cross_entropy(logits, labels)}

    @torch.no_grad()
    def predict(self, module: nn.Module, batch: Batch) -> list[Prediction]:
        embeddings: Tensor = module(batch["image"]).cpu()  # the only CPU-GPU sync point
        # Clones, because pickling a row that is a view would pickle its whole batch.
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
