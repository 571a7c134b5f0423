"""`tessera evaluate`: a registered version on one split, every sample once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.cli import run as run_command

if TYPE_CHECKING:
    from pipelines.ports import Version
    from pipelines.promotion import Evaluation


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--data", required=True, metavar="DIR", help="A packed data set.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test")
@click.option("--workers", type=int, default=0, show_default=True, help="0: in this process.")
@click.option("--verbose", is_flag=True, help="Show Ray's own output, and tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str, data: str, split: str, workers: int, verbose: bool, as_json: bool) -> int:
    """Evaluate MODEL (NAME, NAME@alias, NAME/3 or models:/…) and note the figures on its version.

    NAME alone is its newest version. The figures don't depend on the number of workers.
    """
    from jobs.terminal import show_facts, show_json

    version, evaluation = evaluate(model, data, split=split, workers=workers, verbose=verbose)
    if as_json:
        show_json({"model": f"models:/{version.name}/{version.number}", **vars(evaluation)})
        return 0
    show_facts(
        {
            "model": f"models:/{version.name}/{version.number}",
            "data": f"{data} ({evaluation.split}, {evaluation.samples:,} images)",
            **{name: round(value, 4) for name, value in evaluation.figures.items()},
        }
    )
    return 0


def evaluate(
    model: str, data: str | Path, *, split: str = "test", workers: int = 0, verbose: bool = False
) -> tuple[Version, Evaluation]:
    """Evaluates, notes the evaluation on the version and its figures in the version's run."""
    import tempfile

    from jobs import driver, embedded, judges
    from pipelines import cluster, promotion, worker
    from pipelines import recipe as recipes
    from pipelines.data import card as cards
    from pipelines.data.places import storage

    data = storage.absolute(str(data))
    cards.read(data).split(split)
    registry = driver.open_registry()
    version = driver.resolve(registry, model)
    embedded.root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=embedded.root()) as scratch:
        folder = registry.download(version, Path(scratch))
        payload: dict[str, Any] = {
            "model": str(folder),
            "digest": driver.registered_digest(version),
            "data": data,
            "split": split,
        }
        recipe = recipes.build(json.loads(version.tags["tessera.recipe"]))
        if recipe.judge:
            payload["judge"] = str(Path(scratch) / worker.JUDGE)
            judges.fetch(recipe, registry, Path(payload["judge"]))
        name = f"evaluate-{version.name}-{version.number}"
        group = cluster.Group(workers)
        with driver.executor(
            worker.evaluate, group, name=name, storage=Path(scratch) / "ray", verbose=verbose
        ) as execute:
            result = execute(payload, _Silent())
    evaluation = promotion.Evaluation(
        model_digest=payload["digest"],
        data_digest=result["data_digest"],
        split=split,
        samples=result["samples"],
        figures=result["figures"],
        judge_digest=recipe.judge_digest,
    )
    tag = f"tessera.evaluation.{split}"
    if version.tags.get(tag) != evaluation.to_json():
        registry.tag(version, {tag: evaluation.to_json()})
        _log_figures(version, evaluation, data)
    return version, evaluation


def _log_figures(version: Version, evaluation: Evaluation, data: str) -> None:
    """The figures as metrics of the version's run, with the split as its input."""
    from jobs import driver
    from pipelines.data import card as cards
    from pipelines.ports import Point

    tracker = driver.attach_tracker(version.run_id)
    card = cards.read(data)
    tracker.dataset(name=card.name, digest=card.digest, source=data, split=evaluation.split)
    values = {f"{evaluation.split}/{name}": value for name, value in evaluation.figures.items()}
    tracker.metrics([Point(0, time.time_ns() // 1_000_000, values)])


class _Silent:
    """An `Emit` for work whose only result is what it returns."""

    def __call__(self, event: Any) -> None:
        pass

    def flush(self) -> None:
        pass


if __name__ == "__main__":
    run_command(command, "tessera evaluate")
