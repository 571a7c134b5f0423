"""Any classification network of torchvision by name, and of timm if that is installed.

In: `model.name`, as in `torchvision.models.list_models()`, or `timm/NAME`. Out: that network with a
head for these classes and a first layer for these channels. For images under 96 pixels the first
convolution loses its stride, unless it cuts the image into patches, and a pool right after it is
left out; later layers don't shrink feature maps below 2x2 pixels. Only the weights of the head and,
for other than three channels, of the first layer change their shapes, so published weights can be
loaded.

    B images, C channels, H height, W width, K classes

    image (B, C, H, W) -> logits (B, K)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.blocks.transfer import (
    Pretrained,
    Transfer,
    first_convolution,
    is_small,
    keep_map_sizes,
    last_layer,
)
from models.core.errors import TesseraError, UsageError, unknown
from models.core.family import DataSpec
from models.core.spaces import Choice, LogUniform, Space, Uniform

TIMM = "timm/"


@dataclass(frozen=True)
class BackboneConfig(Pretrained):
    name: str = "mobilenet_v3_small"
    """The network: a name from `torchvision.models.list_models()`, or `timm/NAME`."""
    adapt: bool = True
    """Adapt the network to small images and short trainings. False: as its authors made it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name.removeprefix(TIMM):
            raise UsageError("model.name is empty", hint="name a network, like mobilenet_v3_small")


class Backbone(Transfer[BackboneConfig]):
    variants = {
        "base": BackboneConfig(),
        "tiny": BackboneConfig(name="shufflenet_v2_x0_5"),
    }
    defaults = {
        "optim.model.kind": "adamw",
        "optim.model.lr": 2e-3,
        "optim.model.weight_decay": 0.02,
        "schedule.kind": "cosine",
        "schedule.warmup": 0.1,
        "train.clip_norm": 1.0,
    }

    def build(self, config: BackboneConfig, data: DataSpec) -> nn.Module:
        make = _from_timm if config.name.startswith(TIMM) else _from_torchvision
        try:
            net = make(config.name, data)
            if config.adapt:
                _speed_up_norms(net)
                if is_small("auto", data):
                    _remove_first_stride(net)
                    keep_map_sizes(net, data)
            _try_one_image(net, data)
        except (RuntimeError, ValueError, AssertionError) as error:
            line = " ".join(str(error).split())[:200].rstrip(".!")
            raise UsageError(
                f"{config.name} takes no images of {data.height}x{data.width} pixels: {line}",
                hint="scale them: --set data.height=224 --set data.width=224",
            ) from None
        return net

    def head_names(self, module: nn.Module) -> tuple[str, ...]:
        return (last_layer(module),)

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.model.lr": LogUniform(1e-4, 1e-2),
            "optim.model.weight_decay": LogUniform(1e-4, 0.1),
            "train.batch_size": Choice((64, 128, 256)),
            "augment.label_smoothing": Uniform(0.0, 0.2),
            "model.name": Choice(("mobilenet_v3_small", "shufflenet_v2_x1_0", "regnet_y_400mf")),
        }


def _from_torchvision(name: str, data: DataSpec) -> nn.Module:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise unknown("network", name, known)
    settings: dict[str, Any] = {}
    if name.startswith("vit_"):
        if data.height != data.width:
            raise ValueError("it takes square images only")
        settings = {"image_size": data.height}
    elif name == "maxvit_t":
        settings = {"input_size": (data.height, data.width)}
    elif name in ("googlenet", "inception_v3"):  # auxiliary heads would need a loss of their own
        settings = {"aux_logits": False, "init_weights": False}
    net: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=len(data.classes), **settings
    )
    first = first_convolution(net)
    if data.channels != 3:
        net.set_submodule(first, _with_channels(net.get_submodule(first), data.channels))
    return net


def _from_timm(name: str, data: DataSpec) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError:
        raise TesseraError(
            f"model.name = {name!r} needs timm, which isn't installed here",
            hint="pip install 'tessera-train[timm]', on every machine of a Ray cluster",
        ) from None
    bare = name.removeprefix(TIMM)
    known = timm.list_models()
    if bare not in known:
        raise unknown("network of timm", bare, known)
    net: nn.Module = timm.create_model(
        bare, pretrained=False, num_classes=len(data.classes), in_chans=data.channels
    )
    return net


def _with_channels(layer: nn.Module, channels: int) -> nn.Conv2d:
    assert isinstance(layer, nn.Conv2d)
    return nn.Conv2d(
        channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        bias=layer.bias is not None,
    )


def _remove_first_stride(net: nn.Module) -> None:
    """Removes the stride of the first convolution and a pool right after it. A convolution whose
    stride is as large as its kernel cuts the image into patches, and is kept."""
    layers = [m for m in net.modules() if not list(m.children())]
    start = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d))
    first = layers[start]
    assert isinstance(first, nn.Conv2d)
    if not 1 < first.stride[0] < first.kernel_size[0]:
        return
    first.stride = (1, 1)
    for layer in layers[start + 1 :]:
        if isinstance(layer, nn.MaxPool2d):
            layer.kernel_size, layer.stride, layer.padding = 1, 1, 0
        if isinstance(layer, nn.MaxPool2d | nn.Conv2d):
            return


def _speed_up_norms(net: nn.Module) -> None:
    """Gives batch norms at least PyTorch's default momentum. Some networks have one for a million
    steps; after a short training their statistics would still be close to the initial ones."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.momentum is not None:
            layer.momentum = max(layer.momentum, 0.1)


def _try_one_image(net: nn.Module, data: DataSpec) -> None:
    """Runs one image through the network: it raises here if it doesn't work with this size."""
    device = next(net.parameters()).device
    with torch.no_grad():
        logits: Tensor = net.eval()(torch.zeros(1, *data.shape, device=device))
    assert logits.shape == (1, len(data.classes))
    net.train()


FAMILY = Backbone()
