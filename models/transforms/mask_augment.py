"""Augmentation of images whose objects have masks: as with boxes, and rotations by 90 degrees.

In: batches of uint8 images with boxes and masks. Out: the batch as the network sees it; boxes are
computed from the masks. Must not know any network.

    B images, C channels, H height, W width, N objects of an image
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.core.family import Batch, BatchRng
from models.transforms.geometry import Placement
from models.transforms.object_augment import (
    LEAST_SHARE,
    ObjectAugment,
    ObjectAugmentSettings,
    Tiles,
    within,
)

FIELDS = ("boxes", "labels", "crowd", "masks")


@dataclass(frozen=True)
class MaskAugmentSettings(ObjectAugmentSettings):
    rotate: bool = False
    """Rotate by a random multiple of 90 degrees; images that are not square by 0 or 180 degrees."""

    @property
    def moves_images(self) -> bool:
        return self.rotate or self.moves_without_rotation

    @property
    def moves_without_rotation(self) -> bool:
        """Whether a setting other than `rotate` changes the position or the size of images."""
        return super().moves_images


class MaskAugment(ObjectAugment):
    """The transform. Objects whose masks keep less than a fourth of their pixels are dropped."""

    _settings: MaskAugmentSettings

    def _place(self, batch: Batch, rng: BatchRng) -> Batch:
        if self._settings.rotate:
            batch = _turned(batch, rng.integers(4).tolist())
        return self._lay(batch, rng) if self._settings.moves_without_rotation else batch

    def _lay(self, batch: Batch, rng: BatchRng) -> Batch:
        images: Tensor = batch["image"]
        count, _, height, width = images.shape
        frame = torch.tensor([height, width], dtype=torch.float32)
        tiles = Tiles(self._settings, frame, rng, count)
        output = images
        parts: list[list[tuple[Tensor, ...]]] = [[] for _ in range(count)]
        for slot in range(4 if len(tiles.mosaics) else 1):
            rows, sources, placement, area = tiles.lay(slot, batch["extent"].cpu().float())
            seen = placement.images(images[sources.to(images.device)])
            inside = within(area, seen)
            there = rows.to(images.device)
            output = output.index_copy(0, there, torch.where(inside, seen, output[there]))
            for number, (row, source) in enumerate(zip(rows.tolist(), sources.tolist())):
                masks = _lay_masks(batch["masks"][source], placement, number) * inside[number]
                zoom = float(placement.scale[number].prod().abs())
                before = batch["masks"][source].sum((1, 2)) * zoom
                after = masks.sum((1, 2))
                kept = (after > 0) & (after >= LEAST_SHARE * before)
                others = (batch[name][source][kept] for name in ("labels", "crowd"))
                parts[row].append((boxes_of(masks[kept]), *others, masks[kept]))
        joined = {
            name: [torch.cat([part[field] for part in row]) for row in parts]
            for field, name in enumerate(FIELDS)
        }
        placed = {**batch, **joined, "image": output}
        if tiles.leaves_extent:
            size = torch.tensor([[height, width]], device=batch["extent"].device)
            placed["extent"] = size.expand(count, 2).clone()
        return placed


def _lay_masks(masks: Tensor, placement: Placement, number: int) -> Tensor:
    """uint8 (N, H, W), placed as image `number`, without interpolation. Indexes rows and then
    columns, which for a hundred masks is faster than the grid_sample that images need."""
    for axis in (0, 1):
        pixels = masks.shape[axis + 1]
        centres = torch.arange(pixels) + 0.5
        source = (centres - placement.shift[number, axis]) / placement.scale[number, axis]
        there = (source >= 0) & (source < pixels)
        at = source.floor().long().clamp(0, pixels - 1).to(masks.device)
        shape = (-1, 1) if axis == 0 else (1, -1)
        masks = masks.index_select(axis + 1, at) * there.to(masks).view(shape)
    return masks


def _turned(batch: Batch, quarters: list[int]) -> Batch:
    """Rotates each image, in the upper left corner of its frame, by so many times 90 degrees."""
    images, masks = batch["image"].clone(), []
    sizes = batch["extent"].tolist()
    for image, original, (height, width), quarter in zip(images, batch["masks"], sizes, quarters):
        turns = quarter if height == width else quarter // 2 * 2
        mask = original.clone()
        for pixels in (image, mask):
            pixels[:, :height, :width] = torch.rot90(pixels[:, :height, :width], turns, (1, 2))
        masks.append(mask)
    return {**batch, "image": images, "masks": masks, "boxes": [boxes_of(m) for m in masks]}


def boxes_of(masks: Tensor) -> Tensor:
    """float (N, 4): left, top, right, bottom around the pixels of masks uint8 (N, H, W); zeros for
    an empty mask."""
    sides = []
    for axis in (1, 2):  # columns, then rows
        there = masks.any(axis).bool()  # `any` of uint8 is uint8
        low = there.int().argmax(1)
        high = there.shape[1] - there.flip(1).int().argmax(1)
        sides.append((low, torch.where(there.any(1), high, 0)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], 1).float()
