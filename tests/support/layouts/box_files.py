"""The contents of label files of each format with boxes, for one box in each image.

In: the number of an image. Out: text. The class of an image is that of its number: even or odd.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

WIDTH, HEIGHT = 24, 16
NAMES = ("red", "blue")


def box(number: int) -> tuple[int, int, int, int]:
    """Left, top, width, height."""
    return 2 + number % 5, 1 + number % 3, 8 + number % 4, 6 + number % 2


def corners(number: int) -> list[tuple[int, int]]:
    left, top, width, height = box(number)
    right, bottom = left + width, top + height
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def coco(
    names: Iterable[str], *, masks: bool = True, id_type: Callable[[int], Any] = int
) -> dict[str, Any]:
    images, annotations = [], []
    for number, name in enumerate(names):
        size = {"width": WIDTH, "height": HEIGHT}
        images.append({"id": id_type(number), "file_name": name, **size})
        ring = [side for corner in corners(number) for side in corner]
        annotations.append(
            {
                "id": number + 1,
                "image_id": id_type(number),
                "category_id": number % 2 + 1,
                "bbox": list(box(number)),
                "segmentation": [ring] if masks else [],
                "iscrowd": 0,
            }
        )
    categories = [{"id": at + 1, "name": name} for at, name in enumerate(NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(path: Path, names: list[str], *, turned: bool = False, **options: Any) -> Path:
    """`turned` gives the images an EXIF orientation: the JSON then states the stored size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(coco(names, **options)))
    if turned:
        exif = Image.Exif()
        exif[0x0112] = 6
        for image in path.parent.rglob("*.jpg"):
            with Image.open(image) as opened:
                opened.load()
            opened.save(image, exif=exif)
    return path


def voc_xml(number: int) -> str:
    left, top, width, height = box(number)
    return (
        f"<annotation><filename>{number}.jpg</filename><size><width>{WIDTH}</width>"
        f"<height>{HEIGHT}</height><depth>3</depth></size><object><name>{NAMES[number % 2]}</name>"
        f"<bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{left + width}</xmax>"
        f"<ymax>{top + height}</ymax></bndbox></object></annotation>"
    )


def yolo_line(number: int, kind: str = "box") -> str:
    left, top, width, height = box(number)
    middle = [(left + width / 2) / WIDTH, (top + height / 2) / HEIGHT]
    values = [*middle, width / WIDTH, height / HEIGHT]
    if kind == "pose":
        values += [*middle, 2, left / WIDTH, top / HEIGHT, 1]
    elif kind != "box":
        points = corners(number) + ([] if kind == "corners" else [(left, top + height // 2)])
        values = [side for x, y in points for side in (x / WIDTH, y / HEIGHT)]
    return f"{number % 2} {' '.join(f'{value:.6f}' for value in values)}\n"


def labelme_json(number: int, kind: str = "polygon") -> str:
    points = [list(corner) for corner in corners(number)]
    if kind == "rectangle":
        points = [points[0], points[2]]
    shape = {"label": NAMES[number % 2], "points": points, "group_id": None, "shape_type": kind}
    return json.dumps(
        {
            "version": "5.4.1",
            "flags": {},
            "shapes": [shape],
            "imagePath": f"{number}.jpg",
            "imageData": None,
            "imageHeight": HEIGHT,
            "imageWidth": WIDTH,
        }
    )


def cvat_xml(numbers: Iterable[int], kind: str = "box") -> str:
    labels = "".join(f"<label><name>{name}</name></label>" for name in NAMES)
    rows = ""
    for number in numbers:
        left, top, width, height = box(number)
        name = NAMES[number % 2]
        points = ";".join(f"{x},{y}" for x, y in corners(number))
        shape = {
            "box": f'<box label="{name}" xtl="{left}" ytl="{top}" xbr="{left + width}" '
            f'ybr="{top + height}" z_order="0"></box>',
            "polygon": f'<polygon label="{name}" points="{points}"></polygon>',
            "mask": f'<mask label="{name}" rle="0, {width * height}" left="{left}" top="{top}" '
            f'width="{width}" height="{height}"></mask>',
            "track": "",
        }[kind]
        rows += (
            f'<image id="{number}" name="{number}.jpg" width="{WIDTH}" height="{HEIGHT}">'
            f"{shape}</image>"
        )
    if kind == "track":
        rows = '<track id="0" label="red"><box frame="0" xtl="1" ytl="1" xbr="5" ybr="5"/></track>'
    return (
        f"<?xml version='1.0' encoding='utf-8'?>\n<annotations><version>1.1</version><meta><task>"
        f"<labels>{labels}</labels></task></meta>{rows}</annotations>"
    )


def kitti_line(number: int) -> str:
    left, top, width, height = box(number)
    sides = f"{left}.00 {top}.00 {left + width}.00 {top + height}.00"
    care = "DontCare -1 -1 -10 1.00 1.00 5.00 5.00 -1 -1 -1 -1000 -1000 -1000 -10\n"
    return f"{NAMES[number % 2]} 0.00 0 -1.58 {sides} 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59\n{care}"
