"""A generator and a discriminator of convolutions that are trained against each other.

Radford et al., Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
Networks, 2015 (https://arxiv.org/abs/1511.06434).

    B images, C channels, H height, W width, Z size of a latent vector, channels[i] of stage i

    latent (B, Z) -> (B, channels[-1], H_n, W_n) -> stages, the last first -> fake (B, C, H, W)
    image (B, C, H, W) -> stages, each (B, channels[i], H_i, W_i) -> logit (B,), above 0 for real

A stage of the discriminator halves the size, rounded down; its twin in the generator doubles it and
restores the odd row and column. So images of any size are generated in that size. A stage whose
feature map has a side below 4 keeps the size. Images are normalised with the data set's mean and
standard deviation; the generator's tanh covers the range from black to white.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.transfer import check_channels, check_choice
from models.core.errors import UsageError
from models.core.export import unwrap
from models.core.family import Batch, DataSpec, Family, Losses, Prediction
from models.core.fitted import DataFacts, Fitted, length, square
from models.core.spaces import Choice, LogUniform, Space
from models.tasks.generation import GENERATION

Norm = Literal["batch", "group", "none"]
GROUPS = 8
SLOPE = 0.2
"""Negative slope of the discriminator's leaky ReLU, as in the paper."""


@dataclass(frozen=True)
class DcganConfig:
    latent_dim: int = 64
    """Length of the random vector that an image is generated from."""
    channels: tuple[int, ...] = (64, 128)
    """Channels of each stage, from the image inwards."""
    generator_norm: Norm = "batch"
    """Norm in the generator, except at its end: over the batch as in the paper, over groups of
    channels, or none."""
    discriminator_norm: Norm = "batch"
    """Norm in the discriminator, except in its first stage."""

    def __post_init__(self) -> None:
        if self.latent_dim < 1:
            raise UsageError(
                f"model.latent_dim = {self.latent_dim}", hint="give 1 or more, like 64"
            )
        check_channels("channels", self.channels, example="[64, 128]")
        for part in ("generator", "discriminator"):
            name = f"{part}_norm"
            check_choice(name, getattr(self, name), get_args(Norm))


class Net(nn.Module):
    """Generator and discriminator. Predictions come from the generator."""

    def __init__(self, config: DcganConfig, data: DataSpec) -> None:
        super().__init__()
        if min(data.height, data.width) < 4:
            raise UsageError(
                f"images of {data.height} by {data.width} pixels are too small to be generated",
                hint="enlarge them: --set data.height=32 --set data.width=32",
            )
        self.generator = Generator(config, data)
        self.discriminator = Discriminator(config, data)
        self.apply(_initialise)

    def forward(self, latent: Tensor) -> Tensor:
        """(B, Z) -> fake images (B, C, H, W) in 0..1."""
        return self.generator.draw(latent)


class Generator(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, config: DcganConfig, data: DataSpec) -> None:
        super().__init__()
        self.latent_dim = config.latent_dim
        sizes = _sizes(config, data)
        channels = [data.channels, *config.channels]
        self.start = (channels[-1], *sizes[-1])
        dense = nn.Linear(config.latent_dim, math.prod(self.start), bias=False)
        self.dense = nn.Sequential(dense, nn.Unflatten(1, self.start))
        layers: list[nn.Module] = [_norm(config.generator_norm, channels[-1]), nn.ReLU()]
        for i in reversed(range(len(config.channels))):
            layers.append(
                _enlarge(channels[i + 1], channels[i], sizes[i + 1], sizes[i], bias=i == 0)
            )
            if i:
                layers += [_norm(config.generator_norm, channels[i]), nn.ReLU()]
        self.stages = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor(data.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(data.std)[:, None, None], persistent=False)

    def forward(self, latent: Tensor) -> Tensor:
        """(B, Z) -> fake images (B, C, H, W), normalised as real ones are."""
        return (self.draw(latent) - self.mean) / self.std

    def draw(self, latent: Tensor) -> Tensor:
        """(B, Z) -> fake images (B, C, H, W) in 0..1."""
        x: Tensor = self.stages(self.dense(latent))
        return (x.float().tanh() + 1) / 2


class Discriminator(nn.Module):
    def __init__(self, config: DcganConfig, data: DataSpec) -> None:
        super().__init__()
        sizes = _sizes(config, data)
        channels = [data.channels, *config.channels]
        layers: list[nn.Module] = []
        for i in range(len(config.channels)):
            kernel, stride = (4, 2) if sizes[i + 1] != sizes[i] else (3, 1)
            normed = i > 0 and config.discriminator_norm != "none"
            layers.append(
                nn.Conv2d(channels[i], channels[i + 1], kernel, stride, 1, bias=not normed)
            )
            if normed:
                layers.append(_norm(config.discriminator_norm, channels[i + 1]))
            layers.append(nn.LeakyReLU(SLOPE))
        self.stages = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(channels[-1] * math.prod(sizes[-1]), 1)

    def forward(self, *batches: Tensor) -> tuple[Tensor, ...]:
        """Batches (B, C, H, W), each all real or all fake -> logits (B,) of each batch.

        A batch norm sees one batch at a time. They come in one call because
        DistributedDataParallel needs one forward for each backward.
        """
        return tuple(self.head(self.stages(images))[:, 0].float() for images in batches)


