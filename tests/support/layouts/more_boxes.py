"""Layouts of labelme, CVAT, KITTI, Open Images and tables of boxes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from layouts.base import Layout, text
from layouts.box_files import HEIGHT, NAMES, WIDTH, box, cvat_xml, kitti_line, labelme_json
from layouts.box_sets import BOXES, BY_NAME, COUNT, CUT, KEPT, MASKS, each, images, splits


def table(header: str, row: Callable[[int], str], path: str, image: str, folder: Path) -> None:
    images(folder, image)
    text(folder / path, header + "".join(row(number) + "\n" for number in range(COUNT)))


def tensorflow_row(number: int) -> str:
    left, top, width, height = box(number)
    name = NAMES[number % 2]
    return f"{number}.jpg,{WIDTH},{HEIGHT},{name},{left},{top},{left + width},{top + height}"


def retinanet_row(number: int) -> str:
    left, top, width, height = box(number)
    return f"{number}.jpg,{left},{top},{left + width},{top + height},{NAMES[number % 2]}"


def bbox_row(number: int) -> str:
    return f'{number},{WIDTH},{HEIGHT},"{list(map(float, box(number)))}",{NAMES[number % 2]}'


def open_images(folder: Path) -> None:
    header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsGroupOf\n"
    first = 0
    for split, count in {"train": 4, "validation": 2}.items():
        rows = header
        for number in images(folder, f"{split}/{{}}.jpg", range(first, first + count)):
            left, top, width, height = box(number)
            sides = (left / WIDTH, (left + width) / WIDTH, top / HEIGHT, (top + height) / HEIGHT)
            values = ",".join(map(str, sides))
            rows += f"{number},xclick,{('/m/01a', '/m/02b')[number % 2]},1,{values},0,0\n"
        text(folder / f"{split}-annotations-bbox.csv", rows)
        first += count
    text(folder / "class-descriptions-boxable.csv", "/m/01a,red\n/m/02b,blue\n")


def tensorflow_in_splits(folder: Path) -> None:
    header = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
    for split, numbers in splits():
        images(folder, f"{split}/{{}}.jpg", numbers)
        rows = "".join(tensorflow_row(number) + "\n" for number in numbers)
        text(folder / split / "_annotations.csv", header + rows)


def one_file_cvat(folder: Path, shape: str) -> None:
    images(folder, "images/{}.jpg")
    text(folder / "annotations.xml", cvat_xml(range(COUNT), shape))


LAYOUTS = [
    Layout(
        "labelme: polygons",
        "labelme, X-AnyLabeling",
        partial(each, "{}.jpg", "{}.json", labelme_json),
        **{**BY_NAME, "task": "instance_segmentation"},
    ),
    Layout(
        "labelme: rectangles",
        "labelme, X-AnyLabeling",
        partial(each, "images/{}.jpg", "labels/{}.json", partial(labelme_json, kind="rectangle")),
        **BY_NAME,
    ),
    Layout(
        "labelme: rotated boxes",
        "X-AnyLabeling",
        partial(each, "{}.jpg", "{}.json", partial(labelme_json, kind="rotation")),
        refused=r"rotated box.*task=detection",
    ),
    Layout("CVAT for images: boxes", "CVAT", partial(one_file_cvat, shape="box"), **BOXES),
    Layout("CVAT for images: polygons", "CVAT", partial(one_file_cvat, shape="polygon"), **MASKS),
    Layout("CVAT for images: masks", "CVAT", partial(one_file_cvat, shape="mask"), **MASKS),
    Layout(
        "CVAT for video",
        "CVAT",
        partial(one_file_cvat, shape="track"),
        refused="CVAT for video.*export the task",
    ),
    Layout(
        "KITTI: image_2 and label_2",
        "KITTI",
        partial(each, "training/image_2/{}.png", "training/label_2/{}.txt", kitti_line),
        **BY_NAME,
    ),
    Layout(
        "a table of boxes: filename, class, xmin, ymin, xmax, ymax",
        "Roboflow: Tensorflow Object Detection",
        tensorflow_in_splits,
        **{**BY_NAME, "samples": KEPT},
    ),
    Layout(
        "a table of boxes without a header",
        "Roboflow: RetinaNet",
        lambda folder: (
            table("", retinanet_row, "_annotations.csv", "{}.jpg", folder),
            text(folder / "_classes.csv", "red,0\nblue,1\n"),
        ),
        **BY_NAME,
    ),
    Layout(
        "a table of boxes with a column bbox",
        "Kaggle: Global Wheat",
        partial(table, "image_id,width,height,bbox,class\n", bbox_row, "train.csv", "train/{}.jpg"),
        **{**BY_NAME, "samples": CUT},
    ),
    Layout(
        "Open Images: annotations-bbox.csv",
        "Open Images V4 to V7",
        open_images,
        **{**BY_NAME, "samples": {"train": 3, "val": 2, "test": 1}},
    ),
]
