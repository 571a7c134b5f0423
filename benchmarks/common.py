"""What the measurements share: this machine and the versions in words, results, tables.

In: what a script measured. Out: `benchmarks/results/NAME.json`, and a table on stdout. Must not know
what is measured.
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
"""Where the raw data sets are looked for; `--data` names another folder."""
WORK = ROOT / ".tessera" / "bench"
"""What is made of them, kept for the next time."""
RESULTS = Path(__file__).resolve().with_name("results")


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all have."""
    parser = argparse.ArgumentParser(
        description=description.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--work", type=Path, default=WORK, help="folder for data made up")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    return parser


def machine(*libraries: str) -> dict[str, Any]:
    """What a figure depends on beside the code: hardware, commit, date, versions."""
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
        return "not here"


def commit() -> str:
    """The commit, and whether the tree differs from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def record(folder: Path, name: str, entry: dict[str, Any]) -> Path:
    """Writes `NAME.json` and gives its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(entry, indent=1) + "\n")
    return path


def write_measured(mark: str, text: str) -> None:
    """Replaces what is between the marks of that name in docs/reference/measured.md."""
    page = ROOT / "docs" / "reference" / "measured.md"
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if found and closed:
        page.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; the first stands left, the others right."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = []
    for row in [heads, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(row[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
