"""`train`, `resume` and `plan` as functions, in this process and with the embedded MLflow."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.core.errors import TesseraError, UsageError
from pipelines import recipe as recipes
from pipelines.training.driver import Outcome
from pipelines.workflows import services, train
from pipelines.workflows.context import Context

SMALL: dict[str, Any] = {"train.epochs": 1, "train.batch_size": 128, "workers.count": 0}


@pytest.fixture
def elsewhere(prepared_store: Path, tmp_path: Path) -> Context:
    """A context that differs from the environment."""
    shutil.copytree(prepared_store, tmp_path / "elsewhere")
    return Context.from_environment({"TESSERA_HOME": str(tmp_path / "elsewhere")})


def test_a_plan_creates_nothing(digits: Path, tmp_path: Path) -> None:
    context = Context.from_environment({"TESSERA_HOME": str(tmp_path / "home")})
    plan = train.plan("cnn", data=digits, variant="tiny", set=SMALL, context=context)
    assert plan.recipe.train.epochs == 1
    assert plan.steps == plan.steps_per_epoch == -(-plan.samples // 128)
    assert plan.data == "digits"
    assert not context.home.exists()


@pytest.mark.parametrize(
    ("what", "more", "message"),
    [
        ("cnm", {}, "'cnm'"),
        ("cnn", {"set": {"train.epoch": 1}}, "unknown setting 'train.epoch'"),
        ("cnn", {"variant": "huge"}, "huge"),
        ("no/such.yaml", {}, "can't be read"),
        ("cnn", {"data": "nowhere"}, "nowhere"),
        ("cnn", {"data": None}, "no data set"),
        ("cnn", {"model": "a/b"}, "a/b"),
    ],
)
def test_invalid_arguments_are_refused_and_create_nothing(
    what: str, more: dict[str, Any], message: str, digits: Path, tmp_path: Path
) -> None:
    context = Context.from_environment({"TESSERA_HOME": str(tmp_path / "home")})
    with pytest.raises(TesseraError, match=message):
        train.train(what, progress=False, context=context, **{"data": digits, **more})
    assert not list(context.runs_dir.glob("*"))


@pytest.mark.parametrize("function", [train.plan, train.train])
@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("backbone", {"set": {"model.name": "nonsense"}}, "nonsense"),
        (
            "cnn",
            {"workers": 10_000, "set": {"train.batch_size": 10_000}},
            "train samples are not enough",
        ),
        ("cnn", {"workers": 1_000, "set": {"train.batch_size": 1_000}}, "1000 workers with 1 CPU"),
        ("resnet", {"set": {"model.weights": "/no/w.pth"}}, "/no/w.pth"),
    ],
)
def test_recipes_that_cannot_be_trained_are_refused_before_a_run_exists(
    function: Callable[..., Any],
    family: str,
    more: dict[str, Any],
    message: str,
    digits: Path,
    tmp_path: Path,
    mlflow_settings: None,
) -> None:
    """Also by a dry run, which is `plan`."""
    context = Context.from_environment({"TESSERA_HOME": str(tmp_path / "home")})
    with pytest.raises(TesseraError, match=message):
        function(family, data=digits, context=context, **more)
    assert not context.home.exists(), "neither a run nor a store of MLflow"


@pytest.mark.slow
def test_a_run_is_trained_in_the_home_of_its_context_and_resumed(
    digits: Path, elsewhere: Context, tmp_path: Path
) -> None:
    """With a listener instead of the display. Resuming a finished run registers nothing new."""
    recipe = recipes.start("cnn", "tiny").with_overrides(SMALL)
    events: list[dict[str, Any]] = []
    outcome = train.train(recipe, data=digits, progress=events.append, context=elsewhere)
    assert outcome.run.folder.parent == elsewhere.runs_dir
    assert outcome.version.name == "digits"
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "run"
    assert "metrics" in kinds
    again = train.resume(outcome.run.name, progress=False, context=elsewhere)
    assert again.version.number == outcome.version.number
    assert len(services.open_registry(elsewhere).versions("digits")) == 1
    with pytest.raises(UsageError, match="can't be resumed with other settings"):
        train.resume(outcome.run.name, set={"seed": 5}, progress=False, context=elsewhere)
    with pytest.raises(TesseraError, match="run"):
        train.resume("no-such-run", progress=False, context=elsewhere)


@pytest.mark.slow
def test_a_named_run_is_begun_resumed_and_then_only_reported(
    digits: Path, elsewhere: Context
) -> None:
    """What a cluster repeats until it succeeds: the same call, interrupted after two epochs."""
    events: list[dict[str, Any]] = []

    def interrupt(event: dict[str, Any]) -> None:
        events.append(event)
        if sum("val/accuracy" in each.get("values", ()) for each in events) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    def once_more(progress: Any = False, **more: Any) -> Outcome:
        settings = {**SMALL, "train.epochs": 8, **more}
        return train.train(
            "cnn", data=digits, set=settings, run="nightly", progress=progress, context=elsewhere
        )

    # A process that was started in the background ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        once_more(interrupt)
    signal.signal(signal.SIGINT, before)
    events.clear()
    outcome = once_more(events.append)
    assert outcome.run.name == outcome.run.folder.name == "nightly"
    assert "resume" in [event["kind"] for event in events]
    events.clear()
    again = once_more(events.append)
    assert [event["text"] for event in events] == ["nightly is finished: nothing to train"]
    assert again.version.number == outcome.version.number
    assert again.metrics == pytest.approx(dict(outcome.metrics))
    assert (again.epoch, again.link) == (outcome.epoch, outcome.link)
    client = services.attach_tracker(elsewhere, outcome.run.run_id)._client
    experiment = client.get_experiment_by_name(train.EXPERIMENT).experiment_id
    assert len(client.search_runs([experiment])) == 1
    with pytest.raises(UsageError, match="nightly was begun with other settings: seed was 0, is 5"):
        once_more(seed=5)
    with pytest.raises(UsageError, match="model was digits, is other"):
        train.train(outcome.run.recipe(), run="nightly", model="other", context=elsewhere)


def test_a_named_run_that_is_refused_leaves_nothing_behind(digits: Path, tmp_path: Path) -> None:
    context = Context.from_environment({"TESSERA_HOME": str(tmp_path / "home")})
    for name in ("a/b", "../up", "", ".hidden", "-x", " a", "a\n", 'it\'s "so"', "😀" * 50):
        with pytest.raises(UsageError, match="is not a valid name of a run"):
            train.train("cnn", data=digits, run=name, context=context)
    with pytest.raises(TesseraError, match="nowhere"):
        train.train("cnn", data="nowhere", run="nightly", context=context)
    assert not context.home.exists()


def test_the_default_model_name_includes_a_task_other_than_that_of_the_data(digits: Path) -> None:
    from pipelines.data import card as cards

    card = cards.read(digits)
    assert train.model_name(recipes.start("cnn"), card) == "digits"
    assert train.model_name(recipes.start("embedding"), card).startswith("digits-")


def test_a_gpu_that_this_process_has_not_is_refused(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the training would use the CPU without a word."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    context = Context.from_environment({"TESSERA_HOME": str(tmp_path / "home")})
    changes = {**SMALL, "workers.gpus": 1}
    with pytest.raises(TesseraError, match=r"asks for a GPU, and this process.* sees none"):
        train.plan("cnn", data=digits, variant="tiny", set=changes, context=context)
    plan = train.plan("cnn", data=digits, set={**SMALL, "workers.gpus": 0}, context=context)
    assert plan.recipe.workers.gpus == 0


@pytest.mark.parametrize(("batch_size", "noticed"), [(1000, True), (128, False)])
def test_few_steps_an_epoch_are_noticed(
    elsewhere: Context, digits: Path, batch_size: int, noticed: bool
) -> None:
    events: list[Any] = []
    changes = {**SMALL, "train.batch_size": batch_size}
    train.train(
        "cnn", data=digits, variant="tiny", set=changes, progress=events.append, context=elsewhere
    )
    texts = [event["text"] for event in events if event["kind"] == "notice"]
    assert any("steps an epoch: a smaller train.batch_size" in text for text in texts) == noticed


def test_only_a_family_by_name_is_fitted_to_the_data(digits: Path, tmp_path: Path) -> None:
    context = Context.from_environment({"TESSERA_HOME": str(tmp_path / "home")})
    by_name = train.plan("cnn", data=digits, set={"train.epochs": 2}, context=context)
    chosen = {one.path: one.value for one in by_name.fitted}
    assert by_name.recipe.train.batch_size == chosen["train.batch_size"] < 128
    assert by_name.recipe.train.epochs == 2
    assert "train.epochs" not in chosen
    explicit = recipes.start("cnn").with_overrides({"data.path": str(digits)})
    (tmp_path / "mine.yaml").write_text(explicit.to_json())
    for recipe in (explicit, str(tmp_path / "mine.yaml"), "digits"):
        plan = train.plan(recipe, data=digits, context=context)
        assert plan.fitted == ()
    assert train.plan(explicit, context=context).recipe.train == explicit.train
