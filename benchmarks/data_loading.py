"""Images per second of Tessera's loader, of other loaders, and of a bare loop.

Each contender has its own process, and they take turns, round by round, so that other load on the
machine affects all of them alike. The ratios count; the absolute speeds depend on the machine.
Prints a table for each set and writes benchmarks/results/data_loading.json.

MosaicML's streaming needs an older NumPy and runs in its own environment, which `make bench`
creates (`.venv-bench`). If a contender can't run, the table gives the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import RAW, RESULTS, ROOT, arguments, machine, record, table, write_measured
from contenders import BATCH, CONTENDERS, PROCESSES
from loading_data import DONE, PHOTOS, SETS, MissingData, prepare

BENCH_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
TITLES = {
    "raw_files": "raw limit, image files",
    "raw_blob": "raw limit, one file",
    "ours": "Tessera",
    "ours_cached": "Tessera, cached",
    "folder_torchvision": "folder, torchvision's decoder",
    "image_folder": "ImageFolder, Pillow",
    "webdataset_pillow": "webdataset, Pillow",
    "webdataset_torchvision": "webdataset, torchvision's decoder",
    "mosaicml": "MosaicML streaming",
    "ray_data": "Ray Data read_webdataset",
}
LIMITS = ("raw_files", "raw_blob")
OURS = ("ours", "ours_cached")
PEERS = [name for name in CONTENDERS if name not in (*LIMITS, *OURS)]
BARS = {"cifar10": 0.75, "photos": 0.9}
"""Tessera must reach at least this share of both raw limits: over image files, the limit of a
folder of images, and over one file, which leaves out opening and closing files, as shards do."""
CACHED_BAR = 10.0
"""With its cache, Tessera must be this many times as fast as ImageFolder on CIFAR-10."""


class Contender:
    """A process that runs one contender, and its measurements."""

    def __init__(self, name: str, folder: Path, crop: int | None, logs: Path) -> None:
        python = BENCH_PYTHON if name == "mosaicml" else Path(sys.executable)
        self.name, self.turns, self.problem = name, list[dict[str, float]](), ""
        self._log = logs / f"{name}.log"
        if not python.exists():
            self.problem = "not run: make bench creates its environment"
            return
        logs.mkdir(parents=True, exist_ok=True)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), str(ROOT / "benchmarks/contenders.py"), name, folder, str(crop or 0)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONWARNINGS": "ignore"},
            )
        self._read_reply()

    def turn(self, warm: float, seconds: float) -> None:
        if not self.problem:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"warm": warm, "seconds": seconds}) + "\n")
            self._process.stdin.flush()
            if reply := self._read_reply():
                self.turns.append(reply)

    def _read_reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            lines = self._log.read_text().strip().splitlines()
            self.problem = f"failed: {lines[-1] if lines else 'its log is empty'}"
            return {}
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        """Ends the process; its children are daemons, or end when their pipe closes."""
        if hasattr(self, "_process"):
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(timeout=60)
            assert self._process.stdout is not None
            self._process.stdout.close()


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The entry of an image set: the turns of each contender and their medians."""
    chosen = [contender for contender in CONTENDERS if contender in options.only]
    running = []
    try:
        for contender in chosen:
            print(f"{name}: starting {TITLES[contender]}", file=sys.stderr)
            running.append(
                Contender(contender, folder, SETS[name].crop, options.work / "logs" / name)
            )
        for number in range(options.rounds):
            print(f"{name}: round {number + 1} of {options.rounds}", file=sys.stderr)
            for one in running:
                one.turn(options.warm, options.seconds)
    finally:
        for one in running:
            one.close()
    entry = {one.name: summary(one) for one in running}
    return {"data": json.loads((folder / DONE).read_text()), "contenders": entry}


def summary(contender: Contender) -> dict[str, Any]:
    if contender.problem:
        return {"problem": contender.problem}
    wall = [turn["images"] / turn["wall"] for turn in contender.turns]
    cpu = [turn["images"] / turn["cpu"] for turn in contender.turns]
    return {
        "images_per_second": statistics.median(wall),
        "range": [min(wall), max(wall)],
        "images_per_cpu_second": statistics.median(cpu),
        "turns": contender.turns,
    }


def share(entry: dict[str, Any], name: str, of: str) -> float | None:
    """The speed of `name` divided by that of `of` in the same round; the median over rounds."""
    speeds: list[list[float]] = [
        [
            turn["images"] / turn["wall"]
            for turn in entry["contenders"].get(one, {}).get("turns", ())
        ]
        for one in (name, of)
    ]
    return statistics.median(a / b for a, b in zip(*speeds)) if all(speeds) else None


