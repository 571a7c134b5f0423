"""How thousands of drawn faults end: refused, harmless, or one of what must never be.

Bits are flipped, files are cut, blotted and given hostile members, in shards, indices, cards, images
and annotations. `fault_cases.py` injects them in processes of its own; here they are watched, so
that one that hangs or dies is counted and not waited for. Prints a table, writes `faults.json`, and
ends with an error where something hung, died, was silently wrong, or failed with an error that is
none of ours.
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
"""Of each kind."""
PATIENCE_SECONDS = 60.0
"""A case takes milliseconds; the first of a process waits for torch to load."""
GOOD = ("refused", "unharmed", "taken")
BAD = ("wrong", "other", "died", "hung")
PROGRAM = Path(fault_cases.__file__)


@dataclass
class Ended:
    """How the cases of a kind ended, and which of them ended badly."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def add(self, kind: str, number: int, outcome: str) -> None:
        word = outcome.partition(" ")[0]
        self.counts[word] += 1
        if word in BAD:
            self.bad.append(f"{kind}, case {number}: {outcome}")


def run(kind: str, count: int, patience: float = PATIENCE_SECONDS) -> Ended:
    """All cases of a kind. After one that hangs or dies the next process goes on with the next."""
    ended, number = Ended(), 0
    while number < count:
        number = _watch(kind, number, count, ended, patience)
    return ended


def _watch(kind: str, first: int, count: int, ended: Ended, patience: float) -> int:
    """One process; gives the case to go on with. What it leaves when it is killed is cleared."""
    with tempfile.TemporaryDirectory(prefix="tessera-faults-") as scratch:
        return _watch_in(scratch, kind, first, count, ended, patience)


def _watch_in(
    scratch: str, kind: str, first: int, count: int, ended: Ended, patience: float
) -> int:
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), kind, str(first), str(count - first)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": scratch},
    )
    assert process.stdout is not None
    number, said = first, b""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while selector.select(patience):
                block = os.read(process.stdout.fileno(), 1 << 16)
                if not block:
                    break
                *lines, said = (said + block).split(b"\n")
                for line in lines:
                    at, _, outcome = line.decode().partition(" ")
                    number = int(at) + 1
                    ended.add(kind, int(at), outcome)
            else:
                ended.add(kind, number, "hung")
                return number + 1
    finally:
        if number < count and process.poll() is None:
            process.kill()
        process.communicate()
    if number < count:
        ended.add(kind, number, f"died {process.returncode}")
        return number + 1
    return number


def main() -> None:
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--cases", type=int, default=CASES, help="of each kind")
    parser.add_argument("--only", nargs="+", default=list(fault_cases.KINDS), metavar="KIND")
    arguments = parser.parse_args()
    started = time.monotonic()
    found = {kind: run(kind, arguments.cases) for kind in arguments.only}
    total: Counter[str] = sum((ended.counts for ended in found.values()), Counter())
    words = (*GOOD, *BAD)
    rows = [
        [kind, str(arguments.cases), *(str(counts[word]) for word in words)]
        for kind, counts in ((kind, ended.counts) for kind, ended in found.items())
    ]
    rows.append(["all", str(total.total()), *(str(total[word]) for word in words)])
    print(common.table(["faults in", "injected", *words], rows))
    seconds = time.monotonic() - started
    print(f"in {seconds:.0f} s; taken: a file from outside, of which no checksum tells")
    bad = [line for ended in found.values() for line in ended.bad]
    entry = {
        **common.machine("torch", "torchvision", "pillow", "webdataset"),
        "cases_of_each_kind": arguments.cases,
        "seconds": round(seconds, 1),
        "injected": total.total(),
        "all": {word: total[word] for word in words},
        "kinds": {kind: {w: e.counts[w] for w in words} for kind, e in found.items()},
        "bad": bad,
    }
    print(f"written: {common.record(arguments.results, 'faults', entry)}")
    if bad:
        raise SystemExit("\n".join(bad[:20]))


if __name__ == "__main__":
    main()
