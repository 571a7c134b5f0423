"""A plan for 1,000 machines of 8 GPUs and 100,000 shards: requests, bytes, memory, time lost.

Nothing here trains. What the loader would ask of the object store is counted with the loader's own
order of samples. The memory of card and index is measured in a fresh process on a card of that many
shards. The time that failures cost is simulated, and compared with the formulas of Young (1974) and
Daly (2006). The rate of failures is that of Llama 3's training: 419 unexpected interruptions in 54
days on 16,384 GPUs (arXiv:2407.21783, section 3.3.4). Prints tables, writes
benchmarks/results/at_scale.json and the tables of docs/reference/measured.md.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, arguments, machine, record, table, write_measured

from pipelines.data.index import FIELDS
from pipelines.data.loading.order import WINDOW, EpochOrder, nodes_per_shard

NODES = (1, 8, 64, 1000)
INTERVALS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Checkpoint intervals to simulate, as multiples of Daly's."""
SAMPLED_SHARDS = 4000
"""Shards over which the readers of a shard are counted; windows are independent of each other."""


@dataclass(frozen=True)
class Plan:
    """The assumptions. All are arguments of the script.

    Args:
        machines: Each with `gpus` GPUs and one loader.
        batch: Images per GPU and step.
        images_per_second: Of one GPU.
        shards: Of `samples` images each, `image_bytes` bytes an image.
        store_requests: Requests per second that the object store answers.
        store_gbits, machine_gbits: Bandwidth of the whole store and of one machine.
        gpu_hours: Mean GPU hours between failures.
        checkpoint_bytes: Weights and optimizer.
        blocked_seconds: For which a checkpoint stops the training: the write to the local disk.
        restart_seconds: From a failure to the first step, without the steps done again.
        days: Length of the training without failures.
    """

    machines: int = 1000
    gpus: int = 8
    batch: int = 32
    images_per_second: float = 1000.0
    shards: int = 100_000
    samples: int = 1000
    image_bytes: int = 110_000
    store_requests: float = 100_000.0
    store_gbits: float = 1000.0
    machine_gbits: float = 25.0
    gpu_hours: float = 16_384 * 54 * 24 / 419
    checkpoint_bytes: float = 4e9
    blocked_seconds: float = 4.0
    restart_seconds: float = 120.0
    days: float = 30.0

    @property
    def epoch_seconds(self) -> float:
        images = self.shards * self.samples
        return images / (self.machines * self.gpus * self.images_per_second)

    @property
    def mtbf_seconds(self) -> float:
        """Mean time between failures of the whole cluster."""
        return self.gpu_hours * 3600 / (self.machines * self.gpus)


def readers(plan: Plan, machines: int) -> float:
    """Machines that read a shard in one epoch, on average."""
    sizes = [plan.samples] * min(SAMPLED_SHARDS, plan.shards)
    order = EpochOrder("0" * 64, "train", sizes, seed=0, epoch=0)
    return nodes_per_shard(order, sizes, machines * plan.gpus * plan.batch, machines)


def traffic(plan: Plan, machines: int, key_bytes: int = 20) -> dict[str, float]:
    """Requests and bytes of one epoch. A shard is fetched in blocks, and its rows in one request;
    each machine fetches a shard once, for all of its GPUs."""
    from pipelines.storage.remote import BLOCK_BYTES

    shard_bytes = plan.samples * plan.image_bytes
    row_bytes = np.dtype(FIELDS).itemsize + key_bytes
    fetches = readers(plan, machines) * plan.shards
    blocks = math.ceil(shard_bytes / BLOCK_BYTES) + 1
    seconds = plan.shards * plan.samples / (machines * plan.gpus * plan.images_per_second)
    received = fetches * (shard_bytes + plan.samples * row_bytes)
    requests, gbits = fetches * blocks / seconds, received * 8 / seconds / 1e9
    limits = (
        plan.store_requests / requests,
        plan.store_gbits / gbits,
        plan.machine_gbits * machines / gbits,
    )
    return {
        "machines": machines,
        "samples": plan.samples,
        "epoch_seconds": seconds,
        "readers_per_shard": fetches / plan.shards,
        "requests_per_second": requests,
        "store_gbits": gbits,
        "machine_gbits": gbits / machines,
        "speed": min(1.0, *limits),
        "machine_window_gb": WINDOW * shard_bytes / 1e9,
        "index_gb": plan.shards * plan.samples * row_bytes / 1e9,
    }


