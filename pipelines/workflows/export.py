"""Exports a registered version to one file and compares the file's predictions with the model's.

In: a version and a format. Out: the file and an `ExportedModel`; no file if the predictions differ.
Must not print, nor read the environment.
"""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
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
"""Maximum number of images that are compared, from the start of the test split."""

BATCH = 32
"""Maximum batch size of the comparison. Not 1 or 2: the graph was traced with these sizes, so a
graph that only works with one of them would go unnoticed."""


@dataclass(frozen=True)
class ExportedModel:
    """The result of `export`.

    Args:
        model: The version, as `models:/NAME/NUMBER`.
        format: `onnx` or `pt2`.
        file: Path of the file.
        size_bytes: Its size.
        input: Its input: `dtype`, `layout`, `shape`, `fit`.
        output: Name of its output.
        data: The data set on whose test images the predictions were compared.
        same_data: Whether the model was trained on this data set.
        images: Number of images that were compared.
        largest_difference: Largest difference between a number that the file and the model predict.
        other_class: Number of images for which the file predicts another class; None without
            classes.
    """

    model: str
    format: str
    file: str
    size_bytes: int
    input: Mapping[str, Any]
    output: str
    data: str
    same_data: bool
    images: int
    largest_difference: float
    other_class: int | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `tessera export --json` prints."""
        return asdict(self)


def export(
    model: str | Version,
    *,
    format: str,
    out: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    force: bool = False,
    context: Context | None = None,
) -> ExportedModel:
    """Writes a registered model to a file that needs no Tessera.

    Args:
        model: A reference (`NAME`, `NAME/2`, `NAME@champion`) or a version.
        format: `onnx` for ONNX Runtime, `pt2` for `torch.export.load`.
        out: The file; NAME-NUMBER.FORMAT in the current folder by default.
        data: A packed data set on whose test images to compare; by default the model's own.
        force: Whether an existing file is overwritten.
        context: Where MLflow is; from the environment by default.

    Raises TesseraError, and leaves no file, if the model can't be exported, or if the file's
    predictions differ from the model's.
    """
    from pipelines.inference import export as inference_export
    from pipelines.inference.predictor import Predictor
    from pipelines.storage.atomic import replace_file
    from pipelines.training import checkpoints
    from pipelines.training.setup import data_spec
    from pipelines.workflows import model_reference, services
    from pipelines.workflows.context import Context

    inference_export.check_installed(format)
    context = context or Context.from_environment()
    registry = services.open_registry(context)
    version = model_reference.resolve(registry, model)
    file = Path(out) if out else Path(f"{version.name}-{version.number}.{format}")
    _check_file(file, force=force)
    with tempfile.TemporaryDirectory() as folder:
        files = registry.download(version, Path(folder))
        trained = checkpoints.read_model(files, services.registered_digest(version))
    where, card = _data_of(trained, os.fspath(data) if data else None)
    predictor = Predictor(trained.recipe, data_spec(trained.recipe, trained.card), trained.weights)
    metadata = describe(trained, version, predictor)
    spec = predictor.data
    with replace_file(file, f".{format}") as part:
        inference_export.write(
            predictor.exportable,
            (spec.height, spec.width, spec.channels),
            part,
            form=format,
            output=metadata["output"],
            metadata=metadata,
        )
        check = inference_export.compare(
            inference_export.load(part, format),
            pairs(predictor, trained, where, card),
            classes=bool(spec.classes) and predictor.task.knows_classes,
        )
        _require_same_predictions(check, format)
    return ExportedModel(
        model=f"models:/{version.name}/{version.number}",
        format=format,
        file=str(file),
        size_bytes=file.stat().st_size,
        input=metadata["input"],
        output=metadata["output"],
        data=where,
        same_data=card.digest == trained.card.digest,
        images=check.images,
        largest_difference=check.largest,
        other_class=check.other_class,
    )


def _check_file(file: Path, *, force: bool) -> None:
    from models.core.errors import UsageError

    if file.exists() and not file.is_file():
        raise UsageError(f"{file} is not a file", hint="name another")
    if file.exists() and not force:
        raise UsageError(f"{file} already exists", hint="name another, or --force")
    if not file.parent.is_dir():
        raise UsageError(f"{file.parent} is not a folder", hint="create it first")


def _data_of(trained: Model, data: str | None) -> tuple[str, Card]:
    """The location of the test images, and the card of their data set."""
    from models.core.errors import UsageError
    from pipelines.data import card as cards
    from pipelines.storage.base import absolute_location
    from pipelines.storage.open import open_storage

    where = absolute_location(data or trained.recipe.data.path)
    if data is None and open_storage(where).size(cards.FILE) is None:
        raise UsageError(
            f"the model's data set isn't in {where} any more", hint="give its location: --data DIR"
        )
    card = cards.read(where)
    if data is None and card.digest != trained.card.digest:
        raise UsageError(
            f"{where} has another data set than the one that the model was trained on",
            hint="choose the data set to compare on: --data DIR",
        )
    card.split("test")
    return where, card


def pairs(
    predictor: Predictor, trained: Model, where: str, card: Card
) -> Iterator[tuple[Array, Array]]:
    """Batches of test images, uint8 (B, H, W, C), each with the model's predictions. The
    first image is a batch of its own."""
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
        fit=trained.recipe.data.fit,
        cache="none",
    )
    for number, batch in loader.batches():
        images = batch["image"]
        for some in (images[:1], images[1:]) if number == 0 else (images,):
            if len(some):
                inputs = some.permute(0, 2, 3, 1).contiguous().numpy()
                yield inputs, predictor.exported_output(some).numpy()


def describe(trained: Model, version: Version, predictor: Predictor) -> dict[str, Any]:
    """The metadata that is written into the file."""
    data, recipe = predictor.data, trained.recipe
    return {
        "model": version.name,
        "version": version.number,
        "digest": trained.digest,
        "family": recipe.family,
        "variant": recipe.variant,
        "task": predictor.task.name,
        "classes": list(data.classes),
        "data": trained.card.name,
        "data_digest": trained.card.digest,
        "input": {
            "dtype": "uint8",
            "layout": "batch, height, width, channels",
            "shape": ["batch", data.height, data.width, data.channels],
            "fit": recipe.data.fit,
            **({"range": trained.card.image.range} if trained.card.image.range else {}),
        },
        "output": predictor.task.output_name or "predictions",
        "tessera": importlib.metadata.version("tessera-train"),
        "torch": importlib.metadata.version("torch"),
    }


def _require_same_predictions(comparison: ExportCheck, form: str) -> None:
    """Raises TesseraError if the file's predictions differ from the model's."""
    from models.core.errors import TesseraError
    from models.core.export import ABSOLUTE, RELATIVE

    if not comparison.within:
        raise TesseraError(
            f"the {form} file's predictions differ from the model's by up to "
            f"{comparison.largest:.2g}; {ABSOLUTE:g} and {RELATIVE:g} of the value are allowed",
            hint="no file was kept" + ("; try --format pt2" if form == "onnx" else ""),
        )
