"""Backbones with a feature pyramid, and pretrained weights for networks built on one.

In: settings of `RcnnConfig`, the data spec; tensors of a file. Out: a network from images to the
feature maps of all levels; tensors by the network's own names. Must not know what uses the maps.

    B images, C channels, H height, W width, D features, L levels

    image (B, C, H, W) -> {"0": (B, D, H/4, W/4), "1": (B, D, H/8, W/8), …}, L feature maps
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from models.blocks.transfer import fit_first_kernels
from models.core.errors import TesseraError
from models.core.family import DataSpec

OLD_NAMES = (
    (r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)", r"\1.0.\2"),
    (r"(rpn\.head\.conv)\.(weight|bias)", r"\1.0.0.\2"),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.(weight|bias)", r"roi_heads.mask_head.{}.0.\2"),
)
"""Names in torchvision's files of 2020 -> names in its networks of today."""


class Pyramid(nn.Module):
    def __init__(self, body: nn.Module, fpn: nn.Module) -> None:
        super().__init__()
        self.body, self.fpn = body, fpn

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        feature_maps: dict[str, Tensor] = self.fpn(self.body(image))
        return feature_maps


class SmallBody(nn.Module):
    """Two convolutions that halve the size, then a stage of residual blocks for each number of
    channels. Each stage after the first halves the size again."""

    def __init__(
        self,
        in_channels: int,
        channels: tuple[int, ...],
        blocks: int,
        norm: Callable[[int], nn.Module],
    ) -> None:
        from torchvision.models.resnet import BasicBlock

        super().__init__()
        first = max(8, channels[0] // 2)
        self.stem = nn.Sequential(
            *_convolution(in_channels, first, norm), *_convolution(first, channels[0], norm)
        )
        self.stages = nn.ModuleList()
        before = channels[0]
        for i, after in enumerate(channels):
            stride = 2 if i else 1
            shortcut = None
            if stride > 1 or before != after:
                shortcut = nn.Sequential(
                    nn.Conv2d(before, after, 1, stride, bias=False), norm(after)
                )
            stage = [BasicBlock(before, after, stride, shortcut, norm_layer=norm)]
            stage += [BasicBlock(after, after, norm_layer=norm) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(*stage))
            before = after
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x, feature_maps = self.stem(image), {}
        for i, stage in enumerate(self.stages):
            x = feature_maps[str(i)] = stage(x)
        return feature_maps


def _convolution(
    in_channels: int, out_channels: int, norm: Callable[[int], nn.Module]
) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=False),
        norm(out_channels),
        nn.ReLU(inplace=True),
    ]


def group_norm(channels: int) -> nn.Module:
    """Wu and He, Group Normalization, 2018, with groups of 8 channels or more."""
    return nn.GroupNorm(min(32, channels // 8), channels)


def small(
    data: DataSpec, *, channels: tuple[int, ...], blocks: int, norm: str, features: int
) -> nn.Module:
    from torchvision.ops import FeaturePyramidNetwork

    body = SmallBody(data.channels, channels, blocks, _norm(norm))
    return Pyramid(body, FeaturePyramidNetwork(list(channels), features))


def resnet(name: str, data: DataSpec, *, norm: str, features: int) -> nn.Module:
    """torchvision's ResNet, with four stages and a fifth map of every second pixel of the
    fourth."""
    from torchvision.models import resnet
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    net = getattr(resnet, name)(weights=None, norm_layer=_norm(norm))
    if data.channels != 3:
        net.conv1 = nn.Conv2d(data.channels, 64, 7, 2, 3, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    stages = {f"layer{i + 1}": str(i) for i in range(4)}
    channels = [net.fc.in_features // 2**power for power in (3, 2, 1, 0)]
    backbone: nn.Module = BackboneWithFPN(net, stages, channels, features)
    return backbone


def _norm(name: str) -> Callable[[int], nn.Module]:
    return group_norm if name == "group" else nn.BatchNorm2d


def fit_weights(
    loaded: Mapping[str, Tensor], module: nn.Module, heads: tuple[str, ...], source: str
) -> dict[str, Tensor]:
    """The tensors of a file under the names of `module`, and the module's own where the file has
    none.

    The file is a classifier's, whose layers become the body, or a whole detector's, also with the
    names of older files. Each of the `heads` stays new if one of its tensors has another shape, and
    the mask head if the file has none. For grey images the first kernels are summed over their
    colours.
    """
    own = module.state_dict()
    tensors = {_rename(name): tensor for name, tensor in loaded.items()}
    if not any(name.startswith("backbone.") for name in tensors):
        body = {n: t for n, t in own.items() if not n.startswith("backbone.body.")}
        in_body = {f"backbone.body.{n}": t for n, t in tensors.items() if not n.startswith("fc.")}
        if not in_body.keys() & own.keys():
            raise TesseraError(
                f"weights {source!r} are of another network: it has none of their layers",
                hint="use those of a classifier or a detector with the same model.body",
            )
        tensors = body | in_body
    fit_first_kernels(tensors, module)
    new = [head for head in heads if not _fits(tensors, own, head)]
    if not any(name.startswith("roi_heads.mask_") for name in tensors):
        new.append("roi_heads.mask_")
    for start in new:
        tensors = {n: t for n, t in tensors.items() if not n.startswith(start)}
        tensors |= {n: t for n, t in own.items() if n.startswith(start)}
    return {n: t for n, t in tensors.items() if n in own or not n.startswith("roi_heads.mask_")}


def _fits(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], head: str) -> bool:
    mine = {name: tensor for name, tensor in own.items() if name.startswith(f"{head}.")}
    return all(n in tensors and tensors[n].shape == t.shape for n, t in mine.items())


def _rename(name: str) -> str:
    for old, new in OLD_NAMES:
        if match := re.fullmatch(old, name):
            shifted = int(match[1]) - 1 if "{}" in new else 0
            return match.expand(new).format(shifted)
    return name
