"""What an image would have to be like for a network to answer otherwise.

In: a network, and a function of images that asks it. Out: gradients of images. Must not know what is
asked, nor what the gradients are for. The network is left as it was: each module's mode, which
parameters are trained, their gradients.

    B images, C channels, H height, W width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

Ask = Callable[[Tensor], Tensor]


@contextmanager
def answering(module: nn.Module) -> Iterator[None]:
    """The network as it answers, not as it is trained."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """The network as it answers, and gradients of what goes into it only."""
    trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    # cuDNN has no gradients of recurrent layers that answer; torch's own layers have.
    recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
    flags = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    try:
        for parameter, _ in trained:
            parameter.requires_grad_(False)
        with answering(module), flags, torch.enable_grad():
            yield
    finally:
        for parameter, was in trained:
            parameter.requires_grad_(was)


def slope(ask: Ask, images: Tensor) -> Tensor:
    """(B, C, H, W), of the answer's sum. Parameters get none, whether or not they are `frozen`."""
    given = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(ask(given).sum(), given)
    return found
