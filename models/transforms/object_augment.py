"""What is done to training images with objects, and the normalisation.

In: batches of uint8 images with boxes. Out: the batch as the network sees it, boxes where the image
has them. Works on whole batches, on the device that they are on. Must not know any network.

    B images, C channels, H height, W width, N objects of an image
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.core.errors import UsageError
from models.core.family import Batch, BatchRng, DataSpec
from models.transforms.geometry import Place, inside

LEAST_SHARE = 0.25
"""An object of which less is left after zoom, shift and mosaic is dropped."""
MIDDLE = (0.3, 0.7)
"""Where the four images of a mosaic may meet, as a share of the sides."""
FIELDS = ("boxes", "labels", "crowd")


@dataclass(frozen=True)
class ObjectAugmentSettings:
    """What is done to training images. `flip` and `flip_vertical`: mirror every second image.
    `zoom`: make sides up to so much longer or shorter, 0.5 for 1/1.5 to 1.5. `shift`: move by up to
    so large a share of the sides. `mosaic`: share of the images that become four in one.
    `brightness`, `contrast` and `colour`: change by a factor of 1 ± up to so much; `colour` is drawn
    for each channel."""

    flip: bool = False
    flip_vertical: bool = False
    zoom: float = 0.0
    shift: float = 0.0
    mosaic: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    colour: float = 0.0

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
    def places(self) -> bool:
        """Whether an image may come to lie otherwise."""
        return bool(self.flip or self.flip_vertical or self.zoom or self.shift or self.mosaic)


class ObjectAugment:
    """The transform: images and boxes are placed, then the light is changed, then the pixels are
    normalised."""

    def __init__(self, settings: ObjectAugmentSettings, data: DataSpec) -> None:
        self._settings = settings
        self._mean = torch.tensor(data.mean)[:, None, None] * 255
        self._std = torch.tensor(data.std)[:, None, None] * 255

    def __call__(self, batch: Batch, draws: BatchRng) -> Batch:
        batch = {**batch, "image": batch["image"].float()}
        if self._settings.places and "boxes" in batch:
            batch = self._place(batch, draws)
        batch["image"] = self._light(batch["image"], draws)
        self._mean = self._mean.to(batch["image"].device)
        self._std = self._std.to(batch["image"].device)
        batch["image"] = (batch["image"] - self._mean) / self._std
        return batch

    def _light(self, images: Tensor, draws: BatchRng) -> Tensor:
        settings, changed = self._settings, False
        for amount, shape in (
            (settings.brightness, (1, 1, 1)),
            (settings.colour, (images.shape[1], 1, 1)),
        ):
            if amount:
                factor = 1 + amount * (2 * draws.uniform(*shape) - 1)
                images, changed = images * factor.to(images.device, non_blocking=True), True
        if settings.contrast:
            factor = 1 + settings.contrast * (2 * draws.uniform(1, 1, 1) - 1)
            grey = images.mean((1, 2, 3), keepdim=True)
            factor = factor.to(images.device, non_blocking=True)
            images, changed = (images - grey) * factor + grey, True
        return images.clamp(0, 255) if changed else images

    def _place(self, batch: Batch, draws: BatchRng) -> Batch:
        images: Tensor = batch["image"]
        count, _, height, width = images.shape
        frame = torch.tensor([height, width], dtype=torch.float32)
        extents = batch["extent"].cpu().float()
        tiles = Tiles(self._settings, frame, draws, count)
        whole = images
        parts: list[list[list[Tensor]]] = [[] for _ in range(count)]
        for slot in range(4 if len(tiles.mosaics) else 1):
            rows, sources, place, area = tiles.lay(slot, extents)
            seen = place.images(images[sources.to(images.device)])
            if slot == 0:
                whole = seen
            else:
                there = rows.to(images.device)
                whole[there] = torch.where(within(area, seen), seen, whole[there])
            counts = [len(batch["boxes"][source]) for source in sources.tolist()]
            fields = [torch.cat([batch[f][s] for s in sources.tolist()]) for f in FIELDS]
            near = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
            near = near.to(images.device)
            boxes, kept = inside(
                place.boxes(fields[0], near), area.to(images.device)[near], LEAST_SHARE
            )
            split = [torch.split(field, counts) for field in (boxes, *fields[1:])]
            for row, choice, *own in zip(rows.tolist(), torch.split(kept, counts), *split):
                parts[row].append([field[choice] for field in own])
        joined = {
            name: [torch.cat([part[number] for part in row]) for row in parts]
            for number, name in enumerate(FIELDS)
        }
        placed = {**batch, **joined, "image": whole}
        if tiles.leaves_extent:
            size = torch.tensor([[height, width]], device=batch["extent"].device)
            placed["extent"] = size.expand(count, 2).clone()
        return placed


class Tiles:
    """Draws how the images of a batch are laid, and which lie in a mosaic."""

    def __init__(
        self, settings: ObjectAugmentSettings, frame: Tensor, draws: BatchRng, count: int
    ) -> None:
        self._settings, self._frame, self._count = settings, frame, count
        mirrored = draws.uniform(4, 2) < 0.5
        mirrored &= torch.tensor([settings.flip_vertical, settings.flip])
        self._sign = 1.0 - 2.0 * mirrored
        self._zoom = draws.uniform(4, 1)
        self._shift = (2 * draws.uniform(2) - 1) * settings.shift
        low, high = MIDDLE
        self._middle = ((low + (high - low) * draws.uniform(2)) * frame).round()
        self._partners = (draws.uniform(3) * count).long()
        self._mosaic = draws.uniform() < settings.mosaic
        self.mosaics = self._mosaic.nonzero()[:, 0]
        self.leaves_extent = bool(settings.zoom or settings.shift or settings.mosaic)

    def lay(self, slot: int, extents: Tensor) -> tuple[Tensor, Tensor, Place, Tensor]:
        """The rows that have this slot, the rows their images come from, where these lie, and of
        which part of the frame (left, top, right, bottom) they are seen in. Slots are the quarters
        of a mosaic, line by line; an image by itself lies in the first."""
        if slot == 0:
            rows = torch.arange(self._count)
            alone, area = self._alone(extents), torch.cat([0 * self._frame, self._frame.flip(0)])
            place, quarter = self._quarter(slot, rows, extents)
            several = self._mosaic[:, None]
            place = Place(
                torch.where(several, place.scale, alone.scale),
                torch.where(several, place.shift, alone.shift),
            )
            return rows, rows, place, torch.where(several, quarter, area)
        sources = self._partners[self.mosaics, slot - 1]
        return (self.mosaics, sources, *self._quarter(slot, self.mosaics, extents[sources]))

    def _alone(self, extents: Tensor) -> Place:
        """About the middle of the picture."""
        zoom = (1 + self._settings.zoom) ** (2 * self._zoom[:, 0] - 1)
        scale = zoom * self._sign[:, 0]
        return Place(scale, (1 - scale) * extents / 2 + self._shift * extents)

    def _quarter(self, slot: int, rows: Tensor, extents: Tensor) -> tuple[Place, Tensor]:
        """A corner of the picture at the mosaic's middle; it fills its quarter if it needn't be
        enlarged for that."""
        second = torch.tensor([slot // 2, slot % 2], dtype=torch.bool)
        middle = self._middle[rows]
        low = torch.where(second, middle, torch.zeros(()))
        high = torch.where(second, self._frame, middle)
        fill = ((high - low) / extents).amax(1, keepdim=True).clamp(max=1)
        zoom = fill * (1 + self._settings.zoom) ** self._zoom[rows, slot]
        start = torch.where(second, middle, middle - zoom * extents)
        sign = self._sign[rows, slot]
        shift = torch.where(sign > 0, start, start + zoom * extents)
        return Place(zoom * sign, shift), torch.cat([low.flip(1), high.flip(1)], 1)


def within(area: Tensor, images: Tensor) -> Tensor:
    """(B, 1, H, W) bool: the pixels inside of `area` (B, 4)."""
    height, width = images.shape[-2:]
    left, top, right, bottom = area.to(images.device).T[:, :, None]
    rows, columns = (torch.arange(n, device=images.device) for n in (height, width))
    tall = (rows >= top) & (rows < bottom)
    wide = (columns >= left) & (columns < right)
    both: Tensor = tall[:, None, :, None] & wide[:, None, None, :]
    return both
