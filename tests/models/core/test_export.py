"""What an exported network computes, and what it leaves as it was."""

from __future__ import annotations

import logging
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

from models.core.export import ExportModule, plain_copy, suppress_export_noise, unwrap
from models.core.family import DataSpec

DATA = DataSpec("classification", 3, 4, 4, ("a", "b"), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))


def test_bytes_are_normalised_as_for_the_network() -> None:
    module = ExportModule(nn.Identity(), DATA)
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).expand(2, 4, 4, 3)
    output = module(images)
    assert output.shape == (2, 3, 4, 4)
    assert output.dtype == torch.float32
    assert torch.allclose(output[0, :, 0, 0], torch.tensor([-1.0, 3.0, 0.2]))


def test_the_network_in_training_is_unchanged() -> None:
    net = nn.Dropout(0.5)
    module = ExportModule(net, DATA)
    assert net.training
    assert not module.net.training
    assert not plain_copy(net).training
    assert unwrap(net) is net


def test_a_compiled_network_is_copied_without_its_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

    inner = nn.Linear(2, 2).to(memory_format=torch.channels_last)
    copied = plain_copy(Wrapper(inner))
    assert isinstance(copied, nn.Linear)
    assert copied is not inner


def test_noise_is_hidden_and_what_other_threads_write_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = logging.root.manager.disable
    with suppress_export_noise():
        warnings.warn("noise", stacklevel=1)
        print("noise", file=sys.stderr)
        thread = threading.Thread(target=lambda: print("progress", file=sys.stderr))
        thread.start()
        thread.join()
    assert capsys.readouterr().err == "progress\n"
    assert logging.root.manager.disable == before
