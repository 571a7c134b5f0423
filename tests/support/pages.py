"""The commands that a page of the documentation shows, and a shell that runs them.

A page is Markdown. Its blocks marked `sh` and `python` are run in their order. A block with a title
is written to the file of that name, and a block without a language is only read. Commands run in a
folder that stands for a user's project.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

import models

BLOCK = re.compile(r'^```(sh|python)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
SETTINGS = ("RAY_", "MLFLOW_", "TESSERA_")
SERVICES = ("tessera up", "tessera down")
"""Not run with a page: `tests/integration/test_local_services.py` runs both."""

LIMIT_SECONDS = 600
WITHOUT_TESSERA = """
import sys
assert not {"models", "pipelines", "jobs"} & set(sys.modules), "Tessera was loaded"
"""


class Command(NamedTuple):
    """A line of a shell block, or a whole Python block. `title` is the file it is written to."""

    language: str
    text: str
    title: str = ""


def commands(page: Path) -> list[Command]:
    """The commands of a page, in their order."""
    listed = []
    for language, title, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        lines = [text] if language == "python" else text.splitlines()
        listed += [Command(language, line, title) for line in lines if line.strip()]
    return listed


def write_photos(folder: Path) -> None:
    """600 images of digits in a folder for each class (`photos`), 8 new ones and a broken file in
    `new`, and two of the new ones as JPEG: `a.jpg`, `b.jpg`."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    for number, (pixels, label) in enumerate(zip(images[:608], labels[:608])):
        image = Image.fromarray((pixels.reshape(8, 8) * 15.9).astype("uint8"))
        target = folder / (f"photos/{label}" if number < 600 else "new")
        target.mkdir(parents=True, exist_ok=True)
        image.save(target / f"{number}.png")
    (folder / "new" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n, and then nothing")
    for number, name in ((600, "a.jpg"), (601, "b.jpg")):
        Image.open(folder / "new" / f"{number}.png").save(folder / name, quality=95)


class Shell:
    """Runs commands in a folder and keeps environment variables from one to the next.

    Lines that only call `tessera`, and Python blocks that import it, run in this process, which
    takes a fraction of the time of a new one: `tests/test_wheel.py` runs such lines as processes.
    The rest runs in bash.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        own = (*SETTINGS, "PYTEST", "PYTHONPATH")
        kept = {n: v for n, v in os.environ.items() if not n.startswith(own)}
        path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
        home = {"HOME": str(folder), "TESSERA_HOME": str(folder / ".tessera")}
        self.environment = {**kept, **home, "PATH": path, "OMP_NUM_THREADS": "1"}

    def __call__(self, command: Command) -> str:
        """Runs a command; returns its output, or raises AssertionError with it."""
        if command.title:
            path = self.folder / command.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(command.text)
            return ""
        if command.language == "python" and "import tessera" not in command.text:
            return self._start(sys.executable, "-c", command.text + WITHOUT_TESSERA)
        if command.language == "python" or _only_calls_tessera(command.text):
            return self._in_this_process(command)
        out = self._start("bash", "-c", f"set -e\n{command.text}\nenv -0 > .environment")
        kept = (self.folder / ".environment").read_text().split("\0")
        self.environment = dict(line.split("=", 1) for line in kept if line)
        return out

    def _start(self, *words: str) -> str:
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"$ {words[-1]}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout

    def _in_this_process(self, command: Command) -> str:
        from jobs.cli import run, tessera

        out, err = io.StringIO(), io.StringIO()
        words: list[str] = []
        if command.language == "sh":
            words = self._start("bash", "-c", f"printf '%s\\0' {command.text}").split("\0")[1:-1]
        with (
            self._like_a_new_process(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            if command.language == "python":
                exec(compile(command.text, "page", "exec"), {"__name__": "__main__"})
                return out.getvalue()
            with pytest.raises(SystemExit) as left:
                run(tessera, "tessera", words)
        assert left.value.code == 0, f"$ {command.text}\n{out.getvalue()}\n{err.getvalue()}"
        return out.getvalue()

    @contextlib.contextmanager
    def _like_a_new_process(self) -> Iterator[None]:
        """The folder, the environment and the user's modules of a new process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            for name in [name for name in os.environ if name.startswith(("TESSERA_", "MLFLOW_T"))]:
                patch.delenv(name)
            for name, value in self.environment.items():
                if name.startswith((*SETTINGS, "PYTHONPATH")):
                    patch.setenv(name, value)
            for folder in self.environment.get("PYTHONPATH", "").split(os.pathsep):
                if folder:
                    patch.syspath_prepend(folder)
            yield
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(f"{self.folder}{os.sep}"):
                del sys.modules[name]
        models.get.cache_clear()


def _only_calls_tessera(text: str) -> bool:
    """Whether bash has nothing to do but to expand the words of a call."""
    plain = re.sub(r"\$\([^)]*\)", "", text)
    return text.startswith("tessera ") and not re.search(r"[|&;<>]", plain)
