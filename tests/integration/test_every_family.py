"""Every family is trained on two Ray workers, tracked, registered, evaluated and promoted, and
predicts.

All families share one MLflow store and the same two Ray Train workers. A new family needs no new
test.
"""

from __future__ import annotations

import json
from pathlib import Path

import family_sources
import pytest
from click.testing import CliRunner
from PIL import Image

import models
from jobs import predict
from pipelines import recipe as recipes
from pipelines.data.packing import pack
from pipelines.promotion import champions
from pipelines.recipe import Recipe
from pipelines.tracking.events import read_events
from pipelines.workflows import evaluate, promote, services, train
from pipelines.workflows.context import Context

FIRST_OF_TASK = {models.get(name).task.name: name for name in reversed(models.names())}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def home(own_home: Path) -> Path:
    return own_home


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A packed data set of each kind, with its sources."""
    root = tmp_path_factory.mktemp("sets")
    made = {}
    for kind, make in family_sources.SOURCES.items():
        pack.pack(str(make(root / f"{kind}-source")), root / kind, near_duplicates=False)
        made[kind] = root / kind
    return made


def recipe_for(name: str, packed: dict[str, Path], workers: int) -> Recipe:
    family = models.get(name)
    data = packed[family_sources.READ_FROM[family.task.reads]]
    return recipes.start(name, "tiny").with_overrides(
        {
            "data.path": str(data),
            "train.epochs": 1,
            "train.batch_size": 8,
            "workers.count": workers,
        }
    )


@pytest.fixture(scope="module")
def judge(home: Path, packed: dict[str, Path]) -> str:
    """A registered classifier of the same images."""
    outcome = train.train(
        recipe_for("cnn", packed, 0),
        model="judge",
        progress=False,
    )
    return f"models:/judge/{outcome.version.number}"


@pytest.mark.parametrize("name", models.names())
def test_every_family_trains_and_predicts(
    name: str, home: Path, packed: dict[str, Path], judge: str, kept_workers: None, tmp_path: Path
) -> None:
    import mlflow

    task = models.get(name).task
    recipe = recipe_for(name, packed, 2)
    if task.needs_judge:
        recipe = recipe.with_overrides({"judge": judge})
    outcome = train.train(
        recipe,
        model=name,
        progress=False,
    )
    version = f"models:/{name}/{outcome.version.number}"
    assert task.primary.name in outcome.metrics

    client = mlflow.MlflowClient(Context.from_environment().tracking_uri)
    started = [e for e, _ in read_events(outcome.run.event_log) if e["kind"] == "worker"]
    assert sorted(event["rank"] for event in started) == [0, 1]
    run = client.get_run(outcome.run.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["family"] == name
    assert f"val/{task.primary.name}" in run.data.metrics
    files = {Path(f.path).name for f in client.list_artifacts(run.info.run_id, "images")}
    assert any(f.startswith("val+step+1+") and f.endswith(".png") for f in files)

    evaluate.evaluate(version, data=recipe.data.path, report=False, intervals=False)
    if name == FIRST_OF_TASK[task.name]:  # a promotion depends on the task, not on the family
        assert promote.promote(version).passed
        registry = services.open_registry(Context.from_environment())
        champion = champions.current_champion(registry, name)
        assert champion is not None
        assert champion.number == 1

    images = sorted(Path(f"{recipe.data.path}-source").glob("test/**/*.png"))
    inputs = [str(p) for p in images if "mask" not in str(p)][:3]
    if not task.takes_images:
        inputs = ["--samples", "3"]
    out = tmp_path / "predictions.jsonl"
    ran = CliRunner().invoke(
        predict.command,
        [version, *inputs, "--out", str(out), "--annotated", str(tmp_path)],
    )
    assert ran.exit_code == 0, ran.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert line["version"] == 1
        assert Image.open(tmp_path / line["annotated"]).size > (100, 100)
