"""Autoencoders that bring an image to a few numbers and back: plain, denoising, variational.

    B images, C channels, H height, W width, D numbers of a code

    image (B, C, H, W) -> stages, each half the size -> code (B, D) -> stages, each twice the size
    -> image (B, C, H, W) in 0..1

Sizes follow from the data: sides are halved, rounded up, until the longer one is at most 8, at
least once; channels are doubled from `width` up to 256.

- Hinton and Salakhutdinov, Reducing the Dimensionality of Data with Neural Networks, 2006
- denoising: Vincent et al., Extracting and Composing Robust Features with Denoising Autoencoders,
  2008
- inpainting: Pathak et al., Context Encoders: Feature Learning by Inpainting, 2016, without the
  adversary
- variational: Kingma and Welling, Auto-Encoding Variational Bayes, 2013, with the weight `beta` of
  Higgins et al., beta-VAE, 2017

What is corrupted for the network to undo is a matter of the recipe's `augment`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.core.errors import UsageError
from models.core.family import Batch, DataSpec, Family, Losses, Prediction
from models.core.serving import ExportModule, unwrap
from models.core.spaces import Choice, LogUniform, Space
from models.metrics import image_quality
from models.tasks.reconstruction import RECONSTRUCTION, inside

SMALLEST_SIDE, MOST_CHANNELS = 8, 256
LARGEST = float(torch.finfo(torch.float16).max)


@dataclass(frozen=True)
class AutoencoderConfig:
    """`code`: numbers of a code. `code_bits`: each is rounded to a float of so many bits before an
    answer is decoded from it, so that figures are those of codes that take no more. `width`:
    channels of the first stage. `variational`: a code is a normal distribution, from which training
    draws and of which an answer takes the mean; `beta` weighs its distance from the standard one
    against the sum of squared errors."""

    code: int = 32
    code_bits: Literal[16, 32] = 16
    width: int = 32
    variational: bool = False
    beta: float = 0.02

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
        maps = [min(config.width * 2**stage, MOST_CHANNELS) for stage in range(len(self.sizes))]
        maps = [data.channels, *maps]
        self.core = (maps[-1], *core)
        features = math.prod(self.core)
        numbers = config.code * (2 if config.variational else 1)
        self.down = nn.Sequential(*map(_halve, maps, maps[1:]))
        self.to_code = nn.Linear(features, numbers)
        self.from_code = nn.Linear(config.code, features)
        self.up = nn.ModuleList(map(_double, maps[1:], maps))
        self.apply(_initialise)
        self.register_buffer("mean", torch.tensor(data.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(data.std)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised (B, C, H, W) -> images (B, C, H, W) in 0..1, codes (B, D), and the distance
        (B,) in nats of each code's distribution from the standard normal one, 0 where it has none.
        """
        if image.shape[-2:] != self.size:
            raise UsageError(
                "images of {} by {} pixels for an autoencoder of {} by {}".format(
                    *image.shape[-2:], *self.size
                ),
                hint="its size is fixed when it is trained: set data.height and data.width",
            )
        found = self.to_code(self.down(image).flatten(1)).float()
        code = found[:, : self.config.code]
        distance = torch.zeros_like(code[:, 0])
        if self.config.variational:
            log_variance = found[:, self.config.code :]
            distance = 0.5 * (code.square() + log_variance.exp() - 1 - log_variance).sum(1)
            if self.training:
                code = code + torch.randn_like(code) * (0.5 * log_variance).exp()
        if self.config.code_bits == 16 and not self.training:
            code = code.clamp(-LARGEST, LARGEST).half().float()
        return self.decode(code), code, distance

    def decode(self, code: Tensor) -> Tensor:
        """(B, D) -> (B, C, H, W) in 0..1; in training also beyond, where a gradient leads back."""
        signal: Tensor = self.from_code(code).view(-1, *self.core)
        for stage, (height, width) in zip(reversed(self.up), reversed(self.sizes)):
            signal = stage(signal)[..., :height, :width]
        made = signal.float() * self.std + self.mean
        return made if self.training else made.clamp(0, 1)


