"""The pages of the documentation as tests see them: code blocks, and a shell to run them in.

A block in `sh` is run line by line, one in `python` as a script; one with a title is written to a
file of that name. Blocks without a language are shown only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LIMIT_SECONDS = 600


@dataclass(frozen=True)
class Block:
    """A code block of a page. `title` is the file that the block is to be written to."""

    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in BLOCK.findall(page.read_text(encoding="utf-8"))]


def commands(page: Path) -> list[str]:
    """The lines of the page's shell blocks."""
    texts = [block.text for block in blocks(page) if block.language == "sh"]
    return [line for text in texts for line in text.splitlines() if line.strip()]


class Shell:
    """A user's shell: it keeps its folder and its variables from one command to the next."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out: dict[str, str] = {}
        """What each command printed on stdout, by the command."""
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "MLFLOW_", "TESSERA_", "PYTEST"))
        }
        path = os.pathsep.join([str(Path(sys.executable).parent), clean["PATH"]])
        home = {"HOME": str(folder), "TESSERA_HOME": str(folder / ".tessera")}
        self.environment = {**clean, **home, "PATH": path, "OMP_NUM_THREADS": "1"}
        self.environment.pop("PYTHONPATH", None)

    def run(self, block: Block) -> None:
        """Runs a block, or writes it to its file."""
        if block.title:
            (self.folder / block.title).write_text(block.text)
        elif block.language == "python":
            self._call([sys.executable, "-c", block.text], block.text)
        elif block.language == "sh":
            for line in filter(str.strip, block.text.splitlines()):
                self.sh(line)

    def sh(self, line: str, *more: str) -> str:
        """Runs one command line, with more words at its end; gives its stdout."""
        words = ["bash", "-c", f"set -e\n{' '.join([line, *more])}\nenv -0 > .environment"]
        out = self._call(words, line)
        kept = (self.folder / ".environment").read_text().split("\0")
        self.environment = dict(entry.split("=", 1) for entry in kept if entry)
        return out

    def _call(self, words: list[str], text: str) -> str:
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
        assert done.returncode == 0, f"$ {text}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        self.out[text] = done.stdout
        return done.stdout

    def printed(self, start: str) -> str:
        """What the first command that begins like this printed."""
        return next(out for text, out in self.out.items() if text.startswith(start))

    def copy(self, folder: Path) -> Shell:
        """A shell in a copy of the folder, with the same files under another path."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Shell(folder)


def write_photos(folder: Path) -> None:
    """600 real images in a folder for each class, eight new ones, and a file that is no image."""
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
