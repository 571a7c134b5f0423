"""A generator and a discriminator of convolutions that train each other.

Radford et al., Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
Networks, 2015 (https://arxiv.org/abs/1511.06434).

    B images, C channels, H height, W width, Z numbers of noise, widths[i] maps of stage i

    noise (B, Z) -> (B, widths[-1], H_n, W_n) -> stages, the last first -> made image (B, C, H, W)
    image (B, C, H, W) -> stages, each (B, widths[i], H_i, W_i) -> logit (B,): more than 0 for real

A stage halves the image, rounded down, in the discriminator, and its twin in the generator doubles
it and puts back the odd row and column; so an image of any size is made in its size. (Articles that
double a fixed start so often make 56x56 of it for images of 28x28.) A stage of a map with a side
below 4 keeps its size. Images are normalised as the data set's are; the generator's tanh spans its
black to its white.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.transfer import check_choice
from models.core.errors import UsageError
from models.core.family import Batch, DataSpec, Family, Losses, Prediction
from models.core.serving import unwrap
from models.core.spaces import Choice, LogUniform, Space
from models.tasks.generation import GENERATION

Norm = Literal["batch", "group", "none"]
GROUPS = 8
SLOPE = 0.2
"""Of the discriminator's leaky ReLU, as in the article."""


@dataclass(frozen=True)
class DcganConfig:
    """`noise`: numbers that an image is made of. `widths`: maps of each stage, from the image
    inwards. `norm` of the generator and of the discriminator, but for their ends: over the batch,
    as in the article, or over groups of maps."""

    noise: int = 64
    widths: tuple[int, ...] = (64, 128)
    generator_norm: Norm = "batch"
    discriminator_norm: Norm = "batch"

    def __post_init__(self) -> None:
        if self.noise < 1:
            raise UsageError(f"model.noise = {self.noise}", hint="give 1 or more, like 64")
        if not self.widths or min(self.widths) < 1:
            raise UsageError(
                f"model.widths = {list(self.widths)}", hint="give a list like [64, 128]"
            )
        for part in ("generator", "discriminator"):
            name = f"{part}_norm"
            check_choice(name, getattr(self, name), get_args(Norm))


class Net(nn.Module):
    """Both parts. What answers is the generator."""

    def __init__(self, config: DcganConfig, data: DataSpec) -> None:
        super().__init__()
        if min(data.height, data.width) < 4:
            raise UsageError(
                f"images of {data.height} by {data.width} pixels are too small to be made",
                hint="enlarge them: --set data.height=32 --set data.width=32",
            )
        self.generator = Generator(config, data)
        self.discriminator = Discriminator(config, data)
        self.apply(_initialise)

    def forward(self, noise: Tensor) -> Tensor:
        """(B, Z) -> made images (B, C, H, W) in 0..1."""
        return self.generator.draw(noise)


class Generator(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, config: DcganConfig, data: DataSpec) -> None:
        super().__init__()
        self.noise = config.noise
        sizes = _sizes(config, data)
        maps = [data.channels, *config.widths]
        self.start = (maps[-1], *sizes[-1])
        dense = nn.Linear(config.noise, math.prod(self.start), bias=False)
        self.dense = nn.Sequential(dense, nn.Unflatten(1, self.start))
        layers: list[nn.Module] = [_norm(config.generator_norm, maps[-1]), nn.ReLU()]
        for i in reversed(range(len(config.widths))):
            layers.append(_enlarge(maps[i + 1], maps[i], sizes[i + 1], sizes[i], bias=i == 0))
            if i:
                layers += [_norm(config.generator_norm, maps[i]), nn.ReLU()]
        self.stages = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor(data.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(data.std)[:, None, None], persistent=False)

    def forward(self, noise: Tensor) -> Tensor:
        """(B, Z) -> made images (B, C, H, W), normalised as real ones are."""
        return (self.draw(noise) - self.mean) / self.std

    def draw(self, noise: Tensor) -> Tensor:
        """(B, Z) -> made images (B, C, H, W) in 0..1."""
        drawn: Tensor = self.stages(self.dense(noise))
        return (drawn.float().tanh() + 1) / 2


class Discriminator(nn.Module):
    def __init__(self, config: DcganConfig, data: DataSpec) -> None:
        super().__init__()
        sizes = _sizes(config, data)
        maps = [data.channels, *config.widths]
        layers: list[nn.Module] = []
        for i in range(len(config.widths)):
            kernel, stride = (4, 2) if sizes[i + 1] != sizes[i] else (3, 1)
            normed = i > 0 and config.discriminator_norm != "none"
            layers.append(nn.Conv2d(maps[i], maps[i + 1], kernel, stride, 1, bias=not normed))
            if normed:
                layers.append(_norm(config.discriminator_norm, maps[i + 1]))
            layers.append(nn.LeakyReLU(SLOPE))
        self.stages = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(maps[-1] * math.prod(sizes[-1]), 1)

    def forward(self, *batches: Tensor) -> tuple[Tensor, ...]:
        """Batches (B, C, H, W) of one kind each -> logits (B,) of each. A batch norm sees one kind
        at a time; that they go in together is for DistributedDataParallel, which takes one forward
        for each backward."""
        return tuple(self.head(self.stages(images))[:, 0].float() for images in batches)


