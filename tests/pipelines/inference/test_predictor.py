"""One prediction per input, equal to the output of the network, and safe file names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models
from models.core.errors import TesseraError
from models.core.family import DataSpec, Panel
from pipelines import recipe as recipes
from pipelines.data.image_reading import ImageReading, parse_options
from pipelines.inference import predictor as predictor_module
from pipelines.inference.inputs import ImageInput
from pipelines.inference.predictor import Predictor, draw_panels, image_file_name

SPEC = DataSpec(
    "classification", 3, 12, 16, ("cat", "dog", "owl"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.3)
)
RECIPE = recipes.start("cnn", "tiny")


def network() -> torch.nn.Module:
    torch.manual_seed(3)
    return models.get("cnn").build(RECIPE.config(), SPEC).eval()


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(RECIPE, SPEC, network().state_dict())


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (16, 12)) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def test_predictions_equal_the_output_of_the_network(predictor, tmp_path):
    paths = [write_image(tmp_path / f"{seed}.png", seed) for seed in range(7)]
    exportable = models.get("cnn").exportable(network(), SPEC)
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    with torch.no_grad():
        expected = exportable(torch.from_numpy(images))
    predictions = [f.output for f in predictor.predict(paths)]
    assert [a["path"] for a in predictions] == [str(p) for p in paths]
    for prediction, row in zip(predictions, expected):
        assert json.loads(json.dumps(prediction)) == prediction
        assert prediction["class"] == SPEC.classes[int(row.argmax())]
        assert prediction["probability"] == pytest.approx(float(row.max()), rel=1e-5)
        assert sum(a["probability"] for a in prediction["top5"]) == pytest.approx(1)


def test_images_of_any_size_are_resized(predictor, tmp_path):
    (result,) = predictor.predict([write_image(tmp_path / "large.jpg", size=(300, 200))])
    assert result.output["class"] in SPEC.classes


@pytest.mark.fault(20, 21, 25)
def test_each_input_has_a_result_in_order(predictor, tmp_path):
    good = [write_image(tmp_path / f"good-{seed}.png", seed) for seed in range(5)]
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(good[0].read_bytes()[:-40])
    text = tmp_path / "text.jpg"
    text.write_text("<html>")
    empty = tmp_path / "empty"
    empty.mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    bad = [damaged, text, empty, tmp_path / "absent.png", tmp_path / "pipe.png", Path("a\0b.png")]
    mixed = [good[0], *bad[:4], good[1], good[2], *bad[4:], good[3], good[4]]
    predictions = [f.output for f in predictor.predict(mixed)]
    assert [a["path"] for a in predictions] == [str(p) for p in mixed]
    assert [("error" in a) for a in predictions] == [path in bad for path in mixed]
    assert all(set(a) == {"path", "error"} and a["error"] for a in predictions if "error" in a)
    reasons = {a["path"]: a["error"] for a in predictions if "error" in a}
    assert "folder without images" in reasons[str(empty)]
    assert "doesn't exist" in reasons[str(tmp_path / "absent.png")]
    assert "not a regular file" in reasons[str(tmp_path / "pipe.png")]
    alone = [next(iter(predictor.predict([path]))).output for path in good]
    for one, other in zip((a for a in predictions if "error" not in a), alone, strict=True):
        assert one["path"] == other["path"]
        assert one["class"] == other["class"]
        assert one["probability"] == pytest.approx(other["probability"], rel=1e-5)


def test_only_unreadable_inputs(predictor, tmp_path):
    absent = [tmp_path / str(n) for n in range(5)]
    assert all("error" in result.output for result in predictor.predict(absent))
    assert list(predictor.predict([])) == []


def test_inputs_are_read_lazily(predictor, tmp_path):
    """The first prediction doesn't wait for a list of a million paths."""
    path, taken = write_image(tmp_path / "a.png"), []

    def endless():
        while True:
            taken.append(1)
            yield path

    next(predictor.predict(endless()))
    assert len(taken) == 64


