"""Injects thousands of random faults and counts how they end.

Bits are flipped, files are truncated, overwritten and given hostile members, in shards, indexes,
cards, images and annotations. `fault_cases.py` injects them in separate processes, which are
watched here, so that a case that hangs or dies is counted. Prints a table, writes `faults.json`,
and ends with an error if a case hung, died, was silently wrong, or failed with an error that is not
a TesseraError.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import common
import fault_cases

CASES = 400
"""Number of cases of each kind."""
TIMEOUT_SECONDS = 60.0
"""A case takes milliseconds; the first one of a process also imports torch."""
GOOD = ("refused", "unharmed", "accepted")
BAD = ("wrong", "other", "died", "hung")
PROGRAM = Path(fault_cases.__file__)


@dataclass
class Outcomes:
    """How many cases of a kind had each outcome, and a line for each bad one."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def add(self, kind: str, number: int, outcome: str) -> None:
        word = outcome.partition(" ")[0]
        self.counts[word] += 1
        if word in BAD:
            self.bad.append(f"{kind}, case {number}: {outcome}")


def run(kind: str, count: int, timeout: float = TIMEOUT_SECONDS) -> Outcomes:
    """Runs all cases of a kind. After one that hangs or dies, a new process continues with the next
    case."""
    outcomes, number = Outcomes(), 0
    while number < count:
        number = _watch(kind, number, count, outcomes, timeout)
    return outcomes


def _watch(kind: str, first: int, count: int, outcomes: Outcomes, timeout: float) -> int:
    """Watches one process. Returns the number of the next case. Temporary files of a process that
    is killed are deleted."""
    with tempfile.TemporaryDirectory(prefix="tessera-faults-") as scratch:
        return _watch_in(scratch, kind, first, count, outcomes, timeout)


def _watch_in(
    scratch: str, kind: str, first: int, count: int, outcomes: Outcomes, timeout: float
) -> int:
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), kind, str(first), str(count - first)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": scratch},
    )
    assert process.stdout is not None
    number, partial = first, b""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while selector.select(timeout):
                block = os.read(process.stdout.fileno(), 1 << 16)
                if not block:
                    break
                *lines, partial = (partial + block).split(b"\n")
                for line in lines:
                    index, _, outcome = line.decode().partition(" ")
                    number = int(index) + 1
                    outcomes.add(kind, int(index), outcome)
            else:
                outcomes.add(kind, number, "hung")
                return number + 1
    finally:
        if number < count and process.poll() is None:
            process.kill()
        process.communicate()
    if number < count:
        outcomes.add(kind, number, f"died {process.returncode}")
        return number + 1
    return number


def main() -> None:
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--cases", type=int, default=CASES, help="cases of each kind")
    parser.add_argument(
        "--only", nargs="+", default=list(fault_cases.KINDS), metavar="KIND", help="kinds"
    )
    arguments = parser.parse_args()
    started = time.monotonic()
    results = {kind: run(kind, arguments.cases) for kind in arguments.only}
    total: Counter[str] = sum((one.counts for one in results.values()), Counter())
    words = (*GOOD, *BAD)
    rows = [
        [kind, str(arguments.cases), *(str(counts[word]) for word in words)]
        for kind, counts in ((kind, one.counts) for kind, one in results.items())
    ]
    rows.append(["all", str(total.total()), *(str(total[word]) for word in words)])
    print(common.table(["faults in", "injected", *words], rows))
    seconds = time.monotonic() - started
    print(f"in {seconds:.0f} s; accepted: a changed file that has no checksum")
    bad = [line for one in results.values() for line in one.bad]
    entry = {
        **common.machine("torch", "torchvision", "pillow", "webdataset"),
        "cases_of_each_kind": arguments.cases,
        "seconds": round(seconds, 1),
        "injected": total.total(),
        "all": {word: total[word] for word in words},
        "kinds": {kind: {w: e.counts[w] for w in words} for kind, e in results.items()},
        "bad": bad,
    }
    print(f"written: {common.record(arguments.results, 'faults', entry)}")
    if bad:
        raise SystemExit("\n".join(bad[:20]))


if __name__ == "__main__":
    main()