def start(plan: Plan) -> dict[str, float]:
    """What a resume asks of the store before the first step: on each machine the checkpoint, the
    header of the index, and the shards of the first step with their rows. At the end of an epoch
    one rank uploads a checkpoint; the rest is part of `traffic`."""
    from pipelines.storage.remote import BLOCK_BYTES

    shard_bytes = plan.samples * plan.image_bytes
    shards = math.ceil(plan.gpus * plan.batch / plan.samples) + 1
    requests = 2 + math.ceil(plan.checkpoint_bytes / BLOCK_BYTES)
    requests += shards * (1 + math.ceil(shard_bytes / BLOCK_BYTES))
    gbits = (plan.checkpoint_bytes + shards * shard_bytes) * 8 / 1e9
    return {
        "requests": requests * plan.machines,
        "seconds": max(
            requests * plan.machines / plan.store_requests,
            gbits * plan.machines / plan.store_gbits,
            gbits / plan.machine_gbits,
        ),
        "upload_seconds": plan.checkpoint_bytes * 8 / 1e9 / plan.machine_gbits,
    }


def daly_seconds(plan: Plan) -> float:
    """The interval between checkpoints that loses least, by Daly's formula of higher order."""
    cost, mtbf = plan.blocked_seconds, plan.mtbf_seconds
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def young_seconds(plan: Plan) -> float:
    return math.sqrt(2 * plan.blocked_seconds * plan.mtbf_seconds)


def simulate(plan: Plan, interval: float, rng: np.random.Generator) -> dict[str, float]:
    """One training with failures at random times, and a checkpoint after each `interval` seconds
    of work. Failures happen during restarts as well. Returns the shares of time that are lost."""
    work, clock, committed, failures = plan.days * 86_400, 0.0, 0.0, 0
    again = blocked = restarting = 0.0
    failure = rng.exponential(plan.mtbf_seconds)
    while committed < work:
        step = min(interval, work - committed)
        end = clock + step + plan.blocked_seconds
        if failure >= end:
            clock, committed = end, committed + step
            blocked += plan.blocked_seconds
            continue
        again += failure - clock
        clock = failure
        while True:
            failures += 1
            ready = clock + plan.restart_seconds
            failure = clock + rng.exponential(plan.mtbf_seconds)
            restarting += min(ready, failure) - clock
            clock = min(ready, failure)
            if clock == ready:
                break
    return {
        "failures": failures,
        "again": again / clock,
        "blocked": blocked / clock,
        "restarting": restarting / clock,
        "lost": 1 - work / clock,
    }


def simulated(plan: Plan, interval: float, trials: int) -> dict[str, float]:
    """The means over trainings with different failures."""
    each = [simulate(plan, interval, np.random.default_rng(seed)) for seed in range(trials)]
    return {name: float(np.mean([one[name] for one in each])) for name in each[0]}


def opening(plan: Plan) -> dict[str, float]:
    """Memory and time that card and order of this many shards take, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "card.json")
        path.write_text(make_card(plan.shards, plan.samples, plan.image_bytes))
        size = path.stat().st_size
        done = subprocess.run(
            [sys.executable, "-c", _OPEN, str(path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    return {"card_bytes": size, **json.loads(done.stdout)}


_OPEN = """
import json, sys, time
from pathlib import Path
from pipelines.data import card as cards
from pipelines.data.loading.order import EpochOrder
def resident():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])
text = Path(sys.argv[1]).read_text()
before, start = resident(), time.perf_counter()
card = cards.parse(text, "card.json")
parsed = time.perf_counter()
order = EpochOrder(card.digest, "train", [s.samples for s in card.splits["train"].shards], 0, 0)
order.batch(0, 1)
print(json.dumps({"parse_seconds": parsed - start, "order_seconds": time.perf_counter() - parsed,
                  "memory_bytes": resident() - before}))
