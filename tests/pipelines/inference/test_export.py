"""The network of every family as a file that predicts in a process without this project."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import examples
import numpy as np
import pytest
import torch
from torch import nn

import models
from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines.inference import export
from pipelines.inference.predictor import Predictor

NOT_EXPORTED = {"dcgan", "faster_rcnn", "mask_rcnn", "super_resolution", "yolo"}
EXPORTED = [name for name in models.names() if name not in NOT_EXPORTED]
WRITTEN = {"onnx": EXPORTED, "pt2": ["autoencoder", "cnn", "embedding", "rnn", "unet", "vit"]}
"""By format. A pt2 file holds the graph that `tests/models/test_contract.py` makes of every family,
so one family for each kind of network is enough."""
COUNTS = (1, 5)
"""Images in a batch: other numbers than the graph is made with."""

ALONE = {
    "onnx": """
import glob, json, sys
import numpy, onnxruntime
onnxruntime.set_default_logger_severity(3)
for path in glob.glob("*.onnx"):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        images = numpy.load(path.replace(".onnx", ".npy"))[:count]
        numpy.save(f"{path}-{count}.npy", session.run(None, {"images": images})[0])
    said = session.get_modelmeta().custom_metadata_map
    shapes = [session.get_inputs()[0].shape, session.get_outputs()[0].shape]
    names = [session.get_inputs()[0].name, session.get_outputs()[0].name]
    told = {"said": said, "shapes": shapes, "names": names}
    open(path + ".json", "w").write(json.dumps(told))
assert "torch" not in sys.modules
""",
    "pt2": """
import glob, sys
import numpy, torch
for path in glob.glob("*.pt2"):
    extra = {"tessera.json": ""}
    network = torch.export.load(path, extra_files=extra).module()
    for count in (1, 5):
        images = torch.from_numpy(numpy.load(path.replace(".pt2", ".npy"))[:count])
        numpy.save(f"{path}-{count}.npy", network(images).detach().numpy())
    open(path + ".json", "w").write(extra["tessera.json"])
""",
}
WITHOUT_TESSERA = """
assert not {"models", "pipelines", "jobs"} & set(sys.modules), sorted(sys.modules)
"""


def predictor_of(name: str, variant: str = "tiny") -> Predictor:
    family = models.get(name)
    recipe = recipes.start(name, variant)
    torch.manual_seed(0)
    module = family.build(recipe.config(), examples.spec(family))
    return Predictor(recipe, examples.spec(family), module.state_dict())


def images_of(name: str, count: int = max(COUNTS)) -> torch.Tensor:
    images: torch.Tensor = examples.raw_batch(models.get(name), count)["image"]
    return images


def metadata_of(name: str) -> dict[str, Any]:
    data = examples.spec(models.get(name))
    return {"family": name, "classes": list(data.classes), "version": 3}


def write(name: str, form: str, to: Path, variant: str = "tiny") -> None:
    data, family = examples.spec(models.get(name)), models.get(name)
    export.write(
        predictor_of(name, variant).exportable,
        (data.height, data.width, data.channels),
        to,
        form=form,
        output=family.task.output_name,
        metadata=metadata_of(name),
    )


def pair(name: str, count: int, variant: str = "tiny") -> tuple[export.Array, export.Array]:
    images = images_of(name)[:count]
    predictions = predictor_of(name, variant).exported_output(images)
    return images.permute(0, 2, 3, 1).contiguous().numpy(), predictions.numpy()


@pytest.fixture(scope="module", params=export.FORMATS)
def predicted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A format, and a folder with the file of every family and its predictions, computed in a
    process that can't import this project."""
    form = request.param
    folder = tmp_path_factory.mktemp(form)
    for name in WRITTEN[form]:
        write(name, form, folder / f"{name}.{form}")
        np.save(folder / f"{name}.npy", pair(name, max(COUNTS))[0])
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE[form] + WITHOUT_TESSERA],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return form, folder


@pytest.mark.slow
def test_a_file_predicts_without_tessera_as_the_model_does(predicted: tuple[str, Path]) -> None:
    form, folder = predicted
    for name in WRITTEN[form]:
        for count in COUNTS:
            given = np.load(folder / f"{name}.{form}-{count}.npy")
            expected = pair(name, count)[1]
            np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_file_has_its_metadata(predicted: tuple[str, Path]) -> None:
    form, folder = predicted
    metadata = json.loads((folder / f"cnn.{form}.json").read_text())
    if form == "onnx":
        assert metadata["names"] == ["images", "probabilities"]
        assert metadata["shapes"] == [["batch", 16, 16, 3], ["batch", 4]]
        metadata = {
            "family": "cnn",
            **{k: json.loads(v) for k, v in metadata["said"].items() if k != "family"},
        }
    assert metadata == metadata_of("cnn")
    left = {path.suffix for path in folder.iterdir()}
    assert left == {f".{form}", ".npy", ".json"}, "weights lie beside the file"


