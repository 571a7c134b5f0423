"""A few hundred photos: Tessera's defaults beside a plain loop, and beside random weights.

The photos are grocery-fruit's: 28 classes, 1,142 training images. All ways train the same network
for the same epochs at the same size; each seed trains all of them, one after the other.
"""

from __future__ import annotations

import sys
import tarfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import RAW, arguments, machine, record, table
from plain_loop import plain_loop

import tessera

WAYS: dict[str, dict[str, Any]] = {
    "defaults": {"model.weights": "imagenet"},
    "frozen body": {"model.weights": "imagenet", "model.freeze": "backbone"},
    "random weights": {},
}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, default=RAW, help="folder of the raw data sets")
    parser.add_argument("--size", type=int, default=128, help="side of the input in pixels")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="*", default=["plain loop", *WAYS], help="what to compare")
    options = parser.parse_args()
    folder = options.work / "grocery-fruit"
    if not folder.exists():
        with tarfile.open(options.data / "grocery-fruit" / "grocery-fruit.tar") as archive:
            archive.extractall(folder, filter="data")
    packed = options.work / "grocery-fruit-packed"
    if not packed.exists():
        tessera.pack(folder, to=packed, name="grocery-fruit", progress=False)
    values: dict[str, list[float]] = {way: [] for way in options.ways}
    seconds: dict[str, list[float]] = {way: [] for way in options.ways}
    for seed in range(options.seeds):
        for way in options.ways:
            began = time.perf_counter()
            if way == "plain loop":
                value = plain_loop(str(folder), size=options.size, epochs=options.epochs, seed=seed)
            else:
                value = _train(packed, WAYS[way], options, seed)
            values[way].append(value)
            seconds[way].append(time.perf_counter() - began)
            print(f"seed {seed}: {way} {value:.4f} in {seconds[way][-1]:.0f} s", flush=True)
    entry = {
        **machine("torch", "torchvision", "ray"),
        "data": "grocery-fruit",
        "size": options.size,
        "epochs": options.epochs,
        "accuracy": values,
        "seconds": seconds,
    }
    print(record(options.results, "transfer", entry))
    rows = [(way, _summary(values[way]), f"{mean(seconds[way]):.0f}") for way in options.ways]
    print(table(("way", "test accuracy", "s"), rows))


def _train(packed: Path, way: dict[str, Any], options: Any, seed: int) -> float:
    changes = {
        **way,
        "train.epochs": options.epochs,
        "data.height": options.size,
        "data.width": options.size,
        "seed": seed,
    }
    outcome = tessera.train(
        "efficientnet", data=packed, set=changes, experiment="transfer", progress=False
    )
    report = tessera.evaluate(outcome.version, data=packed, report=False, intervals=False)
    return float(report.metrics["accuracy"])


def _summary(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{mean(values):.4f} ± {stdev(values):.4f}"


if __name__ == "__main__":
    main()
