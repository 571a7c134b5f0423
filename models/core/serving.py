"""A network with its preprocessing in it, for readers that have no Tessera.

In: a network on normalised images. Out: a module from uint8 images to an answer that is one tensor;
the form of it that can be stored as a graph. Must not know files, nor who reads it.

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
"""How far a stored graph's answer may be from the network's: ABSOLUTE and RELATIVE of its value."""


class ExportModule(nn.Module):
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


def plain_copy(module: nn.Module) -> nn.Module:
    """On the CPU, in eval mode, without a wrapper: the only form that exports well."""
    inner: Any = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    copied: nn.Module = copy.deepcopy(inner).cpu().eval()
    return copied.to(memory_format=torch.contiguous_format)


@contextmanager
def suppress_export_noise() -> Iterator[None]:
    """Without what torch.export warns, logs and prints for its developers."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(_OthersOnly(sys.stderr)):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _OthersOnly(io.TextIOBase):
    """What other threads write is passed on: they may be showing something."""

    def __init__(self, real: TextIO) -> None:
        self._real = real
        self._silent = threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._silent else self._real.write(text)

    def flush(self) -> None:
        self._real.flush()
