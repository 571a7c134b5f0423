"""Autoencoders that compress an image to a short code and back: plain, denoising, variational.

    B images, C channels, H height, W width, D numbers of a code

    image (B, C, H, W) -> stages, each half the size -> code (B, D) -> stages, each twice the size
    -> image (B, C, H, W) in 0..1

The number of stages follows from the data: sides are halved, rounded up, at least once and until
the longer one is at most 8. Channels are doubled from `width` up to 256.

- Hinton and Salakhutdinov, Reducing the Dimensionality of Data with Neural Networks, 2006
- denoising: Vincent et al., Extracting and Composing Robust Features with Denoising Autoencoders,
  2008
- inpainting: Pathak et al., Context Encoders: Feature Learning by Inpainting, 2016, without the
  adversary
- variational: Kingma and Welling, Auto-Encoding Variational Bayes, 2013, with the weight `beta` of
  Higgins et al., beta-VAE, 2017

What the network has to undo, noise or blanked squares, is set under `augment`.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.core.errors import UsageError
from models.core.export import ExportModule, unwrap
from models.core.family import Batch, DataSpec, Family, Losses, Prediction
from models.core.fitted import DataFacts, Fitted, length, square
from models.core.spaces import Choice, LogUniform, Space
from models.metrics import image_quality
from models.tasks.reconstruction import RECONSTRUCTION, inside

SMALLEST_SIDE, MOST_CHANNELS = 8, 256
LARGEST = float(torch.finfo(torch.float16).max)


@dataclass(frozen=True)
class AutoencoderConfig:
    code: int = 32
    """Numbers of a code."""
    code_bits: Literal[16, 32] = 16
    """Each number is rounded to a float of so many bits before an image is decoded from it, so the
    metrics are those of codes stored in that precision. Training doesn't round."""
    width: int = 32
    """Channels of the first stage. Each further stage has twice as many, up to 256."""
    variational: bool = False
    """A code is a normal distribution: training samples from it, predictions take its mean."""
    beta: float = 0.02
    """Variational: weight of the KL divergence from the standard normal distribution, against the
    sum of squared errors."""

    def __post_init__(self) -> None:
        for name, value in {"code": self.code, "width": self.width}.items():
            if value < 1:
                raise UsageError(f"model.{name} = {value}", hint="give 1 or more")
        if not 0 <= self.beta < math.inf:
            raise UsageError(f"model.beta = {self.beta}", hint="give 0 or more, like 0.02")


