"""The training loop, in this process and on gloo ranks: each setting, and exact resume."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import gloo_ranks
import pytest
import rank_work
import torch
from safetensors.torch import load_file

from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.interfaces import GroupStopped, NullControl, World
from pipelines.recipe import Recipe
from pipelines.tracking.events import EventLog, read_events
from pipelines.training import checkpoints, worker

WORK = Path(__file__).parents[2] / "support" / "rank_work.py"


def small(digits: Path, **changes: Any) -> Recipe:
    start = recipes.start(changes.pop("family", "cnn"), changes.pop("variant", "tiny"))
    return start.with_overrides(
        {
            "data.path": str(digits),
            "data.digest": cards.read(digits).digest,
            "train.epochs": 3,
            "train.batch_size": 100,  # 1,439 images: the last batch is short
            "train.precision": "fp32",
            "train.log_every_steps": 1,
            "checkpoint.keep": 99,
            **changes,
        }
    )


def fit(recipe: Recipe, folder: Path, **more: Any) -> dict[str, Any]:
    """Trains in this process; returns the summary, all events and the final weights."""
    folder.mkdir(parents=True, exist_ok=True)
    emit = EventLog(folder / "events.jsonl")
    summary = worker.run(rank_work.payload_for(recipe, folder, **more), World(), emit)
    emit.close()
    events = [event for event, _ in read_events(folder / "events.jsonl")]
    last = sorted(folder.glob("checkpoints/step-*"))[-1]
    stored = load_file(last / "weights.safetensors")
    weights = {name: tensor.clone() for name, tensor in stored.items()}  # not the file's own pages
    return {
        **dataclasses.asdict(summary),
        "events": events,
        "weights": weights,
        "folder": folder,
    }


def losses(result: dict[str, Any]) -> list[float]:
    detected = [e["values"].get("train/loss") for e in result["events"] if e["kind"] == "metrics"]
    return [value for value in detected if value is not None]


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    a, b = one["weights"], other["weights"]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def plain(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fit(small(digits), tmp_path_factory.mktemp("plain"))


def test_the_loss_falls_and_every_epoch_is_logged(plain: dict[str, Any]) -> None:
    assert len(losses(plain)) == 3 * 15
    assert losses(plain)[-1] < losses(plain)[0] * 0.75
    images = [e["path"] for e in plain["events"] if e["kind"] == "artifact"]
    assert {Path(p).stem for p in images} == {
        *(f"val-{epoch:05d}" for epoch in (1, 2, 3)),
        "training_samples",
        "worst_mistakes",
        "confusion_matrix",
    }
    validated = [e for e in plain["events"] if "val/accuracy" in e.get("values", {})]
    assert [e["step"] for e in validated] == [1, 2, 3]


def test_the_same_seed_gives_the_same_weights(
    plain: dict[str, Any], digits: Path, tmp_path: Path
) -> None:
    assert equal(plain, fit(small(digits), tmp_path / "again"))
    assert not equal(plain, fit(small(digits, seed=1), tmp_path / "other"))


def test_accumulation_changes_losses_by_rounding_only(
    plain: dict[str, Any], digits: Path, tmp_path: Path
) -> None:
    cut = fit(small(digits, **{"train.accumulate": 3}), tmp_path)
    apart = max(abs(a - b) for a, b in zip(losses(plain), losses(cut), strict=True))
    assert 0 < apart < 1e-4


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"variant": "base", "model.channels": [8, 16]}, id="batchnorm"),
        pytest.param({"train.ema": 0.9}, id="ema", marks=pytest.mark.slow),
        pytest.param(
            {"variant": "lenet-dropout", "augment.crop_padding": 1},
            id="dropout and augmentation",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"optim.model.kind": "adamw", "train.clip_norm": 0.5},
            id="adamw and clipping",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.slow
def test_resume_is_exact(changes: dict[str, Any], digits: Path, tmp_path: Path) -> None:
    """From the middle of an epoch and from the end of one."""
    recipe = small(digits, **{"checkpoint.every_steps": 7, "train.epochs": 2, **changes})
    whole = fit(recipe, tmp_path / "whole")
    for step in (7, 15):
        name = f"checkpoints/step-{step:09d}"
        cut = tmp_path / f"cut-{step}"
        shutil.copytree(tmp_path / "whole" / name, cut / name)
        resumed = fit(recipe, cut)
        assert equal(whole, resumed), step
        assert losses(resumed) == losses(whole)[step:]


def test_a_damaged_newest_checkpoint_is_skipped_with_a_notice(
    plain: dict[str, Any], digits: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain["folder"], run)
    newest = run / "checkpoints" / "step-000000045" / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    again = fit(small(digits), run)
    notices = [
        e["text"] for e in again["events"] if e["kind"] == "notice" and e.get("level") != "info"
    ]
    assert len(notices) == 1
    assert "step-000000045 is damaged" in notices[0]
    assert [e["step"] for e in again["events"] if e["kind"] == "resume"] == [30]
    assert equal(plain, again)


@pytest.mark.fault(18)
def test_resume_with_another_seed_batch_or_data_is_refused(digits: Path, tmp_path: Path) -> None:
    recipe = small(digits, **{"train.epochs": 1})
    fit(recipe, tmp_path)
    for change in ({"seed": 1}, {"train.batch_size": 50}, {"optim.model.lr": 0.01}):
        with pytest.raises(TesseraError, match=next(iter(change)).replace(".", r"\.")):
            fit(recipe.with_overrides(change), tmp_path)
    with pytest.raises(TesseraError, match="not the one that the recipe names"):
        fit(recipe.with_overrides({"data.digest": "0" * 64}), tmp_path)


class StopAt(NullControl):
    """Asks the workers to stop after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stops_after(self, step: int) -> bool:
        return step >= self.step


