"""The sample log has the samples that reached the saved weights."""

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


def test_repeated_steps_count_once(tmp_path: Path) -> None:
    write(tmp_path, 0, [(0, 0, [3, 1]), (1, 0, [0]), (2, 1, [1, 3])])
    write(tmp_path, 1, [(1, 0, [0]), (2, 1, [0, 3])])
    write(tmp_path, 3, [(3, 1, [1])])
    assert sample_log.read(tmp_path) == {0: [3, 1, 0], 1: [0, 3, 1]}


def test_a_lost_step_leaves_a_gap(tmp_path: Path) -> None:
    """Control: an attempt that begins too late."""
    write(tmp_path, 0, [(0, 0, [3, 1])])
    write(tmp_path, 2, [(2, 1, [1, 3])])
    assert sample_log.read(tmp_path) == {0: [3, 1], 1: [1, 3]}


def test_a_missing_file_of_a_rank_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, 0, [(0, 0, [3, 1])])
    file = tmp_path / sample_log.FOLDER / "0000-0000.jsonl"
    file.write_text(file.read_text().replace('"ranks":1', '"ranks":2'))
    with pytest.raises(TesseraError, match="ranks don't agree"):
        sample_log.read(tmp_path)
