"""Gradients of a network's output with respect to its input images.

In: a network, and a function of images that calls it. Out: gradients of images. Must not know what
they are for. The network is left unchanged: the mode of each module, which parameters require
gradients, and their gradients.

    B images, C channels, H height, W width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

ImageFunction = Callable[[Tensor], Tensor]


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts the network into eval mode, and each module back into its own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode, with gradients of the network's input only."""
    trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    # cuDNN has no gradients of recurrent layers in eval mode; torch's own layers have.
    recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
    flags = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    try:
        for parameter, _ in trained:
            parameter.requires_grad_(False)
        with eval_mode(module), flags, torch.enable_grad():
            yield
    finally:
        for parameter, was in trained:
            parameter.requires_grad_(was)


def input_gradient(function: ImageFunction, images: Tensor) -> Tensor:
    """Returns the gradient (B, C, H, W) of the sum of `function(images)`. Parameters get none,
    whether they are `frozen` or not."""
    inputs = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(function(inputs).sum(), inputs)
    return gradient
