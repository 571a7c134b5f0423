"""The options of predict and the files it writes, for every family, as documented."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import examples
import numpy as np
import pytest
from PIL import Image

import models
from models.core.errors import TesseraError, UsageError
from pipelines import recipe as recipes
from pipelines.inference.predictor import Predictor
from pipelines.interfaces import Version
from pipelines.workflows import predict
from pipelines.workflows.context import Context

DOCUMENT = Path(__file__).parents[3] / "docs" / "predictions.md"
VERSION = Version("m", 1, "r", {"tessera.metrics": json.dumps({"val/threshold": 0.5})})
SIZE = (50, 30)
"""Width and height of the images to predict: not those of the networks' input."""


def predictor(name: str) -> Predictor:
    """Of an untrained network: its predictions are meaningless, but have the right form."""
    family = models.get(name)
    weights = examples.tiny(family, seed=1).state_dict()
    return Predictor(recipes.start(name, "tiny"), examples.spec(family), weights)


def outputs(model: Predictor, options: predict.PredictionOptions) -> list[dict[str, Any]]:
    """The lines that the command prints."""
    return [result.to_dict() for result in predict.TrainedModel(model, VERSION).run(options)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    for number in range(3):
        draw = np.random.default_rng(number)
        pixels = draw.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return [str(path) for path in sorted(folder.iterdir())]


def documented(task: str) -> set[str]:
    """The fields that the documentation lists for a task."""
    sections = re.split(r"^## ", DOCUMENT.read_text(), flags=re.MULTILINE)
    (section,) = [s for s in sections if s.startswith(task.replace("_", " ") + "\n")]
    return set(re.findall(r"`(\w+)`", section))


@pytest.mark.parametrize("name", models.names())
def test_every_family_writes_files(name: str, images: list[str], tmp_path: Path) -> None:
    untrained = predictor(name)
    task = untrained.task
    wants = {"annotated": tmp_path / "annotated"}
    written = task.name not in ("classification", "verification")
    if written:
        wants["results"] = tmp_path / "results"
    given = {"paths": tuple(images)} if task.takes_images else {"paths": (), "samples": 3}
    lines = outputs(untrained, predict.PredictionOptions(**given, **wants))
    assert len(lines) == 3
    fields = documented(task.name)
    if task.name == "instance_segmentation":
        fields |= documented("detection")
    for line in lines:
        assert set(line) - {"path", "annotated", "result", "model", "version"} <= fields
        assert Image.open(tmp_path / "annotated" / line["annotated"]).mode == "RGB"
        for one in line.get("objects", []):
            assert set(one) <= fields
            left, top, right, bottom = one["box"]
            assert 0 <= left <= right <= SIZE[0]
            assert 0 <= top <= bottom <= SIZE[1]
        json.dumps(line, allow_nan=False)
    if task.writes_coco_results:
        objects = json.loads((tmp_path / "results" / "results.json").read_text())
        assert {one["image_id"] for one in objects} <= {1, 2, 3}
        assert len(objects) == sum(len(line["objects"]) for line in lines)
        assert all(1 <= one["category_id"] <= len(untrained.data.classes) for one in objects)
    elif written:
        made = [Image.open(tmp_path / "results" / line["result"]) for line in lines]
        if task.name == "semantic_segmentation":
            assert {(image.mode, image.size) for image in made} == {("L", SIZE)}
        if task.name == "upscaling":
            scale = lines[0]["scale"]
            assert {image.size for image in made} == {(SIZE[0] * scale, SIZE[1] * scale)}


@pytest.mark.parametrize("name", ["cnn", "embedding"])
def test_predictions_without_a_file_form_are_refused(
    name: str, images: list[str], tmp_path: Path
) -> None:
    options = predict.PredictionOptions(tuple(images), results=tmp_path / "results")
    with pytest.raises(UsageError, match="can't be written as files"):
        outputs(predictor(name), options)


def test_every_task_is_documented() -> None:
    for name in models.names():
        assert documented(models.get(name).task.name)
    with pytest.raises(ValueError, match="not enough values"):
        documented("telepathy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": ()}, "nothing to predict"),
        ({"paths": ("a.png",), "samples": 3}, "PATHS and --samples"),
        ({"paths": (), "samples": 3, "decode": Path("x")}, "--samples and --decode"),
        ({"paths": (), "samples": 3, "gallery": Path("x")}, "--gallery needs images"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        predict.PredictionOptions(**options)


def test_options_of_another_task_are_refused(images: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="generates none"):
        outputs(predictor("cnn"), predict.PredictionOptions(samples=2))
    with pytest.raises(UsageError, match="--samples 64"):
        outputs(predictor("dcgan"), predict.PredictionOptions(tuple(images)))
    codes = tmp_path / "codes.jsonl"
    codes.write_text('{"code": [1, 2]}\n')
    with pytest.raises(UsageError, match="has no codes"):
        outputs(predictor("cnn"), predict.PredictionOptions(decode=codes))
    options = predict.PredictionOptions(tuple(images), gallery=tmp_path)
    with pytest.raises(UsageError, match="has no embeddings"):
        outputs(predictor("cnn"), options)


def test_generated_samples_do_not_depend_on_their_number(tmp_path: Path) -> None:
    few, more = tmp_path / "few", tmp_path / "more"
    for count, folder in ((2, few), (5, more)):
        options = predict.PredictionOptions(samples=count, results=folder, seed=4)
        assert len(outputs(predictor("dcgan"), options)) == count
    names = sorted(path.name for path in few.iterdir())
    assert all((few / name).read_bytes() == (more / name).read_bytes() for name in names)
    assert len({(more / name).read_bytes() for name in names}) == 2


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{}", 1),
        ('{"code": []}', 1),
        ('{"code": "abc"}', 1),
        ('{"code": [1, 2]}\n{"code": [1]}', 2),
        ('{"code": [1, 2]}\nnot JSON', 2),
        ('{"code": ' + "[" * 100_000, 1),
    ],
)
def test_invalid_codes_are_refused_with_their_line(text: str, line: int, tmp_path: Path) -> None:
    path = tmp_path / "codes.jsonl"
    path.write_text(text)
    with pytest.raises(TesseraError, match=f"line {line} has no code"):
        predict.read_codes(path)


