"""What the driver sends to the training workers, and what rank 0 sends back.

Both are pickled between processes that run the same code. Must not know torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.data.card import Card
from pipelines.recipe import Recipe


@dataclass(frozen=True)
class TrainingPayload:
    """One training, as every worker gets it.

    Args:
        recipe: With the digest of its data set.
        card: Of the data set. Sent along, so that no worker has to read it again.
        run_dir: Folder of the run. Without `storage` all workers see it under the same path; with
            one it holds the machine's working copies.
        until_epoch: Stop after this epoch although the recipe has more; None to train to the end.
        changing: Paths of settings that may differ from the checkpoint that is resumed.
        cache: Where copies of remote shards lie, as `cache_payload` gives it.
        storage: Address of the run's files in an object store; empty if `run_dir` has them.
        attempt: Number of the driver's lease on `storage`; 0 without one.
        shared_file: A file that the driver has written in `run_dir`. Without `storage` every worker
            must see it. With `storage`, a worker that doesn't removes its copy of `run_dir` at the
            end; empty: it stays.
    """

    recipe: Recipe
    card: Card
    run_dir: Path
    until_epoch: int | None = None
    changing: tuple[str, ...] = ()
    cache: Mapping[str, Any] = field(default_factory=dict)
    storage: str = ""
    attempt: int = 0
    shared_file: str = ""


@dataclass(frozen=True)
class TrainingSummary:
    """What rank 0 reports when the workers are done.

    Args:
        checkpoint: Folder name of the best checkpoint.
        newest: Folder name of the newest checkpoint.
        step: Optimizer steps before the best checkpoint.
        epoch: Epoch of the best checkpoint, counted from 1.
        epochs: Epochs that were trained in all.
        images_per_second: Speed of all workers together in the last logging window.
        precision: fp32 or bf16.
        ended: Whether the training is over; False if it stopped at `until_epoch`.
        metrics: Validation metrics of the best checkpoint; empty unless `ended`.
    """

    checkpoint: str
    newest: str
    step: int
    epoch: int
    epochs: int
    images_per_second: float
    precision: str
    ended: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