"""


def make_card(shards: int, samples: int, image_bytes: int) -> str:
    """A card of that many shards, as packing writes it."""
    from pipelines.data.card import Card, ImageCard, Shard, SplitCard

    size, checksum = samples * image_bytes, "0" * 64
    split = SplitCard(
        samples=shards * samples,
        shards=tuple(
            Shard(
                path=f"train/{number:06d}.tar",
                samples=samples,
                size_bytes=size,
                sha256=checksum,
                rows_sha256=checksum,
            )
            for number in range(shards)
        ),
        index="train/index.npy",
        index_bytes=shards * samples * 60,
        index_sha256=checksum,
    )
    sides = dict.fromkeys(("min_height", "max_height", "min_width", "max_width"), 256)
    grey = (0.5, 0.5, 0.5)
    card = Card(
        name="planned",
        task="classification",
        classes=("a", "b"),
        image=ImageCard(channels=3, mean=grey, std=grey, **sides),
        splits={"train": split},
    )
    return card.sealed().to_json()


def markdown(entry: dict[str, Any]) -> str:
    """The tables of the docs."""
    plan = Plan(**entry["plan"])
    lines = [
        f"{plan.shards * plan.samples:,} images of {plan.image_bytes / 1000:.0f} kB, "
        f"{plan.gpus} GPUs a machine, {plan.batch} images a GPU and step, "
        f"{plan.images_per_second:,.0f} images/s a GPU:",
        "",
        "| machines | images a shard | its readers | requests/s | store | a machine | speed |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in entry["traffic"]:
        lines.append(
            f"| {row['machines']:,} | {row['samples']:,} "
            f"| {row['readers_per_shard']:.2f} | {row['requests_per_second']:,.0f} "
            f"| {row['store_gbits']:,.0f} Gbit/s | {row['machine_gbits']:.1f} Gbit/s "
            f"| {row['speed']:.0%} |"
        )
    opened, begin = entry["opening"], entry["start"]
    lines += [
        "",
        f"Speed is the share of the GPUs' speed that a store with {plan.store_requests:,.0f} "
        f"requests/s and {plan.store_gbits:,.0f} Gbit/s allows, with {plan.machine_gbits:g} Gbit/s "
        "a machine and without a cache.",
        "",
        f"A resume on {plan.machines:,} machines sends {begin['requests']:,.0f} requests before "
        f"its first step, which takes that store {begin['seconds']:.0f} s with a checkpoint of "
        f"{plan.checkpoint_bytes / 1e9:g} GB. One machine uploads it in "
        f"{begin['upload_seconds']:.1f} s, beside the training.",
        "",
        f"Card: {opened['card_bytes'] / 1e6:.0f} MB, read in {opened['parse_seconds']:.1f} s; card "
        f"and order take {opened['memory_bytes'] / 1e6:.0f} MB a process. "
        f"Index: {entry['traffic'][-1]['index_gb']:.1f} GB, of which a machine reads only the rows "
        "of its shards.",
        "",
        f"A failure every {entry['mtbf_hours']:.1f} h on {plan.machines * plan.gpus:,} GPUs, "
        f"{plan.blocked_seconds:g} s a checkpoint, {plan.restart_seconds:g} s a restart. Daly's "
        f"interval is {entry['daly_minutes']:.1f} min, Young's {entry['young_minutes']:.1f} min:",
        "",
        "| interval | time lost | steps done again | checkpoints | restarts |",
        "|---|---|---|---|---|",
    ]
    for row in entry["intervals"]:
        lines.append(
            f"| {row['minutes']:.1f} min | {row['lost']:.2%} | {row['again']:.2%} "
            f"| {row['blocked']:.2%} | {row['restarting']:.2%} |"
        )
    return "\n".join(lines) + "\n"


def evaluate(plan: Plan, nodes: Sequence[int], trials: int) -> dict[str, Any]:
    interval, images = daly_seconds(plan), plan.shards * plan.samples
    return {
        "plan": asdict(plan),
        "traffic": [
            traffic(replace(plan, samples=samples, shards=images // samples), machines)
            for samples in (plan.samples, plan.gpus * plan.batch // 2)
            for machines in nodes
        ],
        "opening": opening(plan),
        "start": start(replace(plan, samples=plan.gpus * plan.batch // 2)),
        "mtbf_hours": plan.mtbf_seconds / 3600,
        "daly_minutes": interval / 60,
        "young_minutes": young_seconds(plan) / 60,
        "intervals": [
            {"minutes": interval * each / 60, **simulated(plan, interval * each, trials)}
            for each in INTERVALS
        ],
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--trials", type=int, default=200, help="simulated trainings")
    options = parser.parse_args()
    plan = Plan(**{name: getattr(options, name) for name in asdict(Plan())})
    nodes = sorted({*(n for n in NODES if n < plan.machines), plan.machines})
    entry = {**machine("numpy"), **evaluate(plan, nodes, options.trials)}
    heads = ["machines", "images a shard", "readers", "requests/s", "Gbit/s", "speed"]
    rows = [
        [
            f"{row['machines']:,}",
            f"{row['samples']:,}",
            f"{row['readers_per_shard']:.2f}",
            f"{row['requests_per_second']:,.0f}",
            f"{row['store_gbits']:,.1f}",
            f"{row['speed']:.0%}",
        ]
        for row in entry["traffic"]
    ]
    print(table(heads, rows))
    print(record(options.results, "at_scale", entry))
    if plan == Plan():
        write_measured("at scale", markdown(entry))
    print(markdown(entry))


if __name__ == "__main__":
    main()
