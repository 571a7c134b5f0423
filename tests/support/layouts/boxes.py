"""Layouts of data sets with boxes and polygons. `more_boxes.py` has the less usual formats."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from layouts import more_boxes
from layouts.base import Layout, text
from layouts.box_files import voc_xml, write_coco, yolo_line
from layouts.box_sets import (
    BOXES,
    BY_NAME,
    COUNT,
    KEPT,
    MASKS,
    SPLITS,
    each,
    images,
    in_splits,
    splits,
)


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


def coco_keypoints(folder: Path) -> None:
    """A file for poses, as COCO's and CVAT's: objects have boxes, masks and keypoints."""
    images(folder, "images/{}.jpg")
    path = write_coco(
        folder / "annotations" / "person_keypoints_default.json",
        [f"{number}.jpg" for number in range(COUNT)],
    )
    content = json.loads(path.read_text())
    for row in content["annotations"]:
        row |= {"keypoints": [4, 4, 2, 6, 5, 1], "num_keypoints": 2}
    text(path, json.dumps(content))


def voc_polygons(folder: Path) -> None:
    ring = "<polygon><x1>3</x1><y1>3</y1><x2>9</x2><y2>3</y2><x3>9</x3><y3>7</y3></polygon>"
    each("{}.jpg", "{}.xml", lambda n: voc_xml(n).replace("<bndbox>", f"{ring}<bndbox>"), folder)


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
        "COCO: keypoints",
        "COCO 2017, CVAT",
        coco_keypoints,
        refused=r"6 of 6 objects .* keypoints.*task=instance_segmentation.*task=detection",
    ),
    Layout(
        "COCO: the boxes of keypoints",
        "COCO 2017, CVAT",
        coco_keypoints,
        **BOXES,
        format="coco",
        options={"task": "detection"},
    ),
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
        "VOC: polygons beside the boxes",
        "Roboflow, RectLabel",
        voc_polygons,
        refused=r"polygons, .*export the set as COCO.*task=detection",
    ),
    Layout(
        "VOC: the boxes of objects with polygons",
        "Roboflow, RectLabel",
        voc_polygons,
        **BY_NAME,
        options={"task": "detection"},
    ),
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
LAYOUTS: list[Layout] = [*COCO, *VOC, *YOLO, *more_boxes.LAYOUTS]
