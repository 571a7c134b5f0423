"""A built wheel works in an environment of its own, also in a folder with packages named like ours.

The heavy libraries are those of this environment: the new one sees them behind its own packages.
The commands of README run here, and its Python, which trains for one epoch and without Ray.
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
from pages import Shell, commands, write_photos

ROOT = Path(__file__).parents[1]
UV = Path(sys.executable).with_name("uv")
BUILT_FROM = ("models", "pipelines", "jobs", "tests")

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools writes into the folder that it builds."""
    copy = tmp_path_factory.mktemp("source")
    for name in BUILT_FROM:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "tessera.py"):
        shutil.copy(ROOT / name, copy / name)
    words = ["--quiet", "--wheel", "--no-build-isolation", "--offline", "--python", sys.executable]
    _run([UV, "build", *words, "--out-dir", copy / "dist", copy], copy)
    (file,) = (copy / "dist").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a clean environment with the wheel installed."""
    folder = tmp_path_factory.mktemp("environment")
    _run([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    (site,) = folder.glob("lib/python3*/site-packages")
    words = ["--quiet", "--no-deps", "--offline", "--python", folder / "bin" / "python"]
    _run([UV, "pip", "install", *words, wheel], folder)
    # The libraries, without this environment's own .pth files, which would bring the checkout.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture(scope="module")
def project(prepared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with photos, and with packages that have the names of ours."""
    folder = tmp_path_factory.mktemp("project")
    write_photos(folder)
    shutil.copytree(prepared_store, folder / ".tessera")
    write_packages(folder)
    return folder


def write_packages(folder: Path) -> None:
    for name in ("jobs", "models", "pipelines"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('the user\\'s own')\n")


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


SETTINGS = '{"train.epochs": 3}'
QUICK = '{"train.epochs": 1, "workers.count": 0}'
BEFORE = """
import sys, time
began = time.perf_counter()
import tessera
assert time.perf_counter() - began < 0.5
assert not {"torch", "ray", "mlflow", "click", "numpy"} & set(sys.modules)
"""
AFTER = """
assert "<style>" in report.page.read_text()
print(tessera.__file__)
"""


@pytest.fixture(scope="module")
def printed(installed: Path, project: Path) -> list[str]:
    """The lines that README's Python prints; it leaves the data set `data/photos`."""
    (block,) = [c.text for c in commands(ROOT / "README.md") if c.language == "python"]
    assert SETTINGS in block
    (project / "script.py").write_text(BEFORE + block.replace(SETTINGS, QUICK) + AFTER)
    return _run([installed / "bin" / "python", "script.py"], project).splitlines()


def test_the_python_of_readme_works_in_such_a_folder(installed: Path, printed: list[str]) -> None:
    *_, first, second, file = printed
    assert file.startswith(str(installed))
    rows = [first.split(), second.split()]
    assert all(label.isdigit() and 0 < float(share) <= 1 for label, share in rows)


def test_the_commands_of_readme_work_in_such_a_folder(
    installed: Path, project: Path, printed: list[str], prepared_store: Path, tmp_path: Path
) -> None:
    """On the data set that the Python packed, in a new home: what needs Ray, or only loads a model,
    as a process of the wheel, the rest in this process. Ray's workers start with the project's
    folder first on their path."""
    listed = [command for command in commands(ROOT / "README.md") if command.language == "sh"]
    line = {command.text.split()[1]: command for command in listed}
    shutil.copytree(prepared_store, tmp_path / "home")
    shell = Shell(project)
    shell.environment["TESSERA_HOME"] = home = str(tmp_path / "home")

    def start(text: str) -> str:
        words = [installed / "bin" / "tessera", *text.removeprefix("tessera ").split()]
        return _run(words, project, PYTHONPATH=".", TESSERA_HOME=home)

    assert "photos/1" in start(line["train"].text)
    assert "accuracy" in shell(line["evaluate"])
    assert "photos@champion is version 1" in shell(line["promote"])
    assert len(start(line["predict"].text).splitlines()) == 2
    start("tessera inspect data/photos --html page.html")
    assert "<style>" in (project / "page.html").read_text()


def test_python_imports_tessera_s_own_or_says_what_is_in_the_way(
    installed: Path, tmp_path: Path
) -> None:
    write_packages(tmp_path)
    own = "import tessera\nprint(tessera.Context.__module__)\n"
    (tmp_path / "script.py").write_text(own)
    python = installed / "bin" / "python"
    assert _run([python, "script.py"], tmp_path) == "pipelines.workflows.context\n"
    (tmp_path / "models" / "__init__.py").write_text("")
    (tmp_path / "script.py").write_text(f"import models\n{own}")
    done = subprocess.run(
        [python, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    line = done.stderr.splitlines()[-1]
    folder = tmp_path / "models"
    assert line.startswith(f"ImportError: the folder {folder} hides Tessera's package 'models'")
