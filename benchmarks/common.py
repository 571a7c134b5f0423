"""What the benchmarks share: a description of the machine, result files and tables.

In: what a script measured. Out: `benchmarks/results/NAME.json`, and a table on stdout. Must not
know what is measured.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.training.hardware import describe as hardware

ROOT = Path(__file__).resolve().parents[1]
RAW = ROOT.parent / "shared" / "data"
"""The default folder of the raw data sets; `--data` names another one."""
WORK = ROOT / ".tessera" / "bench"
"""Data prepared from them, kept for the next run."""
RESULTS = Path(__file__).resolve().with_name("results")


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--work", type=Path, default=WORK, help="folder for prepared data")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    return parser


def machine(*libraries: str) -> dict[str, Any]:
    """What a result depends on: hardware, commit, date and versions of libraries."""
    return {
        "hardware": hardware(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in libraries},
    }


def version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The commit, with "-dirty" if the working tree differs from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


def record(folder: Path, name: str, entry: dict[str, Any]) -> Path:
    """Writes `NAME.json` and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(entry, indent=1) + "\n")
    return path


def write_measured(marker: str, text: str) -> None:
    """Replaces the text between the markers of that name in docs/reference/measured.md."""
    page = ROOT / "docs" / "reference" / "measured.md"
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, opened, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if opened and closed:
        page.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table; the first column is left-aligned, the others are right-aligned."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = []
    for row in [heads, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(row[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