def _sizes(config: DcganConfig, data: DataSpec) -> list[tuple[int, int]]:
    """Height and width of the image and of each stage's maps."""
    sizes = [(data.height, data.width)]
    for _ in config.widths:
        height, width = sizes[-1]
        sizes.append((height // 2, width // 2) if min(height, width) >= 4 else (height, width))
    return sizes


def _enlarge(
    maps: int, made: int, small: tuple[int, int], large: tuple[int, int], *, bias: bool
) -> nn.Module:
    if small == large:
        return nn.ConvTranspose2d(maps, made, 3, 1, 1, bias=bias)
    odd = (large[0] % 2, large[1] % 2)
    return nn.ConvTranspose2d(maps, made, 4, 2, 1, output_padding=odd, bias=bias)


def _norm(kind: Norm, maps: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    return nn.BatchNorm2d(maps) if kind == "batch" else nn.GroupNorm(math.gcd(GROUPS, maps), maps)


def _initialise(layer: nn.Module) -> None:
    """Radford et al.: from a normal distribution with a standard deviation of 0.02."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(layer.weight, 0.0, 0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)


class Dcgan(Family[DcganConfig]):
    task = GENERATION
    variants = {
        # Narrow, for small images. Without a norm the discriminator sees one image at a time, and
        # the generator leaves out less.
        "base": DcganConfig(widths=(32, 64), discriminator_norm="none"),
        "tiny": DcganConfig(noise=8, widths=(8, 16)),
        # the article's, for images of 64x64
        "radford": DcganConfig(noise=100, widths=(128, 256, 512, 1024)),
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

    def build(self, config: DcganConfig, data: DataSpec) -> nn.Module:
        return Net(config, data)

    def parts(self, module: nn.Module) -> Mapping[str, nn.Module]:
        assert isinstance(module, Net)
        return {"generator": module.generator, "discriminator": module.discriminator}

    def updates(self, parts: Mapping[str, nn.Module], batch: Batch) -> Iterator[tuple[str, Losses]]:
        """The discriminator first, then the generator by the discriminator that has just learned,
        with the loss that doesn't saturate (Goodfellow et al., https://arxiv.org/abs/1406.2661).
        The images made for the first are looked at again in the second."""
        real: Tensor = batch["image"]
        generator, discriminator = parts["generator"], parts["discriminator"]
        noise = torch.randn(len(real), unwrap(generator).noise, device=real.device)
        made = generator(noise)
        of_real, of_made = discriminator(real, made.detach())
        yield (
            "discriminator",
            {
                "loss": F.softplus(-of_real).mean() + F.softplus(of_made).mean(),
                "real": of_real.sigmoid().mean(),
                "made": of_made.sigmoid().mean(),
            },
        )
        # Past DistributedDataParallel: of the discriminator no gradient is wanted here.
        bare = unwrap(discriminator)
        with _still(bare):
            (of_made,) = bare(made)
        yield "generator", {"loss": F.softplus(-of_made).mean()}

    @torch.no_grad()
    def predict(self, module: nn.Module, batch: Batch) -> list[Prediction]:
        """One made image for each `index`. Its noise is a function of the batch's `seed`, by
        default 0, and of the index, so that it is the same one in any company."""
        net = unwrap(module)
        assert isinstance(net, Net)
        seed = int(batch.get("seed", 0))
        noise = torch.stack([_noise(seed, i, net.generator.noise) for i in batch["index"].tolist()])
        drawn = net(noise.to(net.generator.mean.device))
        pixels = (drawn * 255).round().to(torch.uint8).contiguous().cpu()
        return [{"image": image.clone()} for image in pixels]

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.generator.lr": LogUniform(5e-5, 2e-3),
            "optim.discriminator.lr": LogUniform(5e-5, 2e-3),
            "train.batch_size": Choice((32, 64, 128)),
            "model.noise": Choice((32, 64, 128)),
            "model.discriminator_norm": Choice(("batch", "group", "none")),
        }


def _noise(seed: int, index: int, count: int) -> Tensor:
    # torch takes the lower 32 bits of a seed only. Within them no two images have the same.
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4])
    return torch.randn(count, generator=torch.Generator().manual_seed((start + index) % 2**32))


@contextmanager
def _still(part: nn.Module) -> Iterator[None]:
    """No gradient of the part's parameters is taken of what is computed within."""
    parameters = [p for p in part.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


FAMILY = Dcgan()
