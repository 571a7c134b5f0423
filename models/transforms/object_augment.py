"""Augmentation and normalisation of images with object boxes.

In: batches of uint8 images with boxes. Out: the batch as the network sees it, with transformed
boxes. Works on output batches, on their device. Must not know any network.

    B images, C channels, H height, W width, N objects of an image
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.core.errors import UsageError
from models.core.family import Batch, BatchRng, DataSpec
from models.transforms.geometry import Placement, inside

LEAST_SHARE = 0.25
"""Objects that keep a smaller share of their area after zoom, shift and mosaic are dropped."""
MIDDLE = (0.3, 0.7)
"""Range of the point where the four images of a mosaic meet, as a share of the sides."""
FIELDS = ("boxes", "labels", "crowd")


@dataclass(frozen=True)
class ObjectAugmentSettings:
    flip: bool = False
    """Mirror half of the training images, left to right."""
    flip_vertical: bool = False
    """Mirror half of the training images, top to bottom."""
    zoom: float = 0.0
    """Enlarge or reduce by a factor of up to 1 + `zoom`: 0.5 for 1/1.5 to 1.5."""
    shift: float = 0.0
    """Shift by up to this share of the sides."""
    mosaic: float = 0.0
    """Share of the training images that become a mosaic of four images."""
    brightness: float = 0.0
    """Multiply the pixels by 1 ± up to this share."""
    contrast: float = 0.0
    """Change the contrast by a factor of 1 ± up to this share."""
    colour: float = 0.0
    """Multiply each channel by its own factor of 1 ± up to this share."""

    def __post_init__(self) -> None:
        if not 0 <= self.zoom <= 3:
            raise UsageError(f"augment.zoom = {self.zoom}", hint="give 0 to 3, like 0.5")
        for name in ("shift", "brightness", "contrast", "colour"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UsageError(f"augment.{name} = {value}", hint="give 0 or more, below 1")
        if not 0 <= self.mosaic <= 1:
            raise UsageError(f"augment.mosaic = {self.mosaic}", hint="give a share from 0 to 1")

    @property
    def moves_images(self) -> bool:
        """Whether any setting changes the position or the size of images."""
        return bool(self.flip or self.flip_vertical or self.zoom or self.shift or self.mosaic)


class ObjectAugment:
    """The transform: first geometry of images and boxes, then brightness and colours, then
    normalisation."""

    def __init__(self, settings: ObjectAugmentSettings, data: DataSpec) -> None:
        self._settings = settings
        self._mean = torch.tensor(data.mean)[:, None, None] * 255
        self._std = torch.tensor(data.std)[:, None, None] * 255

    def __call__(self, batch: Batch, rng: BatchRng) -> Batch:
        batch = {**batch, "image": batch["image"].float()}
        if self._settings.moves_images and "boxes" in batch:
            batch = self._place(batch, rng)
        batch["image"] = self._light(batch["image"], rng)
        self._mean = self._mean.to(batch["image"].device)
        self._std = self._std.to(batch["image"].device)
        batch["image"] = (batch["image"] - self._mean) / self._std
        return batch

    def _light(self, images: Tensor, rng: BatchRng) -> Tensor:
        settings, changed = self._settings, False
        for amount, shape in (
            (settings.brightness, (1, 1, 1)),
            (settings.colour, (images.shape[1], 1, 1)),
        ):
            if amount:
                factor = 1 + amount * (2 * rng.uniform(*shape) - 1)
                images, changed = images * factor.to(images.device, non_blocking=True), True
        if settings.contrast:
            factor = 1 + settings.contrast * (2 * rng.uniform(1, 1, 1) - 1)
            grey = images.mean((1, 2, 3), keepdim=True)
            factor = factor.to(images.device, non_blocking=True)
            images, changed = (images - grey) * factor + grey, True
        return images.clamp(0, 255) if changed else images

    def _place(self, batch: Batch, rng: BatchRng) -> Batch:
        images: Tensor = batch["image"]
        count, _, height, width = images.shape
        frame = torch.tensor([height, width], dtype=torch.float32)
        extents = batch["extent"].cpu().float()
        tiles = Tiles(self._settings, frame, rng, count)
        output = images
        parts: list[list[list[Tensor]]] = [[] for _ in range(count)]
        for slot in range(4 if len(tiles.mosaics) else 1):
            rows, sources, placement, area = tiles.lay(slot, extents)
            seen = placement.images(images[sources.to(images.device)])
            if slot == 0:
                output = seen
            else:
                there = rows.to(images.device)
                output[there] = torch.where(within(area, seen), seen, output[there])
            counts = [len(batch["boxes"][source]) for source in sources.tolist()]
            fields = [torch.cat([batch[f][s] for s in sources.tolist()]) for f in FIELDS]
            near = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
            near = near.to(images.device)
            boxes, kept = inside(
                placement.boxes(fields[0], near), area.to(images.device)[near], LEAST_SHARE
            )
            split = [torch.split(field, counts) for field in (boxes, *fields[1:])]
            for row, choice, *own in zip(rows.tolist(), torch.split(kept, counts), *split):
                parts[row].append([field[choice] for field in own])
        joined = {
            name: [torch.cat([part[number] for part in row]) for row in parts]
            for number, name in enumerate(FIELDS)
        }
        placed = {**batch, **joined, "image": output}
        if tiles.leaves_extent:
            size = torch.tensor([[height, width]], device=batch["extent"].device)
            placed["extent"] = size.expand(count, 2).clone()
        return placed


class Tiles:
    """Random placements of the images of a batch, and the choice of those in a mosaic."""

    def __init__(
        self, settings: ObjectAugmentSettings, frame: Tensor, rng: BatchRng, count: int
    ) -> None:
        self._settings, self._frame, self._count = settings, frame, count
        mirrored = rng.uniform(4, 2) < 0.5
        mirrored &= torch.tensor([settings.flip_vertical, settings.flip])
        self._sign = 1.0 - 2.0 * mirrored
        self._zoom = rng.uniform(4, 1)
        self._shift = (2 * rng.uniform(2) - 1) * settings.shift
        low, high = MIDDLE
        self._middle = ((low + (high - low) * rng.uniform(2)) * frame).round()
        self._partners = (rng.uniform(3) * count).long()
        self._mosaic = rng.uniform() < settings.mosaic
        self.mosaics = self._mosaic.nonzero()[:, 0]
        self.leaves_extent = bool(settings.zoom or settings.shift or settings.mosaic)

    def lay(self, slot: int, extents: Tensor) -> tuple[Tensor, Tensor, Placement, Tensor]:
        """The rows with this slot, the rows that their images come from, the placements of these,
        and the areas (left, top, right, bottom) in which they are visible. Slots are the quarters
        of a mosaic, row by row; an image that is not in a mosaic has only the first."""
        if slot == 0:
            rows = torch.arange(self._count)
            alone, area = self._alone(extents), torch.cat([0 * self._frame, self._frame.flip(0)])
            placement, quarter = self._quarter(slot, rows, extents)
            several = self._mosaic[:, None]
            placement = Placement(
                torch.where(several, placement.scale, alone.scale),
                torch.where(several, placement.shift, alone.shift),
            )
            return rows, rows, placement, torch.where(several, quarter, area)
        sources = self._partners[self.mosaics, slot - 1]
        return (self.mosaics, sources, *self._quarter(slot, self.mosaics, extents[sources]))

    def _alone(self, extents: Tensor) -> Placement:
        """The placements of images outside a mosaic: zoom about the centre, and shift."""
        zoom = (1 + self._settings.zoom) ** (2 * self._zoom[:, 0] - 1)
        scale = zoom * self._sign[:, 0]
        return Placement(scale, (1 - scale) * extents / 2 + self._shift * extents)

    def _quarter(self, slot: int, rows: Tensor, extents: Tensor) -> tuple[Placement, Tensor]:
        """The placements in a quarter of a mosaic: a corner of the image is at the mosaic's centre.
        Images are reduced to fill their quarter, but not enlarged."""
        second = torch.tensor([slot // 2, slot % 2], dtype=torch.bool)
        middle = self._middle[rows]
        low = torch.where(second, middle, torch.zeros(()))
        high = torch.where(second, self._frame, middle)
        fill = ((high - low) / extents).amax(1, keepdim=True).clamp(max=1)
        zoom = fill * (1 + self._settings.zoom) ** self._zoom[rows, slot]
        start = torch.where(second, middle, middle - zoom * extents)
        sign = self._sign[rows, slot]
        shift = torch.where(sign > 0, start, start + zoom * extents)
        return Placement(zoom * sign, shift), torch.cat([low.flip(1), high.flip(1)], 1)


def within(area: Tensor, images: Tensor) -> Tensor:
    """(B, 1, H, W) bool: the pixels inside `area` (B, 4)."""
    height, width = images.shape[-2:]
    left, top, right, bottom = area.to(images.device).T[:, :, None]
    rows, columns = (torch.arange(n, device=images.device) for n in (height, width))
    tall = (rows >= top) & (rows < bottom)
    wide = (columns >= left) & (columns < right)
    both: Tensor = tall[:, None, :, None] & wide[:, None, None, :]
    return both