@pytest.mark.parametrize("name", sorted(NOT_EXPORTED))
def test_a_family_without_a_single_output_is_refused(name: str) -> None:
    with pytest.raises(TesseraError, match="can't be exported") as refused:
        _ = predictor_of(name).exportable
    assert refused.value.hint == f"these can be exported: {', '.join(EXPORTED)}"


@pytest.mark.parametrize(
    ("name", "variant"),
    [("rnn", "gru"), ("rnn", "bidirectional"), ("autoencoder", "variational")],
)
@pytest.mark.slow
def test_variants_with_different_layers_can_be_exported(
    name: str, variant: str, tmp_path: Path
) -> None:
    """The autoencoder rounds its codes to 16 bits, so a difference in a last bit may change a
    code."""
    write(name, "onnx", tmp_path / "x.onnx", variant)
    ask = export.load(tmp_path / "x.onnx", "onnx")
    result = export.compare(ask, [pair(name, n, variant) for n in COUNTS], classes=False)
    assert result.within
    assert result.images == sum(COUNTS)


@pytest.mark.slow
@pytest.mark.parametrize("form", export.FORMATS)
def test_different_weights_are_detected(form: str, tmp_path: Path) -> None:
    write("cnn", form, tmp_path / f"x.{form}")
    ask = export.load(tmp_path / f"x.{form}", form)
    images, expected = pair("cnn", 5)
    good = export.compare(ask, [(images, expected)], classes=True)
    assert good.within
    assert good.largest < 1e-5
    assert good.other_class == 0
    swapped = export.compare(ask, [(images, expected[:, ::-1])], classes=True)
    assert not swapped.within
    assert swapped.largest > 1e-3
    assert swapped.other_class == 5


def test_tolerances() -> None:
    images = np.zeros((2, 1, 1, 1), np.uint8)
    expected = np.array([[0.0, 10.0], [0.0, 10.0]], np.float32)

    def found(*rows: list[float]) -> export.ExportCheck:
        given = np.array(rows, np.float32)
        return export.compare(lambda _: given, [(images, expected)], classes=True)

    assert found([0, 10], [0, 10]) == export.ExportCheck(2, 0.0, True, 0)
    assert found([0.00009, 10], [0, 10.009]).within
    assert not found([0.0002, 10], [0, 10]).within
    assert not found([0, 10], [0, 10.02]).within
    broken = found([0, 10], [math.nan, 10])
    assert (broken.within, broken.largest) == (False, math.inf)
    with pytest.raises(TesseraError, match=r"shape \(1, 2\), the model's \(2, 2\)"):
        found([0, 10])


def pickles(file: Path) -> list[str]:
    """The parts of a pt2 file that are neither tensor bytes nor text."""
    result = []
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if "/data/weights/weight_" not in name:
                try:
                    archive.read(name).decode()
                except UnicodeDecodeError:
                    result.append(name.partition("/")[2])
    return result


@pytest.mark.slow
def test_an_exported_file_has_no_pickle(tmp_path: Path) -> None:
    write("cnn", "pt2", tmp_path / "x.pt2")
    assert pickles(tmp_path / "x.pt2") == []
    plain = torch.export.export(predictor_of("cnn").exportable, (torch.zeros(2, 16, 16, 3).byte(),))
    torch.export.save(plain, tmp_path / "control.pt2")
    assert pickles(tmp_path / "control.pt2") == ["data/sample_inputs/model.pt"]


class Stubborn(nn.Module):
    """Its control flow depends on the pixels, which no graph can express."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float() if images.float().mean() > 3 else images.float() * 2


@pytest.mark.parametrize("form", export.FORMATS)
def test_a_network_that_cannot_be_exported_is_an_error(
    form: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TesseraError, match="can't be recorded as a graph: ") as refused:
        export.write(Stubborn(), (4, 4, 1), tmp_path / "x", form=form, output="y", metadata={})
    assert "\n" not in refused.value.message
    assert capfd.readouterr() == ("", "")


def test_weights_that_are_too_large_for_onnx_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MOST_BYTES", 100)
    with pytest.raises(TesseraError, match="can hold 100") as refused:
        write("cnn", "onnx", tmp_path / "x.onnx")
    assert "pt2" in refused.value.hint


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_reported(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    export.check_installed("onnx")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(TesseraError, match=f"needs {missing}, which") as refused:
        export.check_installed("onnx")
    assert "pip install 'tessera-train[onnx]'" in refused.value.hint
    export.check_installed("pt2")
