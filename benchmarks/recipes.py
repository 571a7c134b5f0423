"""Every measured recipe, trained with three seeds on the data set it is for: hours.

In: the data sets' archives in a folder, as `SOURCE.md` beside each tells. Out: what `make measure`
writes, for one recipe after the other. The table below says how each data set is laid out and
packed; the command goes into the recipe's comment.

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
    """`lay_out` makes a folder that `tessera pack` reads, of the archives in a folder; `words` are
    the further words of the command."""

    lay_out: Callable[[Path, Path], Path]
    words: tuple[str, ...] = ()


def mnist(archives: Path, to: Path) -> Path:
    return archives / "mnist"


def cifar10(archives: Path, to: Path) -> Path:
    _extract(archives / "cifar10-jpeg/cifar10-jpeg.tar.gz", to)
    return to


def bccd(archives: Path, to: Path) -> Path:
    _extract(archives / "bccd/BCCD.tar", to)
    return to / "BCCD"


def isbi(archives: Path, to: Path) -> Path:
    """The 30 slices in their order: 21 to train, 3 to choose by, the last 6 held out."""
    _extract(archives / "isbi-membrane/membrane.tar", to / "raw")
    for number in range(30):
        split = "train" if number < 21 else "val" if number < 24 else "test"
        for kind in ("image", "label"):
            folder = to / "isbi" / split / kind
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(to / f"raw/membrane/train/{kind}/{number}.png", folder)
    return to / "isbi"


def super_resolution(archives: Path, to: Path) -> Path:
    """68 photos to train on, Set5 as test."""
    for archive, split in (("CBSD68", "train"), ("Set5", "test")):
        _extract(archives / f"sr-bsd68-set5/{archive}.tar", to)
        (to / archive).rename(to / split)
    return to


def nuclei(archives: Path, to: Path) -> Path:
    """170 images to train on, of which val is cut; those that SOURCE.md calls val are the test."""
    source = archives / "dsb2018-fluorescence"
    _extract(source / "dsb2018-fluorescence.tar.gz", to)
    for split, name in (("train", "train"), ("val", "test")):
        shutil.copy(source / f"instances_{split}.json", to / f"instances_{name}.json")
    return to


DATA_SETS = {
    "mnist": DataSet(mnist),
    "mnist-unseen": DataSet(mnist, ("--unseen", "7,8,9")),
    "cifar10": DataSet(cifar10),
    "bccd": DataSet(bccd, ("--allow-rejected", "2")),
    "isbi": DataSet(isbi, ("--option", "classes=membrane,cell")),
    "sr-bsd68-set5": DataSet(super_resolution, ("--format", "images")),
    "nuclei": DataSet(nuclei, ("--format", "coco")),
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
    "bccd-yolo": "bccd",
    "nuclei-mask-rcnn": "nuclei",
    "nuclei-faster-rcnn": "nuclei",
    "isbi-unet": "isbi",
    "set5-super-resolution": "sr-bsd68-set5",
    "mnist-autoencoder": "mnist",
    "mnist-dcgan": "mnist",
    "mnist-embedding": "mnist-unseen",
}
"""Which data set a recipe in `jobs/recipes` is measured on."""
JUDGES = {"mnist-dcgan": ("mnist", "mnist-judge")}
"""By which recipe the classifier is trained that judges, and its name in the registry: one of its
own, as every classifier of a data set is registered under the data set's."""


def principal_components(packed: Path) -> list[str]:
    import references

    metrics = references.pca(str(packed), 32)
    return [f"{metrics['components']} principal components: mse {metrics['mse']:.5f}"]


def at_the_beginning(packed: Path) -> list[str]:
    """Of the last trained one of the seeds."""
    import initial_frechet

    found = initial_frechet.initial_frechet(f"{packed.name}-generation", str(packed))
    before, after = (found[when]["frechet"] for when in ("initial", "trained"))
    return [f"the network before it is trained: frechet {before:.4g}; after, {after:.4g}"]


REFERENCES: dict[str, Callable[[Path], list[str]]] = {
    "mnist-autoencoder": principal_components,
    "mnist-dcgan": at_the_beginning,
}
"""What is measured to stand beside a recipe's figures."""


def prepare(name: str, archives: Path, work: Path) -> tuple[Path, str]:
    """The packed data set, made where it isn't there yet, and the command that packs it."""
    packed = work / "packed" / name
    command = ["tessera", "pack", "SOURCE", "--to", "DIR"]
    source, words = "digits", ["--name", name]
    if name in DATA_SETS:
        words += DATA_SETS[name].words
        if not (packed / "card.json").exists():
            laid = work / "sources" / name
            if laid.exists():
                shutil.rmtree(laid)
            source = str(DATA_SETS[name].lay_out(archives, laid))
    if not (packed / "card.json").exists():
        _run("-m", "jobs.pack", source, "--to", str(packed), *words)
    return packed, " ".join([*command, *words])


def _is_registered(model: str) -> bool:
    from pipelines.workflows import services

    return bool(services.open_registry(Context.from_environment()).versions(model))


def _run(*words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def measure(recipe: str, archives: Path, work: Path) -> None:
    packed, command = prepare(RECIPES[recipe], archives, work)
    words = [recipe, "--data", str(packed), "--packed", command]
    if recipe in JUDGES:
        trained, name = JUDGES[recipe]
        if not _is_registered(name):
            _run("-m", "jobs.train", trained, "--data", str(packed), "--model", name)
    _run(str(ROOT / "benchmarks/measure.py"), *words)
    if recipe in REFERENCES:
        results = ROOT / "benchmarks/results/references.json"
        found = json.loads(results.read_text()) if results.exists() else {}
        found[recipe] = REFERENCES[recipe](packed)
        results.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        _run(str(ROOT / "benchmarks/measure.py"), "--readme")


def main() -> None:
    # Ray's workers would give way to whatever else this machine does.
    os.environ.setdefault("RAY_worker_niceness", "0")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes; all, if none is named")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", metavar="DIR")
    parser.add_argument("--work", type=Path, default=ROOT / ".tessera/recipes", metavar="DIR")
    parser.add_argument("--pack", action="store_true", help="only pack their data sets")
    asked = parser.parse_args()
    known = [name for name in RECIPES if (ROOT / f"jobs/recipes/{name}.yaml").exists()]
    for name in asked.names or known:
        if name not in known:
            parser.error(f"there is no recipe {name!r}: {', '.join(known)}")
        if asked.pack:
            print(prepare(RECIPES[name], asked.data.resolve(), asked.work.resolve())[0])
        else:
            measure(name, asked.data.resolve(), asked.work.resolve())


if __name__ == "__main__":
    main()