def test_codes_are_read_from_predictions(tmp_path: Path) -> None:
    path = tmp_path / "codes.jsonl"
    path.write_text('{"path": "a.png", "code": [1, 2.5]}\n{"code": [0, -1]}\n')
    assert predict.read_codes(path) == [[1.0, 2.5], [0.0, -1.0]]


def test_a_loaded_model_predicts_files_folders_and_reports_unreadable_files(
    trained_home: Path, images: list[str], tmp_path: Path
) -> None:
    context = Context.from_environment({"TESSERA_HOME": str(trained_home)})
    model = predict.load("digits", context=context)
    assert (model.task, len(model.classes), model.version.number) == ("classification", 10, 1)
    first, missing = model.predict([images[0], tmp_path / "absent.png"])
    assert first.path == Path(images[0])
    assert first.label in model.classes
    assert first.error is None
    assert first.probability is not None
    assert 0.1 <= first.probability <= 1
    assert {"class", "probability"} <= first.fields.keys()
    assert missing.error is not None
    assert (missing.label, missing.probability, missing.fields) == (None, None, {})
    folder = list(model.predict(Path(images[0]).parent, annotated=tmp_path / "drawn"))
    assert [result.path for result in folder] == [Path(path) for path in images]
    assert len(list((tmp_path / "drawn").iterdir())) == 3
    again = predict.predict("digits@challenger", images[0], context=context)
    assert next(again).to_dict() == first.to_dict()


def test_a_model_that_is_not_registered_cannot_be_loaded(trained_home: Path) -> None:
    context = Context.from_environment({"TESSERA_HOME": str(trained_home)})
    with pytest.raises(TesseraError, match="phantom"):
        predict.load("phantom@champion", context=context)
    with pytest.raises(UsageError, match="nothing to predict"):
        predict.predict("phantom", context=context)
