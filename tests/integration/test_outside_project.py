"""A family, a task and a metric in files outside the project, anywhere that Python can import from.

The cases run in new processes, as for a user or on a Ray worker.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Done
from PIL import Image

pytestmark = pytest.mark.e2e

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
            nn.Flatten(),
            nn.Linear(pixels, config.width),
            nn.Linear(config.width, len(data.classes)),
        )

FAMILY = Mixer()
'''


@pytest.fixture
def mylab(tmp_path) -> Path:
    """A folder with the package `mylab`; importing it creates the file `ran`."""
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


def refusals(mylab: Path, *names: str, **options) -> dict[str, str]:
    """The error of `models.get` for each name, all in one new process."""
    code = (
        "import json, models\nfrom models.core.errors import UsageError\nsaid = {}\n"
        f"for name in {names!r}:\n"
        "    try: models.get(name)\n"
        "    except UsageError as error: said[name] = str(error)\n"
        "print(json.dumps(said))"
    )
    done = python(mylab, "-c", code, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_external_family_has_a_recipe_like_a_built_in_one(mylab):
    code = (
        "import json\nfrom pipelines import recipe as recipes\n"
        "made = recipes.start('mylab.mixer', 'tiny').with_overrides({'model.width': 5})\n"
        "assert recipes.build(json.loads(made.to_json())).to_json() == made.to_json()\n"
        "print(made.family, made.config().width, made.optim['model'].lr)"
    )
    done = python(mylab, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mylab.mixer", "5", "0.01"]


def test_a_module_without_a_family_is_refused(mylab):
    expected = {
        "mylab.mixr": "can't be found here",
        "yourlab.mixer": "can't be found here",
        "mylab.mixer.deeper": "can't be found here",
        "mylab.empty": "doesn't define FAMILY",
        "mylab.wrong": "of type int, not a Family",
        "mylab.needy": "No module named 'surely_not_there'",
        "mylab.broken": "broken.py, line 1",
        "models.cnn": "unknown family",
        "mylab.": "can't be found here",
        ".mylab": "can't be found here",
    }
    output = refusals(mylab, *expected)
    assert {name: text for name, text in expected.items() if text not in output[name]} == {}


def test_the_error_names_pythonpath(mylab):
    assert "PYTHONPATH" in refusals(mylab, "mylab.mixer", on_path=False)["mylab.mixer"]


def test_a_recipe_that_names_a_module_does_not_run_its_code(mylab):
    """A downloaded recipe can name any installed module."""
    ran = mylab / "mylab" / "ran"
    refusals(mylab, "mylab.empty", "mylab.mixr", "mylab.broken")
    assert not ran.exists()
    python(mylab, "-c", "import mylab.empty")  # the control
    assert ran.exists()


@pytest.mark.slow
def test_an_external_family_trains_on_a_ray_worker_and_predicts(mylab, prepared_store, digits):
    """Trained on a Ray worker, then used for predictions, with commands only."""
    shutil.copytree(prepared_store, mylab / "home")
    Image.new("L", (8, 8)).save(mylab / "one.png")

    def call(verb: str, *words: str) -> subprocess.CompletedProcess[str]:
        done = python(mylab, "-m", f"jobs.{verb}", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    settings = ["--set", "train.epochs=1", "--set", "train.precision=fp32"]
    call("train", "mylab.mixer", "--data", str(digits), "--workers", "1", "--model", "m", *settings)
    image = str(mylab / "one.png")
    assert "probability" in call("predict", "m@challenger", image).stdout
    away = python(mylab, "-m", "jobs.predict", "m@challenger", image, on_path=False)
    assert away.returncode == 2
    assert "mylab.mixer" in away.stderr
    assert "Traceback" not in away.stderr


TASK = '''"""Which class an image has, measured by whether that is odd."""
from models.core.family import Metric
from models.tasks.classification import Classification

class Parity(Classification):
    name = "parity"
    primary = Metric("same_parity", "max")

    def bootstrap_metrics(self, records, data):
        def of(positions):
            hits = [records[i]["predicted"] % 2 == records[i]["label"] % 2 for i in positions]
            return {"same_parity": sum(hits) / len(hits)}
        return of
'''
FAMILY = MIXER.replace("    variants =", "    task = Parity()\n    variants =").replace(
    "\nfrom torch", "\nfrom oddlab.tasks import Parity\nfrom torch"
)
METRICS = """
from models.metrics import lower_is_better

@lower_is_better
def largest_label_share(records, data):
    # The share of images that get the most frequent prediction: 0.1 is the best for digits.
    predicted = [int(r["predicted"]) for r in records]
    return max(predicted.count(k) for k in range(len(data.classes))) / len(predicted)

