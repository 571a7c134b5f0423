"""`tessera export`: the file, what it is compared with, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import family_sources
import numpy as np
import pytest
from cli_runner import Call
from PIL import Image

import models
from models.core.export import ABSOLUTE
from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.data.packing import pack
from pipelines.inference.export import FORMATS
from pipelines.inference.predictor import Predictor
from pipelines.training import checkpoints
from pipelines.training.setup import data_spec
from pipelines.workflows import export, services, train
from pipelines.workflows.context import Context

pytestmark = pytest.mark.slow

CROOKED = '''"""A cnn whose exported network forgets to divide the pixels by their deviation."""
from models.cnn import Cnn

class Crooked(Cnn):
    def exportable(self, module, data):
        served = super().exportable(module, data)
        served.std.fill_(1.0)
        return served

FAMILY = Crooked()
'''

ALONE = {
    "onnx": """
import sys
import numpy, onnxruntime
onnxruntime.set_default_logger_severity(3)
session = onnxruntime.InferenceSession("it.onnx", providers=["CPUExecutionProvider"])
numpy.save("predictions.npy", session.run(None, {"images": numpy.load("images.npy")})[0])
assert "torch" not in sys.modules
""",
    "pt2": """
import sys
import numpy, torch
network = torch.export.load("it.pt2").module()
numpy.save("predictions.npy", network(torch.from_numpy(numpy.load("images.npy"))).detach().numpy())
""",
}
WITHOUT_TESSERA = """
assert not {"models", "pipelines", "jobs"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def home(trained_home: Path, digits: Path) -> Iterator[Path]:
    """Version 1 of `digits`, and `crooked`, whose exported network isn't the trained one."""
    folder = trained_home.parent
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "crooked.py").write_text(CROOKED)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        fit("elsewhere.crooked", digits, model="crooked")
        yield trained_home