class Net(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, config: AutoencoderConfig, data: DataSpec) -> None:
        super().__init__()
        self.config = config
        self.size = (data.height, data.width)
        sizes = [self.size]
        while len(sizes) == 1 or max(sizes[-1]) > SMALLEST_SIDE:
            height, width = sizes[-1]
            sizes.append(((height + 1) // 2, (width + 1) // 2))
        *self.sizes, core = sizes
        stages = range(len(self.sizes))
        channels = [min(config.width * 2**stage, MOST_CHANNELS) for stage in stages]
        channels = [data.channels, *channels]
        self.core = (channels[-1], *core)
        features = math.prod(self.core)
        numbers = config.code * (2 if config.variational else 1)
        self.down = nn.Sequential(*map(_halve, channels, channels[1:]))
        self.to_code = nn.Linear(features, numbers)
        self.from_code = nn.Linear(config.code, features)
        self.up = nn.ModuleList(map(_double, channels[1:], channels))
        self.apply(_initialise)
        self.register_buffer("mean", torch.tensor(data.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(data.std)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised (B, C, H, W) -> images (B, C, H, W) in 0..1, codes (B, D), and KL divergences
        (B,) in nats of the codes' distributions from the standard normal one, 0 if not variational.
        """
        if image.shape[-2:] != self.size:
            raise UsageError(
                "images of {} by {} pixels for an autoencoder of {} by {}".format(
                    *image.shape[-2:], *self.size
                ),
                hint="the size is fixed at training: set data.height and data.width",
            )
        numbers = self.to_code(self.down(image).flatten(1)).float()
        code = numbers[:, : self.config.code]
        divergence = torch.zeros_like(code[:, 0])
        if self.config.variational:
            log_variance = numbers[:, self.config.code :]
            divergence = 0.5 * (code.square() + log_variance.exp() - 1 - log_variance).sum(1)
            if self.training:
                code = code + torch.randn_like(code) * (0.5 * log_variance).exp()
        if self.config.code_bits == 16 and not self.training:
            code = code.clamp(-LARGEST, LARGEST).half().float()
        return self.decode(code), code, divergence

    def decode(self, code: Tensor) -> Tensor:
        """(B, D) -> (B, C, H, W) in 0..1. Not clamped in training: that would stop the gradient."""
        x: Tensor = self.from_code(code).view(-1, *self.core)
        for stage, (height, width) in zip(reversed(self.up), reversed(self.sizes)):
            x = stage(x)[..., :height, :width]
        image = x.float() * self.std + self.mean
        return image if self.training else image.clamp(0, 1)


def _halve(in_channels: int, out_channels: int) -> nn.Sequential:
    """Half the size, rounded up."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        nn.ReLU(),
    )


def _double(in_channels: int, out_channels: int) -> nn.Sequential:
    """Twice the size."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(in_channels, in_channels, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1),
    )


def _initialise(layer: nn.Module) -> None:
    """As in LeCun et al., Efficient BackProp, 1998, which keeps the variance from layer to layer.

    The network has no norms that would do that. With PyTorch's default, activations shrink, and the
    codes of all images begin nearly equal.
    """
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        values = layer.weight[0].numel()
        if isinstance(layer, nn.ConvTranspose2d):
            values = layer.weight[:, 0].numel() // math.prod(layer.stride)
        nn.init.normal_(layer.weight, 0.0, math.sqrt(1 / values))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class Autoencoder(Family[AutoencoderConfig]):
    task = RECONSTRUCTION
    variants = {
        "base": AutoencoderConfig(),
        # codes of 32 bits, because rounding could enlarge a difference in the last bit
        "tiny": AutoencoderConfig(code=16, code_bits=32, width=16),
        "denoising": AutoencoderConfig(),
        "inpainting": AutoencoderConfig(),
        "variational": AutoencoderConfig(variational=True),
    }
    defaults = {
        "optim.model.kind": "adam",
        "optim.model.lr": 2e-3,
        "schedule.kind": "one_cycle",
        "schedule.warmup": 0.2,
    }
    variant_defaults = {"denoising": {"augment.noise": 0.3}, "inpainting": {"augment.mask": 0.25}}

    def fitted_defaults(
        self,
        config: AutoencoderConfig,
        facts: DataFacts,
        settings: Mapping[str, Any],
        kept: Container[str],
    ) -> Iterable[Fitted]:
        yield from square(facts, 128)
        yield from length(facts, settings, kept, steps=4000)

    def build(self, config: AutoencoderConfig, data: DataSpec) -> nn.Module:
        return Net(config, data)

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        """The mean squared error over each image without its padding. Variational: plus `beta`
        times `kl`, the KL divergence of the codes in nats, divided by the number of values of the
        image as the sum of squared errors is."""
        output, _, divergence = module(batch["image"])
        clean: Tensor = batch["clean"]
        valid = inside(batch["extent"], *clean.shape[-2:]).to(clean.dtype)
        values = valid.sum((1, 2, 3)) * clean.shape[1]
        error = ((output - clean).square() * valid).sum((1, 2, 3)) / values
        config = unwrap(module).config
        if not config.variational:
            return {"loss": error.mean()}
        loss = error + config.beta * divergence / values
        return {"loss": loss.mean(), "mse": error.mean(), "kl": divergence.mean()}

    @torch.no_grad()
    def predict(self, module: nn.Module, batch: Batch) -> list[Prediction]:
        images, codes, _ = module(batch["image"])
        images, clean = images.cpu(), batch["clean"].cpu()
        seen = batch["seen"].cpu() if "seen" in batch else None
        predictions = _predictions(unwrap(module).config, images, codes.cpu())
        for row, (height, width) in enumerate(batch["extent"].tolist()):
            prediction = predictions[row]
            image = prediction["image"] = images[row, :, :height, :width].clone()
            prediction["mse"] = image_quality.mse(image, clean[row, :, :height, :width])
            if seen is not None:
                prediction["seen"] = seen[row, :, :height, :width].clone()
        return predictions

    @torch.no_grad()
    def decode(self, module: nn.Module, codes: Tensor) -> list[Prediction]:
        """Images of the size that the network was trained on. Raises UsageError for codes of
        another length, or with values that are not finite."""
        config = unwrap(module).config
        if codes.ndim != 2 or codes.shape[1] != config.code:
            raise UsageError(
                f"codes of {codes.shape[-1]} numbers for a network whose codes have {config.code}",
                hint="decode codes of the same model",
            )
        if not bool(torch.isfinite(codes).all()):
            raise UsageError("a code has a value that is not finite")
        codes = codes.float()
        return _predictions(config, unwrap(module).decode(codes).cpu(), codes.cpu())

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.model.lr": LogUniform(3e-4, 1e-2),
            "train.batch_size": Choice((64, 128, 256)),
            "model.width": Choice((16, 32, 64)),
        }

    def exportable(self, module: nn.Module, data: DataSpec) -> nn.Module:
        """From uint8 (B, H, W, C) to reconstructions (B, C, H, W) in 0..1."""
        return _Reconstruction(module, data)


class _Reconstruction(ExportModule):
    def finish(self, output: Any) -> Tensor:
        return super().finish(output[0])


def _predictions(config: AutoencoderConfig, images: Tensor, codes: Tensor) -> list[Prediction]:
    """Clones the rows, because pickling a row that is a view would pickle its whole batch."""
    bits = config.code * config.code_bits
    return [
        {"image": image.clone(), "code": code.clone(), "bits": bits}
        for image, code in zip(images, codes)
    ]


FAMILY = Autoencoder()
