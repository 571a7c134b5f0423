"""A network with its preprocessing in it, for readers that have no Tessera.

In: a network on normalised images. Out: a module from uint8 images to an answer that is one tensor.
Must not know files, nor who reads it.

    B images, C channels, H height, W width
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from models.core.family import DataSpec


class Served(nn.Module):
    """From uint8 (B, H, W, C) to what `finish` makes of the network's output. It has a copy of the
    network, on the CPU, to evaluate: the one that is being trained stays as it is."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, data: DataSpec) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).cpu()
        self.register_buffer("mean", torch.tensor(data.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(data.std)[:, None, None])
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float() / 255
        output: Tensor = self.net((pixels - self.mean) / self.std)
        return self.finish(output.float())

    def finish(self, output: Tensor) -> Tensor:
        """The answer."""
        return output
