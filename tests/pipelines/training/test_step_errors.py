"""Steps that fail for a reason that another attempt would meet again."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import rank_work

from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.interfaces import World
from pipelines.tracking.events import EventLog
from pipelines.training import worker

FREE_BYTES = 512 << 20


@contextmanager
def limited_memory() -> Iterator[Callable[[], None]]:
    """Yields what limits the memory that this process can still allocate, until the block ends."""
    before = resource.getrlimit(resource.RLIMIT_AS)

    def begin() -> None:
        (used,) = re.findall(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
        resource.setrlimit(resource.RLIMIT_AS, (int(used) * 1024 + FREE_BYTES, before[1]))

    try:
        yield begin
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def train(digits: Path, folder: Path, *, side: int) -> None:
    """Trains with `FREE_BYTES` left, on square images."""
    recipe = recipes.start("cnn", "tiny").with_overrides(
        {
            "data.path": str(digits),
            "data.digest": cards.read(digits).digest,
            "data.height": side,
            "data.width": side,
            "train.batch_size": 400,
            "train.epochs": 1,
            "train.precision": "fp32",
        }
    )
    with limited_memory() as begin:

        class Log(EventLog):
            def __call__(self, event: Mapping[str, Any]) -> None:
                super().__call__(event)
                if event["kind"] == "notice":  # the last event before the first step
                    begin()

        emit = Log(folder / "events.jsonl")
        try:
            worker.run(rank_work.payload_for(recipe, folder), World(), emit)
        finally:
            emit.close()


@pytest.mark.slow
@pytest.mark.fault(40)
def test_a_step_that_needs_too_much_memory_is_refused_in_a_line(
    digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(TesseraError, match=r"memory of the machine is too small.*400 images") as e:
        train(digits, tmp_path, side=512)
    assert "train.accumulate" in e.value.hint


@pytest.mark.slow
@pytest.mark.control(40)
def test_a_step_with_smaller_images_passes_under_the_same_limit(
    digits: Path, tmp_path: Path
) -> None:
    train(digits, tmp_path, side=16)
