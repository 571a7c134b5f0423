"""Layouts of data sets with boxes and polygons."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from layouts.base import Layout, picture, text
from layouts.box_files import (
    HEIGHT,
    NAMES,
    WIDTH,
    box,
    cvat_xml,
    kitti_line,
    labelme_json,
    voc_xml,
    write_coco,
    yolo_line,
)

COUNT = 6
CUT = {"train": 4, "val": 1, "test": 1}
"""What becomes of `COUNT` images without splits."""
SPLITS = {"train": 3, "valid": 2, "test": 1}
KEPT = {"train": 3, "val": 2, "test": 1}


def images(folder: Path, path: str, numbers: Iterable[int] = range(COUNT)) -> list[int]:
    """Writes the images `path` with the numbers in place of {}."""
    listed = list(numbers)
    for number in listed:
        picture(folder / path.format(number), number, width=WIDTH, height=HEIGHT)
    return listed


def splits() -> Iterable[tuple[str, list[int]]]:
    first = 0
    for split, count in SPLITS.items():
        yield split, list(range(first, first + count))
        first += count


def in_splits(image: str, label: str, content: Callable[[int], str], folder: Path) -> None:
    """An image and a label file for each number, with the name of the split in place of {split}."""
    for split, numbers in splits():
        for number in numbers:
            images(folder, image.replace("{split}", split), [number])
            text(folder / label.replace("{split}", split).format(number), content(number))


def each(image: str, label: str, content: Callable[[int], str], folder: Path) -> None:
    for number in images(folder, image):
        text(folder / label.format(number), content(number))


def coco_in_splits(image: str, path: str, folder: Path) -> None:
    for split, numbers in splits():
        images(folder, image.replace("{split}", split), numbers)
        names = [f"{number}.jpg" for number in numbers]
        write_coco(folder / path.replace("{split}", split), names)


def coco_layout(image: str, path: str, name: str, folder: Path, **options: Any) -> None:
    images(folder, image)
    write_coco(folder / path, [name.format(number) for number in range(COUNT)], **options)


def coco_official(folder: Path) -> None:
    coco_in_splits("{split}2017/{}.jpg", "annotations/instances_{split}2017.json", folder)
    captions = {"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]}
    text(folder / "annotations" / "captions_train2017.json", json.dumps(captions))


def yolo_lists(folder: Path, settings: dict[str, str]) -> None:
    each("images/{}.jpg", "labels/{}.txt", yolo_line, folder)
    for split, numbers in splits():
        text(folder / f"{split}.txt", "".join(f"./images/{n}.jpg\n" for n in numbers))
    for name, content in settings.items():
        text(folder / name, content)


def yolo_test_without_labels(folder: Path) -> None:
    each("images/train/{}.jpg", "labels/train/{}.txt", yolo_line, folder)
    images(folder, "images/test/{}.jpg", range(20, 24))
    text(folder / "data.yaml", "names: [red, blue]\n")


def cvat_yolo(folder: Path) -> None:
    each("obj_train_data/{}.jpg", "obj_train_data/{}.txt", yolo_line, folder)
    text(folder / "obj.names", "red\nblue\n")
    text(folder / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\n")
    lines = "".join(f"data/obj_train_data/{number}.jpg\n" for number in range(COUNT))
    text(folder / "train.txt", lines)


def darknet_roboflow(folder: Path) -> None:
    in_splits("{split}/{}.jpg", "{split}/{}.txt", yolo_line, folder)
    for split in SPLITS:
        text(folder / split / "_darknet.labels", "red\nblue\n")


def voc_lists(folder: Path) -> None:
    each("JPEGImages/{}.jpg", "Annotations/{}.xml", voc_xml, folder)
    for split, numbers in splits():
        name = "val" if split == "valid" else split
        text(folder / "ImageSets" / "Main" / f"{name}.txt", "".join(f"{n}\n" for n in numbers))


def voc_some_without(folder: Path) -> None:
    each("images/{}.jpg", "annotations/{}.xml", voc_xml, folder)
    images(folder, "images/x{}.jpg", range(20, 24))


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


BOXES: dict[str, Any] = {"task": "detection", "classes": NAMES, "samples": CUT, "objects": COUNT}
MASKS: dict[str, Any] = {**BOXES, "task": "instance_segmentation"}
BY_NAME: dict[str, Any] = {**BOXES, "classes": ("blue", "red")}
YAML = "names: [red, blue]\n"

COCO = [
    Layout(
        "COCO: annotations/instances_train2017.json",
        "COCO 2017, Roboflow",
        coco_official,
        **{**MASKS, "samples": KEPT},
        allow=("captions_*",),
    ),
    Layout(
        "COCO: captions beside the boxes",
        "COCO 2017",
        coco_official,
        refused=r"1 label file.*captions_train2017",
    ),
    Layout(
        "COCO: data/ and labels.json",
        "FiftyOne",
        partial(coco_layout, "data/{}.jpg", "labels.json", "{}.jpg"),
        **MASKS,
    ),
    Layout(
        "COCO: images/ and result.json",
        "Label Studio",
        partial(coco_layout, "images/{}.jpg", "result.json", "images\\{}.jpg", masks=False),
        **BOXES,
    ),
    Layout(
        "COCO: annotations/train.json",
        "Detectron2, PaddleDetection",
        partial(coco_in_splits, "images/{}.jpg", "annotations/{split}.json"),
        **{**MASKS, "samples": KEPT},
    ),
    Layout(
        "COCO: annotation_coco.json in the folders of the splits",
        "MMDetection",
        partial(coco_in_splits, "{split}/{}.jpg", "{split}/annotation_coco.json"),
        **{**MASKS, "samples": KEPT},
    ),
    Layout(
        "COCO: _annotations.coco.json in the folders of the splits",
        "Roboflow",
        partial(coco_in_splits, "{split}/{}.jpg", "{split}/_annotations.coco.json"),
        **{**MASKS, "samples": KEPT},
    ),
    Layout(
        "COCO: file_name is an absolute path of another machine",
        "labelme2coco, scripts",
        partial(coco_layout, "img/{}.jpg", "coco.json", "/home/me/set/img/{}.jpg"),
        **MASKS,
    ),
    Layout(
        "COCO: file_name is an address",
        "Labelbox, V7",
        partial(coco_layout, "photos/{}.jpg", "export.json", "https://host/a/photos/{}.jpg?x=1"),
        **MASKS,
    ),
    Layout(
        "COCO: ids are floats or text",
        "pandas",
        partial(coco_layout, "images/{}.jpg", "annotations/a.json", "{}.jpg", id_type=float),
        **MASKS,
    ),
    Layout(
        "COCO: the JSON states the size as stored of turned photos",
        "annotation on the stored pixels",
        partial(coco_layout, "images/{}.jpg", "a.json", "{}.jpg", turned=True),
        refused="exif=stored",
    ),
    Layout(
        "COCO: boxes on the stored pixels of turned photos",
        "annotation on the stored pixels",
        partial(coco_layout, "images/{}.jpg", "a.json", "{}.jpg", turned=True),
        **MASKS,
        options={"exif": "stored"},
    ),
]
VOC = [
    Layout(
        "VOC: JPEGImages, Annotations, ImageSets",
        "PASCAL VOC, CVAT",
        voc_lists,
        **{**BY_NAME, "samples": KEPT},
    ),
    Layout(
        "VOC: XML beside the images",
        "Roboflow, labelImg",
        partial(in_splits, "{split}/{}.jpg", "{split}/{}.xml", voc_xml),
        **{**BY_NAME, "samples": KEPT},
    ),
    Layout(
        "VOC: images/train and annotations/train",
        "Kaggle",
        partial(in_splits, "images/{split}/{}.jpg", "annotations/{split}/{}.xml", voc_xml),
        **{**BY_NAME, "samples": KEPT},
    ),
    Layout(
        "VOC: images and annotations in each split",
        "Kaggle",
        partial(in_splits, "{split}/images/{}.jpg", "{split}/annotations/{}.xml", voc_xml),
        **{**BY_NAME, "samples": KEPT},
    ),
    Layout(
        "VOC: images without XML",
        "labelImg",
        voc_some_without,
        refused="4 pictures",
    ),
    Layout(
        "VOC: images without XML have no objects",
        "labelImg",
        voc_some_without,
        **{**BY_NAME, "samples": {"train": 8, "val": 1, "test": 1}},
        options={"unlabelled": "empty"},
    ),
]
YOLO = [
    Layout(
        "YOLO: images/train and labels/train",
        "Ultralytics",
        lambda folder: (
            in_splits("images/{split}/{}.jpg", "labels/{split}/{}.txt", yolo_line, folder),
            text(folder / "data.yaml", YAML),
        ),
        **{**BOXES, "samples": KEPT},
    ),
    Layout(
        "YOLO: images and labels in each split",
        "Roboflow",
        lambda folder: (
            in_splits("{split}/images/{}.jpg", "{split}/labels/{}.txt", yolo_line, folder),
            text(folder / "data.yaml", f"train: ../train/images\nval: ../valid/images\n{YAML}"),
        ),
        **{**BOXES, "samples": KEPT},
    ),
    Layout(
        "YOLO: text beside the images, classes.txt",
        "labelImg",
        lambda folder: (
            each("{}.jpg", "{}.txt", yolo_line, folder),
            text(folder / "classes.txt", "red\nblue\n"),
        ),
        **BOXES,
    ),
    Layout(
        "YOLO: images, labels, classes.txt",
        "Label Studio",
        lambda folder: (
            each("images/{}.jpg", "labels/{}.txt", yolo_line, folder),
            text(folder / "classes.txt", "red\nblue\n"),
        ),
        **BOXES,
    ),
    Layout("YOLO: obj_train_data, obj.names, obj.data", "CVAT: YOLO 1.1", cvat_yolo, **BOXES),
    Layout(
        "YOLO: text beside the images, _darknet.labels",
        "Roboflow: Darknet",
        darknet_roboflow,
        **{**BOXES, "samples": KEPT},
    ),
    Layout(
        "YOLO: lists in data.yaml",
        "Ultralytics, CVAT",
        lambda folder: yolo_lists(
            folder,
            {"data.yaml": f"train: train.txt\nval: valid.txt\ntest: test.txt\n{YAML}"},
        ),
        **{**BOXES, "samples": KEPT},
    ),
    Layout(
        "YOLO: train.txt, valid.txt, obj.names",
        "Darknet",
        lambda folder: yolo_lists(folder, {"obj.names": "red\nblue\n"}),
        **{**BOXES, "samples": KEPT},
    ),
    Layout(
        "YOLO: x.jpg.txt",
        "Supervisely, scripts",
        lambda folder: (
            each("images/{}.jpg", "labels/{}.jpg.txt", yolo_line, folder),
            text(folder / "data.yaml", YAML),
        ),
        **BOXES,
    ),
    Layout(
        "YOLO: train and val are one folder",
        "Ultralytics' coco128",
        lambda folder: (
            each("images/train/{}.jpg", "labels/train/{}.txt", yolo_line, folder),
            text(folder / "data.yaml", f"train: images/train\nval: images/train\n{YAML}"),
        ),
        **BOXES,
    ),
    Layout(
        "YOLO: a split without labels",
        "competitions",
        yolo_test_without_labels,
        refused="4 pictures",
    ),
    Layout(
        "YOLO: a split without labels is left out",
        "competitions",
        yolo_test_without_labels,
        **BOXES,
        allow=("images/test/*",),
    ),
    Layout(
        "YOLO: polygons",
        "Ultralytics: segment",
        lambda folder: (
            each("images/{}.jpg", "labels/{}.txt", partial(yolo_line, kind="polygon"), folder),
            text(folder / "data.yaml", YAML),
        ),
        **MASKS,
    ),
    Layout(
        "YOLO: keypoints",
        "Ultralytics: pose",
        lambda folder: (
            each("images/{}.jpg", "labels/{}.txt", partial(yolo_line, kind="pose"), folder),
            text(folder / "data.yaml", f"{YAML}kpt_shape: [2, 3]\n"),
        ),
        refused=r"kpt_shape 2, 3.*task=detection",
    ),
    Layout(
        "YOLO: the boxes of keypoints",
        "Ultralytics: pose",
        lambda folder: (
            each("images/{}.jpg", "labels/{}.txt", partial(yolo_line, kind="pose"), folder),
            text(folder / "data.yaml", f"{YAML}kpt_shape: [2, 3]\n"),
        ),
        **BOXES,
        options={"task": "detection"},
        format="yolo",
    ),
    Layout(
        "YOLO: rotated boxes",
        "Ultralytics: OBB",
        lambda folder: (
            each("images/{}.jpg", "labels/{}.txt", partial(yolo_line, kind="corners"), folder),
            text(folder / "data.yaml", YAML),
        ),
        refused=r"four corners.*task=instance_segmentation.*task=detection",
    ),
]
OTHERS = [
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
LAYOUTS: list[Layout] = [*COCO, *VOC, *YOLO, *OTHERS]