@pytest.mark.slow
def test_workers_that_are_asked_to_stop_commit_and_resume_exactly(
    plain: dict[str, Any], digits: Path, tmp_path: Path
) -> None:
    for step in (7, 15, 30):  # within the first epoch, and at the end of an epoch
        payload = rank_work.payload_for(small(digits), tmp_path)
        with (
            closing(EventLog(tmp_path / "events.jsonl")) as emit,
            pytest.raises(GroupStopped),
        ):
            worker.run(payload, World(control=StopAt(step)), emit)
        newest = sorted((tmp_path / "checkpoints").glob("step-*"))[-1]
        assert newest.name == f"step-{step:09d}", "no step is done again"
    whole = fit(small(digits), tmp_path)
    assert equal(whole, plain)
    assert losses(whole) == losses(plain)


@pytest.mark.slow
def test_a_stop_after_the_last_step_is_the_end(
    plain: dict[str, Any], digits: Path, tmp_path: Path
) -> None:
    payload = rank_work.payload_for(small(digits), tmp_path)
    with closing(EventLog(tmp_path / "events.jsonl")) as emit:
        summary = worker.run(payload, World(control=StopAt(45)), emit)
    assert summary.ended
    assert summary.metrics == plain["metrics"]


def test_a_training_in_pieces_is_the_same_training(
    plain: dict[str, Any], digits: Path, tmp_path: Path
) -> None:
    """The learning rate follows the whole schedule wherever it stops; only the end has metrics."""
    for epoch in (1, 2):
        piece = fit(small(digits), tmp_path, until_epoch=epoch)
        assert (piece["epochs"], piece["ended"], piece["metrics"]) == (epoch, False, {})
    whole = fit(small(digits), tmp_path, until_epoch=3)
    assert whole["ended"]
    assert whole["metrics"] == plain["metrics"]
    assert losses(whole) == losses(plain)
    assert equal(whole, plain)