def test_weights_of_another_network_are_refused():
    other = models.get("cnn").build(recipes.start("cnn").config(), SPEC).state_dict()
    with pytest.raises(TesseraError, match="not those of a cnn tiny"):
        Predictor(RECIPE, SPEC, other)


def test_large_images_are_held_one_at_a_time(tmp_path, monkeypatch):
    """Decoded images, in their own size, that are alive while the next one is decoded."""
    import weakref

    fixed = recipes.start("cnn", "tiny")
    predictor = Predictor(fixed, SPEC, network().state_dict())
    alive: list[weakref.ref] = []
    most = []
    decode = predictor_module.decode_image

    def counted(*args, **options):
        most.append(sum(ref() is not None for ref in alive))
        image = decode(*args, **options)
        alive.append(weakref.ref(image))
        return image

    monkeypatch.setattr(predictor_module, "decode_image", counted)
    paths = [write_image(tmp_path / f"{n}.png", n, size=(640, 480)) for n in range(6)]
    assert len(list(predictor.predict(paths))) == 6
    assert max(most) <= 1  # all of the chunk before it was fitted to the network's size


def test_a_part_of_an_image_does_not_keep_all_of_it():
    recipe = RECIPE.with_overrides({"data.fit": "crop"})
    predictor = Predictor(recipe, SPEC, network().state_dict())
    fitted = predictor._fitted(torch.zeros(3, 600, 800, dtype=torch.uint8))
    assert fitted.pixels.untyped_storage().nbytes() == 3 * 12 * 16


def test_images_that_are_predicted_together_are_bounded_in_bytes(predictor, monkeypatch):
    assert predictor._chunk_size == 64
    monkeypatch.setattr(predictor_module, "MAX_BATCH_BYTES", 5 * 3 * 12 * 16)
    assert predictor._chunk_size == 5
    monkeypatch.setattr(predictor_module, "MAX_BATCH_BYTES", 1)
    assert predictor._chunk_size == 1


def test_dark_images_of_16_bits_need_a_range(predictor, tmp_path):
    """12 bits in 16 would be predicted as black."""
    dark = np.random.default_rng(0).integers(0, 4096, (12, 16)).astype(np.uint16)
    Image.fromarray(dark).save(tmp_path / "dark.png")
    Image.fromarray(dark * 16).save(tmp_path / "bright.png")
    paths = [tmp_path / "dark.png", tmp_path / "bright.png"]
    refused, bright = (r.output for r in predictor.predict(paths))
    assert "--option range=0..4095" in refused["error"]
    (scaled,) = (r.output for r in predictor.predict(paths[:1], ImageReading((0, 4095))))
    assert scaled["probability"] == pytest.approx(bright["probability"], abs=1e-3)
    (kept,) = (r.output for r in predictor.predict(paths[:1], ImageReading((0, 65535))))
    assert "error" not in kept


def test_a_model_reads_images_as_its_training_data_was_read(tmp_path):
    """The range that `pack` was told is known to the predictor; one that is given is preferred."""
    values = np.random.default_rng(0).integers(0, 4096, (12, 16)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "dark.png")
    Image.fromarray(values * 16).save(tmp_path / "bright.png")
    weights = network().state_dict()
    told = Predictor(RECIPE, SPEC, weights, reading=ImageReading((0, 4095)))
    (dark,) = (r.output for r in told.predict([tmp_path / "dark.png"]))
    (bright,) = (r.output for r in told.predict([tmp_path / "bright.png"], ImageReading()))
    assert dark["probability"] == pytest.approx(bright["probability"], abs=1e-3)
    (untold,) = (
        r.output for r in Predictor(RECIPE, SPEC, weights).predict([tmp_path / "dark.png"])
    )
    assert "nearly black" in untold["error"]


def test_an_image_over_the_limit_is_predicted_with_the_option_that_the_error_names(
    predictor, tmp_path
):
    path = tmp_path / "wide.png"
    Image.new("1", (20_000, 5_001)).save(path)
    (refused,) = (r.output for r in predictor.predict([path]))
    assert "more than 100,000,000" in refused["error"]
    option = re.search(r"--option (max_pixels)=([0-9]+)", refused["error"])
    assert option is not None
    reading = parse_options({option[1]: option[2]})
    (allowed,) = (r.output for r in predictor.predict([path], reading))
    assert "error" not in allowed
    (control,) = (r.output for r in predictor.predict([path], replace(reading, max_pixels=10**8)))
    assert "error" in control


