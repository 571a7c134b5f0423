"""The speed of the training loop compared with a bare PyTorch loop on the same network and images.

Both train `cnn` on the bundled digits in one process, in the same precision and memory format, in
turns in one run. The bare loop has its images decoded, as Tessera has after its first epoch, and
only does forward, backward and step. The ratio counts; the absolute speeds depend on the machine.
Prints a table and writes benchmarks/results/loop_overhead.json.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from models.core.family import BatchRng
from pipelines import recipe as recipes
from pipelines.data.loading.loaders import TrainLoader
from pipelines.data.packing import pack
from pipelines.interfaces import NullEmit, World
from pipelines.recipe import Recipe
from pipelines.training import optim
from pipelines.training.checkpoint_store import CheckpointFolder
from pipelines.training.evaluator import autocast
from pipelines.training.hardware import describe as hardware
from pipelines.training.setup import open_setup
from pipelines.training.trainer import Trainer, resolve_precision

ROUNDS = 5
EPOCHS = 4
RESULT = Path(__file__).with_name("results") / "loop_overhead.json"


def ours(recipe: Recipe, folder: Path) -> float:
    """Images per second of Tessera's loop, from its second epoch on, without validation."""
    setup = open_setup(recipe)
    loader = TrainLoader(
        Path(recipe.data.path),
        setup.card,
        setup.data,
        batch_size=recipe.train.batch_size,
        seed=recipe.seed,
        world=World(),
    )
    trainer = Trainer(
        setup=setup,
        loader=loader,
        validate=lambda module, epoch: {"accuracy": 0.0},
        world=World(),
        emit=NullEmit(),
        store=CheckpointFolder(folder, NullEmit(), keep=recipe.checkpoint.keep),
    )
    trainer.train_epoch()
    seconds = 0.0
    for epoch in range(1, EPOCHS + 1):
        trainer.progress.epoch, trainer.progress.consumed = epoch, 0
        began = time.perf_counter()
        trainer.train_epoch()
        seconds += time.perf_counter() - began
    return loader.samples * EPOCHS / seconds


def bare(recipe: Recipe) -> float:
    """Images per second of the bare loop."""
    setup = open_setup(recipe)
    family, card, data = setup.family, setup.card, setup.data
    precision = resolve_precision(recipe.train.precision, "cpu")
    loader = TrainLoader(Path(recipe.data.path), card, data, batch_size=128, seed=0, world=World())
    transform = family.augment(recipe.augment_settings(), data, train=False)
    batches = [
        transform(step.batch, BatchRng(0, step.total, step.rows)) for step in loader.epoch(0)
    ]
    for batch in batches:
        batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    module = family.build(recipe.config(), data).to(memory_format=torch.channels_last).train()
    optimizer = optim.build(module, recipe.optim["model"])

    def epoch() -> None:
        for batch in batches:
            with autocast("cpu", precision):
                loss = family.loss(module, batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    epoch()
    began = time.perf_counter()
    for _ in range(EPOCHS):
        epoch()
    return loader.samples * EPOCHS / (time.perf_counter() - began)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "digits"
        card = pack.pack("digits", folder)
        recipe = recipes.start("cnn").with_overrides(
            {"data.path": str(folder), "data.digest": card.digest, "train.epochs": EPOCHS + 1}
        )
        pairs = [(ours(recipe, Path(scratch)), bare(recipe)) for _ in range(ROUNDS)]
    ratios = sorted(a / b for a, b in pairs)
    entry = {
        "ours_images_per_second": statistics.median(a for a, _ in pairs),
        "bare_images_per_second": statistics.median(b for _, b in pairs),
        "ratio_median": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
        "rounds": ROUNDS,
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "torch": torch.__version__,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(entry, indent=1) + "\n")
    print(f"ours {entry['ours_images_per_second']:,.0f} images/s")
    print(f"bare {entry['bare_images_per_second']:,.0f} images/s")
    print(f"ratio {entry['ratio_median']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
