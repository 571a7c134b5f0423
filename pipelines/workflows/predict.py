"""Predicts images with a registered model, or generates new ones.

In: a registered version; images, a number of samples, or codes to decode. Out: a
`PredictionResult` per input, in order, and image and result files if folders are given. Must not
print, nor read the environment.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.core.errors import TesseraError, UsageError, unknown
from pipelines import tag_names
from pipelines.data.image_reading import OPTIONS, ImageReading, parse_options
from pipelines.workflows.prediction_files import PredictionFiles

if TYPE_CHECKING:
    from models.core.family import DataSpec, Prediction
    from pipelines.inference.predictor import Predictor
    from pipelines.interfaces import Version
    from pipelines.workflows.context import Context

    StrPath = str | os.PathLike[str]

_NAMED = ("path", "error", "model", "version")


@dataclass(frozen=True)
class PredictionResult:
    """What a model predicts for one input.

    `output` is the JSON object that `tessera predict` prints; docs/predictions.md lists the fields
    of each task. An input that can't be read has an `error` and no other field.
    """

    output: Mapping[str, Any] = field(repr=False)

    @property
    def path(self) -> Path | None:
        """The image's file; None for an image that the model generated, and for an address."""
        path = self.output.get("path")
        return None if path is None or "://" in path else Path(path)

    @property
    def error(self) -> str | None:
        """Why the input couldn't be read; None if it could."""
        return self.output.get("error")

    @property
    def label(self) -> str | None:
        """The most probable class; None if the task predicts no single class."""
        return self.output.get("class")

    @property
    def probability(self) -> float | None:
        """The probability of `label`, between 0 and 1; None if the task gives none."""
        return self.output.get("probability")

    @property
    def fields(self) -> dict[str, Any]:
        """What the task predicts, as plain JSON: `objects`, `top5`, `similarity`, …"""
        return {name: value for name, value in self.output.items() if name not in _NAMED}

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `tessera predict` prints."""
        return dict(self.output)

    def __repr__(self) -> str:
        return f"PredictionResult({self.to_dict()!r})"


@dataclass(frozen=True)
class PredictionOptions:
    """What to predict, and which files to write.

    Images, `samples` or `decode` must be given, and only one of these.

    Args:
        paths: Image files, folders, globs, tars, http and https addresses, and `-` for an image or
            a list on standard input.
        lists: Files with one input on each line.
        allowed_hosts: HOST or HOST:PORT of the addresses that may be read.
        notify: Called with a line for the user, on the files that are left out.
        options: How image files are read, `range` and `max_pixels`, as for `pack`; by default as
            the training data was packed.
        annotated: Folder for each image with its prediction drawn on it.
        results: Folder for predictions as files: COCO results of objects, PNGs of masks and of
            generated images.
        samples: Number of images to generate, from `seed`.
        decode: JSON lines file with codes for an autoencoder to decode.
        gallery: Folder with one subfolder of images for each identity, to identify the images by.
        compare: Whether to compare each image with the first one.

    Raises UsageError if these options can't be combined.
    """

    paths: tuple[str, ...] = ()
    annotated: Path | None = None
    results: Path | None = None
    samples: int | None = None
    seed: int = 0
    decode: Path | None = None
    gallery: Path | None = None
    compare: bool = False
    lists: tuple[Path, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    notify: Callable[[str], None] = field(default=lambda line: None, repr=False)
    options: Mapping[str, str] = field(default_factory=dict)

    def reading(self, trained: ImageReading) -> ImageReading:
        """How image files are read, where those of the training data were read as `trained`."""
        for name in self.options:
            if name not in OPTIONS:
                raise unknown("option", name, OPTIONS)
        given = parse_options(self.options)
        if given.all_frames:
            raise UsageError(
                "frames=all is for packing: the first frame of a file is predicted",
                hint="leave the option out, and predict other frames as files of their own",
            )
        return replace(
            trained, **{name: getattr(given, name) for name in self.options if name != "frames"}
        )

    def __post_init__(self) -> None:
        images = self.paths or self.lists
        self.reading(ImageReading())  # an invalid option is refused before the model is loaded
        kinds = {"PATHS": images, "--samples": self.samples, "--decode": self.decode}
        given = [name for name, value in kinds.items() if value]
        if len(given) != 1:
            problem = f"{' and '.join(given)} don't go together" if given else "nothing to predict"
            raise UsageError(problem, hint="name images, or give --samples N, or --decode FILE")
        if self.gallery and not images:
            raise UsageError("--gallery needs images", hint="name some")
        if self.compare and not images:
            raise UsageError("--compare needs images", hint="name two or more")
        if self.compare and self.gallery:
            raise UsageError("--compare and --gallery don't go together", hint="use one of them")


class TrainedModel:
    """A registered version, loaded into this process. Made by `load`."""

    def __init__(self, predictor: Predictor, version: Version) -> None:
        self._predictor = predictor
        self.version = version

    def __repr__(self) -> str:
        return f"TrainedModel(models:/{self.version.name}/{self.version.number}, {self.task})"

    @property
    def task(self) -> str:
        """Such as `classification` or `detection`."""
        return self._predictor.task.name

    @property
    def data(self) -> DataSpec:
        """What the network was trained on: image size, channels, classes."""
        return self._predictor.data

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty for a task without classes."""
        return tuple(self.data.classes)

    def predict(
        self,
        paths: StrPath | Iterable[StrPath],
        *,
        gallery: StrPath | None = None,
        compare: bool = False,
        annotated: StrPath | None = None,
        results: StrPath | None = None,
        allowed_hosts: Iterable[str] = (),
        notify: Callable[[str], None] = lambda line: None,
        options: Mapping[str, str] | None = None,
    ) -> Iterator[PredictionResult]:
        """Predicts images one by one, as the iterator is read.

        Args:
            paths: One or several image files, folders, globs, tars and addresses.

        The other arguments are those of `PredictionOptions`. Raises UsageError if they don't fit
        the model. An image that can't be read is not an error here: see `PredictionResult.error`.
        """
        return self.run(
            PredictionOptions(
                paths=_texts(paths),
                gallery=_path(gallery),
                compare=compare,
                annotated=_path(annotated),
                results=_path(results),
                allowed_hosts=tuple(allowed_hosts),
                notify=notify,
                options=dict(options or {}),
            )
        )

    def generate(
        self,
        samples: int,
        *,
        seed: int = 0,
        annotated: StrPath | None = None,
        results: StrPath | None = None,
    ) -> Iterator[PredictionResult]:
        """Generates new images. The first ones don't depend on `samples`."""
        return self.run(
            PredictionOptions(
                samples=samples, seed=seed, annotated=_path(annotated), results=_path(results)
            )
        )

    def run(self, options: PredictionOptions) -> Iterator[PredictionResult]:
        """Yields a result for each input, in order, and writes the files of each result."""
        for output in _outputs(self._predictor, options, self.version):
            yield PredictionResult(
                {**output, "model": self.version.name, "version": self.version.number}
            )


