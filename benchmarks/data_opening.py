"""The cost of opening a data set, and of resuming at 90 % of an epoch, by its number of shards.

Each opening has its own process, and they take turns: Tessera and stock webdataset, over sets of 10
to 10,000 shards of 1,000 samples. Measured from reading the card to the first batch of 128 decoded
images; imports are excluded. Tessera starts two loader processes in that time, webdataset reads in
the process itself. To save disk space all shards are hard links to one tar, while the index has a
real row for each sample. The tar stays in the page cache, so disk reads are excluded. Prints a
table, writes benchmarks/results/data_opening.json and data_opening.png.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, arguments, machine, record, table
from opening import SHARD_SAMPLES

from pipelines.data import card as cards
from pipelines.data import shards
from pipelines.data.card import Card, ImageCard

SIZES = (10, 100, 1000, 10_000)
RESUMED = 0.9
STOCK_RESUMES_UP_TO = 100
"""Shards: webdataset reads all consumed samples again, which takes minutes for more."""
SIDE = 32
BARS = {"seconds": 1.0, "grown_mb": 100.0}
"""Upper limits at the largest number of shards."""
TITLES = {
    ("ours", 0.0): "Tessera, first batch",
    ("ours", RESUMED): "Tessera, resume",
    ("stock", 0.0): "webdataset, first batch",
    ("stock", RESUMED): "webdataset, resume",
}


def make(folder: Path, count: int) -> None:
    """Writes a data set of `count` shards that are one file, with an index that has all rows."""
    (folder / "train").mkdir(parents=True)
    name = "train/{:06d}.tar".format
    first, rows = shards.write_shard(folder / name(0), name(0), samples())
    written = [(first, rows)]
    for number in range(1, count):
        os.link(folder / name(0), folder / name(number))
        copied = rows.copy()
        copied["key"] = [b"%06d/%03d" % (number, sample) for sample in range(SHARD_SAMPLES)]
        written.append((first.model_copy(update={"path": name(number)}), copied))
    split = shards.finish_split(folder, "train", written)
    half = (0.5, 0.5, 0.5)
    image = ImageCard(
        channels=3,
        min_height=SIDE,
        max_height=SIDE,
        min_width=SIDE,
        max_width=SIDE,
        mean=half,
        std=half,
    )
    card = Card(
        name=f"{count} shards",
        task="classification",
        classes=("a", "b"),
        image=image,
        splits={"train": split},
    )
    (folder / cards.FILE).write_text(card.sealed().to_json())


def samples() -> list[shards.Packed]:
    """The samples of a shard: small JPEGs of noise."""
    from PIL import Image

    rng = np.random.default_rng(0)
    packed = []
    for number in range(SHARD_SAMPLES):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).resize((SIDE, SIDE)).save(out, format="JPEG", quality=75)
        label = number % 2
        annotation = ("cls", str(label).encode())
        key = f"000000/{number:03d}"
        packed.append(shards.Packed(key, ("jpg", out.getvalue()), annotation, label))
    return packed


def open_once(folder: Path, who: str, share: float) -> dict[str, float]:
    """One opening in a fresh process."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/opening.py"), folder, who, str(share)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{TITLES[who, share]} over {folder.name} failed:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(work: Path, sizes: list[int], rounds: int, only: list[str]) -> list[dict[str, Any]]:
    """One entry for each kind of opening and number of shards, with the medians of its rounds."""
    for size in sizes:
        print(f"{size:,} shards are written", file=sys.stderr)
        make(work / str(size), size)
    cases = [
        (who, share, size)
        for size in sizes
        for who, share in TITLES
        if who in only and (who == "ours" or not share or size <= STOCK_RESUMES_UP_TO)
    ]
    turns: dict[tuple[str, float, int], list[dict[str, float]]] = {case: [] for case in cases}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for who, share, size in cases:
            turns[who, share, size].append(open_once(work / str(size), who, share))
    entries = []
    for (who, share, size), measured in turns.items():
        seconds = [turn["seconds"] for turn in measured]
        entries.append(
            {
                "what": TITLES[who, share],
                "shards": size,
                "samples": size * SHARD_SAMPLES,
                "seconds": statistics.median(seconds),
                "seconds_range": [min(seconds), max(seconds)],
                "grown_mb": statistics.median(t["grown_bytes"] for t in measured) / 2**20,
                "of_it_in_loader_processes_mb": statistics.median(
                    t["children_bytes"] for t in measured
                )
                / 2**20,
            }
        )
    return entries


def judge(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results for the bars, at the largest size that was measured."""
    bars = []
    largest = max(entry["shards"] for entry in entries)
    for entry in entries:
        if entry["shards"] == largest and entry["what"].startswith("Tessera"):
            for unit, most in BARS.items():
                criterion = f"{entry['what']}, {largest:,} shards, {unit}"
                reached = entry[unit]
                bars.append(
                    {
                        "criterion": criterion,
                        "reached": reached,
                        "allowed": most,
                        "met": reached <= most,
                    }
                )
    return bars


def plot(entries: list[dict[str, Any]], path: Path) -> None:
    """Seconds and memory against the number of shards."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    labels = {"seconds": "seconds to the first batch", "grown_mb": "memory grown by, MiB"}
    for axis, (unit, bar) in zip(axes, BARS.items()):
        for what in dict.fromkeys(entry["what"] for entry in entries):
            mine = [entry for entry in entries if entry["what"] == what]
            axis.plot([e["shards"] for e in mine], [e[unit] for e in mine], "o-", label=what)
        axis.axhline(bar, color="grey", linestyle=":", label="limit for Tessera")
        axis.set(xscale="log", yscale="log", xlabel="shards of 1,000 samples", ylabel=labels[unit])
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--shards", type=int, nargs="+", default=list(SIZES), help="numbers of shards"
    )
    parser.add_argument("--rounds", type=int, default=3, help="openings of each kind and size")
    parser.add_argument(
        "--only", nargs="+", choices=["ours", "stock"], default=["ours", "stock"], help="loaders"
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="opening-", dir=options.work))
    try:
        entries = measure(scratch, options.shards, options.rounds, options.only)
    finally:
        shutil.rmtree(scratch)
    rows = [
        [
            entry["what"],
            f"{entry['shards']:,}",
            f"{entry['seconds']:.2f}",
            "{:.2f} to {:.2f}".format(*entry["seconds_range"]),
            f"{entry['grown_mb']:.0f}",
        ]
        for entry in sorted(entries, key=lambda entry: list(TITLES.values()).index(entry["what"]))
    ]
    print(table(["", "shards", "seconds", "range", "MiB grown"], rows))
    bars = judge(entries)
    for bar in bars:
        verdict = "met" if bar["met"] else f"missed by {bar['reached'] - bar['allowed']:.2f}"
        print(f"{bar['criterion']}: {bar['reached']:.2f}, allowed {bar['allowed']:g}: {verdict}")
    entry = {
        **machine("torch", "torchvision", "numpy", "webdataset"),
        "rounds": options.rounds,
        "openings": entries,
        "bars": bars,
    }
    print(record(options.results, "data_opening", entry))
    plot(entries, options.results / "data_opening.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
