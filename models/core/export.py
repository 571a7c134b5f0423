"""A network together with its preprocessing, for programs that don't have Tessera.

In: a network that takes normalised images. Out: a module from uint8 images to one output tensor, in
a form that can be exported as a graph. Must not know files, nor what reads them.

    B images, C channels, H height, W width
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from models.core.family import DataSpec

RELATIVE, ABSOLUTE = 1e-3, 1e-4
"""Tolerances between the outputs of an exported graph and of the network."""


class ExportModule(nn.Module):
    """From uint8 (B, H, W, C) to what `finish` makes of the network's output.

    Holds a copy of the network, on the CPU and in eval mode: the network in training is unchanged.
    """

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
        return self.finish(self.net((pixels - self.mean) / self.std))

    def finish(self, output: Any) -> Tensor:
        """The output tensor, float32. A subclass takes it from what its network returns."""
        return torch.as_tensor(output).float()


def unwrap(module: nn.Module) -> Any:
    """The network itself, without DistributedDataParallel around it."""
    return getattr(module, "module", module)


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, without torch.compile's wrapper, as torch.export needs
    it."""
    inner: Any = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    copied: nn.Module = copy.deepcopy(inner).cpu().eval()
    return copied.to(memory_format=torch.contiguous_format)


@contextmanager
def suppress_export_noise() -> Iterator[None]:
    """Hides the warnings, logs and prints that torch.export writes for its own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(_OthersOnly(sys.stderr)):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _OthersOnly(io.TextIOBase):
    """Drops what this thread writes. Other threads may be showing progress, so theirs passes."""

    def __init__(self, real: TextIO) -> None:
        self._real = real
        self._silent = threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._silent else self._real.write(text)

    def flush(self) -> None:
        self._real.flush()
