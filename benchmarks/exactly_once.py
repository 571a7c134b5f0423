"""Each sample once in every epoch: the property test of the loader with ten thousand cases.

Prints the number of cases, and stops with an error at the first case that fails.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hypothesis import HealthCheck, given, settings

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import exactly_once

EXAMPLES = 10_000


def main() -> None:
    checked = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(exactly_once.CASES)
    def check(case: exactly_once.Case) -> None:
        nonlocal checked
        exactly_once.check(case)
        checked += 1

    started = time.monotonic()
    check()
    print(f"{checked:,} cases, lost 0, duplicated 0, in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
