"""Layouts of data sets whose labels are in tables."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from layouts.base import CUT, PETS, Layout, picture, text


def table(
    folder: Path,
    name: str = "labels.csv",
    *,
    header: str = "path,label",
    row: str = "{n}.jpg,{label}",
    images: str = "{n}.jpg",
    encoding: str = "utf-8",
    end: str = "\n",
) -> None:
    """Writes four images of each class, and a table that names them."""
    rows = [header]
    for n in range(8):
        label = PETS[n % 2]
        values = {
            "n": n,
            "label": label,
            "folder": folder.resolve(),
            "part": n % 2 + 1,
            "flag": int(n < 6),
            "phase": "train" if n < 6 else "valid",
        }
        picture(folder / images.format(**values), n)
        rows.append(row.format(**values))
    text(folder / name, end.join(rows) + end, encoding)


def split_tables(folder: Path) -> None:
    for at, (split, count) in enumerate({"train": 4, "valid": 2, "test": 2}.items()):
        rows = ["filename,cat,dog"]
        for n in range(count):
            picture(folder / split / f"{n}.jpg", 10 * at + n)
            rows.append(f"{n}.jpg,{1 - n % 2},{n % 2}")
        text(folder / split / "_classes.csv", "\n".join(rows) + "\n")


def decomposed(folder: Path) -> None:
    """File names as macOS writes them, a table as an editor does."""
    rows = ["path,label"]
    for n in range(8):
        name = unicodedata.normalize("NFD", f"café{n}.jpg")
        picture(folder / name, n)
        rows.append(f"café{n}.jpg,{PETS[n % 2]}")
    text(folder / "labels.csv", "\n".join(rows))


LAYOUTS = [
    Layout("a table of paths and labels", "pandas", table, classes=PETS, samples=CUT),
    Layout(
        "a table with semicolons, CRLF and a byte order mark",
        "Excel in Europe",
        lambda folder: table(
            folder,
            header="path;label;score",
            row="{n}.jpg;{label};0,5",
            encoding="utf-8-sig",
            end="\r\n",
        ),
        classes=PETS,
        samples=CUT,
    ),
    Layout(
        "a table in UTF-16 with tabs",
        "Excel: Unicode text",
        lambda folder: table(
            folder, header="path\tlabel", row="{n}.jpg\t{label}", encoding="utf-16"
        ),
        classes=PETS,
        samples=CUT,
    ),
    Layout(
        "a table without a header",
        "AutoML Vision",
        lambda folder: (
            table(folder, header="0.jpg,cat", row="{n}.jpg,{label}", end="\n")
            or text(folder / "labels.csv", "".join(f"{n}.jpg,{PETS[n % 2]}\n" for n in range(8)))
        ),
        classes=PETS,
        samples=CUT,
    ),
    Layout(
        "a table of ids without suffix, images in train/",
        "Kaggle competitions",
        lambda folder: table(
            folder, "train.csv", header="id,label", row="{n},{label}", images="train/{n}.jpg"
        ),
        classes=PETS,
        samples=CUT,
    ),
    Layout(
        "a table of ids, images in several parts",
        "HAM10000",
        lambda folder: table(
            folder,
            "HAM10000_metadata.csv",
            header="lesion_id,image_id,dx,age",
            row="HAM_{n},ISIC_{n},{label},50",
            images="HAM10000_images_part_{part}/ISIC_{n}.jpg",
        ),
        classes=PETS,
        samples=CUT,
    ),
    Layout(
        "a table with several columns that could be labels",
        "HAM10000",
        lambda folder: table(
            folder,
            header="image_id,dx,sex",
            row="{n},{label},{part}",
            images="part_{part}/{n}.jpg",
        ),
        refused="labels in one of several: dx, sex.*label_column=dx",
    ),
    Layout(
        "a table with a column for each class",
        "ISIC 2018",
        lambda folder: (
            table(
                folder,
                header="image,cat,dog",
                row="{n},{part}.0,{part}.0",
                images="images/{n}.jpg",
            )
            or text(
                folder / "labels.csv",
                "image,cat,dog\n" + "".join(f"{n},{1 - n % 2}.0,{n % 2}.0\n" for n in range(8)),
            )
        ),
        classes=PETS,
        samples=CUT,
    ),
    Layout(
        "a table in each split with a column for each class",
        "Roboflow: Multi-Label Classification",
        split_tables,
        classes=PETS,
        samples={"train": 4, "val": 2, "test": 2},
    ),
    Layout(
        "a table with several labels in a cell",
        "Kaggle: Plant Pathology",
        lambda folder: (
            table(folder)
            or text(
                folder / "labels.csv",
                "path,label\n"
                + "".join(f"{n}.jpg,{('cat', 'dog', 'cat dog')[n % 3]}\n" for n in range(8)),
            )
        ),
        refused="'cat dog' is several labels with ' ' between them",
    ),
    Layout(
        "a table of absolute paths in the source",
        "fastai, scripts",
        lambda folder: table(folder, row="{folder}/{n}.jpg,{label}"),
        classes=PETS,
        samples=CUT,
    ),
    Layout(
        "a table of paths on another machine",
        "scripts on Windows",
        lambda folder: table(
            folder, row="C:\\Users\\me\\pets\\photos\\{n}.jpg,{label}", images="photos/{n}.jpg"
        ),
        classes=PETS,
        samples=CUT,
    ),
    Layout(
        "a table of URLs, the images beside it",
        "Label Studio, Labelbox",
        lambda folder: table(folder, row="https://host/a/{n}.jpg?v=1,{label}"),
        classes=PETS,
        samples=CUT,
    ),
    Layout(
        "a table with a column of splits of any name",
        "pandas, scripts",
        lambda folder: table(folder, header="path,label,phase", row="{n}.jpg,{label},{phase}"),
        classes=PETS,
        samples={"train": 4, "val": 2, "test": 2},
    ),
    Layout(
        "a table with a column is_train of 1 and 0",
        "CUB-200-2011, scripts",
        lambda folder: table(folder, header="path,label,is_train", row="{n}.jpg,{label},{flag}"),
        refused=r"is_train of 1 and 0.*split_column=is_train.*split_column=",
    ),
    Layout(
        "a table with a column is_train, which is used",
        "CUB-200-2011, scripts",
        lambda folder: table(folder, header="path,label,is_train", row="{n}.jpg,{label},{flag}"),
        format="csv",
        options={"split_column": "is_train"},
        classes=PETS,
        samples={"train": 4, "val": 2, "test": 2},
    ),
    Layout(
        "a table and files with accents in two forms",
        "macOS",
        decomposed,
        classes=PETS,
        samples=CUT,
    ),
    Layout(
        "metadata.csv with labels",
        "Hugging Face: imagefolder",
        lambda folder: table(
            folder, "train/metadata.csv", header="file_name,label", images="train/{n}.jpg"
        ),
        classes=PETS,
        samples=CUT,
    ),
]
