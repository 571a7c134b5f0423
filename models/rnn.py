"""Recurrent networks, LSTM and GRU, that read an image step by step, by rows or by patches.

Hochreiter and Schmidhuber, Long Short-Term Memory, 1997; Cho et al., Learning Phrase
Representations using RNN Encoder-Decoder, 2014. Forget gates begin open, after Jozefowicz et al.,
An Empirical Exploration of Recurrent Network Architectures, 2015.

    B images, C channels, H height, W width, T steps, D values of one step, F features, K classes

    image (B, C, H, W) -> sequence (B, T, D) -> outputs (B, T, F) -> mean or last (B, F)
    -> logits (B, K)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.classifier import Classifier
from models.blocks.transfer import check_choice, check_shares
from models.core.errors import UsageError
from models.core.family import DataSpec
from models.core.spaces import Choice, LogUniform, Space, Uniform

Cell = Literal["lstm", "gru"]
Read = Literal["mean", "last"]


@dataclass(frozen=True)
class RnnConfig:
    cell: Cell = "lstm"
    """The recurrent cell."""
    patch: int = 0
    """Side in pixels of the square patches that are the steps, from left to right and top to
    bottom; 0 takes the rows as steps."""
    hidden: int = 128
    """Size of the hidden state."""
    layers: int = 2
    """Stacked recurrent layers."""
    bidirectional: bool = False
    """A second network reads the sequence from the end."""
    read: Read = "mean"
    """What the head gets: the mean of all outputs, or the last output of each direction."""
    dropout: float = 0.1
    """Dropout rate between the layers and before the head."""

    def __post_init__(self) -> None:
        if self.patch < 0 or self.hidden < 1 or self.layers < 1:
            raise UsageError("model.patch is 0 or more, model.hidden and model.layers at least 1")
        check_choice("cell", self.cell, get_args(Cell))
        check_choice("read", self.read, get_args(Read))
        check_shares(self, "dropout")


class Net(nn.Module):
    def __init__(self, config: RnnConfig, data: DataSpec) -> None:
        super().__init__()
        channels, _, width = data.shape
        self.step = (config.patch, config.patch) if config.patch else (1, width)
        self.last = config.read == "last"
        self.hidden = config.hidden
        kind = nn.LSTM if config.cell == "lstm" else nn.GRU
        self.recurrent = kind(
            channels * self.step[0] * self.step[1],
            config.hidden,
            config.layers,
            batch_first=True,
            dropout=config.dropout if config.layers > 1 else 0.0,
            bidirectional=config.bidirectional,
        )
        if config.cell == "lstm":
            _open_forget_gates(self.recurrent)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden * (1 + config.bidirectional), len(data.classes))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        outputs: Tensor
        outputs, _ = self.recurrent(sequence(image, *self.step))
        if self.last:
            ends = outputs[:, -1, : self.hidden], outputs[:, 0, self.hidden :]
            features = torch.cat(ends, 1)
        else:
            features = outputs.mean(1)
        logits: Tensor = self.head(self.dropout(features))
        return logits


def sequence(image: Tensor, height: int, width: int) -> Tensor:
    """(B, C, H, W) -> (B, T, C * height * width): patches of that size, row by row. Other image
    sizes are padded with zeros on the right and below."""
    image = F.pad(image, (0, -image.shape[3] % width, 0, -image.shape[2] % height))
    count, channels = image.shape[:2]
    rows, columns = image.shape[2] // height, image.shape[3] // width
    patches = image.reshape(count, channels, rows, height, columns, width)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(count, rows * columns, -1)


def _open_forget_gates(recurrent: nn.Module) -> None:
    with torch.no_grad():
        for name, bias in recurrent.named_parameters():
            if name.startswith("bias_ih"):
                bias.view(4, -1)[1] = 1.0


class _Exportable(nn.Module):
    """Computes the same as a trained nn.LSTM or nn.GRU in evaluation mode. torch.export can't trace
    these, because they keep their weights in a second list beside their parameters."""

    def __init__(self, trained: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        self.weights = nn.ParameterList(trained.parameters())
        self.is_lstm = isinstance(trained, nn.LSTM)
        self.layers, self.hidden = trained.num_layers, trained.hidden_size
        self.bidirectional = trained.bidirectional

    def forward(self, steps: Tensor) -> tuple[Tensor, None]:
        directions = 1 + self.bidirectional
        start = steps.new_zeros(self.layers * directions, steps.shape[0], self.hidden)
        rest = (list(self.weights), True, self.layers, 0.0, False, self.bidirectional, True)
        if self.is_lstm:
            return torch.lstm(steps, (start, start), *rest)[0], None
        return torch.gru(steps, start, *rest)[0], None


class Rnn(Classifier[RnnConfig]):
    variants = {
        "base": RnnConfig(),
        "tiny": RnnConfig(hidden=32, layers=1, dropout=0.0),
        "gru": RnnConfig(cell="gru"),
        "bidirectional": RnnConfig(bidirectional=True),
        "patches": RnnConfig(patch=4),
    }
    defaults = {
        "optim.model.kind": "adamw",
        "optim.model.lr": 3e-3,
        "optim.model.weight_decay": 0.01,
        "schedule.kind": "cosine",
        "schedule.warmup": 0.1,
        "train.clip_norm": 1.0,
    }

    def build(self, config: RnnConfig, data: DataSpec) -> nn.Module:
        return Net(config, data)

    def exportable(self, module: nn.Module, data: DataSpec) -> nn.Module:
        exported = super().exportable(module, data)
        net = exported.get_submodule("net")
        assert isinstance(net, Net)
        net.recurrent = _Exportable(net.recurrent)  # type: ignore[assignment]
        return exported

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.model.lr": LogUniform(3e-4, 1e-2),
            "train.batch_size": Choice((64, 128, 256)),
            "augment.label_smoothing": Uniform(0.0, 0.2),
            "model.dropout": Uniform(0.0, 0.5),
            "model.hidden": Choice((64, 128, 256)),
            "model.layers": Choice((1, 2, 3)),
            "model.cell": Choice(("lstm", "gru")),
        }


FAMILY = Rnn()
