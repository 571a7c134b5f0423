"""On a CUDA device: training with bf16, and predictions that agree with those on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import rank_work
import torch

from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.interfaces import World
from pipelines.tracking.events import EventLog
from pipelines.training import checkpoints, worker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def test_a_model_trained_on_a_gpu_predicts_the_same_on_the_cpu(
    digits: Path, tmp_path: Path
) -> None:
    recipe = recipes.start("cnn").with_overrides(
        {"data.path": str(digits), "data.digest": cards.read(digits).digest, "train.epochs": 8}
    )
    payload = rank_work.payload_for(recipe, tmp_path)
    emit = EventLog(tmp_path / "events.jsonl")
    summary = worker.run(payload, World(0, 1, "cuda:0"), emit)
    assert summary.metrics["accuracy"] > 0.9
    folder = tmp_path / "model"
    digest = checkpoints.write_model(tmp_path / "checkpoints" / summary.checkpoint, folder)
    told = {"model": str(folder), "digest": digest, "data": str(digits), "split": "test"}
    on_gpu, on_cpu = (
        rank_work.evaluate(World(0, 1, device), told)["metrics"] for device in ("cuda:0", "cpu")
    )
    assert on_gpu["accuracy"] == pytest.approx(on_cpu["accuracy"], abs=0.01)
    assert on_gpu["loss"] == pytest.approx(on_cpu["loss"], rel=0.01)
