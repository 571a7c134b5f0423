"""GoogLeNet: blocks of parallel convolutions, and two more heads while it is trained.

The network is torchvision's (BSD-3-Clause), with batch norm, and its weights fit it: Szegedy et al.,
Going Deeper with Convolutions, 2015. The losses of the two auxiliary heads are added with a weight,
as the article has it, and they don't take part in answers. For images under 96 pixels the first
convolution is 3x3 without stride and without pool.

    B images, C channels, H height, W width, K classes

    image (B, C, H, W) -> stem -> inception 3a, 3b -> 4a … 4e -> 5a, 5b -> mean over the map
    -> logits (B, K); in training also those of heads after 4a and 4d
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.transfer import (
    NARROW,
    Pretrained,
    Stem,
    Transfer,
    check_choice,
    check_shares,
    is_small,
    keep_maps,
)
from models.core.family import Batch, DataSpec, Losses
from models.core.spaces import Choice, LogUniform, Space, Uniform

AUXILIARY_WEIGHT = 0.3
"""The article's."""


@dataclass(frozen=True)
class GoogLeNetConfig(Pretrained):
    """`auxiliary`: train with the two auxiliary heads. `narrow`: divides the width of every layer.
    `dropout`: before the head; `auxiliary_dropout`: in the auxiliary ones. `stem`: "small" is 3x3,
    "large" is 7x7 with stride 2 and a pool."""

    auxiliary: bool = True
    narrow: int = 1
    dropout: float = 0.2
    auxiliary_dropout: float = 0.7
    stem: Stem = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("narrow", self.narrow, NARROW)
        check_choice("stem", self.stem, get_args(Stem))
        check_shares(self, "dropout", "auxiliary_dropout")


class GoogLeNet(Transfer[GoogLeNetConfig]):
    heads = ("fc", "aux1", "aux2")
    variants = {
        "base": GoogLeNetConfig(),
        "tiny": GoogLeNetConfig(narrow=8, dropout=0.0, auxiliary_dropout=0.0),
        "small": GoogLeNetConfig(narrow=2),
        "plain": GoogLeNetConfig(auxiliary=False),
    }
    defaults = {
        "optim.model.kind": "sgd",
        "optim.model.lr": 0.05,
        "optim.model.nesterov": True,
        "optim.model.weight_decay": 5e-4,
        "schedule.kind": "cosine",
        "schedule.warmup": 0.1,
    }

    def build(self, config: GoogLeNetConfig, data: DataSpec) -> nn.Module:
        import torchvision
        from torchvision.models.googlenet import BasicConv2d, Inception, InceptionAux

        def narrow(width: int) -> int:
            return width // config.narrow

        def convolution(inputs: int, outputs: int, **kind: Any) -> nn.Module:
            first = inputs == 3
            if first and is_small(config.stem, data):
                kind = {"kernel_size": 3, "padding": 1}
            width = data.channels if first else narrow(inputs)
            made: nn.Module = BasicConv2d(width, narrow(outputs), **kind)
            return made

        def inception(*widths: int) -> nn.Module:
            made: nn.Module = Inception(*map(narrow, widths))
            return made

        def auxiliary(inputs: int, classes: int, dropout: float) -> nn.Module:
            made: nn.Module = InceptionAux(narrow(inputs), classes, dropout=dropout)
            if config.narrow > 1:
                made.conv = BasicConv2d(narrow(inputs), narrow(128), kernel_size=1)
                made.fc1 = nn.Linear(narrow(2048), narrow(1024))
                made.fc2 = nn.Linear(narrow(1024), classes)
            return made

        net: nn.Module = torchvision.models.GoogLeNet(
            num_classes=len(data.classes),
            aux_logits=config.auxiliary,
            init_weights=False,
            blocks=[convolution, inception, auxiliary],
            dropout=config.dropout,
            dropout_aux=config.auxiliary_dropout,
        )
        if config.narrow > 1:
            net.fc = nn.Linear(narrow(1024), len(data.classes))
        if is_small(config.stem, data):
            net.maxpool1 = nn.Identity()
        keep_maps(net, data)
        return net

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        """Cross-entropy of the answer, plus that of the auxiliary heads in training; `main_loss` is
        the answer's alone."""
        outputs = module(batch["image"])
        target = batch["target"] if "target" in batch else batch["label"]
        if isinstance(outputs, Tensor):
            logits, others = outputs.float(), []
        else:
            logits, *others = (o.float() for o in outputs if o is not None)
        main = F.cross_entropy(logits, target)
        added = [AUXILIARY_WEIGHT * F.cross_entropy(other, target) for other in others]
        right = (logits.argmax(1) == batch["label"]).float()
        return {"loss": sum(added, start=main), "main_loss": main, "accuracy": right.mean()}

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.model.lr": LogUniform(1e-3, 0.5),
            "optim.model.weight_decay": LogUniform(1e-5, 1e-2),
            "train.batch_size": Choice((64, 128, 256)),
            "augment.label_smoothing": Uniform(0.0, 0.2),
            "model.dropout": Uniform(0.0, 0.5),
            "model.auxiliary": Choice((True, False)),
        }


FAMILY = GoogLeNet()
