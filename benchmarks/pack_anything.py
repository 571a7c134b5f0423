"""5,000 sources made at random: does the account add up, and is any label or image lost?

In: a seed. Out: `benchmarks/results/pack_anything.json`, and a table. Each source has labels in one
of eight formats, and some have stray files or damage; tests/support/random_sources.py makes them
and compares what is packed with what was made.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(common.ROOT / "tests" / "support"))
from random_sources import build, check_pack


def main() -> None:
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--sources", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=10_000)
    options = parser.parse_args()
    started = time.process_time()
    packed: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    wrong: list[str] = []
    for seed in range(options.seed, options.seed + options.sources):
        kind, outcome, found = one(seed)
        (packed if outcome == "packed" else refused)[kind] += 1
        wrong += [f"seed {seed} ({kind}): {text}" for text in found]
    result: dict[str, Any] = {
        **common.machine("pillow", "pyarrow"),
        "sources": options.sources,
        "seed": options.seed,
        "cpu_seconds": round(time.process_time() - started),
        "packed": dict(sorted(packed.items())),
        "refused": dict(sorted(refused.items())),
        "wrong": wrong,
    }
    path = options.results / "pack_anything.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    for kind in sorted(packed | refused):
        print(f"{kind:14} packed {packed[kind]:5}  refused {refused[kind]:5}")
    print(f"wrong: {len(wrong)}")
    for text in wrong[:20]:
        print(text)
    sys.exit(bool(wrong))


def one(seed: int) -> tuple[str, str, list[str]]:
    folder = Path(tempfile.mkdtemp())
    try:
        truth = build(folder / "source", seed)
        outcome, wrong = check_pack(folder / "source", folder / "packed", truth)
    finally:
        shutil.rmtree(folder)
    return truth.kind, outcome, wrong


if __name__ == "__main__":
    main()
