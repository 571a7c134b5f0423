"""Exports a registered version to one file and compares its predictions with the model's."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.data.card import Card
    from pipelines.inference.export import Array, ExportCheck
    from pipelines.inference.predictor import Predictor
    from pipelines.interfaces import Version
    from pipelines.training.checkpoints import Model
    from pipelines.workflows.context import Context

MOST_IMAGES = 1000
"""Of the test split, from its beginning, are compared."""


BATCH = 32
"""Images that are compared at once, at most. Neither 1 nor 2, which the graph was made with."""


def export(
    context: Context,
    model: str,
    form: str,
    *,
    out: Path | None = None,
    data: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Writes the file, or raises and leaves none. Gives what `--json` prints."""
    import tempfile

    from models.core.errors import UsageError
    from pipelines.inference import export as inference_export
    from pipelines.inference.predictor import Predictor
    from pipelines.storage.atomic import replace_file
    from pipelines.training import checkpoints
    from pipelines.training.setup import data_spec
    from pipelines.workflows import model_reference, services

    inference_export.check_installed(form)
    registry = services.open_registry(context)
    version = model_reference.resolve(registry, model)
    out = out or Path(f"{version.name}-{version.number}.{form}")
    if out.exists() and not out.is_file():
        raise UsageError(f"{out} is no file", hint="name another")
    if out.exists() and not force:
        raise UsageError(f"{out} is already there", hint="name another, or --force")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent} is no folder", hint="make it first")
    with tempfile.TemporaryDirectory() as folder:
        files = registry.download(version, Path(folder))
        found = checkpoints.read_model(files, services.registered_digest(version))
    where, card = _data_of(found, data)
    predictor = Predictor(found.recipe, data_spec(found.recipe, found.card), found.weights)
    metadata = describe(found, version, predictor)
    seen = predictor.data
    with replace_file(out, f".{form}") as part:
        inference_export.write(
            predictor.exportable,
            (seen.height, seen.width, seen.channels),
            part,
            form=form,
            output=metadata["output"],
            metadata=metadata,
        )
        comparison = inference_export.compare(
            inference_export.load(part, form),
            pairs(predictor, found, where, card),
            classes=bool(seen.classes) and predictor.task.knows_classes,
        )
        _insist(comparison, form)
    return {
        "model": f"models:/{version.name}/{version.number}",
        "format": form,
        "file": str(out),
        "size_bytes": out.stat().st_size,
        "input": metadata["input"],
        "output": metadata["output"],
        "data": where,
        "same_data": card.digest == found.card.digest,
        "images": comparison.images,
        "largest_difference": comparison.largest,
        "other_class": comparison.other_class,
    }


def _data_of(found: Model, data: str | None) -> tuple[str, Card]:
    """Where the test images are, and their card."""
    from models.core.errors import UsageError
    from pipelines.data import card as cards
    from pipelines.storage.base import absolute_location
    from pipelines.storage.open import open_storage

    where = absolute_location(data or found.recipe.data.path)
    if data is None and open_storage(where).size(cards.FILE) is None:
        raise UsageError(
            f"the model's data set isn't in {where} any more", hint="say where it is: --data DIR"
        )
    card = cards.read(where)
    if data is None and card.digest != found.card.digest:
        raise UsageError(
            f"in {where} lies another data set than the model was trained on",
            hint="say on which to compare: --data DIR",
        )
    card.split("test")
    return where, card


def pairs(
    predictor: Predictor, found: Model, where: str, card: Card
) -> Iterator[tuple[Array, Array]]:
    """Batches of test images, uint8 (B, H, W, C), each with what the model answers. The first image
    is a batch of its own."""
    import dataclasses

    import numpy as np

    from pipelines.data.loading.loaders import EvalLoader
    from pipelines.interfaces import World

    count = min(card.split("test").samples, MOST_IMAGES)
    loader = EvalLoader(
        where,
        card,
        dataclasses.replace(predictor.data, task="images", classes=(), counts=()),
        batch_size=min(BATCH, predictor.task.eval_batch),
        world=World(),
        split="test",
        only=np.arange(count),
        fit=found.recipe.data.fit,
        cache="none",
    )
    for number, batch in loader.batches():
        images = batch["image"]
        for some in (images[:1], images[1:]) if number == 0 else (images,):
            if len(some):
                asked = some.permute(0, 2, 3, 1).contiguous().numpy()
                yield asked, predictor.tensor(some).numpy()


def describe(found: Model, version: Version, predictor: Predictor) -> dict[str, Any]:
    """What the file says of itself."""
    data, recipe = predictor.data, found.recipe
    return {
        "model": version.name,
        "version": version.number,
        "digest": found.digest,
        "family": recipe.family,
        "variant": recipe.variant,
        "task": predictor.task.name,
        "classes": list(data.classes),
        "data": found.card.name,
        "data_digest": found.card.digest,
        "input": {
            "dtype": "uint8",
            "layout": "batch, height, width, channels",
            "shape": ["batch", data.height, data.width, data.channels],
            "fit": recipe.data.fit,
        },
        "output": predictor.task.output_name or "answers",
        "tessera": importlib.metadata.version("tessera-train"),
        "torch": importlib.metadata.version("torch"),
    }


def _insist(comparison: ExportCheck, form: str) -> None:
    """A TesseraError where the file doesn't answer as the model does."""
    from models.core.errors import TesseraError
    from models.core.serving import ABSOLUTE, RELATIVE

    if not comparison.within:
        raise TesseraError(
            f"the {form} file's answers differ from the model's by up to {comparison.largest:.2g}; "
            f"{ABSOLUTE:g} and {RELATIVE:g} of the value are allowed",
            hint="no file was kept" + ("; try --format pt2" if form == "onnx" else ""),
        )
