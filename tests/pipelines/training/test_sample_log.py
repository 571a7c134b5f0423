"""The ledger says which samples reached the weights that are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.interfaces import World
from pipelines.training import sample_log
from pipelines.training.sample_log import SampleLog


def write(folder: Path, begins: int, lines: list[tuple[int, int, list[int]]]) -> None:
    book = SampleLog(folder, World(), step=begins)
    for step, epoch, samples in lines:
        book.write_step(step, epoch=epoch, samples=samples)
    book.close()


def test_steps_that_were_done_again_count_once(tmp_path: Path) -> None:
    write(tmp_path, 0, [(0, 0, [3, 1]), (1, 0, [0]), (2, 1, [1, 3])])
    write(tmp_path, 1, [(1, 0, [0]), (2, 1, [0, 3])])
    write(tmp_path, 3, [(3, 1, [1])])
    assert sample_log.read(tmp_path) == {0: [3, 1, 0], 1: [0, 3, 1]}


def test_a_step_that_was_lost_is_missed(tmp_path: Path) -> None:
    """The control: an attempt that goes on too late leaves a hole."""
    write(tmp_path, 0, [(0, 0, [3, 1])])
    write(tmp_path, 2, [(2, 1, [1, 3])])
    assert sample_log.read(tmp_path) == {0: [3, 1], 1: [1, 3]}


def test_a_lost_file_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, 0, [(0, 0, [3, 1])])
    file = tmp_path / sample_log.FOLDER / "0000-0000.jsonl"
    file.write_text(file.read_text().replace('"ranks":1', '"ranks":2'))
    with pytest.raises(TesseraError, match="ranks don't agree"):
        sample_log.read(tmp_path)
