"""What a worker says before it trains. The training itself is tested with the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rank_work

from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.interfaces import World
from pipelines.tracking.events import EventLog, read_events
from pipelines.training import worker


def run(digits: Path, folder: Path, shared_file: str = "", **settings: Any) -> list[dict[str, Any]]:
    from dataclasses import replace

    recipe = recipes.start("cnn", "tiny").with_overrides(
        {
            "data.path": str(digits),
            "data.digest": cards.read(digits).digest,
            "train.epochs": 1,
            **settings,
        }
    )
    folder.mkdir()
    emit = EventLog(folder / "events.jsonl")
    payload = replace(rank_work.payload_for(recipe, folder), shared_file=shared_file)
    worker.run(payload, World(), emit)
    emit.close()
    return [event for event, _ in read_events(folder / "events.jsonl")]


def test_a_worker_that_does_not_see_the_folder_is_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match="doesn't see") as caught:
        run(digits, tmp_path / "run", shared_file=".shared")
    assert "--storage" in caught.value.hint


@pytest.mark.parametrize(("batch_size", "said"), [(1000, True), (100, False)])
def test_an_epoch_of_one_or_two_steps_is_reported(
    digits: Path, tmp_path: Path, batch_size: int, said: bool
) -> None:
    events = run(digits, tmp_path / "run", **{"train.batch_size": batch_size})
    texts = [event["text"] for event in events if event["kind"] == "notice"]
    assert any("steps an epoch" in text for text in texts) is said
    assert [event["reason"] for event in events if event["kind"] == "start"]
    (tags,) = [event["values"] for event in events if event["kind"] == "tags"]
    assert "tessera.hardware" in tags
