"""What `tessera predict` asks, and what it writes beside the lines.

In: a predictor and what is asked: images, new samples, codes to decode, who it is. Out: an answer a
line as plain JSON; pictures and results as files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.core.errors import TesseraError, UsageError
from pipelines import tag_names

if TYPE_CHECKING:
    from models.core.family import Prediction
    from pipelines.inference.predictor import Predictor
    from pipelines.interfaces import Version

COCO_FILE = "results.json"


@dataclass(frozen=True)
class Asked:
    """The options of `tessera predict`. Raises UsageError where they don't go together."""

    paths: tuple[str, ...]
    out: Path | None = None
    pictures: Path | None = None
    results: Path | None = None
    samples: int | None = None
    seed: int = 0
    decode: Path | None = None
    gallery: Path | None = None
    compare: bool = False

    def __post_init__(self) -> None:
        kinds = {"PATHS": self.paths, "--samples": self.samples, "--decode": self.decode}
        given = [name for name, value in kinds.items() if value]
        if len(given) != 1:
            said = f"{' and '.join(given)} don't go together" if given else "nothing is asked"
            raise UsageError(said, hint="name images, or give --samples N, or --decode FILE")
        if self.gallery and not self.paths:
            raise UsageError("--gallery goes with images", hint="name some")
        if self.compare and not self.paths:
            raise UsageError("--compare goes with images", hint="name two or more")
        if self.compare and self.gallery:
            raise UsageError("--compare and --gallery don't go together", hint="ask one by one")


def give(predictor: Predictor, asked: Asked, version: Version) -> Iterator[dict[str, Any]]:
    """An answer for each thing that is asked, in order; the files are written on the way."""
    files = _Files(predictor, asked)
    if asked.samples:
        for number, prediction in enumerate(predictor.generate(asked.samples, asked.seed)):
            name = f"sample-{number:05d}"
            answer = predictor.task.prediction_to_json(prediction, predictor.data)
            yield {"sample": number, "seed": asked.seed, **answer, **files.write(name, prediction)}
    elif asked.decode:
        for number, prediction in enumerate(predictor.decode(read_codes(asked.decode))):
            yield {"line": number + 1, **files.write(f"decoded-{number:05d}", prediction)}
    else:
        yield from _about_images(predictor, asked, version, files)
    files.close()


def _about_images(
    predictor: Predictor, asked: Asked, version: Version, files: _Files
) -> Iterator[dict[str, Any]]:
    from pipelines.inference import predictor as inference_predictor

    liken = _likener(predictor, asked, version)
    for number, found in enumerate(predictor.predict(inference_predictor.expand(asked.paths))):
        answer = found.output
        if asked.compare and not number and found.prediction is None:
            raise TesseraError(answer["error"], hint="it is what the others are compared with")
        if found.prediction is not None:
            if liken:
                answer = {**answer, **liken(found.prediction)}
            answer = {**answer, **files.write(found.path, found.prediction)}
        yield answer


def _likener(
    predictor: Predictor, asked: Asked, version: Version
) -> Callable[[Prediction], dict[str, Any]] | None:
    """What tells of an embedding who it is, or whether it is the same as the first."""
    if not asked.gallery and not asked.compare:
        return None
    from pipelines.inference import identify

    threshold = json.loads(version.tags.get(tag_names.METRICS, "{}")).get("val/threshold")
    if asked.gallery:
        return identify.build_gallery(predictor, asked.gallery, threshold)
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
    """The code in a line; empty where there is none."""
    try:
        code = json.loads(line)["code"]
        return [float(value) for value in code if type(value) in (int, float)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


class _Files:
    """The pictures and results of one call."""

    def __init__(self, predictor: Predictor, asked: Asked) -> None:
        self._predictor, self._pictures, self._results = predictor, asked.pictures, asked.results
        self._names: set[str] = set()
        self._objects: list[dict[str, Any]] = []
        self._images = 0
        for folder in (self._pictures, self._results):
            if folder:
                folder.mkdir(parents=True, exist_ok=True)

    def write(self, source: Path | str, prediction: Prediction) -> dict[str, str]:
        """Writes what was asked for; gives the names of the files, for the answer's line."""
        from pipelines.inference import predictor as inference_predictor

        if not self._pictures and not self._results:
            return {}
        name = inference_predictor.image_file_name(Path(source), self._names)
        written = {}
        if self._pictures:
            self._draw(source, prediction, self._pictures / name)
            written["picture"] = name
        if self._results:
            self._images += 1
            if inference_predictor.save_image(
                self._predictor.task.prediction_to_image(prediction), self._results / name
            ):
                written["result"] = name
            if self._predictor.task.writes_coco_results:
                objects = self._predictor.task.prediction_to_coco(prediction)
                known = {"image_id": self._images, "file_name": Path(source).name}
                self._objects += [known | one for one in objects]
                written["result"] = COCO_FILE
            if "result" not in written:
                raise UsageError(
                    f"answers of {self._predictor.task.name.replace('_', ' ')} are no files",
                    hint="take --out for their lines, or --pictures",
                )
        return written

    def _draw(self, source: Path | str, prediction: Prediction, to: Path) -> None:
        from pipelines.inference import predictor as inference_predictor

        task, data = self._predictor.task, self._predictor.data
        image = None
        if isinstance(source, Path):
            image = inference_predictor.read_image(source, data.channels)
        else:
            image = task.prediction_to_image(prediction)
        if image is None:
            raise UsageError(f"answers of {task.name} can't be drawn")
        panels = task.panels(image, prediction, None, data)
        inference_predictor.draw(panels, data.classes).save(to)

    def close(self) -> None:
        """Writes the COCO results, which are one file."""
        if self._results and self._predictor.task.writes_coco_results:
            from jobs.shared.terminal import json_line

            (self._results / COCO_FILE).write_text(json_line(self._objects) + "\n")