def show(name: str, entry: dict[str, Any]) -> str:
    """The text table of an image set."""
    rows = []
    for contender, measured in entry["contenders"].items():
        if "problem" in measured:
            rows.append([TITLES[contender], measured["problem"][:40], "", "", "", ""])
            continue
        low, high = measured["range"]
        ratios = [share(entry, contender, limit) for limit in LIMITS]
        rows.append(
            [
                TITLES[contender],
                f"{measured['images_per_second']:,.0f}",
                f"{low:,.0f} to {high:,.0f}",
                f"{measured['images_per_cpu_second']:,.0f}",
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            ]
        )
    data = entry["data"]
    width, height = data["mean_size"]
    crop = SETS[name].crop
    title = (
        f"{name}: {data['images']:,} JPEGs of {width} x {height}, {data['mean_bytes']:,} bytes, "
        f"{f'centre crop to {crop}' if crop else 'as they are'}; "
        f"batches of {BATCH}, {PROCESSES} processes"
    )
    heads = ["", "images/s", "range", "images/CPU s", "of raw, files", "of raw, one file"]
    return f"{title}\n{table(heads, rows)}"


def markdown(entry: dict[str, Any]) -> str:
    """The table in docs/reference/measured.md: images/s of all contenders on both image sets, and
    their share of the raw limit over one file."""
    sets = entry["sets"]
    heads = [f"{name}, images/s | of the limit" for name in sets]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + 2 * len(sets)) + "|"]
    for contender in CONTENDERS:
        cells = []
        for measured_set in sets.values():
            measured = measured_set["contenders"].get(contender, {})
            ratio = share(measured_set, contender, "raw_blob")
            speed = measured.get("images_per_second")
            cells += [f"{speed:,.0f}" if speed else "", f"{ratio:.2f}" if ratio else ""]
        lines.append(f"| {TITLES[contender]} | {' | '.join(cells)} |")
    hardware, commit = entry["hardware"], entry["commit"]
    return "\n".join([*lines, "", f"Measured on {hardware}, at commit {commit}.", ""])


def judge(name: str, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The results for the bars; only bars whose contenders all ran."""
    bars = []

    def bar(criterion: str, reached: float | None, least: float) -> None:
        if reached is not None:
            bars.append(
                {
                    "criterion": criterion,
                    "reached": reached,
                    "required": least,
                    "met": reached >= least,
                }
            )

    for limit in LIMITS:
        bar(f"{name}: Tessera / {TITLES[limit]}", share(entry, "ours", limit), BARS[name])
    for peer in PEERS:
        bar(f"{name}: Tessera / {TITLES[peer]}", share(entry, "ours", peer), 1.0)
    if name == "cifar10":
        cached = share(entry, "ours_cached", "image_folder")
        bar(f"{name}: Tessera, cached / ImageFolder, Pillow", cached, CACHED_BAR)
    return bars


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, default=RAW, help="folder with the raw data sets")
    parser.add_argument(
        "--sets", nargs="+", choices=list(SETS), default=list(SETS), help="image sets"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), help="contenders"
    )
    parser.add_argument("--rounds", type=int, default=4, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of a turn")
    parser.add_argument("--warm", type=float, default=1.0, help="seconds of warm-up before a turn")
    parser.add_argument("--photos", type=int, default=PHOTOS, help="number of photos")
    options = parser.parse_args()
    sets, bars = {}, []
    for name in options.sets:
        try:
            folder = prepare(name, options.data, options.work, options.photos)
        except MissingData as error:
            print(f"{name} is skipped: {error}; give the folder that has it: --data FOLDER")
            continue
        sets[name] = measure(name, folder, options)
        bars += judge(name, sets[name])
        print(f"\n{show(name, sets[name])}")
    for bar in bars:
        verdict = "met" if bar["met"] else f"missed by {bar['required'] - bar['reached']:.2f}"
        print(
            f"{bar['criterion']}: {bar['reached']:.2f}, required {bar['required']:.2f}: {verdict}"
        )
    libraries = ("torch", "torchvision", "pillow", "numpy", "webdataset", "ray")
    entry = {
        **machine(*libraries),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "sets": sets,
        "bars": bars,
    }
    if sets:
        print(record(options.results, "data_loading", entry))
    if (
        options.results == RESULTS
        and sets.keys() == SETS.keys()
        and options.only == list(CONTENDERS)
    ):
        write_measured("loading", markdown(entry))
    return 0


if __name__ == "__main__":
    sys.exit(main())
