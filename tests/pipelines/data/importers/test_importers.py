"""Formats are the modules of the package, or modules from outside the project."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sample_sources

from models.core.errors import UsageError
from pipelines.data import importers
from pipelines.data.packing.pack import pack

ROOT = Path(__file__).parents[4]
DICOM_FOLDER = '''"""A folder of images with the class in the name of the file: cat_1.jpg."""

from functools import partial
from pathlib import Path

from pipelines.data.sources import Item, Source, read_file

NAME = "dicom_folder"
OPTIONS = {"suffix": "suffix of the images"}


def read(source, options):
    paths = sorted(Path(source).glob(f"*.{options.get('suffix', 'jpg')}"))
    classes = sorted({path.name.split("_")[0] for path in paths})
    items = [
        Item(path.stem, path.name, classes.index(path.name.split("_")[0])) for path in paths
    ]
    name = Path(source).name
    return Source(name, "classification", tuple(classes), items, partial(load, source))


def load(source, item):
    return read_file(Path(source, item.origin), item.origin)
'''
FORMATS = """from mylab import dicom_folder


class Scans:
    OPTIONS = {}

    def read(self, source, options):
        return dicom_folder.read(source, options)


scans = Scans()
"""


@pytest.fixture
def mylab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder outside the project with the package `mylab`, importable in this process."""
    package = tmp_path / "mylab"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "dicom_folder.py").write_text(DICOM_FOLDER)
    (package / "formats.py").write_text(FORMATS)
    (package / "needy.py").write_text("import surely_not_there\n")
    (package / "broken.py").write_text("OPTIONS = \n")
    (package / "failing.py").write_text("1 / 0\n")
    (package / "empty.py").write_text("OPTIONS = {}\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "mylab"]:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for number in range(12):
        sample_sources.image(
            tmp_path / "scans" / f"{('cat', 'dog')[number % 2]}_{number}.jpg", number
        )
    return tmp_path / "scans"


def test_formats_are_the_modules_of_the_package() -> None:
    files = Path(importers.__file__).parent.glob("[a-z]*.py")
    assert importers.names() == sorted(file.stem for file in files)
    assert [importers.get(name).NAME for name in importers.names()] == importers.names()
    with pytest.raises(UsageError, match="did you mean 'mnist'"):
        importers.get("minst")


@pytest.mark.parametrize(
    "form", ["mylab.dicom_folder", "mylab.formats:dicom_folder", "mylab.formats:scans"]
)
def test_a_format_from_outside_the_project_is_packed(
    mylab: Path, scans: Path, tmp_path: Path, form: str
) -> None:
    card = pack(str(scans), tmp_path / "out", format=form)
    assert card.classes == ("cat", "dog")
    assert sum(split.samples for split in card.splits.values()) == 12
    assert card.source == f"{form}:scans"


@pytest.mark.slow
def test_the_command_packs_a_format_from_outside_the_project(
    mylab: Path, scans: Path, tmp_path: Path
) -> None:
    words = [str(scans), "--to", str(tmp_path / "out"), "--workers", "0", "--json"]
    words += ["--format", "mylab.dicom_folder", "--option", "suffix=jpg"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.pack", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(mylab)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["classes"] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("mylab.nowhere", "there is no module 'mylab.nowhere'.*PYTHONPATH"),
        ("nolab.formats:scans", "there is no module 'nolab.formats'.*PYTHONPATH"),
        ("torchvison:MNIST", "unknown format 'torchvison'.*did you mean 'torchvision'"),
        ("mylab.formats:scan", "the module 'mylab.formats' has no 'scan'"),
        ("mylab.empty", "the format 'mylab.empty' has no read"),
        ("mylab.formats", "has no OPTIONS and no read"),
        ("mylab.needy", "can't be imported: ModuleNotFoundError: No module named 'surely_not"),
        ("mylab.failing", "can't be imported: ZeroDivisionError"),
        ("mylab.broken", r"broken\.py, line 1: invalid syntax"),
    ],
)
def test_a_format_that_cannot_be_imported_is_reported_with_the_reason(
    mylab: Path, form: str, message: str
) -> None:
    with pytest.raises(UsageError) as refused:
        importers.get(form)
    text = f"{refused.value.message}. {refused.value.hint}"
    assert re.search(message, text), text


def test_options_of_a_format_from_outside_are_checked(
    mylab: Path, scans: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="did you mean 'suffix'"):
        pack(
            str(scans),
            tmp_path / "out",
            format="mylab.dicom_folder",
            options={"sufix": "png"},
        )
