"""What families around ready-made networks share: small images, first layers, pretrained weights.

In: a network that somebody else designed, and what is known of the data. Out: the same network, fit
for it. Must not know which network it is.

    B images, C channels, H height, W width
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from models.blocks.classifier import Classifier
from models.core.errors import UsageError
from models.core.family import DataSpec
from models.core.weights import load_weights, read_weights

Freeze = Literal["none", "backbone"]
Stem = Literal["auto", "small", "large"]
LARGE_PIXELS = 96
"""From this height and width on, a network begins as its article has it for large images."""
NARROW = (1, 2, 4, 8)


@dataclass(frozen=True)
class Pretrained:
    """`weights`: path, or http(s) or file address, of a `.safetensors` file or a `.pth` state dict;
    it is read once, when a training begins. Layers of the head stay new where their shape differs;
    for grey images the first kernels are summed over their colours. `weights_sha256` is compared
    when given. `freeze`: "backbone" trains the head only."""

    weights: str = ""
    weights_sha256: str = ""
    freeze: Freeze = "none"

    def __post_init__(self) -> None:
        check_choice("freeze", self.freeze, get_args(Freeze))


P = TypeVar("P", bound=Pretrained)


class Transfer(Classifier[P], Generic[P]):
    """A classifier that can begin with weights from a file."""

    heads: ClassVar[tuple[str, ...]]
    """Layers, by their names in the network, that depend on classes or image size."""

    def head_names(self, module: nn.Module) -> tuple[str, ...]:
        return self.heads

    def rename(self, name: str) -> str:
        """The network's name for a tensor of a file, where old files have another."""
        return name

    def warm_start(self, config: P, module: nn.Module) -> None:
        if not config.weights:
            if config.freeze != "none":
                raise UsageError(
                    f"model.freeze = {config.freeze!r} would keep a network that has learned nothing",
                    hint="name weights: --set model.weights=FILE_OR_URL",
                )
            return
        found = read_weights(config.weights, config.weights_sha256)
        tensors = {self.rename(name): tensor for name, tensor in found.items()}
        own = module.state_dict()
        first = f"{first_convolution(module)}.weight"
        given = tensors.get(first)
        if first in own and own[first].shape[1] == 1 and given is not None and given.ndim == 4:
            tensors[first] = given.sum(1, keepdim=True)
        heads = self.head_names(module)
        for head in heads:
            tensors = _fresh_where_it_differs(tensors, own, f"{head}.")
        load_weights(module, tensors, heads[0], config.weights)

    def frozen(self, config: P, module: nn.Module, epoch: int) -> frozenset[str]:
        if config.freeze == "none":
            return frozenset()
        heads = tuple(f"{head}." for head in self.head_names(module))
        return frozenset(n for n, _ in module.named_parameters() if not n.startswith(heads))


def _fresh_where_it_differs(
    tensors: dict[str, Tensor], own: dict[str, Tensor], head: str
) -> dict[str, Tensor]:
    """The head's tensors are the file's if all of them fit, otherwise the network's."""
    mine = {name: tensor for name, tensor in own.items() if name.startswith(head)}
    if mine and all(n in tensors and tensors[n].shape == t.shape for n, t in mine.items()):
        return tensors
    return {n: t for n, t in tensors.items() if not n.startswith(head)} | mine


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    if value not in (allowed := tuple(allowed)):
        raise UsageError(
            f"model.{name} = {value!r}", hint=f"give one of: {', '.join(map(str, allowed))}"
        )


def check_shares(config: object, *names: str) -> None:
    """Each named setting is a share: 0 or more and below 1."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise UsageError(
                f"model.{name} = {getattr(config, name)}", hint="give 0 or more, below 1"
            )


def is_small(stem: Stem, data: DataSpec) -> bool:
    """Whether a network begins as for small images."""
    return stem == "small" or (stem == "auto" and min(data.height, data.width) < LARGE_PIXELS)


def first_convolution(net: nn.Module) -> str:
    """Name of the first convolution, in the order in which the layers were made; "" for none."""
    return next((name for name, m in net.named_modules() if isinstance(m, nn.Conv2d)), "")


def keep_maps(net: nn.Module, data: DataSpec) -> None:
    """Layers that would make a map smaller than 2x2 keep its size instead, so that a network made
    for large images takes small ones, and a norm has several values even of one image.

    Pools become identities, convolutions lose their stride; no weight changes its shape. One image
    goes through the network, and each layer is looked at just before it gets it.
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
    made = [
        (sides[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    least = 1 if kernel == stride and isinstance(layer, nn.Conv2d) else 2  # patches may end in one
    if all(made[i] >= min(least, sides[i]) for i in (0, 1)):
        return
    if isinstance(layer, nn.Conv2d):
        layer.stride, layer.padding = (1, 1), "same"
    else:
        layer.kernel_size, layer.stride, layer.padding = 1, 1, 0


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def last_layer(net: nn.Module) -> str:
    """Name of the layer that gives the logits: the last with weights, in the order of making."""
    kinds = (nn.Linear, nn.Conv2d)
    found: list[str] = [name for name, module in net.named_modules() if isinstance(module, kinds)]
    return found[-1]
