"""What saving a checkpoint costs the steps of a training: to a folder, and to a slow object store.

One process trains `cnn` on the digits. Windows of training beside an upload that takes about 20
seconds, through a proxy that limits the bytes per second before a real S3 server, and windows
without one take turns. What the upload costs is reported in two ways. How much slower the steps
were by the clock, which other programs on the machine disturb. And a bound that they don't disturb:
how much more CPU time a step took, plus the CPU time of all other threads, upload and proxy, which
may have held Python's lock meanwhile. A save to a folder is compared with the same 20 seconds
between two checkpoints. Needs an S3 server (`make s3`). Prints a table and writes
benchmarks/results/checkpoint_upload.json.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

from pipelines import recipe as recipes
from pipelines.data.loading.loaders import TrainLoader
from pipelines.data.packing import pack
from pipelines.interfaces import NullEmit, World
from pipelines.training.checkpoint_store import CheckpointFolder, PublishedCheckpoints
from pipelines.training.run_storage import RunStorage
from pipelines.training.setup import open_setup
from pipelines.training.trainer import Trainer

sys.path.insert(0, str(common.ROOT / "tests" / "support"))
UPLOAD_SECONDS = 20.0
ROUNDS = 4
WINDOW_SECONDS = 15.0
BUCKET = "benchmark"


@dataclass(frozen=True)
class Window:
    """Steps that were trained one after the other."""

    seconds: float
    cpu_seconds: float
    """Of the training's thread, per step, as `seconds` is."""
    other_cpu_share: float
    """CPU time of all other threads of the process, per second."""


def train_for(trainer: Trainer, seconds: float) -> Window:
    """Trains whole epochs for so long."""
    before, began = trainer.progress.step, time.perf_counter()
    cpu, other = time.thread_time(), _other_cpu()
    while time.perf_counter() - began < seconds:
        trainer.train_epoch()
        trainer.progress.epoch, trainer.progress.consumed = trainer.progress.epoch + 1, 0
    took, steps = time.perf_counter() - began, trainer.progress.step - before
    cpu, other = time.thread_time() - cpu, _other_cpu() - other
    return Window(took / steps, cpu / steps, other / took)


def _other_cpu() -> float:
    return time.process_time() - time.thread_time()


def make_trainer(data: Path, store: CheckpointFolder) -> Trainer:
    recipe = recipes.start("cnn").with_overrides(
        {
            "data.path": str(data),
            "train.epochs": 100_000,
            "train.log_every_steps": 1000,
            "model.hidden": 1400,
        }
    )
    setup = open_setup(recipe)
    loader = TrainLoader(
        data, setup.card, setup.data, batch_size=128, seed=0, world=World(), cache="memory"
    )
    return Trainer(
        setup=setup,
        loader=loader,
        validate=lambda module, epoch: {"accuracy": 0.0},
        world=World(),
        emit=NullEmit(),
        store=store,
    )


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure_folder(data: Path, folder: Path) -> dict[str, Any]:
    """Seconds of a save to a folder, and their share of the time between two saves."""
    trainer = make_trainer(data, CheckpointFolder(folder, NullEmit(), keep=2))
    train_for(trainer, 1.0)
    seconds, cpu = [], []
    for _ in range(10):
        trainer.train_epoch()
        trainer.progress.epoch, trainer.progress.consumed = trainer.progress.epoch + 1, 0
        began, cpu_began = time.perf_counter(), time.thread_time()
        trainer.save_checkpoint()
        seconds.append(time.perf_counter() - began)
        cpu.append(time.thread_time() - cpu_began)
    return {
        "checkpoint_bytes": size_of(max(folder.glob("step-*"))),
        "save_seconds": statistics.median(seconds),
        "save_cpu_seconds": statistics.median(cpu),
        "share_of_interval": statistics.median(seconds) / UPLOAD_SECONDS,
    }


def measure_upload(data: Path, folder: Path, checkpoint_bytes: int) -> dict[str, Any]:
    """The speed of the steps with and without an upload beside them."""
    with _slow_store(folder, int(checkpoint_bytes / UPLOAD_SECONDS)) as address:
        store = PublishedCheckpoints(
            folder / "checkpoints", NullEmit(), RunStorage.open(address), keep=2
        )
        trainer = make_trainer(data, store)
        train_for(trainer, 2.0)
        pairs, uploads = [], []
        for _ in range(ROUNDS):
            without = train_for(trainer, WINDOW_SECONDS)
            began = time.perf_counter()
            trainer.save_checkpoint()
            beside = train_for(trainer, WINDOW_SECONDS)
            store.wait()
            uploads.append(time.perf_counter() - began)
            pairs.append((without, beside))
    slower = [beside.seconds / without.seconds - 1 for without, beside in pairs]
    costlier = [beside.cpu_seconds / without.cpu_seconds - 1 for without, beside in pairs]
    other = [beside.other_cpu_share - without.other_cpu_share for without, beside in pairs]
    return {
        "upload_seconds": statistics.median(uploads),
        "steps_slower_by_the_clock": statistics.median(slower),
        "steps_slower_by_the_clock_range": [min(slower), max(slower)],
        "step_cpu_more": statistics.median(costlier),
        "upload_cpu_share": statistics.median(other),
        "steps_slower_at_most": statistics.median(map(sum, zip(costlier, other))),
        "rounds": ROUNDS,
    }


@contextmanager
def _slow_store(folder: Path, bytes_a_second: int) -> Iterator[str]:
    from faulty_server import wire_to
    from s3_server import S3Server, environment

    server = S3Server(folder / "server")
    try:
        server.start()
        os.environ.update(environment(server.endpoint))
        import boto3

        boto3.client("s3").create_bucket(Bucket=BUCKET)
        with wire_to(server.port) as wire:
            wire.always = f"trickle:{bytes_a_second}"
            os.environ["AWS_ENDPOINT_URL"] = wire.address
            yield f"s3://{BUCKET}/run"
    finally:
        server.stop()


def main() -> None:
    options = common.arguments(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pack.pack("digits", folder / "digits")
        saved = measure_folder(folder / "digits", folder / "plain")
        uploaded = measure_upload(folder / "digits", folder, saved["checkpoint_bytes"])
    entry = {"folder": saved, "upload": uploaded, **common.machine("torch", "s3fs")}
    common.record(options.results, "checkpoint_upload", entry)
    print(f"checkpoint          {saved['checkpoint_bytes'] / 1e6:.1f} MB")
    print(f"save to a folder    {saved['share_of_interval']:.2%} of {UPLOAD_SECONDS:.0f} s")
    print(f"upload              {uploaded['upload_seconds']:.1f} s")
    print(f"steps beside it     {uploaded['steps_slower_by_the_clock']:+.2%} by the clock")
    print(f"by CPU time         {uploaded['steps_slower_at_most']:+.2%} at most")


if __name__ == "__main__":
    main()
