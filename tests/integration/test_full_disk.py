"""A training whose disk is full says so in one line, and resumes when there is room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_disk import fill, small_disk

from models.core.errors import TesseraError
from pipelines.workflows import train
from pipelines.workflows.context import Context

pytestmark = [pytest.mark.slow, pytest.mark.e2e]
SETTINGS = {"train.epochs": 3, "train.batch_size": 128, "data.loader_workers": 0}


@pytest.mark.parametrize("left_bytes", [0, 20_000])
def test_a_training_on_a_full_disk_resumes(digits: Path, tmp_path: Path, left_bytes: int) -> None:
    """With no room the event log can't be written, with a little the checkpoint can't."""
    home = str(tmp_path / "home")
    with small_disk(tmp_path / "disk", 16 << 20) as disk:
        context = Context.from_environment({"TESSERA_HOME": home, "TESSERA_STORAGE": str(disk)})
        seen: list[str] = []

        def listener(event: dict[str, Any]) -> None:
            seen.append(event["kind"])
            if event["kind"] == "checkpoint" and "checkpoint" not in seen[:-1]:
                fill(disk, left_bytes=left_bytes)

        with pytest.raises(TesseraError) as caught:
            train.train(
                "cnn",
                data=digits,
                variant="tiny",
                workers=0,
                set=SETTINGS,
                run="once",
                progress=listener,
                context=context,
            )
        assert "can't be written: No space left on device" in caught.value.message
        assert "\n" not in caught.value.message
        assert "--resume" in caught.value.hint
        folder = disk / "runs" / "once" / "checkpoints"
        assert [p for p in folder.iterdir() if not p.name.startswith("step-")] == []
        (disk / "filler").unlink()
        outcome = train.resume("once", progress=listener, context=context)
    assert "resume" in seen
    assert outcome.version.number == 1
    assert outcome.epoch <= 3
