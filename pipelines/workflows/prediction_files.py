"""The image and result files that a prediction writes.

In: predictions, and the folders for their files. Out: files, and their names. Must not know where
the predictions come from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.core.errors import UsageError

if TYPE_CHECKING:
    from models.core.family import Prediction
    from pipelines.data.image_reading import ImageReading
    from pipelines.inference.inputs import ImageInput
    from pipelines.inference.predictor import Predictor

COCO_FILE = "results.json"


class PredictionFiles:
    """The image and result files of one call."""

    def __init__(
        self,
        predictor: Predictor,
        annotated: Path | None,
        results: Path | None,
        reading: ImageReading,
    ) -> None:
        self._predictor = predictor
        self._annotated, self._results = annotated, results
        self._reading = reading
        self._names: set[str] = set()
        self._objects: list[dict[str, Any]] = []
        self._images = 0
        for folder in (self._annotated, self._results):
            if folder:
                folder.mkdir(parents=True, exist_ok=True)

    def write(self, source: ImageInput | str, prediction: Prediction) -> dict[str, str]:
        """Writes the files of one prediction; returns their names, as fields of its output.
        `source` is the image that was predicted, or a name for one that was made."""
        from pipelines.inference import predictor

        if not self._annotated and not self._results:
            return {}
        file_name = source if isinstance(source, str) else source.file_name
        name = predictor.image_file_name(file_name, self._names)
        written = {}
        if self._annotated:
            self._draw(source, prediction, self._annotated / name)
            written["annotated"] = name
        if self._results:
            self._images += 1
            if predictor.save_image(
                self._predictor.task.prediction_to_image(prediction), self._results / name
            ):
                written["result"] = name
            if self._predictor.task.writes_coco_results:
                objects = self._predictor.task.prediction_to_coco(prediction)
                image = {"image_id": self._images, "file_name": file_name}
                self._objects += [image | one for one in objects]
                written["result"] = COCO_FILE
            if "result" not in written:
                task_name = self._predictor.task.name.replace("_", " ")
                raise UsageError(
                    f"predictions of {task_name} can't be written as files",
                    hint="write their lines with --out, or draw them with --annotated",
                )
        return written

    def _draw(self, source: ImageInput | str, prediction: Prediction, to: Path) -> None:
        from pipelines.inference import predictor

        task, data = self._predictor.task, self._predictor.data
        if isinstance(source, str):
            image = task.prediction_to_image(prediction)
        else:
            image = predictor.read_image(source, data.channels, self._reading)
        if image is None:
            raise UsageError(f"predictions of {task.name} can't be drawn")
        panels = task.panels(image, prediction, None, data)
        predictor.draw_panels(panels, data.classes).save(to)

    def close(self) -> None:
        """Writes the COCO results of all images to one file."""
        if self._results and self._predictor.task.writes_coco_results:
            (self._results / COCO_FILE).write_text(json.dumps(self._objects) + "\n")
