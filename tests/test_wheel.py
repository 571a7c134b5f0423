"""A built wheel works in an environment of its own, also in a folder with packages named like ours.

The heavy libraries are those of this environment: the new one sees them behind its own packages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("models", "pipelines", "jobs", "tests")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools writes into the folder that it builds."""
    copy = tmp_path_factory.mktemp("source")
    for name in BUILT_FROM:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "tessera.py"):
        shutil.copy(ROOT / name, copy / name)
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    _run([sys.executable, "-m", "pip", *words, "--wheel-dir", copy / "dist", copy], copy)
    (file,) = (copy / "dist").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a clean environment with the wheel installed."""
    folder = tmp_path_factory.mktemp("environment")
    _run([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    (site,) = folder.glob("lib/python3*/site-packages")
    words = ["install", "--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    python = folder / "bin" / "python"
    _run([sys.executable, "-m", "pip", "--python", python, *words, wheel], folder)
    # The libraries, without this environment's own .pth files, which would bring the checkout.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder with packages that have the names of ours."""
    for name in ("jobs", "models", "pipelines"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the user\\'s own')\n")
    return tmp_path


def _run(words: list[str | Path], folder: Path, **environment: str) -> str:
    hidden = ("PYTHONPATH", "TESSERA_HOME", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")
    inherited = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(
        list(map(str, words)),
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_what_is_needed_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if ".dist-info" not in name} == {
        "jobs",
        "models",
        "pipelines",
        "tessera.py",
    }
    for pattern in ("*.j2", "*.css", "recipes/*.yaml"):
        sources = {
            str(path.relative_to(ROOT))
            for package in ("models", "pipelines", "jobs")
            for path in (ROOT / package).rglob(pattern)
        }
        assert sources, pattern
        assert sources <= set(names)


@pytest.mark.parametrize("words", [["bin/tessera"], ["bin/python", "-m", "tessera"]])
def test_the_command_imports_its_own_packages(
    words: list[str], installed: Path, project: Path
) -> None:
    command = [installed / words[0], *words[1:]]
    listed = _run([*command, "families", "--recipes"], project, PYTHONPATH=".")
    assert "digits " in listed
    assert "Training:" in _run([*command, "--help"], project, PYTHONPATH=".")


def test_the_command_works_in_a_folder_with_packages_of_these_names(
    installed: Path, project: Path
) -> None:
    def tessera(line: str) -> str:
        return _run([installed / "bin" / "tessera", *line.split()], project, PYTHONPATH=".")

    tessera("pack digits --to data --workers 0")
    tessera("inspect data --html page.html")
    assert "<style>" in (project / "page.html").read_text()
    # With a worker of Ray: it starts with the project's folder first on its path.
    words = "--variant tiny --epochs 1 --workers 1"
    assert "models:/digits/1" in tessera(f"train cnn --data data {words}")
    assert "train digits" not in tessera("train digits --data data --dry-run")
    tessera("evaluate digits --data data --robustness 0 --report report")
    assert (project / "report" / "report.html").is_file()


SNIPPET = """
import sys, time
began = time.perf_counter()
import tessera
assert time.perf_counter() - began < 0.5
assert not {"torch", "ray", "mlflow", "click", "numpy"} & set(sys.modules)
data = tessera.pack("digits", to="data/digits")
options = {"train.epochs": 1, "workers.count": 0}
run = tessera.train("cnn", variant="tiny", data=data, set=options, progress=False)
report = tessera.evaluate(run.version, data=data)
tessera.promote(run.version)
model = tessera.load("digits@challenger")
from PIL import Image
Image.new("L", (8, 8)).save("a.png")
for prediction in model.predict(["a.png"]):
    print(prediction.label, prediction.probability)
print(tessera.__file__)
"""


def test_the_python_api_works_in_such_a_folder(installed: Path, project: Path) -> None:
    (project / "script.py").write_text(SNIPPET)
    said = _run([installed / "bin" / "python", "script.py"], project).splitlines()
    assert said[-1].startswith(str(installed))
    assert 0 <= float(said[-2].split()[1]) <= 1


def test_python_imports_tessera_s_own_or_says_what_is_in_the_way(
    installed: Path, project: Path
) -> None:
    own = "import tessera\nprint(tessera.Context.__module__)\n"
    (project / "script.py").write_text(own)
    python = installed / "bin" / "python"
    assert _run([python, "script.py"], project) == "pipelines.workflows.context\n"
    (project / "models" / "__init__.py").write_text("")
    (project / "script.py").write_text(f"import models\n{own}")
    done = subprocess.run(
        [python, "script.py"], cwd=project, capture_output=True, text=True, check=False
    )
    line = done.stderr.splitlines()[-1]
    folder = project / "models"
    assert line.startswith(f"ImportError: the folder {folder} hides Tessera's package 'models'")
