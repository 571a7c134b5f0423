"""Layouts of data sets for classification, and of images without labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layouts.base import CUT, PETS, Layout, json_lines, picture, text


def class_folders(folder: Path, paths: dict[str, int], suffix: str = ".jpg") -> None:
    """Writes the given number of images into each folder."""
    for at, (path, count) in enumerate(paths.items()):
        for number in range(count):
            picture(folder / path / f"{number}{suffix}", 1000 * at + number)


def metadata(folder: Path, value: Callable[[int], dict[str, Any]]) -> Path:
    """Hugging Face's imagefolder with a metadata.jsonl in each split."""
    for at, (split, count) in enumerate({"train": 8, "validation": 2, "test": 2}.items()):
        rows = [{"file_name": f"{n}.jpg", **value(n)} for n in range(count)]
        for n in range(count):
            picture(folder / split / f"{n}.jpg", 10 * at + n)
        json_lines(folder / split / "metadata.jsonl", rows)
    return folder


def objects(folder: Path) -> Path:
    return metadata(
        folder, lambda n: {"objects": {"bbox": [[2, 3, 8, 9.5]], "categories": [n % 2]}}
    )


def parquet(folder: Path, *, objects: bool = False, pairs: bool = False) -> Path:
    """Parquet files as Hugging Face's `push_to_hub` writes them. `pairs` adds a second image."""
    import pyarrow
    from pyarrow import parquet as writer

    for at, (split, count) in enumerate({"train": 8, "validation": 2, "test": 2}.items()):
        files = [picture(folder / f"{n}.png", 10 * at + n) for n in range(count)]
        columns: dict[str, Any] = {
            "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files]
        }
        if pairs:
            columns["mask"] = columns["image"]
        names = {"names": list(PETS), "_type": "ClassLabel"}
        features: dict[str, Any] = {"image": {"_type": "Image"}}
        if objects:
            columns["objects"] = [
                {"bbox": [[2.0, 3.0, 8.0, 9.0]], "category": [n % 2]} for n in range(count)
            ]
            features["objects"] = {"feature": {"bbox": {}, "category": names}}
        else:
            columns["label"] = [n % 2 for n in range(count)]
            features["label"] = names
        for file in files:
            file.unlink()
        table = pyarrow.table(columns).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        writer.write_table(table, path, row_group_size=3)
    return folder


def lfw(folder: Path) -> None:
    for at, name in enumerate(("Aaron_Eckhart", "Zico")):
        for n in range(1, 5):
            picture(folder / "lfw" / name / f"{name}_{n:04d}.jpg", 10 * at + n)
    text(folder / "pairs.txt", "Zico\t1\t2\n")


def imagenet(folder: Path) -> Path:
    """Kaggle's ILSVRC: synset folders, a table for val, and annotations."""
    place = folder / "ILSVRC" / "Data" / "CLS-LOC"
    synsets = ("n01440764", "n01443537")
    for at, synset in enumerate(synsets):
        for n in range(4):
            picture(place / "train" / synset / f"{synset}_{n}.JPEG", 10 * at + n)
    rows = []
    for n in range(2):
        picture(place / "val" / f"ILSVRC2012_val_{n:08d}.JPEG", 50 + n)
        rows.append(f"ILSVRC2012_val_{n:08d},{synsets[n]} 1 1 5 5 \n")
    picture(place / "test" / "ILSVRC2012_test_00000001.JPEG", 60)
    text(folder / "LOC_val_solution.csv", "ImageId,PredictionString\n" + "".join(rows))
    text(folder / "LOC_synset_mapping.txt", "n01440764 crane, bird\nn01443537 crane\n")
    return folder


def dogs_and_cats(folder: Path) -> None:
    class_folders(
        folder,
        {f"{s}_set/{c}": n for s, n in (("training", 4), ("test", 2)) for c in ("cats", "dogs")},
    )


def stems(folder: Path) -> None:
    class_folders(folder, {"cat": 4, "dog": 4})
    picture(folder / "cat" / "0.png", 99)


