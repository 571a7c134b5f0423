"""What is done to training images whose objects have masks: as with boxes, and quarter turns.

In: batches of uint8 images with boxes and masks. Out: the batch as the network sees it; boxes are
those of the masks. Must not know any network.

    B images, C channels, H height, W width, N objects of an image
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.core.family import Batch, BatchRng
from models.transforms.geometry import Place
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
    """What is done to training images. `rotate`: turn by 0, 90, 180 or 270 degrees, pictures that
    are not square by 0 or 180. `flip` and `flip_vertical`: mirror every second image. `zoom`: make
    sides up to so much longer or shorter, 0.5 for 1/1.5 to 1.5. `shift`: move by up to so large a
    share of the sides. `mosaic`: share of the images that become four in one. `brightness`,
    `contrast` and `colour`: change by a factor of 1 ± up to so much; `colour` is drawn for each
    channel."""

    rotate: bool = False

    @property
    def places(self) -> bool:
        return self.rotate or self.moves

    @property
    def moves(self) -> bool:
        """Whether something else than a turn may be done."""
        return super().places


class MaskAugment(ObjectAugment):
    """The transform. An object whose mask keeps less than a fourth of its pixels is dropped."""

    _settings: MaskAugmentSettings

    def _place(self, batch: Batch, draws: BatchRng) -> Batch:
        if self._settings.rotate:
            batch = _turned(batch, draws.integers(4).tolist())
        return self._lay(batch, draws) if self._settings.moves else batch

    def _lay(self, batch: Batch, draws: BatchRng) -> Batch:
        images: Tensor = batch["image"]
        count, _, height, width = images.shape
        frame = torch.tensor([height, width], dtype=torch.float32)
        tiles = Tiles(self._settings, frame, draws, count)
        whole = images
        parts: list[list[tuple[Tensor, ...]]] = [[] for _ in range(count)]
        for slot in range(4 if len(tiles.mosaics) else 1):
            rows, sources, place, area = tiles.lay(slot, batch["extent"].cpu().float())
            seen = place.images(images[sources.to(images.device)])
            inside = within(area, seen)
            there = rows.to(images.device)
            whole = whole.index_copy(0, there, torch.where(inside, seen, whole[there]))
            for number, (row, source) in enumerate(zip(rows.tolist(), sources.tolist())):
                masks = _lay_masks(batch["masks"][source], place, number) * inside[number]
                zoom = float(place.scale[number].prod().abs())
                before = batch["masks"][source].sum((1, 2)) * zoom
                after = masks.sum((1, 2))
                kept = (after > 0) & (after >= LEAST_SHARE * before)
                others = (batch[name][source][kept] for name in ("labels", "crowd"))
                parts[row].append((boxes_of(masks[kept]), *others, masks[kept]))
        joined = {
            name: [torch.cat([part[place] for part in row]) for row in parts]
            for place, name in enumerate(FIELDS)
        }
        placed = {**batch, **joined, "image": whole}
        if tiles.leaves_extent:
            size = torch.tensor([[height, width]], device=batch["extent"].device)
            placed["extent"] = size.expand(count, 2).clone()
        return placed


def _lay_masks(masks: Tensor, place: Place, number: int) -> Tensor:
    """uint8 (N, H, W) as image `number` is laid, the nearest pixel taken. Rows and columns are
    taken one after the other, which is quicker for a hundred masks than what images need."""
    for axis in (0, 1):
        pixels = masks.shape[axis + 1]
        middles = torch.arange(pixels) + 0.5
        source = (middles - place.shift[number, axis]) / place.scale[number, axis]
        there = (source >= 0) & (source < pixels)
        at = source.floor().long().clamp(0, pixels - 1).to(masks.device)
        shape = (-1, 1) if axis == 0 else (1, -1)
        masks = masks.index_select(axis + 1, at) * there.to(masks).view(shape)
    return masks


def _turned(batch: Batch, quarters: list[int]) -> Batch:
    """Each picture, which lies in the left upper corner of its frame, turned by so many quarters."""
    images, masks = batch["image"].clone(), []
    sizes = batch["extent"].tolist()
    for image, given, (height, width), quarter in zip(images, batch["masks"], sizes, quarters):
        turns = quarter if height == width else quarter // 2 * 2
        mask = given.clone()
        for pixels in (image, mask):
            pixels[:, :height, :width] = torch.rot90(pixels[:, :height, :width], turns, (1, 2))
        masks.append(mask)
    return {**batch, "image": images, "masks": masks, "boxes": [boxes_of(m) for m in masks]}


def boxes_of(masks: Tensor) -> Tensor:
    """float (N, 4): left, top, right, bottom around the pixels of uint8 (N, H, W); zeros around
    none."""
    sides = []
    for axis in (1, 2):  # columns, then rows
        there = masks.any(axis).bool()  # of uint8 torch makes uint8
        low = there.int().argmax(1)
        high = there.shape[1] - there.flip(1).int().argmax(1)
        sides.append((low, torch.where(there.any(1), high, 0)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], 1).float()
