"""Lists of the images of each split beside VOC's masks.

In: the folders of images and masks. Out: the split of each image that is in a list. Must not know
masks.

    ROOT/JPEGImages, ROOT/SegmentationClass, ROOT/ImageSets/Segmentation/train.txt
    ROOT/JPEGImages, ROOT/SegmentationClassContext, ROOT/ImageSets/SegmentationContext/train.txt
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.data.card import Split
from pipelines.data.importers.support.mask_pairs import MaskFolders
from pipelines.data.importers.support.reading import SPLIT_ORDER, read_inside


@dataclass(frozen=True)
class SplitLists:
    """The split of each image by its name without suffix, and the files that say so."""

    splits: dict[str, Split]
    files: tuple[Path, ...]

    def keep_listed(self, folders: MaskFolders) -> MaskFolders:
        """Without the images that are in no list: VOC has many images without a mask."""
        pairs = [pair for pair in folders.pairs if self.split_of(pair[0])]
        alone = [name for name in folders.alone if self.split_of(name)]
        return replace(folders, pairs=pairs, alone=alone)

    def split_of(self, path: str) -> Split | None:
        return self.splits.get(Path(path).stem)


def find_lists(folders: MaskFolders) -> SplitLists | None:
    """The lists for these masks, if there are any. Raises TesseraError for an image in two lists,
    and for a name that has no mask."""
    root = folders.images.parent
    place = root / "ImageSets" / folders.masks.name.replace("Class", "")
    splits: dict[str, Split] = {}
    files = []
    for split in SPLIT_ORDER:
        path = place / f"{split}.txt"
        if not path.is_file():
            continue
        files.append(path)
        for name in read_inside(place, path.name).decode(errors="replace").split():
            if splits.setdefault(name, split) != split:
                raise TesseraError(
                    f"{path}: {name} is in {splits[name]}.txt, too", hint="remove it from one"
                )
    known = {Path(image).stem for image, _ in folders.pairs} | {Path(p).stem for p in folders.alone}
    if missing := [name for name in splits if name not in known]:
        raise TesseraError(
            f"{place} names {missing[0]}, which has no image in {folders.images.name}",
            hint="add the image, or remove its name",
        )
    others = sorted(place.glob("*.txt")) if files else []
    return SplitLists(splits, tuple({*files, *others})) if splits else None
