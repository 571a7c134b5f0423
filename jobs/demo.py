"""`make demo`: the main job on real images, from pixels to predictions of a promoted model.

Each step does what the `tessera` command printed above it does. Only the data set is special to the
demo.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from jobs.cli import run as run_command
from jobs.shared.terminal import say

UNSEEN = 10
"""Number of images of the test split that the promoted model predicts."""


GROUP = "training"


@click.command(short_help="Run the whole path on the bundled digits, in about a minute.")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed.")
@click.option("--verbose", is_flag=True, help="Show Ray's output, and tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(seed: int, verbose: bool, as_json: bool) -> int:
    """Pack the bundled digits, train a model, evaluate it, promote it, and predict with it."""
    from jobs.shared.terminal import show_facts, show_json
    from pipelines.data import card as cards
    from pipelines.promotion import champions
    from pipelines.workflows import packaged_recipes, services
    from pipelines.workflows.context import Context
    from pipelines.workflows.evaluate import evaluate
    from pipelines.workflows.pack import pack
    from pipelines.workflows.promote import promote
    from pipelines.workflows.train import train

    began = time.monotonic()
    context = Context.from_environment()
    data = context.home / "data" / "digits"
    if not (data / cards.FILE).is_file():
        _step("tessera pack digits --to .tessera/data/digits")
        packed = pack("digits", to=data, context=context)
        counts = [f"{name} {split.samples:,}" for name, split in packed.card.splits.items()]
        say(f"packed {', '.join(counts)}; digest {packed.card.digest[:12]}")
    _step(f"tessera train digits --data .tessera/data/digits --set seed={seed}")
    recipe = packaged_recipes.start("digits").with_overrides(
        {"data.path": str(data), "data.digest": cards.read(data).digest, "seed": seed}
    )
    outcome = train(recipe, verbose=verbose, context=context)
    version = outcome.version
    reference = f"{version.name}/{version.number}"
    _step(f"tessera evaluate {reference} --data .tessera/data/digits")
    evaluation = evaluate(version, data=data, report=False, intervals=False, context=context)
    _step(f"tessera promote {version.name}/{version.number}")
    registry = services.open_registry(context)
    promotion = promote(version, context=context)
    word = "promoted" if promotion.passed else "not promoted"
    say(f"version {version.number} {word}: {promotion.why}")
    champion = f"models:/{version.name}@{champions.CHAMPION}"
    _step(f"tessera predict {champion} .tessera/demo/unseen")
    right, total = _predict_unseen(champion, data, context.home / "demo" / "unseen")
    facts: dict[str, Any] = {
        "family": recipe.family,
        "dataset": f"{version.name}, {evaluation.samples} test images",
        "test accuracy": round(evaluation.metrics["accuracy"], 4),
        "images/s": round(outcome.images_per_second),
        "run": outcome.link if as_json else services.page(context, outcome.link),
        "model version": reference,
        "aliases": ", ".join(registry.version(version.name, version.number).aliases),
        "champion": f"version {registry.version(version.name, champions.CHAMPION).number}",
        "unseen images": f"{right} of {total} right, in a fresh process",
        "seconds": round(time.monotonic() - began),
    }
    if as_json:
        show_json(facts)
    else:
        click.echo()
        show_facts(facts)
        click.echo(f"\nopen the pages with: {_tessera()} up")
    return 0


def _step(text: str) -> None:
    say(f"\n$ {text}")


def _tessera() -> str:
    """The command to type: its path if this environment is in the current folder, else its name."""
    script = Path(sys.executable).with_name("tessera")
    return str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) else "tessera"


def _predict_unseen(model: str, data: Path, folder: Path) -> tuple[int, int]:
    """Predicts test images in a fresh process. Returns the numbers of right ones and of all."""
    from pipelines.data import card as cards
    from pipelines.data.shards import ShardReader

    folder.mkdir(parents=True, exist_ok=True)
    card = cards.read(data)
    reader = ShardReader(data, card, "test")
    truth = {}
    stride = max(1, len(reader) // UNSEEN)
    for position in range(0, stride * UNSEEN, stride):
        sample = reader.read(position)
        path = folder / f"{position:04d}.png"
        path.write_bytes(sample.image)
        truth[path.name] = card.classes[sample.label]
    process = subprocess.run(
        [sys.executable, "-m", "tessera", "predict", model, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    right = 0
    for line in process.stdout.splitlines():
        prediction = json.loads(line)
        name = Path(prediction["path"]).name
        right += prediction["class"] == truth[name]
        label, probability = prediction["class"], prediction["probability"]
        say(f"{name}: predicted {label} ({probability:.1%}), is {truth[name]}")
    return right, len(truth)


if __name__ == "__main__":
    run_command(command, "tessera demo")
