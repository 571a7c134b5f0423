"""A file is there whole or not at all; what is no file stays what it is."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from pipelines.storage.atomic import write_atomic


def test_it_is_there_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines"
    with write_atomic(path) as file:
        file.write("one\n")
        assert not path.exists()
    assert path.read_text() == "one\n"
    writing = write_atomic(path)
    writing.__enter__().write("half")
    stopped = KeyboardInterrupt()
    assert not writing.__exit__(type(stopped), stopped, None)
    assert path.read_text() == "one\n"
    assert [p.name for p in path.parent.iterdir()] == ["lines"]


def test_a_pipe_and_a_device_are_written_to(tmp_path: Path) -> None:
    """Whoever is root would otherwise lose them: /dev/null was replaced by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    with write_atomic(pipe) as file:
        file.write("through")
    reader.join(10)
    assert got == ["through"]
    assert pipe.is_fifo()
    with write_atomic(Path(os.devnull)) as file:
        file.write("away")
    assert Path(os.devnull).is_char_device()
