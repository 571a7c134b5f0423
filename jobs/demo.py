"""`make demo`: the main job on real images, from pixels to a promoted model that answers.

Each step is what the `tessera` command above it does; nothing here is special to the demo but the
choice of data.
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

UNSEEN = 10
"""Images of the test split that the finished model is asked about."""


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
    right, asked = _ask(champion, data, context.home / "demo" / "unseen")
    facts: dict[str, Any] = {
        "family": recipe.family,
        "dataset": f"{version.name}, {evaluation.samples} test images",
        "test accuracy": round(evaluation.metrics["accuracy"], 4),
        "images/s": round(outcome.images_per_second),
        "run": outcome.link if as_json else services.page(outcome.link),
        "model version": reference,
        "aliases": ", ".join(registry.version(version.name, version.number).aliases),
        "champion": f"version {registry.version(version.name, champions.CHAMPION).number}",
        "unseen images": f"{right} of {asked} right, asked in a fresh process",
        "seconds": round(time.monotonic() - began),
    }
    if as_json:
        show_json(facts)
    else:
        click.echo()
        show_facts(facts)
        click.echo(f"\nopen the pages with: {_tessera()} up")
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _step(text: str) -> None:
    say(f"\n$ {text}")


def _tessera() -> str:
    """How a person calls the command here: inside the project's own environment or by name."""
    beside = Path(sys.executable).with_name("tessera")
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else "tessera"


def _ask(model: str, data: Path, folder: Path) -> tuple[int, int]:
    """Asks a fresh process about images of the test split; gives (right answers, questions)."""
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
    called = subprocess.run(
        [sys.executable, "-m", "tessera", "predict", model, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    right = 0
    for line in called.stdout.splitlines():
        answer = json.loads(line)
        name = Path(answer["path"]).name
        right += answer["class"] == truth[name]
        say(f"{name}: {answer['class']} ({answer['probability']:.1%}), is {truth[name]}")
    return right, len(truth)


if __name__ == "__main__":
    run_command(command, "tessera demo")
