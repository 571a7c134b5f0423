"""Measures every recipe with three seeds on its data set. Takes hours.

In: a folder with the archives of the data sets, as each `SOURCE.md` describes. Out: what `make
measure` writes, for one recipe after the other. `DATA_SETS` defines how each data set is extracted
and packed; the command is written into the recipe's comment.

    python benchmarks/recipes.py [--data ../shared/data] [--work DIR] [--pack] [NAME…]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipelines.workflows.context import Context

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


@dataclass(frozen=True)
class DataSet:
    """`extract(archives, to)` returns a folder that `tessera pack` can read; `options` are further
    options of the command."""

    extract: Callable[[Path, Path], Path]
    options: tuple[str, ...] = ()


def mnist(archives: Path, to: Path) -> Path:
    return archives / "mnist"


def cifar10(archives: Path, to: Path) -> Path:
    _extract(archives / "cifar10-jpeg/cifar10-jpeg.tar.gz", to)
    return to


def bccd(archives: Path, to: Path) -> Path:
    _extract(archives / "bccd/BCCD.tar", to)
    return to / "BCCD"


def isbi(archives: Path, to: Path) -> Path:
    """The 30 slices in order: 21 for train, 3 for val, the last 6 for test."""
    _extract(archives / "isbi-membrane/membrane.tar", to / "raw")
    for number in range(30):
        split = "train" if number < 21 else "val" if number < 24 else "test"
        for kind in ("image", "label"):
            folder = to / "isbi" / split / kind
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(to / f"raw/membrane/train/{kind}/{number}.png", folder)
    return to / "isbi"


def super_resolution(archives: Path, to: Path) -> Path:
    """68 photos for train, Set5 for test."""
    for archive, split in (("CBSD68", "train"), ("Set5", "test")):
        _extract(archives / f"sr-bsd68-set5/{archive}.tar", to)
        (to / archive).rename(to / split)
    return to


def grocery_fruit(archives: Path, to: Path) -> Path:
    _extract(archives / "grocery-fruit/grocery-fruit.tar", to)
    return to


def nuclei(archives: Path, to: Path) -> Path:
    """170 images for train, from which `pack` takes val; the images of its own val are the test."""
    source = archives / "dsb2018-fluorescence"
    _extract(source / "dsb2018-fluorescence.tar.gz", to)
    for split, name in (("train", "train"), ("val", "test")):
        shutil.copy(source / f"instances_{split}.json", to / f"instances_{name}.json")
    return to


DATA_SETS = {
    "mnist": DataSet(mnist),
    "mnist-unseen": DataSet(mnist, ("--unseen", "7,8,9")),
    "cifar10": DataSet(cifar10),
    "grocery-fruit": DataSet(grocery_fruit),
    "bccd": DataSet(bccd, ("--allow-rejected", "2")),
    "isbi": DataSet(isbi, ("--option", "classes=membrane,cell")),
    "sr-bsd68-set5": DataSet(super_resolution, ("--format", "images")),
    "nuclei": DataSet(nuclei, ("--format", "coco", "--allow-unused", "stage1_train/*/masks/*.png")),
}


def _extract(archive: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(to, filter="data")


RECIPES = {
    "digits": "digits",
    "mnist": "mnist",
    "mnist-rnn": "mnist",
    "mnist-vit": "mnist",
    "mnist-alexnet": "mnist",
    "mnist-vgg": "mnist",
    "mnist-googlenet": "mnist",
    "mnist-densenet": "mnist",
    "mnist-resnet": "mnist",
    "mnist-backbone": "mnist",
    "cifar10": "cifar10",
    "cifar10-airbench": "cifar10",
    "grocery-efficientnet": "grocery-fruit",
    "bccd-yolo": "bccd",
    "nuclei-mask-rcnn": "nuclei",
    "nuclei-faster-rcnn": "nuclei",
    "isbi-unet": "isbi",
    "set5-super-resolution": "sr-bsd68-set5",
    "mnist-autoencoder": "mnist",
    "mnist-dcgan": "mnist",
    "mnist-embedding": "mnist-unseen",
}
"""The data set that each recipe in `jobs/recipes` is measured on."""
JUDGES = {"mnist-dcgan": ("mnist", "mnist-judge")}
"""The recipe of the classifier that judges a recipe's images, and the classifier's name in the
registry: a separate one, because by default classifiers share the name of their data set."""


def principal_components(packed: Path) -> list[str]:
    import references

    metrics = references.pca(str(packed), 32)
    return [f"{metrics['components']} principal components: mse {metrics['mse']:.5f}"]


def before_training(packed: Path) -> list[str]:
    """The Fréchet distance before and after the training with the last seed."""
    import initial_frechet

    metrics = initial_frechet.initial_frechet(f"{packed.name}-generation", str(packed))
    before, after = (metrics[when]["frechet"] for when in ("initial", "trained"))
    return [f"the network before it is trained: frechet {before:.4g}; after, {after:.4g}"]


REFERENCES: dict[str, Callable[[Path], list[str]]] = {
    "mnist-autoencoder": principal_components,
    "mnist-dcgan": before_training,
}
"""Reference values that are written next to a recipe's metrics."""