def _halve(given: int, maps: int) -> nn.Sequential:
    """Half the size, rounded up."""
    return nn.Sequential(
        nn.Conv2d(given, maps, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(maps, maps, 3, padding=1),
        nn.ReLU(),
    )


def _double(maps: int, made: int) -> nn.Sequential:
    """Twice the size."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(maps, maps, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(maps, made, 4, stride=2, padding=1),
    )


def _initialise(layer: nn.Module) -> None:
    """LeCun et al., Efficient BackProp, 1998. There is no norm to make up for a signal that gets
    smaller from layer to layer, and by torch's own start codes are all alike and slow to part."""
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
        # codes of 32 bits: a last bit that is otherwise can't become a rounding that is otherwise
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

    def build(self, config: AutoencoderConfig, data: DataSpec) -> nn.Module:
        return Net(config, data)

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        """The mean squared error of what is picture. Of a variational one also `kl`, the distance
        of the codes in nats, weighed by `beta` and divided by the number of the image's values as
        the squared errors are."""
        made, _, distance = module(batch["image"])
        clean: Tensor = batch["clean"]
        shown = inside(batch["extent"], *clean.shape[-2:]).to(clean.dtype)
        values = shown.sum((1, 2, 3)) * clean.shape[1]
        error = ((made - clean).square() * shown).sum((1, 2, 3)) / values
        config = unwrap(module).config
        if not config.variational:
            return {"loss": error.mean()}
        loss = error + config.beta * distance / values
        return {"loss": loss.mean(), "mse": error.mean(), "kl": distance.mean()}

    @torch.no_grad()
    def predict(self, module: nn.Module, batch: Batch) -> list[Prediction]:
        made, codes, _ = module(batch["image"])
        made, clean = made.cpu(), batch["clean"].cpu()
        seen = batch["seen"].cpu() if "seen" in batch else None
        predictions = _predictions(unwrap(module).config, made, codes.cpu())
        for row, (height, width) in enumerate(batch["extent"].tolist()):
            prediction = predictions[row]
            image = prediction["image"] = made[row, :, :height, :width].clone()
            prediction["mse"] = image_quality.mse(image, clean[row, :, :height, :width])
            if seen is not None:
                prediction["seen"] = seen[row, :, :height, :width].clone()
        return predictions

    @torch.no_grad()
    def decode(self, module: nn.Module, codes: Tensor) -> list[Prediction]:
        """Images of the size that the network sees. UsageError for codes of another length, or
        with numbers that are none."""
        config = unwrap(module).config
        if codes.ndim != 2 or codes.shape[1] != config.code:
            raise UsageError(
                f"codes of {codes.shape[-1]} numbers for a network whose codes have {config.code}",
                hint="decode what the same model has made",
            )
        if not bool(torch.isfinite(codes).all()):
            raise UsageError("a code has a number that is infinite or none")
        codes = codes.float()
        return _predictions(config, unwrap(module).decode(codes).cpu(), codes.cpu())

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.model.lr": LogUniform(3e-4, 1e-2),
            "train.batch_size": Choice((64, 128, 256)),
            "model.width": Choice((16, 32, 64)),
        }

    def exportable(self, module: nn.Module, data: DataSpec) -> nn.Module:
        """From uint8 (B, H, W, C) to reconstructions (B, C, H, W) in 0..1, channels first as in a
        prediction."""
        return _Reconstruction(module, data)


class _Reconstruction(ExportModule):
    def finish(self, output: Any) -> Tensor:
        return super().finish(output[0])


def _predictions(config: AutoencoderConfig, made: Tensor, codes: Tensor) -> list[Prediction]:
    """Clones, because a row that is a view would carry its whole batch through pickle."""
    bits = config.code * config.code_bits
    return [
        {"image": image.clone(), "code": code.clone(), "bits": bits}
        for image, code in zip(made, codes)
    ]


FAMILY = Autoencoder()
