"""Bodies with a feature pyramid, and pretrained weights for networks that stand on one.

In: settings of `RcnnConfig`, what is known of the data; tensors of a file. Out: a network from
images to the maps of all levels; tensors by the network's own names. Must not know what stands on
it.

    B images, C channels, H height, W width, D features, L levels

    image (B, C, H, W) -> {"0": (B, D, H/4, W/4), "1": (B, D, H/8, W/8), …}, L maps
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from models.blocks.transfer import first_convolution
from models.core.errors import TesseraError
from models.core.family import DataSpec

OLD_NAMES = (
    (r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)", r"\1.0.\2"),
    (r"(rpn\.head\.conv)\.(weight|bias)", r"\1.0.0.\2"),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.(weight|bias)", r"roi_heads.mask_head.{}.0.\2"),
)
"""What torchvision's files of 2020 call its layers of today."""


class Pyramid(nn.Module):
    def __init__(self, body: nn.Module, fpn: nn.Module) -> None:
        super().__init__()
        self.body, self.fpn = body, fpn

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(self.body(image))
        return maps


class SmallBody(nn.Module):
    """Two convolutions that halve the size, then a stage of residual blocks for each width; each
    but the first halves the size again."""

    def __init__(
        self, channels: int, widths: tuple[int, ...], blocks: int, norm: Callable[[int], nn.Module]
    ) -> None:
        from torchvision.models.resnet import BasicBlock

        super().__init__()
        first = max(8, widths[0] // 2)
        self.stem = nn.Sequential(
            *_convolution(channels, first, norm), *_convolution(first, widths[0], norm)
        )
        self.stages = nn.ModuleList()
        before = widths[0]
        for place, width in enumerate(widths):
            stride = 2 if place else 1
            around = None
            if stride > 1 or before != width:
                around = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), norm(width))
            stage = [BasicBlock(before, width, stride, around, norm_layer=norm)]
            stage += [BasicBlock(width, width, norm_layer=norm) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(*stage))
            before = width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        signal, maps = self.stem(image), {}
        for place, stage in enumerate(self.stages):
            signal = maps[str(place)] = stage(signal)
        return maps


def _convolution(before: int, width: int, norm: Callable[[int], nn.Module]) -> list[nn.Module]:
    return [nn.Conv2d(before, width, 3, 2, 1, bias=False), norm(width), nn.ReLU(inplace=True)]


def group_norm(channels: int) -> nn.Module:
    """Wu and He, Group Normalization, 2018, with groups of 8 channels or more."""
    return nn.GroupNorm(min(32, channels // 8), channels)


def small(
    data: DataSpec, *, widths: tuple[int, ...], blocks: int, norm: str, features: int
) -> nn.Module:
    from torchvision.ops import FeaturePyramidNetwork

    body = SmallBody(data.channels, widths, blocks, _norm(norm))
    return Pyramid(body, FeaturePyramidNetwork(list(widths), features))


def resnet(name: str, data: DataSpec, *, norm: str, features: int) -> nn.Module:
    """torchvision's, with four stages and a fifth map made of every second pixel of the last."""
    from torchvision.models import resnet
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    net = getattr(resnet, name)(weights=None, norm_layer=_norm(norm))
    if data.channels != 3:
        net.conv1 = nn.Conv2d(data.channels, 64, 7, 2, 3, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    stages = {f"layer{place + 1}": str(place) for place in range(4)}
    widths = [net.fc.in_features // 2**power for power in (3, 2, 1, 0)]
    backbone: nn.Module = BackboneWithFPN(net, stages, widths, features)
    return backbone


def _norm(name: str) -> Callable[[int], nn.Module]:
    return group_norm if name == "group" else nn.BatchNorm2d


def fit_weights(
    found: Mapping[str, Tensor], module: nn.Module, heads: tuple[str, ...], source: str
) -> dict[str, Tensor]:
    """The tensors of a file by the names of `module`; its own where the file has none.

    A file is of a classifier, whose layers become the body, or of a whole detector, old names
    among them. The `heads` stay new where one of their tensors differs, and the part for masks where
    there is none. For grey images the first kernels are summed over their colours.
    """
    own = module.state_dict()
    tensors = {_rename(name): tensor for name, tensor in found.items()}
    if not any(name.startswith("backbone.") for name in tensors):
        body = {n: t for n, t in own.items() if not n.startswith("backbone.body.")}
        given = {f"backbone.body.{n}": t for n, t in tensors.items() if not n.startswith("fc.")}
        if not given.keys() & own.keys():
            raise TesseraError(
                f"weights {source!r} are of another network: none of their layers is in it",
                hint="take a classifier's or a detector's with the same model.body",
            )
        tensors = body | given
    first = f"{first_convolution(module)}.weight"
    kernels = tensors.get(first)
    if own[first].shape[1] == 1 and kernels is not None and kernels.ndim == 4:
        tensors[first] = kernels.sum(1, keepdim=True)
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
        if found := re.fullmatch(old, name):
            shifted = int(found[1]) - 1 if "{}" in new else 0
            return found.expand(new).format(shifted)
    return name