LAYOUTS = [
    Layout(
        "a folder for each class",
        "torchvision's ImageFolder",
        lambda folder: class_folders(folder, {"cat": 4, "dog": 4}),
        classes=PETS,
        samples=CUT,
    ),
    Layout(
        "class folders in a folder around all",
        "most archives",
        lambda folder: class_folders(folder, {"data/pets/cat": 4, "data/pets/dog": 4}),
        classes=PETS,
        samples=CUT,
    ),
    Layout(
        "class folders in train, val, test",
        "Keras, timm",
        lambda folder: class_folders(
            folder,
            {f"{s}/{c}": 2 for s in ("train", "val", "test") for c in PETS},
        ),
        classes=PETS,
        samples={"train": 4, "val": 4, "test": 4},
    ),
    Layout(
        "class folders in Training and Testing",
        "Kaggle: Brain Tumor MRI",
        lambda folder: class_folders(
            folder, {f"{s}/{c}": 4 for s in ("Training", "Testing") for c in PETS}
        ),
        classes=PETS,
        samples={"train": 6, "val": 2, "test": 8},
    ),
    Layout(
        "class folders in training_set and test_set",
        "Kaggle: Cat and Dog",
        dogs_and_cats,
        classes=("cats", "dogs"),
        samples={"train": 6, "val": 2, "test": 4},
    ),
    Layout(
        "split folders twice: seg_train/seg_train",
        "Kaggle: Intel Image Classification",
        lambda folder: class_folders(
            folder, {f"seg_{s}/seg_{s}/{c}": 4 for s in ("train", "test") for c in PETS}
        ),
        classes=PETS,
        samples={"train": 6, "val": 2, "test": 8},
    ),
    Layout(
        "split folders with another word: flowers-train, flowers-test",
        "many labs",
        lambda folder: class_folders(
            folder, {f"flowers-{s}/{c}": 4 for s in ("train", "test") for c in PETS}
        ),
        classes=PETS,
        samples={"train": 6, "val": 2, "test": 8},
    ),
    Layout(
        "split folders in the class folders",
        "many labs",
        lambda folder: class_folders(
            folder, {f"{c}/{s}": 4 for s in ("train", "test") for c in PETS}
        ),
        classes=PETS,
        samples={"train": 6, "val": 2, "test": 8},
    ),
    Layout(
        "class folders in parts",
        "archives in several files",
        lambda folder: class_folders(folder, {f"part_{p}/{c}": 2 for p in (1, 2) for c in PETS}),
        classes=PETS,
        samples=CUT,
    ),
    Layout(
        "class folders in several levels",
        "iNaturalist, Grocery Store",
        lambda folder: class_folders(folder, {"pet/cat": 4, "pet/dog": 4, "farm/cow": 4}),
        refused=r"which one names the class isn't clear.*class_from=parent.*class_from=leaf",
    ),
    Layout(
        "class folders in several levels: the innermost",
        "iNaturalist, Grocery Store",
        lambda folder: class_folders(folder, {"pet/cat": 4, "pet/dog": 4, "farm/cow": 4}),
        format="image_folder",
        options={"class_from": "leaf"},
        classes=("cat", "cow", "dog"),
        samples={"train": 6, "val": 3, "test": 3},
    ),
    Layout(
        "class folders in several levels: the whole path",
        "iNaturalist, Grocery Store",
        lambda folder: class_folders(folder, {"pet/cat": 4, "pet/dog": 4, "farm/cow": 4}),
        format="image_folder",
        options={"class_from": "path"},
        classes=("farm/cow", "pet/cat", "pet/dog"),
        samples={"train": 6, "val": 3, "test": 3},
    ),
    Layout(
        "class folders with JFIF files",
        "browsers",
        lambda folder: (
            class_folders(folder, {"dog": 4}),
            [picture(folder / "cat" / f"{n}.jfif", 50 + n, form="JPEG") for n in range(4)],
        ),
        classes=PETS,
        samples=CUT,
    ),
    Layout(
        "class folders with PPM files",
        "GTSRB",
        lambda folder: class_folders(folder, {"00000": 4, "00001": 4}, ".ppm"),
        classes=("00000", "00001"),
        samples=CUT,
    ),
    Layout(
        "class folders with a picture that isn't read",
        "Inkscape",
        lambda folder: (
            class_folders(folder, {"cat": 4, "dog": 4}),
            text(folder / "cat" / "x.svg", "<svg/>"),
        ),
        refused=r"1 \.svg in cat \(cat/x\.svg\).*--allow-unused 'cat/\*\.svg'",
    ),
    Layout(
        "two images with one name and two suffixes",
        "converters",
        stems,
        classes=PETS,
        samples={"train": 5, "val": 2, "test": 2},
    ),
    Layout(
        "a folder for each person, with lists of pairs",
        "LFW",
        lfw,
        allow=("*.txt",),
        classes=("Aaron_Eckhart", "Zico"),
        samples=CUT,
    ),
    Layout(
        "synset folders and LOC_val_solution.csv",
        "Kaggle: ImageNet",
        imagenet,
        allow=("*/test/*.JPEG",),
        classes=("n01440764", "n01443537"),
        samples={"train": 6, "val": 2, "test": 2},
    ),
    Layout(
        "synset folders, named by words",
        "Kaggle: ImageNet",
        imagenet,
        format="imagenet",
        options={"names": "words"},
        allow=("*/test/*.JPEG",),
        classes=("crane (n01440764)", "crane (n01443537)"),
        samples={"train": 6, "val": 2, "test": 2},
    ),
    Layout(
        "metadata.jsonl with labels",
        "Hugging Face: imagefolder",
        lambda folder: metadata(folder, lambda n: {"label": PETS[n % 2]}),
        classes=PETS,
        samples={"train": 8, "val": 2, "test": 2},
    ),
    Layout(
        "metadata.jsonl with objects",
        "Hugging Face: imagefolder",
        objects,
        task="detection",
        classes=("0", "1"),
        samples={"train": 8, "val": 2, "test": 2},
        objects=12,
    ),
    Layout(
        "metadata.jsonl with objects, and a label for each image",
        "Hugging Face: imagefolder",
        lambda folder: metadata(
            folder,
            lambda n: {"label": n % 2, "objects": {"bbox": [[2, 3, 8, 9]], "categories": [0]}},
        ),
        refused=r"and also classes .* label.*label_column=objects.*label_column=label",
    ),
    Layout(
        "metadata.jsonl with captions",
        "Hugging Face: imagefolder",
        lambda folder: metadata(folder, lambda n: {"text": f"photo number {n}"}),
        refused=r"no labels: its columns are text.*--format images",
    ),
    Layout(
        "Parquet files with images and labels",
        "Hugging Face: push_to_hub",
        parquet,
        classes=PETS,
        samples={"train": 8, "val": 2, "test": 2},
    ),
    Layout(
        "Parquet files with images and objects",
        "Hugging Face: push_to_hub",
        lambda folder: parquet(folder, objects=True),
        task="detection",
        classes=PETS,
        samples={"train": 8, "val": 2, "test": 2},
        objects=12,
    ),
    Layout(
        "Parquet files with two images in a row",
        "Hugging Face: sets of pairs, or of images and masks",
        lambda folder: parquet(folder, pairs=True),
        refused=r"several columns: image, mask.*image_column=image.*image_column=mask",
    ),
    Layout(
        "Parquet files with two images in a row, of which one is taken",
        "Hugging Face: sets of pairs, or of images and masks",
        lambda folder: parquet(folder, pairs=True),
        format="parquet",
        options={"image_column": "image"},
        classes=PETS,
        samples={"train": 8, "val": 2, "test": 2},
    ),
    Layout(
        "images without labels",
        "DIV2K without its low resolution",
        lambda folder: class_folders(folder, {"train": 8, "valid": 2, "test": 2}),
        task="images",
        samples={"train": 8, "val": 2, "test": 2},
    ),
    Layout(
        "images whose names begin with the class",
        "Kaggle: Dogs vs. Cats",
        lambda folder: [picture(folder / f"{PETS[n % 2]}.{n}.jpg", n) for n in range(8)],
        refused=r"names could have the classes: cat, dog.*class_from=name.*--format images",
    ),
    Layout(
        "images whose names begin with the class, by option",
        "Oxford-IIIT Pets",
        lambda folder: [
            picture(folder / f"{('big_cat', 'dog')[n % 2]}_{n}.jpg", n) for n in range(8)
        ],
        format="image_folder",
        options={"class_from": "name"},
        classes=("big_cat", "dog"),
        samples=CUT,
    ),
    Layout(
        "images with a file of labels that no format reads",
        "tools of one's own",
        lambda folder: class_folders(folder, {"": 8}) or text(folder / "my_labels.json", "{}"),
        refused=r"my_labels\.json, which no .* labels.*--format images --allow-unused '\*\.json'",
    ),
    Layout(
        "images with labels for MATLAB",
        "Oxford Flowers, Stanford Cars",
        lambda folder: class_folders(folder, {"jpg": 8}) or text(folder / "labels.mat", "MATLAB"),
        refused=r"labels\.mat, which no format recognises as labels",
    ),
]