def zeros(records, data):
    return sum(r["label"] == 0 for r in records) / len(records)

def counts(records, data):
    return {"images": len(records), "classes": len(data.classes)}

def undefined(records, data):
    return float("nan")

def broken(records, data):
    return 1 / 0
"""


@pytest.fixture
def oddlab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package `oddlab`, importable in this process."""
    package = tmp_path / "lab" / "oddlab"
    package.mkdir(parents=True)
    for name, code in {"tasks": TASK, "odd": FAMILY, "metrics": METRICS}.items():
        (package / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(package.parent)


def test_an_external_task_family_and_metric_are_trained_and_evaluated(
    oddlab: None, own_home: Path, digits: Path, call: Callable[..., Done]
) -> None:
    metrics = "metrics=[oddlab.metrics:zeros,oddlab.metrics:counts]"
    settings = ["train.epochs=1", "train.precision=fp32", metrics]
    words = [word for setting in settings for word in ("--set", setting)]
    trained = call(
        "train", "oddlab.odd", "--data", digits, "--workers", "0", "--model", "odd", *words
    )
    assert trained.status == 0, trained.err
    (log,) = own_home.glob("runs/*/events.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    named = {name for e in events if e["kind"] == "metrics" for name in e["values"]}
    assert {"val/same_parity", "val/zeros", "val/counts_images"} <= named
    done = call("evaluate", "odd/1", "--data", digits, "--json")
    assert done.status == 0, done.err
    (assessed,) = json.loads(done.out)["models"]
    assert assessed["task"] == "parity"
    result = assessed["metrics"]
    assert {"same_parity", "zeros", "counts_images", "counts_classes"} == result.keys()
    assert result["counts_classes"] == {"value": 10, "low": 10, "high": 10}
    assert result["zeros"]["low"] < result["zeros"]["value"] < result["zeros"]["high"]


def test_an_external_metric_that_is_better_when_lower_selects_and_promotes(
    oddlab: None, own_home: Path, digits: Path, call: Callable[..., Done]
) -> None:
    """The first version, which learns nothing, doesn't name the metric: the second one's metric
    compares them."""

    def train(*settings: str) -> list[dict[str, Any]]:
        before = set(own_home.glob("runs/*"))
        words = [word for setting in settings for word in ("--set", setting)]
        done = call(
            "train", "oddlab.odd", "--data", digits, "--workers", "0", "--model", "m", *words
        )
        assert done.status == 0, done.err
        (run,) = set(own_home.glob("runs/*")) - before
        return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]

    train("train.epochs=1", "train.precision=fp32", "optim.model.lr=1e-12")
    evaluated = ("--data", digits, "--json")
    assert call("evaluate", "m/1", *evaluated).status == 0
    assert call("promote", "m/1").status == 0
    name = "largest_label_share"
    chosen = [f"metrics=[oddlab.metrics:{name}]", f"primary_metric={name}"]
    events = train("train.epochs=9", "train.patience=1", "train.precision=fp32", *chosen)
    values = [e["values"][f"val/{name}"] for e in events if f"val/{name}" in e.get("values", ())]
    assert values[0] > min(values)
    assert 2 < len(values) < 9
    assert values.index(min(values)) == len(values) - 2  # the last epoch alone was no better

    (result,) = json.loads(call("evaluate", "m/2", *evaluated).out)["models"]
    assert (result["primary"], result["direction"]) == (name, "min")
    done = call("promote", "m/2", "--json")
    assert done.status == 0, done.out + done.err
    assert f"better: {name} " in done.out


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("oddlab.metrics", "is not the name of a metric"),
        ("oddlab.metrics:missing", "doesn't define missing"),
        ("nolab.metrics:zeros", "'nolab.metrics' can't be found here"),
        ("oddlab.metrics:undefined", "returned nan"),
        ("oddlab.metrics:broken", "ZeroDivisionError"),
    ],
)
def test_an_unusable_external_metric_raises_a_tessera_error(
    oddlab: None,
    own_home: Path,
    digits: Path,
    call: Callable[..., Done],
    metric: str,
    message: str,
) -> None:
    before = set(own_home.glob("runs/*"))
    settings = ["--set", "train.epochs=1", "--set", f"metrics=[{metric}]"]
    done = call("train", "oddlab.odd", "--data", digits, "--workers", "0", *settings)
    assert done.status != 0
    assert message in done.err
    assert "Traceback" not in done.err
    refused_at_once = not message.startswith(("returned", "Zero"))
    assert (set(own_home.glob("runs/*")) == before) is refused_at_once