def prepare(name: str, archives: Path, work: Path) -> tuple[Path, str]:
    """The packed data set, written if it doesn't exist, and the command that packs it."""
    packed = work / "packed" / name
    command = ["tessera", "pack", "SOURCE", "--to", "DIR"]
    source, options = "digits", ["--name", name]
    if name in DATA_SETS:
        options += DATA_SETS[name].options
        if not (packed / "card.json").exists():
            extracted = work / "sources" / name
            if extracted.exists():
                shutil.rmtree(extracted)
            source = str(DATA_SETS[name].extract(archives, extracted))
    if not (packed / "card.json").exists():
        _run("-m", "jobs.pack", source, "--to", str(packed), *options)
    return packed, " ".join([*command, *options])


def _is_registered(model: str) -> bool:
    from pipelines.workflows import services

    return bool(services.open_registry(Context.from_environment()).versions(model))


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)


def measure(recipe: str, archives: Path, work: Path) -> None:
    packed, command = prepare(RECIPES[recipe], archives, work)
    arguments = [recipe, "--data", str(packed), "--packed", command]
    if recipe in JUDGES:
        judge, name = JUDGES[recipe]
        if not _is_registered(name):
            _run("-m", "jobs.train", judge, "--data", str(packed), "--model", name)
    _run(str(ROOT / "benchmarks/measure.py"), *arguments)
    if recipe in REFERENCES:
        results = ROOT / "benchmarks/results/references.json"
        references = json.loads(results.read_text()) if results.exists() else {}
        references[recipe] = REFERENCES[recipe](packed)
        results.write_text(json.dumps(references, indent=1, sort_keys=True) + "\n")
        _run(str(ROOT / "benchmarks/measure.py"), "--readme")


def main() -> None:
    # By default Ray's workers have a low priority (niceness 15).
    os.environ.setdefault("RAY_worker_niceness", "0")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes; by default all")
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared/data",
        metavar="DIR",
        help="folder of the archives",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / ".tessera/recipes",
        metavar="DIR",
        help="folder for extracted and packed data",
    )
    parser.add_argument("--pack", action="store_true", help="only pack the data sets")
    options = parser.parse_args()
    known = [name for name in RECIPES if (ROOT / f"jobs/recipes/{name}.yaml").exists()]
    for name in options.names or known:
        if name not in known:
            parser.error(f"there is no recipe {name!r}: {', '.join(known)}")
        if options.pack:
            print(prepare(RECIPES[name], options.data.resolve(), options.work.resolve())[0])
        else:
            measure(name, options.data.resolve(), options.work.resolve())


if __name__ == "__main__":
    main()
