"""A newcomer's family: one file, anywhere that Python can import from. Each case is a process of its
own, as a person or a Ray worker would have it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MIXER = '''"""A family of one layer."""
from dataclasses import dataclass
from torch import nn
from models.blocks.classifier import Classifier

@dataclass(frozen=True)
class MixerConfig:
    width: int = 8

class Mixer(Classifier[MixerConfig]):
    variants = {"base": MixerConfig(), "tiny": MixerConfig(4)}
    defaults = {"optim.model.lr": 0.01}

    def build(self, config, data):
        pixels = data.channels * data.height * data.width
        return nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, config.width), nn.Linear(config.width, len(data.classes))
        )

FAMILY = Mixer()
'''


@pytest.fixture
def mylab(tmp_path) -> Path:
    """A folder with the package `mylab`; importing it leaves a file `ran`."""
    package = tmp_path / "mylab"
    package.mkdir()
    mark = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n"
    (package / "__init__.py").write_text(mark)
    (package / "mixer.py").write_text(MIXER)
    (package / "empty.py").write_text(mark)
    (package / "wrong.py").write_text("FAMILY = 3\n")
    (package / "needy.py").write_text("import surely_not_there\nFAMILY = None\n")
    (package / "broken.py").write_text("FAMILY = \n")
    return tmp_path


def python(mylab: Path, *words: str, on_path: bool = True) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *([str(mylab)] if on_path else [])])
    environment = {
        **{n: v for n, v in os.environ.items() if not n.startswith(("TESSERA_", "MLFLOW_"))},
        "PYTHONPATH": path,
        "TESSERA_HOME": str(mylab / "home"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *words],
        cwd=mylab.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def refusal(mylab: Path, name: str, **options) -> str:
    code = (
        "import sys, models\nfrom models.core.errors import UsageError\n"
        f"try: models.get({name!r})\n"
        "except UsageError as error: print(error)\n"
        "else: sys.exit('it was taken')"
    )
    done = python(mylab, "-c", code, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_is_a_family_like_ours(mylab):
    code = (
        "import json\nfrom pipelines import recipe as recipes\n"
        "made = recipes.start('mylab.mixer', 'tiny').with_overrides({'model.width': 5})\n"
        "assert recipes.build(json.loads(made.to_json())).to_json() == made.to_json()\n"
        "print(made.family, made.config().width, made.optim['model'].lr)"
    )
    done = python(mylab, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mylab.mixer", "5", "0.01"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mylab.mixr", "can't be found here"),
        ("yourlab.mixer", "can't be found here"),
        ("mylab.mixer.deeper", "can't be found here"),
        ("mylab.empty", "says nothing of FAMILY"),
        ("mylab.wrong", "is a int, no family"),
        ("mylab.needy", "No module named 'surely_not_there'"),
        ("mylab.broken", "broken.py, line 1"),
        ("models.cnn", "unknown family"),
        ("mylab.", "can't be found here"),
        (".mylab", "can't be found here"),
    ],
)
def test_what_is_no_family_is_refused_in_words(mylab, name, message):
    assert message in refusal(mylab, name)


def test_says_how_it_is_found(mylab):
    assert "PYTHONPATH" in refusal(mylab, "mylab.mixer", on_path=False)


@pytest.mark.parametrize("name", ["mylab.empty", "mylab.mixr", "mylab.broken"])
def test_naming_a_module_runs_nothing_of_it(mylab, name):
    """A recipe that came with a model can name any module that is installed."""
    refusal(mylab, name)
    assert not (mylab / "mylab" / "ran").exists()
    python(mylab, "-c", f"import {name}")  # the control
    assert (mylab / "mylab" / "ran").exists()


@pytest.mark.slow
def test_trains_on_a_worker_and_answers(mylab):
    """Packed, trained on a worker of Ray, evaluated and asked, by the verbs alone."""
    data = str(mylab / "digits")

    def call(verb: str, *words: str) -> subprocess.CompletedProcess[str]:
        done = python(mylab, "-m", f"jobs.{verb}", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    call("pack", "digits", "--to", data, "--workers", "0")
    settings = ["--set", "train.epochs=2", "--set", "train.precision=fp32"]
    call("train", "mylab.mixer", "--data", data, "--workers", "1", "--model", "m", *settings)
    call("evaluate", "m/1", "--data", data)
    image = mylab / "one.png"
    python(mylab, "-c", f"from PIL import Image; Image.new('L', (8, 8)).save({str(image)!r})")
    assert "probability" in call("predict", "m@challenger", str(image)).stdout
    away = python(mylab, "-m", "jobs.predict", "m@challenger", str(image), on_path=False)
    assert away.returncode == 2
    assert "mylab.mixer" in away.stderr
    assert "Traceback" not in away.stderr
