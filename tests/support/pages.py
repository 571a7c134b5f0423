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
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

BLOCK = re.compile(r'^```(sh|python)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
SETTINGS = ("RAY_", "MLFLOW_", "TESSERA_")
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

    With `fresh` every command runs in a new process, as for a user. Otherwise plain `tessera`
    lines and Python blocks that import tessera run in this process, which takes a fraction of the
    time; the rest runs in bash.
    """

    def __init__(self, folder: Path, *, fresh: bool) -> None:
        self.folder, self.fresh = folder, fresh
        own = (*SETTINGS, "PYTEST", "PYTHONPATH")
        kept = {n: v for n, v in os.environ.items() if not n.startswith(own)}
        path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
        home = {"HOME": str(folder), "TESSERA_HOME": str(folder / ".tessera")}
        self.environment = {**kept, **home, "PATH": path, "OMP_NUM_THREADS": "1"}

    def __call__(self, command: Command) -> str:
        """Runs a command; returns its output, or raises AssertionError with it."""
        if command.title:
            (self.folder / command.title).write_text(command.text)
            return ""
        if not self.fresh and self._is_ours(command):
            return self._in_this_process(command)
        return self._in_a_process(command)

    def _is_ours(self, command: Command) -> bool:
        if "PYTHONPATH" in self.environment:
            return False  # it holds for a new process only
        if command.language == "python":
            return "import tessera" in command.text
        services = re.match(r"tessera (up|down|submit|status|doctor)\b", command.text)
        return command.text.startswith("tessera ") and not services and not _needs_bash(command)

    def _in_this_process(self, command: Command) -> str:
        from jobs.cli import run, tessera

        out, err = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.chdir(self.folder)
            for name in [name for name in os.environ if name.startswith(("TESSERA_", "MLFLOW_T"))]:
                patch.delenv(name)
            for name, value in self.environment.items():
                if name.startswith(SETTINGS):
                    patch.setenv(name, value)
            if command.language == "python":
                exec(compile(command.text, "page", "exec"), {"__name__": "__main__"})
                return out.getvalue()
            with pytest.raises(SystemExit) as left:
                run(tessera, "tessera", shlex.split(command.text)[1:])
        assert left.value.code == 0, f"$ {command.text}\n{out.getvalue()}\n{err.getvalue()}"
        return out.getvalue()

    def _in_a_process(self, command: Command) -> str:
        if command.language == "python":
            alone = "" if "import tessera" in command.text else WITHOUT_TESSERA
            words = [sys.executable, "-c", command.text + alone]
        else:
            words = ["bash", "-c", f"set -e\n{command.text}\nenv -0 > .environment"]
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
        assert done.returncode == 0, f"$ {command.text}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        if command.language == "sh":
            kept = (self.folder / ".environment").read_text().split("\0")
            self.environment = dict(line.split("=", 1) for line in kept if line)
        return done.stdout


def _needs_bash(command: Command) -> bool:
    return bool(re.search(r"[|&;<>$*]", command.text))