def fit(family: str, data: Path, *, model: str) -> None:
    recipe = recipes.start(family, "tiny").with_overrides(
        {"data.path": str(data), "train.epochs": 1, "workers.count": 0}
    )
    train.train(recipe, model=model, progress=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_is_compared_on_all_test_images(
    form: str, home: Path, here: Path, digits: Path, call: Call
) -> None:
    done = call("export", "digits", "--format", form, "--json")
    assert (done.status, done.err) == (0, "")
    output = json.loads(done.out)
    assert files(here) == [f"digits-1.{form}"]
    assert output["file"] == f"digits-1.{form}"
    assert output["size_bytes"] == (here / f"digits-1.{form}").stat().st_size
    assert output["model"] == "models:/digits/1"
    assert output["images"] == cards.read(digits).split("test").samples
    assert (output["data"], output["same_data"]) == (str(digits), True)
    assert output["largest_difference"] < ABSOLUTE
    assert output["other_class"] == 0
    assert output["input"]["shape"] == ["batch", 8, 8, 1]
    printed = call("export", "digits@challenger", "--format", form, "--out", f"again.{form}")
    assert printed.status == 0
    assert f"on {output['images']} test images of {digits}, the same data" in printed.out
    assert "largest difference" in printed.out
    assert "in 0 images" in printed.out


@pytest.mark.parametrize("form", FORMATS)
def test_the_file_predicts_the_same_without_tessera(
    form: str, home: Path, here: Path, tmp_path: Path, call: Call
) -> None:
    """In a new process, in a folder with nothing else."""
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[:7, :, :, None] * 15.9).astype(np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image[:, :, 0]).save(tmp_path / f"{number}.png")
    np.save(here / "images.npy", pixels)
    assert call("export", "digits", "--format", form, "--out", f"it.{form}").status == 0
    alone = subprocess.run(
        [sys.executable, "-I", "-c", ALONE[form] + WITHOUT_TESSERA],
        cwd=here,
        env={"PATH": os.environ["PATH"], "HOME": str(here)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    predictions = np.load(here / "predictions.npy")
    assert predictions.shape == (7, 10)
    inputs = [str(tmp_path / f"{number}.png") for number in range(len(pixels))]
    lines = call("predict", "digits", *inputs).out.splitlines()
    for row, line in zip(predictions, lines, strict=True):
        output = json.loads(line)
        assert output["class"] == str(row.argmax())
        best = sorted(map(float, row), reverse=True)[:5]
        assert [one["probability"] for one in output["top5"]] == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_with_different_predictions_is_not_kept(
    form: str, home: Path, here: Path, call: Call
) -> None:
    (here / "kept").write_text("as it was")
    done = call("export", "crooked", "--format", form, "--out", "kept", "--force")
    assert done.status == 1
    assert "predictions differ from the model's by up to" in done.err
    assert files(here) == ["kept"]
    assert (here / "kept").read_text() == "as it was"


def test_an_existing_file_is_not_overwritten(home: Path, here: Path, call: Call) -> None:
    (here / "digits-1.pt2").write_text("mine")
    done = call("export", "digits", "--format", "pt2")
    assert (done.status, "--force" in done.err) == (2, True)
    assert (here / "digits-1.pt2").read_text() == "mine"
    assert call("export", "digits", "--format", "pt2", "--force").status == 0
    assert files(here) == ["digits-1.pt2"]
    assert (here / "digits-1.pt2").read_bytes()[:2] == b"PK"


def test_invalid_arguments_are_refused(
    home: Path, here: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, status, part in (
        ("digits", 2, "--format onnx, or --format pt2"),
        ("digits --format tflite", 2, "'tflite'"),
        ("digits --format pt2 --out none/x.pt2", 2, "none is not a folder"),
        ("digits --format pt2 --out /dev/null --force", 2, "/dev/null is not a file"),
        ("digits/7 --format pt2", 1, "it has version 1"),
        ("digits --format pt2 --data none", 1, "is not a packed data set"),
    ):
        done = call("export", *words.split())
        assert (done.status, part in done.err) == (status, True), done.err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = call("export", "digits", "--format", "onnx")
    assert (done.status, "pip install 'tessera-train[onnx]'" in done.err) == (1, True)
    assert files(here) == []


def test_changed_model_files_are_not_exported(home: Path, here: Path, call: Call) -> None:
    registry = services.open_registry(Context.from_environment())
    version = registry.version("digits", 1)
    registry.tag(version, {"tessera.digest": "0" * 64})
    done = call("export", "digits", "--format", "pt2")
    registry.tag(version, {"tessera.digest": version.tags["tessera.digest"]})
    assert (done.status, "not those that were registered" in done.err) == (1, True)
    assert files(here) == []


def test_missing_or_changed_data_are_refused(
    home: Path, here: Path, digits: Path, tmp_path: Path, call: Call
) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    shutil.copytree(digits, data)
    fit("cnn", data, model="moved")
    pack.pack("digits", other, seed=3)
    shutil.rmtree(data)
    gone = call("export", "moved", "--format", "pt2")
    shutil.copytree(other, data)
    replaced = call("export", "moved", "--format", "pt2")
    elsewhere = call("export", "moved", "--format", "pt2", "--data", other)
    assert gone.status == replaced.status == 2
    assert "isn't in" in gone.err
    assert "--data DIR" in gone.err
    assert "another data set" in replaced.err
    assert elsewhere.status == 0
    assert f"of {other}, other data than in training" in elsewhere.out
    assert files(here) == ["moved-1.pt2"]


def test_the_images_that_are_compared(
    home: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test images in the split's order, one alone, then as many as fit into a batch."""
    registry = services.open_registry(Context.from_environment())
    version = registry.version("digits", 1)
    folder = registry.download(version, home / "files")
    trained = checkpoints.read_model(folder, services.registered_digest(version))
    seen = data_spec(trained.recipe, trained.card)
    predictor = Predictor(trained.recipe, seen, trained.weights)
    card = cards.read(digits)
    monkeypatch.setattr(export, "MOST_IMAGES", 70)
    batches = list(export.pairs(predictor, trained, str(digits), card))
    sizes = [len(images) for images, _ in batches]
    assert sizes == [1, export.BATCH - 1, export.BATCH, 70 - 2 * export.BATCH]
    images = np.concatenate([images for images, _ in batches])
    assert (images.shape, images.dtype) == ((70, 8, 8, 1), np.uint8)
    monkeypatch.setattr(export, "MOST_IMAGES", 1000)
    every = np.concatenate([i for i, _ in export.pairs(predictor, trained, str(digits), card)])
    assert len(every) == card.split("test").samples
    assert np.array_equal(every[:70], images)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gives", "classes"),
    [
        ("embedding", "embedding", False),
        ("unet", "probabilities", True),
        ("yolo", "", False),
    ],
)
def test_predictions_that_are_no_classes_are_exported_or_refused(
    name: str, gives: str, classes: bool, home: Path, here: Path, tmp_path: Path, call: Call
) -> None:
    kind = family_sources.READ_FROM[models.get(name).task.reads]
    packed = tmp_path / "packed"
    pack.pack(str(family_sources.SOURCES[kind](tmp_path / "source")), packed, near_duplicates=False)
    recipe = recipes.start(name, "tiny").with_overrides(
        {"data.path": str(packed), "train.epochs": 1, "train.batch_size": 8, "workers.count": 0}
    )
    train.train(recipe, model=name, progress=False)
    done = call("export", name, "--format", "onnx", "--json")
    if not gives:
        assert (done.status, "can't be exported" in done.err) == (1, True)
        assert "alexnet, autoencoder, " in done.err
        assert files(here) == []
        return
    assert done.status == 0, done.err
    output = json.loads(done.out)
    assert (output["output"], output["images"]) == (gives, family_sources.COUNTS["test"])
    assert output["other_class"] == (0 if classes else None)
    assert files(here) == [f"{name}-1.onnx"]