@pytest.fixture(scope="module")
def first_epoch(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that stopped after the first of three epochs. Only read."""
    folder = tmp_path_factory.mktemp("first") / "run"
    fit(small(digits), folder, until_epoch=1)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"optim.model.lr": 0.01},
        {"optim.model.momentum": 0.5},
        {"optim.model.weight_decay": 0.1},
        {"augment.label_smoothing": 0.2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_setting_takes_effect_after_a_resume(
    change: dict[str, Any],
    plain: dict[str, Any],
    first_epoch: Path,
    digits: Path,
    tmp_path: Path,
) -> None:
    """The optimizer's state in the checkpoint has the old momentum and weight decay."""
    run = tmp_path / "run"
    shutil.copytree(first_epoch, run)
    (path,) = change
    changed = small(digits).with_overrides(change)
    with pytest.raises(TesseraError, match=re.escape(path)):
        fit(changed, run, changing=("augment.flip",))
    again = fit(changed, run, changing=(path,))
    assert losses(again)[:15] == losses(plain)[:15]
    assert not equal(again, plain)
    newest = checkpoints.load(run / "checkpoints" / again["newest"])
    assert newest.recipe == changed


def test_patience_stops_early(digits: Path, tmp_path: Path) -> None:
    still = {"optim.model.lr": 1e-12, "train.patience": 2, "train.epochs": 9}
    result = fit(small(digits, **still), tmp_path)
    assert result["epochs"] == 3
    assert result["epoch"] == 3  # of equal epochs the later one


def test_the_moving_average_is_saved_beside_the_trained_weights(
    digits: Path, tmp_path: Path
) -> None:
    fit(small(digits, **{"train.ema": 0.9}), tmp_path)
    folder = sorted(tmp_path.glob("checkpoints/step-*"))[-1]
    state = checkpoints.load(folder)
    assert any(not torch.equal(state.weights[k], state.training[k]) for k in state.weights)


@pytest.mark.slow
def test_frozen_parameters_do_not_change(digits: Path, tmp_path: Path) -> None:
    """Transfer learning: the weights of another network, all frozen but a new head."""
    recipe = small(digits, family="resnet", **{"train.epochs": 1, "train.batch_size": 500})
    fit(recipe, tmp_path / "first")
    learned = sorted(tmp_path.glob("first/checkpoints/step-*"))[-1] / "weights.safetensors"
    changes = {"model.weights": str(learned), "model.freeze": "backbone"}
    result = fit(recipe.with_overrides(changes), tmp_path / "second")
    before = load_file(learned)
    moved = {k for k, v in result["weights"].items() if not torch.equal(v, before[k])}
    assert moved
    assert all(k.startswith("fc.") for k in moved), moved


@pytest.mark.slow
def test_three_ranks_train_as_one(plain: dict[str, Any], digits: Path, tmp_path: Path) -> None:
    """`integration/test_training.py` has two on a real Ray."""
    payload = {"recipe": small(digits).to_json(), "run_dir": str(tmp_path)}
    result = gloo_ranks.run(WORK, "train", 3, payload)[0]
    apart = max(abs(a - b) for a, b in zip(losses(plain), result["losses"], strict=True))
    assert apart < 1e-4


@pytest.mark.slow
@pytest.mark.fault(15)
def test_a_rank_without_an_image_takes_part_in_every_update(digits: Path, tmp_path: Path) -> None:
    """The last batch has one image for three ranks, so two of them count none."""
    assert cards.read(digits).split("train").samples % 719 == 1
    changes = {"train.batch_size": 719, "train.epochs": 2}
    payload = {"recipe": small(digits, **changes).to_json(), "run_dir": str(tmp_path / "three")}
    result = gloo_ranks.run(WORK, "train", 3, payload)[0]
    alone = fit(small(digits, **changes), tmp_path / "one")
    apart = max(abs(a - b) for a, b in zip(losses(alone), result["losses"], strict=True))
    assert apart < 1e-4


def test_a_batch_of_one_image_that_can_not_be_normalised_is_refused(
    digits: Path, tmp_path: Path
) -> None:
    """With 8x8 images the last feature maps are one pixel. Ray would retry torch's ValueError."""
    changes = {"train.batch_size": 1438, "variant": "base", "model.pools": 3}
    with pytest.raises(TesseraError, match=r"1 image of a batch.*normalise.*batch_size"):
        fit(small(digits, **changes), tmp_path)


@pytest.mark.control(39)
def test_torch_goes_on_with_weights_that_are_not_finite() -> None:
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e30)
    for _ in range(8):
        layer(torch.ones(2, 4)).pow(2).mean().backward()
        optimizer.step()
    assert not layer.weight.isfinite().any()


@pytest.mark.slow
@pytest.mark.fault(39)
def test_every_rank_stops_at_a_loss_that_is_not_finite(digits: Path, tmp_path: Path) -> None:
    recipe = small(digits, **{"optim.model.lr": 1e9})
    predictions = gloo_ranks.run(
        WORK, "train", 2, {"recipe": recipe.to_json(), "run_dir": str(tmp_path)}
    )
    assert predictions[0] == predictions[1]
    assert "not finite at step" in predictions[0]["error"]
    assert re.search(r"in a batch with: \d{4}, \d{4}", predictions[0]["error"]), "keys are named"
    assert not list(tmp_path.glob("checkpoints/step-*")), "such weights are never written"


@pytest.mark.slow
def test_metrics_do_not_depend_on_the_number_of_ranks(
    plain: dict[str, Any], digits: Path, tmp_path: Path
) -> None:
    """On the train split: 1,439 images are six batches, the last one short."""
    last = sorted(plain["folder"].glob("checkpoints/step-*"))[-1]
    digest = checkpoints.write_model(last, tmp_path / "model")
    payload = {
        "model": str(tmp_path / "model"),
        "digest": digest,
        "data": str(digits),
        "split": "train",
    }
    result = [gloo_ranks.run(WORK, "evaluate", size, payload)[0] for size in (1, 2, 3)]
    assert result[0]["samples"] == cards.read(digits).split("train").samples
    assert result[0] == result[1] == result[2]
    assert json.dumps(result[0]["metrics"])