def _sizes(config: DcganConfig, data: DataSpec) -> list[tuple[int, int]]:
    """Height and width of the image and of each stage's feature map."""
    sizes = [(data.height, data.width)]
    for _ in config.channels:
        height, width = sizes[-1]
        sizes.append((height // 2, width // 2) if min(height, width) >= 4 else (height, width))
    return sizes


def _enlarge(
    in_channels: int,
    out_channels: int,
    small: tuple[int, int],
    large: tuple[int, int],
    *,
    bias: bool,
) -> nn.Module:
    if small == large:
        return nn.ConvTranspose2d(in_channels, out_channels, 3, 1, 1, bias=bias)
    odd = (large[0] % 2, large[1] % 2)
    return nn.ConvTranspose2d(in_channels, out_channels, 4, 2, 1, output_padding=odd, bias=bias)


def _norm(kind: Norm, channels: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


def _initialise(layer: nn.Module) -> None:
    """From a normal distribution with a standard deviation of 0.02, as in the paper."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(layer.weight, 0.0, 0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)


class Dcgan(Family[DcganConfig]):
    task = GENERATION
    variants = {
        # For small images. Without a norm the discriminator judges each image by itself, and the
        # generator covers more of the data.
        "base": DcganConfig(channels=(32, 64), discriminator_norm="none"),
        "tiny": DcganConfig(latent_dim=8, channels=(8, 16)),
        # the paper's, for images of 64x64
        "radford": DcganConfig(latent_dim=100, channels=(128, 256, 512, 1024)),
    }
    defaults = {
        **{
            f"optim.{part}.{name}": value
            for part in ("generator", "discriminator")
            for name, value in {"kind": "adam", "lr": 5e-4, "betas": [0.5, 0.999]}.items()
        },
        "schedule.kind": "constant",
        "train.batch_size": 64,
        "train.ema": 0.995,
        "train.precision": "fp32",
    }
    variant_defaults = {
        "radford": {
            "optim.generator.lr": 2e-4,
            "optim.discriminator.lr": 2e-4,
            "train.batch_size": 128,
        }
    }

    def fitted_defaults(
        self,
        config: DcganConfig,
        facts: DataFacts,
        settings: Mapping[str, Any],
        kept: Container[str],
    ) -> Iterable[Fitted]:
        yield from square(facts, 64)
        # The balance of the two parts is known for this size of a batch.
        yield from length(facts, settings, ("train.batch_size",), steps=5000)

    def build(self, config: DcganConfig, data: DataSpec) -> nn.Module:
        return Net(config, data)

    def parts(self, module: nn.Module) -> Mapping[str, nn.Module]:
        assert isinstance(module, Net)
        return {"generator": module.generator, "discriminator": module.discriminator}

    def updates(self, parts: Mapping[str, nn.Module], batch: Batch) -> Iterator[tuple[str, Losses]]:
        """First the discriminator, then the generator against the updated discriminator, with the
        non-saturating loss (Goodfellow et al., https://arxiv.org/abs/1406.2661). Both updates use
        the same fake images."""
        real: Tensor = batch["image"]
        generator, discriminator = parts["generator"], parts["discriminator"]
        latent = torch.randn(len(real), unwrap(generator).latent_dim, device=real.device)
        fake = generator(latent)
        of_real, of_fake = discriminator(real, fake.detach())
        yield (
            "discriminator",
            {
                "loss": F.softplus(-of_real).mean() + F.softplus(of_fake).mean(),
                "real": of_real.sigmoid().mean(),
                "fake": of_fake.sigmoid().mean(),
            },
        )
        # Without DistributedDataParallel, as no gradient of the discriminator is needed here.
        bare = unwrap(discriminator)
        with _without_gradients(bare):
            (of_fake,) = bare(fake)
        yield "generator", {"loss": F.softplus(-of_fake).mean()}

    @torch.no_grad()
    def predict(self, module: nn.Module, batch: Batch) -> list[Prediction]:
        """One fake image for each `index`. Its latent vector is a function of the batch's `seed`
        (by default 0) and the index, so it doesn't depend on the rest of the batch."""
        net = unwrap(module)
        assert isinstance(net, Net)
        seed = int(batch.get("seed", 0))
        size, indices = net.generator.latent_dim, batch["index"].tolist()
        latent = torch.stack([_latent(seed, index, size) for index in indices])
        fake = net(latent.to(net.generator.mean.device))
        pixels = (fake * 255).round().to(torch.uint8).contiguous().cpu()
        return [{"image": image.clone()} for image in pixels]

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.generator.lr": LogUniform(5e-5, 2e-3),
            "optim.discriminator.lr": LogUniform(5e-5, 2e-3),
            "train.batch_size": Choice((32, 64, 128)),
            "model.latent_dim": Choice((32, 64, 128)),
            "model.discriminator_norm": Choice(("batch", "group", "none")),
        }


def _latent(seed: int, index: int, size: int) -> Tensor:
    # torch uses only the lower 32 bits of a seed. Within these, no two images share one.
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4])
    return torch.randn(size, generator=torch.Generator().manual_seed((start + index) % 2**32))


@contextmanager
def _without_gradients(part: nn.Module) -> Iterator[None]:
    """What is computed inside has no gradient with respect to the part's parameters."""
    parameters = [p for p in part.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


FAMILY = Dcgan()