PEAK = """
import resource, sys
from pathlib import Path
import torch
from pipelines import recipe as recipes
from pipelines.inference.predictor import Predictor
from models.core.family import DataSpec
import models
torch.set_num_threads(1)
spec = DataSpec("classification", 3, 12, 16, ("a", "b"))
recipe = recipes.start("cnn", "tiny")
weights = models.get("cnn").build(recipe.config(), spec).state_dict()
paths = [Path(sys.argv[1])] * int(sys.argv[2])
assert all(not "error" in r.output for r in Predictor(recipe, spec, weights).predict(paths))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_16_images_of_48_megapixels_take_the_memory_of_few(tmp_path):
    path = tmp_path / "large.jpg"
    Image.new("RGB", (8_000, 6_000), "green").save(path, quality=50)

    def peak_mib(images: int) -> int:
        command = [sys.executable, "-c", PEAK, str(path), str(images)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout)

    one, many = peak_mib(1), peak_mib(16)
    decoded = 8_000 * 6_000 * 3 / 2**20
    assert one > decoded  # the control: one image is held in its own size
    assert many < one + 2.5 * decoded


def test_bytes_that_are_kept_end_a_chunk(predictor, tmp_path, monkeypatch):
    data = write_image(tmp_path / "a.png").read_bytes()
    inputs = [ImageInput(str(n), partial(bytes, data), keep=True) for n in range(6)]
    monkeypatch.setattr(predictor_module, "MAX_BATCH_BYTES", 2 * len(data) + 10_000)
    most = (2 * len(data) + 10_000) // len(data) + 1
    remaining = iter(inputs)
    assert len(predictor._load_chunk(remaining, ImageReading())) == min(most, 6)
    assert [r.output["path"] for r in predictor.predict(inputs)] == list("012345")


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (700, 100), (3000, 2000), (30, 600)])
def test_captions_are_drawn_below_the_image(size):
    image = torch.zeros(3, size[1], size[0], dtype=torch.uint8)
    caption = "a very long class name\nindeed, so long 99% that no picture has room for it at all"
    drawn, other = (draw_panels([Panel(image, text)], ("a",)) for text in (caption, "x"))
    assert drawn.size == other.size
    assert max(drawn.size) <= 1024 + 40
    assert max(drawn.size) >= 200
    band = np.asarray(drawn)[-40:]
    assert band.min() < 100, "there is dark text"
    assert (band[:, [0, -1]] == 255).all(), "it doesn't run over the sides"
    assert np.array_equal(np.asarray(drawn)[:-40], np.asarray(other)[:-40])


def test_panels_are_drawn_side_by_side():
    small = torch.full((1, 10, 10), 200, dtype=torch.uint8)
    large = torch.full((3, 20, 20), 100, dtype=torch.uint8)
    drawn = np.asarray(draw_panels([Panel(small), Panel(large)], ()))
    assert (drawn == 200).all(2).sum() * 4 == (drawn == 100).all(2).sum() > 0


@pytest.mark.fault(10)
def test_image_file_names_are_unique_and_stay_in_the_folder():
    taken: set[str] = set()
    inputs = ["x/a.png", "y/a.jpg", "A.png", "../..", "/etc/passwd", "..", ".", "a\nb\0.png", "-rf",
              "a/b/" + "n" * 300 + ".png", "猫.png", "con.tar.png"]  # fmt: skip
    names = [image_file_name(Path(text), taken) for text in inputs]
    assert names[:3] == ["a.png", "a-2.png", "A-3.png"]
    assert len({name.lower() for name in names}) == len(inputs)
    for name in names:
        assert name.endswith(".png")
        assert os.sep not in name
        assert not name.startswith(".")
        assert len(name) < 100
        assert "\n" not in name
        assert "\0" not in name