def load(
    model: str | Version, *, device: str = "cpu", context: Context | None = None
) -> TrainedModel:
    """Loads a registered model to predict with.

    Args:
        model: A reference (`NAME`, `NAME/2`, `NAME@champion`) or a version.
        device: Where the network runs: `cpu`, `cuda`, `cuda:1`.
        context: Where MLflow is; from the environment by default.

    Raises TesseraError if there is no such version, or if its files are not the registered ones.
    """
    from pipelines.inference.predictor import Predictor
    from pipelines.training import checkpoints
    from pipelines.training.setup import data_spec
    from pipelines.workflows import model_reference, services
    from pipelines.workflows.context import Context

    context = context or Context.from_environment()
    registry = services.open_registry(context)
    version = model_reference.resolve(registry, model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = registry.download(version, Path(scratch))
        files = checkpoints.read_model(folder, services.registered_digest(version))
    data = data_spec(files.recipe, files.card)
    reading = files.card.image.reading
    predictor = Predictor(files.recipe, data, files.weights, device=device, reading=reading)
    return TrainedModel(predictor, version)


def predict(
    model: str | Version,
    paths: StrPath | Iterable[StrPath] = (),
    *,
    samples: int | None = None,
    seed: int = 0,
    decode: StrPath | None = None,
    gallery: StrPath | None = None,
    compare: bool = False,
    annotated: StrPath | None = None,
    results: StrPath | None = None,
    lists: Iterable[StrPath] = (),
    allowed_hosts: Iterable[str] = (),
    notify: Callable[[str], None] = lambda line: None,
    options: Mapping[str, str] | None = None,
    device: str = "cpu",
    context: Context | None = None,
) -> Iterator[PredictionResult]:
    """Loads a registered model and predicts with it, as `tessera predict` does.

    To predict more than once, use `load`. The arguments are those of `load` and of
    `PredictionOptions`; raises as these. The model is loaded when this is called, the images are
    read as the iterator is read.
    """
    wanted = PredictionOptions(
        paths=_texts(paths),
        annotated=_path(annotated),
        results=_path(results),
        samples=samples,
        seed=seed,
        decode=_path(decode),
        gallery=_path(gallery),
        compare=compare,
        lists=tuple(map(Path, lists)),
        allowed_hosts=tuple(allowed_hosts),
        notify=notify,
        options=dict(options or {}),
    )
    return load(model, device=device, context=context).run(wanted)


def _texts(paths: StrPath | Iterable[StrPath]) -> tuple[str, ...]:
    if isinstance(paths, str | os.PathLike):
        return (os.fspath(paths),)
    return tuple(os.fspath(path) for path in paths)


def _path(path: StrPath | None) -> Path | None:
    return None if path is None else Path(path)


def _outputs(
    predictor: Predictor, options: PredictionOptions, version: Version
) -> Iterator[dict[str, Any]]:
    reading = options.reading(predictor.reading)
    files = PredictionFiles(predictor, options.annotated, options.results, reading)
    if options.samples:
        for number, prediction in enumerate(predictor.generate(options.samples, options.seed)):
            name = f"sample-{number:05d}"
            output = predictor.task.prediction_to_json(prediction, predictor.data)
            written = files.write(name, prediction)
            yield {"sample": number, "seed": options.seed, **output, **written}
    elif options.decode:
        for number, prediction in enumerate(predictor.decode(read_codes(options.decode))):
            yield {"line": number + 1, **files.write(f"decoded-{number:05d}", prediction)}
    else:
        yield from _image_outputs(predictor, options, version, files, reading)
    files.close()


def _image_outputs(
    predictor: Predictor,
    options: PredictionOptions,
    version: Version,
    files: PredictionFiles,
    reading: ImageReading,
) -> Iterator[dict[str, Any]]:
    from pipelines.inference.inputs import LeftOut, expand, read_list

    identify = _identifier(predictor, options, version, reading)
    lists = (line for path in options.lists for line in read_list(path))
    left_out, number, animated = LeftOut(), -1, 0
    inputs = expand((*options.paths, *lists), hosts=options.allowed_hosts, left_out=left_out)
    for number, result in enumerate(predictor.predict(inputs, reading)):
        output = result.output
        animated += result.frames > 1
        if options.compare and not number and result.prediction is None:
            raise TesseraError(output["error"], hint="the others are compared with it")
        if result.prediction is not None:
            if identify:
                output = {**output, **identify(result.prediction)}
            output = {**output, **files.write(result.source, result.prediction)}
        yield output
    if animated:
        options.notify(
            f"several frames or pages in {animated:,} of {number + 1:,} inputs: the first is "
            "predicted"
        )
    if left_out.counts:
        options.notify(str(left_out))
    if number < 0:
        raise UsageError("nothing to predict: the lists name no image", hint="name some")


def _identifier(
    predictor: Predictor, options: PredictionOptions, version: Version, reading: ImageReading
) -> Callable[[Prediction], dict[str, Any]] | None:
    """A function that identifies an embedding, or compares it with the first one; None without
    `gallery` and `compare`."""
    if not options.gallery and not options.compare:
        return None
    from pipelines.inference import identify

    threshold = json.loads(version.tags.get(tag_names.METRICS, "{}")).get("val/threshold")
    if options.gallery:
        return identify.build_gallery(predictor, options.gallery, threshold, reading)
    return identify.PairSimilarity(predictor, threshold)


def read_codes(path: Path) -> list[list[float]]:
    """The `code` of each line of a JSON lines file, as `tessera predict` writes them."""
    codes: list[list[float]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TesseraError(f"{path} can't be read: {error}") from None
    for line in lines:
        code = _code(line)
        if not code or (codes and len(code) != len(codes[0])):
            raise TesseraError(
                f"{path}, line {len(codes) + 1} has no code, or one of another length",
                hint="give lines with a code, as tessera predict --out writes",
            )
        codes.append(code)
    return codes


def _code(line: str) -> list[float]:
    """The code in a line; empty if there is none."""
    try:
        code = json.loads(line)["code"]
        return [float(value) for value in code if type(value) in (int, float)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
