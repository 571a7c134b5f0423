"""Opens a data set once, and measures time and memory in a process that does nothing else.

In: the folder, the loader that opens it, and the share of the epoch that is consumed already. Out:
a line of JSON on stdout. Libraries are imported, but no data is read, before the clock starts; the
clock stops when the first batch arrives.

    seconds        wall
    grown_bytes    growth of the process's resident memory at its peak, plus the unshared memory
                   of its loader processes
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

BATCH = 128
Opener = Callable[[], Any]


def ours(folder: Path, share: float) -> Opener:
    """`TrainLoader` as a training opens it, starting with the card."""
    import torchvision  # noqa: F401

    from pipelines.data import card as cards
    from pipelines.data.loading.loaders import TrainLoader
    from pipelines.interfaces import World

    def first() -> Any:
        card = cards.read(folder)
        loader = TrainLoader(
            folder,
            card,
            card.spec(),
            batch_size=BATCH,
            seed=0,
            world=World(),
            loader_workers=2,
        )
        steps = loader.epoch(0, int(loader.samples * share) // BATCH * BATCH)
        return next(steps).batch["image"], steps

    return first


def stock(folder: Path, share: float) -> Opener:
    """webdataset with torchvision's decoder. It can't resume: the consumed samples are read and
    dropped without decoding."""
    import torch
    import torchvision.io  # noqa: F401
    import webdataset as wds
    from contenders import _decode

    def first() -> Any:
        shards = sorted(map(str, (folder / "train").glob("*.tar")))
        skipped = int(len(shards) * SHARD_SAMPLES * share) // BATCH * BATCH
        stream = wds.WebDataset(shards, shardshuffle=False).to_tuple("jpg", "cls")
        chosen = itertools.islice(iter(stream), skipped, skipped + BATCH)
        return torch.stack([_decode(image, None) for image, _ in chosen]), stream

    return first


SHARD_SAMPLES = 1000
OPENERS: dict[str, Callable[[Path, float], Opener]] = {"ours": ours, "stock": stock}


def measure(first: Opener) -> dict[str, float]:
    """Seconds until `first` returns a batch, and the growth of memory in bytes."""
    me = psutil.Process()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (VmHWM)
    before = me.memory_info().rss
    began = time.perf_counter()
    images, _stream = first()
    seconds = time.perf_counter() - began
    assert len(images) == BATCH
    grown = _peak() - before
    children = sum(child.memory_full_info().uss for child in me.children(recursive=True))
    return {"seconds": seconds, "grown_bytes": grown + children, "children_bytes": children}


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(peak) * 1024


def main() -> None:
    folder, opener, share = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    print(json.dumps(measure(OPENERS[opener](folder, share))))


if __name__ == "__main__":
    main()
