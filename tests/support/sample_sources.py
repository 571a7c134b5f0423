"""Small sources of every format that has a folder, for the importers' tests.

In: a folder. Out: files in it, in the official layout of the format. Pixels are seeded noise.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 24, 32
DATA = Path(__file__).parents[2].parent / "shared" / "data"


def noise(seed: int, height: int = HEIGHT, width: int = WIDTH, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def image(path: Path, seed: int = 0) -> Path:
    return save(path, noise(seed))


def coco(
    folder: Path, *, splits: tuple[str, ...] = ("train2017", "val2017"), count: int = 3
) -> Path:
    """One folder of images per split, with polygons, run lengths of both forms, and a crowd."""
    for at, split in enumerate(splits):
        images, annotations = [], []
        for number in range(count):
            name = f"{number:06d}.jpg"
            image(folder / split / name, 100 * at + number)
            images.append({"id": number + 7, "file_name": name, "height": HEIGHT, "width": WIDTH})
            for kind, segmentation in enumerate(segmentations()):
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": number + 7,
                        "category_id": (3, 18, 90)[kind % 3],
                        "bbox": [2, 3, 10.5, 12.25],
                        "area": 10,
                        "iscrowd": int(kind == 1),
                        "segmentation": segmentation,
                    }
                )
        categories = [{"id": i, "name": n} for i, n in ((90, "cat"), (3, "dog"), (18, "emu"))]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path = folder / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def segmentations() -> list[Any]:
    """One polygon, run lengths as numbers, as text, and two polygons."""
    from pycocotools import mask

    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[3:15, 2:12] = 1
    text = mask.encode(np.asfortranarray(pixels))["counts"].decode()
    counts = [2 * HEIGHT + 3, *[12, 12] * 9, 12]
    counts.append(HEIGHT * WIDTH - sum(counts))
    return [
        [[2, 3, 12.5, 3.25, 11, 15.25]],
        {"size": [HEIGHT, WIDTH], "counts": counts},
        {"size": [HEIGHT, WIDTH], "counts": text},
        [[2, 3, 6, 3, 6, 8, 2, 8], [8.5, 10, 12, 10, 10, 15]],
    ]


def voc(folder: Path, *, count: int = 4) -> Path:
    """Half of the images in train, a quarter each in val and test."""
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for number in range(count):
        name = f"2007_{number:06d}"
        image(folder / "JPEGImages" / f"{name}.jpg", number)
        (folder / "Annotations").mkdir(exist_ok=True)
        text = voc_xml([("dog", (1, 1, WIDTH, HEIGHT), 0), ("cat", (3, 4, 9, 12), number % 2)])
        (folder / "Annotations" / f"{name}.xml").write_text(text)
        lists[("train", "val", "train", "test")[number % 4]].append(name)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    lists["trainval"] = [*lists["train"], *lists["val"]]
    for split, names in lists.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return folder


def voc_xml(
    objects: list[tuple[str, tuple[Any, ...], int]], size: tuple[Any, Any] = (HEIGHT, WIDTH)
) -> str:
    rows = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin>"
        f"<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for name, box, difficult in objects
    )
    return (
        f"<annotation><filename>x.jpg</filename><path>/home/pi/x.jpg</path><size><width>{size[1]}"
        f"</width><height>{size[0]}</height><depth>3</depth></size>{rows}</annotation>"
    )


def yolo(folder: Path, *, polygons: bool = False, splits_first: bool = False) -> Path:
    """Three images per split, the last of each without objects."""
    line = "1 0.25 0.25 0.75 0.25 0.5 0.75" if polygons else "1 0.5 0.5 0.25 0.5"
    for at, split in enumerate(("train", "val")):
        for number in range(3):
            path = f"{split}/{{}}" if splits_first else f"{{}}/{split}"
            image(folder / path.format("images") / f"{number}.jpg", 10 * at + number)
            text = folder / path.format("labels") / f"{number}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            if number < 2:
                text.write_text(f"{line}\n{line.replace('1', '0', 1)}\n")
    (folder / "data.yaml").write_text("path: ../elsewhere\ntrain: /etc\nnc: 2\nnames: [no, yes]\n")
    return folder


def masks(folder: Path, *, values: tuple[int, ...] = (0, 255), count: int = 3) -> Path:
    for number in range(count):
        image(folder / "images" / f"{number}.jpg", number)
        pixels = np.array(values, np.uint8)[noise(number, channels=1) % len(values)]
        save(folder / "masks" / f"{number}.png", pixels)
    return folder


def instance_masks(folder: Path, *, count: int = 3, objects: int = 2) -> Path:
    for number in range(count):
        image(folder / f"id{number}" / "images" / f"id{number}.png", number)
        for at in range(objects):
            pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
            pixels[2 + at : 8 + at, 3 : 10 + number] = 255
            save(folder / f"id{number}" / "masks" / f"m{at}.png", pixels)
    return folder


def table(folder: Path) -> Path:
    rows = ["Path,Label,Split"]
    for number in range(6):
        image(folder / "photos" / f"{number}.jpg", number)
        split = ("train", "valid", "")[number % 3]
        rows.append(f"photos/{number}.jpg,{('cat', 'dog')[number % 2]},{split}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(
    folder: Path, counts: dict[str, int], *, packed: bool = True, dot: str = "-"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate(counts.items()):
        pixels = np.random.default_rng(seed).integers(0, 256, (count, 5, 4), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images", pixels), ("labels", labels)):
            name = f"{split}-{kind}{dot}idx{array.ndim}-ubyte"
            data = idx(array)
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(data, mtime=0))
            else:
                (folder / name).write_bytes(data)
    return folder


def medmnist(folder: Path, name: str = "pathmnist", **other: np.ndarray) -> Path:
    arrays: dict[str, np.ndarray] = {}
    for at, (split, count) in enumerate({"train": 12, "val": 4, "test": 5}.items()):
        random = np.random.default_rng(at)
        arrays[f"{split}_images"] = random.integers(0, 256, (count, 28, 28, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count, dtype=np.uint8) % 4)[:, None]
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{name}.npz", **{**arrays, **other})
    return folder


CIFAR_NAMES = [f"class{number}" for number in range(10)]


def cifar_rows(seed: int, count: int = 6) -> tuple[np.ndarray, list[int]]:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
    return pixels, random.integers(0, 10, count).tolist()


def cifar_python(folder: Path, protocol: int = 2) -> Path:
    """A batch in the official format: by Python 3 with protocol 2, or `python2_pickle` for 0."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for seed, name in enumerate(names):
        pixels, labels = cifar_rows(seed)
        if protocol:
            batch = {b"batch_label": b"one", b"labels": labels, b"data": pixels}
            (folder / name).write_bytes(pickle.dumps(batch, protocol))
        else:
            (folder / name).write_bytes(python2_pickle(pixels, labels))
    (folder / "batches.meta").write_bytes(
        pickle.dumps({"label_names": CIFAR_NAMES, "num_vis": 3072}, protocol or 2)
    )
    return folder


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """The output of Python 2's cPickle with protocol 2, as in the official batches."""

    def text(value: bytes) -> bytes:
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + struct.pack("<i", len(value)) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85"
        + text(b"b")
        + b"\x87Rq\x03(K\x01"
        + b"M"
        + struct.pack("<H", len(pixels))
        + b"M"
        + struct.pack("<H", pixels.shape[1])
        + b"\x86cnumpy\ndtype\nq\x04"
        + text(b"u1")
        + b"K\x00K\x01\x87Rq\x05(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + text(pixels.tobytes())
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}q\x00(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def cifar_binary(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    for seed, name in enumerate(names):
        pixels, labels = cifar_rows(seed)
        rows = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)
        (folder / name).write_bytes(rows.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR_NAMES) + "\n\n")
    return folder


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()
