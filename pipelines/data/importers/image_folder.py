"""A folder for each class: SOURCE/CLASS/…/IMAGE.jpg, or SOURCE/train/CLASS/…, SOURCE/test/CLASS/….

In: a folder. Out: a `Source` for classification. Classes are the names of the class folders in the
order of their characters, as torchvision's `ImageFolder` has them. Hidden files are passed over;
files that aren't named like images are passed over and counted.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.data.card import Split
from pipelines.data.importing import IMAGE_SUFFIXES, Item, Source, find_images
from pipelines.data.samples import make_key

NAME = "image_folder"
_SPLITS: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_MAX_FILE_BYTES = 256 << 20


def recognises(source: str) -> str:
    folder = Path(source)
    if not folder.is_dir():
        return ""
    splits = _find_splits(folder)
    names = {p.name for part in splits.values() for p in _folders(part) if _has_images(p)}
    if not names:
        return ""
    where = f" in {', '.join(part.name for part in splits.values())}" if None not in splits else ""
    return f"{len(names)} class folders{where}"


def read(source: str) -> Source:
    """Lists the files; images are read one at a time by `load`."""
    folder = Path(source)
    if not folder.is_dir():
        raise TesseraError(f"there is no folder {source}")
    splits = _find_splits(folder)
    places = [(split, place) for split, part in splits.items() for place in _folders(part)]
    classes = tuple(sorted({_check_name(place) for _, place in places}))
    numbers = {name: number for number, name in enumerate(classes)}
    items: list[Item] = []
    empty: list[str] = []
    for split, place in places:
        found = [path.relative_to(folder) for path in find_images(place)]
        if not found:
            empty.append(str(place.relative_to(folder)))
        items += [
            Item(make_key(str(path.with_suffix(""))), numbers[place.name], str(path), split)
            for path in found
        ]
    if not items:
        raise TesseraError(
            f"{source} has no images in class folders", mend="it must be SOURCE/CLASS/IMAGE.jpg"
        )
    if empty:
        raise TesseraError(
            f"{source}: {len(empty)} class folders hold no image: {', '.join(empty[:5])}"
            if len(empty) > 1
            else f"{source}: the class folder {empty[0]} holds no image",
            mend="add images or remove the folder",
        )
    name = folder.resolve().name
    notes = _describe_others(folder, splits, len(items))
    return Source(name, "classification", classes, items, partial(_load, folder), notes)


def _load(folder: Path, item: Item) -> bytes:
    path = folder / item.origin
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise TesseraError(f"{item.origin} is larger than {_MAX_FILE_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise TesseraError(f"{item.origin} can't be read: {error.strerror}") from None


def _find_splits(folder: Path) -> dict[Split | None, Path]:
    """The split folders, or {None: folder} where the class folders lie in `folder` itself."""
    found: dict[Split | None, Path] = {}
    for place in _folders(folder):
        split = _SPLITS.get(place.name.lower())
        if split is None:
            continue
        if split in found:
            raise TesseraError(
                f"{folder} has two folders for {split}: {found[split].name} and {place.name}",
                mend="put them together",
            )
        found[split] = place
    # A class may be called "test"; only with class folders in a `train` are they splits.
    if "train" in found and _folders(found["train"]):
        return found
    return {None: folder}


def _folders(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX"))
    )


def _has_images(folder: Path) -> bool:
    return next(find_images(folder), None) is not None


def _check_name(place: Path) -> str:
    if not place.name.isprintable():  # also names that are not UTF-8
        raise TesseraError(f"the class folder {place.name!r} has a name that can't be printed")
    return place.name


def _describe_others(folder: Path, splits: dict[Split | None, Path], taken: int) -> tuple[str, ...]:
    """Refuses images that lie outside of the class folders; counts files that are no images."""
    parts = set(splits.values())
    for path in find_images(folder):
        relative = path.relative_to(folder)
        depth = 2 if None in splits else 3
        if len(relative.parts) < depth or (
            None not in splits and folder / relative.parts[0] not in parts
        ):
            raise TesseraError(
                f"{folder}: {relative} lies in no class folder",
                mend="move it to a class folder, or out of the source",
            )
    others = sum(
        1
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix.lower() not in IMAGE_SUFFIXES
        and not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)
    )
    return (f"{others} files are not named like images and are left out",) if others else ()
