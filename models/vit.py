"""Vision transformers that also train from scratch on small data sets.

Dosovitskiy et al., An Image is Worth 16x16 Words, 2020, in the simplified form of Beyer et al.,
Better plain ViT baselines for ImageNet-1k, 2022: the mean over the patches is classified, and
position embeddings are fixed sines and cosines, so that any image size is possible. What small data
sets need is on by default: stochastic depth (Huang et al., Deep Networks with Stochastic Depth,
2016), warm-up, gradient clipping, shifted images and smoothed labels.

    B images, C channels, H height, W width, P side of a patch, T patches, D width, K classes

    image (B, C, H, W) -> patches (B, T, D) + positions (T, D) -> blocks, each (B, T, D)
    -> mean (B, D) -> logits (B, K)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.transfer import LARGE_PIXELS, Pretrained, Transfer, check_shares
from models.core.errors import UsageError
from models.core.family import DataSpec
from models.core.spaces import Choice, LogUniform, Space, Uniform


@dataclass(frozen=True)
class VitConfig(Pretrained):
    patch: int = 0
    """Side of the patches in pixels. 0 takes 16 for images of 96 pixels and more, and for smaller
    ones an eighth of the shorter side."""
    width: int = 192
    """Size of a token's embedding, a multiple of 4 and of `heads`."""
    depth: int = 12
    """Transformer blocks."""
    heads: int = 3
    """Attention heads of each block."""
    expansion: int = 4
    """Hidden units of a block's dense layers, as a multiple of `width`."""
    drop_path: float = 0.1
    """Stochastic depth: probability that an image skips the last block, growing linearly from 0 at
    the first."""
    dropout: float = 0.0
    """Dropout rate in the dense layers and before the head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch < 0 or min(self.width, self.depth, self.heads, self.expansion) < 1:
            raise UsageError(
                "model.patch is 0 or more; width, depth, heads and expansion at least 1"
            )
        if self.width % 4 or self.width % self.heads:
            raise UsageError(
                f"model.width = {self.width} with {self.heads} heads",
                hint=f"give a multiple of 4 and of the heads, like {64 * self.heads}",
            )
        check_shares(self, "drop_path", "dropout")


class Net(nn.Module):
    positions: Tensor

    def __init__(self, config: VitConfig, data: DataSpec) -> None:
        super().__init__()
        side = min(data.height, data.width)
        patch = config.patch or (16 if side >= LARGE_PIXELS else -(-side // 8))
        self.patches = nn.Conv2d(data.channels, config.width, patch, patch)
        # Other image sizes are padded on the right and below.
        self.padding = (0, -data.width % patch, 0, -data.height % patch)
        rows, columns = -(-data.height // patch), -(-data.width // patch)
        positions = sines(rows, columns, config.width)
        self.register_buffer("positions", positions, persistent=False)
        shares = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.Sequential(*(Block(config, share) for share in shares))
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.width, len(data.classes))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        tokens = self.patches(F.pad(image, self.padding)).flatten(2).transpose(1, 2)
        tokens = self.norm(self.blocks(tokens + self.positions))
        logits: Tensor = self.head(self.dropout(tokens.mean(1)))
        return logits


class Block(nn.Module):
    """Attention, then two dense layers, each with a norm before and a residual connection
    around."""

    def __init__(self, config: VitConfig, drop_path: float) -> None:
        from torchvision.ops import StochasticDepth

        super().__init__()
        width, wide = config.width, config.width * config.expansion
        self.heads = config.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.dense = nn.Sequential(
            nn.Linear(width, wide), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(wide, width)
        )
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.drop_path(self.attend(self.norm1(tokens)))
        added: Tensor = tokens + self.drop_path(self.dense(self.norm2(tokens)))
        return added

    def attend(self, tokens: Tensor) -> Tensor:
        parts = self.query_key_value(tokens).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        values = F.scaled_dot_product_attention(query, key, value)
        attended: Tensor = self.project(values.transpose(1, 2).flatten(2))
        return attended


def sines(rows: int, columns: int, width: int) -> Tensor:
    """(rows * columns, width): the first half encodes the row, the second the column, each by sines
    and cosines with wavelengths from 2 pi patches to about 10,000 times that."""
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 4) / (width // 4))
    row = torch.arange(rows).repeat_interleave(columns)[:, None] * rates
    column = torch.arange(columns).repeat(rows)[:, None] * rates
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], 1)


class Vit(Transfer[VitConfig]):
    heads = ("head",)
    variants = {
        "base": VitConfig(),
        "tiny": VitConfig(width=32, depth=2, heads=2, expansion=2, drop_path=0.0),
        "small": VitConfig(width=64, depth=6, heads=4, expansion=2, drop_path=0.05),
        # the papers' sizes: Ti and S (Touvron et al., 2020), B and L
        "vit-ti": VitConfig(width=192, heads=3),
        "vit-s": VitConfig(width=384, heads=6),
        "vit-b": VitConfig(width=768, heads=12, drop_path=0.2),
        "vit-l": VitConfig(width=1024, depth=24, heads=16, drop_path=0.3),
    }
    defaults = {
        "optim.model.kind": "adamw",
        "optim.model.lr": 1e-3,
        "optim.model.weight_decay": 0.05,
        "schedule.kind": "cosine",
        "schedule.warmup": 0.2,
        "train.clip_norm": 1.0,
        "augment.label_smoothing": 0.1,
    }
    variant_defaults = {"small": {"optim.model.lr": 3e-3}}

    def build(self, config: VitConfig, data: DataSpec) -> nn.Module:
        return Net(config, data)

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.model.lr": LogUniform(1e-4, 5e-3),
            "optim.model.weight_decay": LogUniform(1e-3, 0.3),
            "train.batch_size": Choice((64, 128, 256)),
            "schedule.warmup": Uniform(0.05, 0.4),
            "augment.label_smoothing": Uniform(0.0, 0.2),
            "model.drop_path": Uniform(0.0, 0.3),
            "model.depth": Choice((4, 8, 12)),
        }


FAMILY = Vit()
