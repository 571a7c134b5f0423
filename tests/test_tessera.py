"""The Python API: from a folder of photos to predictions, as its docstring shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runner import Call
from PIL import Image

import tessera

COLOURS = {"apple": (200, 60, 60), "pear": (60, 200, 60)}
SMALL: dict[str, Any] = {"train.epochs": 3, "train.batch_size": 16, "workers.count": 0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in their colour, 60 different images each."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    for label, colour in COLOURS.items():
        (folder / label).mkdir(parents=True)
        for number in range(60):
            photo(label, colour, number).save(folder / label / f"{number}.png")
    return folder


def photo(label: str, colour: tuple[int, int, int], number: int) -> Image.Image:
    random = np.random.default_rng([number, *label.encode()])
    blocks = random.uniform(0.1, 1, (8, 8, 1)).repeat(4, 0).repeat(4, 1)  # no near duplicates
    return Image.fromarray((np.array(colour) * blocks).astype(np.uint8))


@pytest.fixture(scope="module")
def context(own_home: Path) -> tessera.Context:
    return tessera.Context.from_environment({"TESSERA_HOME": str(own_home)})


@pytest.mark.slow
def test_from_photos_to_predictions(photos: Path, tmp_path: Path, context: Any) -> None:
    """With every object handed on as it is returned."""
    for name, label in (("a.jpg", "apple"), ("b.jpg", "pear")):
        photo(label, COLOURS[label], 1000).save(tmp_path / name)
    events: list[dict[str, Any]] = []
    data = tessera.pack(photos, to=tmp_path / "data", progress=events.append, context=context)
    run = tessera.train(
        "cnn", data=data, variant="tiny", set=SMALL, progress=events.append, context=context
    )
    report = tessera.evaluate(run.version, data=data, robustness=0, context=context)
    assert report.metrics["accuracy"] == 1.0
    promotion = tessera.promote(run.version, context=context)
    assert promotion.passed, promotion.why
    model = tessera.load("photos@champion", context=context)
    first, second = model.predict([tmp_path / "a.jpg", tmp_path / "b.jpg"])
    assert (first.label, second.label) == ("apple", "pear")
    assert first.probability is not None
    assert 0.5 < first.probability <= 1
    assert {"message", "advance", "run", "metrics"} <= {event["kind"] for event in events}
    (again,) = tessera.predict(run.version, tmp_path / "a.jpg", context=context)
    assert (again.label, again.probability) == ("apple", pytest.approx(first.probability))
    file = tmp_path / "photos.pt2"
    exported = tessera.export(run.version, format="pt2", out=file, context=context)
    assert (exported.file, exported.same_data) == (str(file), True)
    with pytest.raises(tessera.TesseraError, match="is the first champion"):
        tessera.rollback("photos", context=context)


def test_bad_input_raises_what_the_command_prints(call: Call, digits: Path) -> None:
    wrong: list[tuple[Any, tuple[object, ...]]] = [
        (lambda: tessera.train("cnm", data=digits), ("train", "cnm", "--data", digits)),
        (
            lambda: tessera.train("cnn", data=digits, set={"train.epoch": 1}),
            ("train", "cnn", "--data", digits, "--set", "train.epoch=1"),
        ),
        (lambda: tessera.pack("nowhere", to="x"), ("pack", "nowhere", "--to", "x")),
        (lambda: tessera.load("phantom@champion"), ("predict", "phantom@champion", "a.png")),
    ]
    for function, arguments in wrong:
        with pytest.raises(tessera.TesseraError) as raised:
            function()
        done = call(*arguments)
        assert done.status == raised.value.exit_code
        assert raised.value.message in done.err


def test_importing_it_is_quick_and_loads_nothing() -> None:
    code = (
        "import sys, time; before = set(sys.modules); began = time.perf_counter(); import tessera\n"
        "seconds = time.perf_counter() - began\n"
        "heavy = {'ray', 'mlflow', 'torch', 'numpy', 'click', 'rich'}\n"
        "heavy |= {'pipelines', 'models', 'jobs'}\n"
        "assert not heavy & (set(sys.modules) - before), heavy & set(sys.modules)\n"
        "assert set(tessera.__all__) <= set(dir(tessera))\n"
        "print(seconds)"
    )
    seconds = []
    for _ in range(3):  # the first one may compile
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
    assert min(seconds) < 0.05


def test_every_public_name_can_be_used() -> None:
    for name in tessera.__all__:
        assert callable(getattr(tessera, name))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        tessera.trian  # type: ignore[attr-defined]  # noqa: B018
