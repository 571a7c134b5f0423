"""`registry` and `lineage`: what is registered, and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import Call

from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.data.packing import pack
from pipelines.promotion import gate
from pipelines.training import hardware
from pipelines.workflows import evaluate, promote, services, train
from pipelines.workflows.context import Context

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(trained_home: Path, digits: Path) -> Path:
    """Two versions of a model: the first is champion, the second was refused."""
    recipe = recipes.start("cnn", "tiny").with_overrides(
        {"data.path": str(digits), "train.epochs": 1, "workers.count": 0}
    )
    tags = {"tessera.search": "a-search", "tessera.trial": "7"}
    train.train(recipe, progress=False, tags=tags)
    for version in ("digits/1", "digits/2"):
        evaluate.evaluate(version, data=digits, report=False, intervals=False)
        promote.promote(version)
    return trained_home


def test_all_models_are_listed(home: Path, call: Call) -> None:
    (model,) = json.loads(call("registry", "--json").out)
    assert model == {
        "model": "digits",
        "versions": 2,
        "champion": 1,
        "challenger": 2,
        "family": "cnn",
        "data": "digits",
    }
    assert "digits" in call("registry").out


def test_the_versions_of_a_model_are_listed_with_metrics_and_verdicts(
    home: Path, call: Call
) -> None:
    newest, first = json.loads(call("registry", "digits", "--json").out)
    assert (first["version"], first["aliases"]) == (1, "champion")
    assert first["verdict"].startswith("promoted: accuracy")
    assert newest["verdict"].startswith("refused: gain in accuracy")
    registry = services.open_registry(Context.from_environment())
    for row in (newest, first):
        version = registry.version("digits", row["version"])
        evaluation = gate.evaluation_of(version)
        assert evaluation is not None
        assert row["test"] == f"{evaluation.metrics['accuracy']:.4f}"
        val = json.loads(version.tags["tessera.metrics"])["val/accuracy"]
        assert row["val"] == f"{val:.4f}"


def test_an_unknown_model_is_an_error(home: Path, call: Call) -> None:
    done = call("registry", "digts")
    assert (done.status, "did you mean 'digits'" in done.err) == (2, True)


def test_an_empty_registry(store: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.setenv("TESSERA_HOME", str(store))
    assert call("registry").out == (
        "no model is registered yet; train one: tessera train FAMILY --data DIR\n"
    )
    assert json.loads(call("registry", "--json").out) == []
    done = call("registry", "digits")
    assert (done.status, "no model is registered yet" in done.err) == (1, True)


def test_a_version_is_traced_to_the_digest_of_its_data(
    home: Path, digits: Path, call: Call
) -> None:
    found = json.loads(call("lineage", "models:/digits@champion", "--json").out)
    version = services.open_registry(Context.from_environment()).version("digits", 1)
    assert found["version"] == "models:/digits/1"
    assert found["files"] == f"sha256 {version.tags['tessera.digest']}"
    assert found["verdict"].startswith("promoted: accuracy")
    assert found["data_digest"] == cards.read(digits).digest
    assert cards.read(digits).digest in found["evaluated"]
    assert found["settings"]["train.epochs"] == 2
    assert found["settings"]["data.path"] == str(digits)
    assert found["hardware"] == hardware.describe()
    assert set(found["libraries"]) == {
        "torch",
        "torchvision",
        "ray",
        "mlflow",
        "webdataset",
        "tessera",
    }
    assert found["search"] == ""
    page = call("lineage", "digits@champion").out
    assert cards.read(digits).digest in page
    assert "train.epochs=2" in page


def test_the_lineage_includes_the_search(home: Path, call: Call) -> None:
    found = json.loads(call("lineage", "digits/2", "--json").out)
    assert (found["search"], found["trial"]) == ("a-search", "7")
    assert found["verdict"].startswith("refused: gain in accuracy")


def test_a_version_registered_without_tessera(home: Path, call: Call, tmp_path: Path) -> None:
    registry = services.open_registry(Context.from_environment())
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "weights").write_bytes(b"1")
    run_id = registry.version("digits", 1).run_id
    registry.register("foreign", tmp_path / "files", run_id=run_id, tags={})
    done = call("lineage", "foreign")
    assert (done.status, "was not registered by Tessera" in done.err) == (1, True)
    (row,) = json.loads(call("registry", "foreign", "--json").out)
    assert (row["family"], row["verdict"], row["test"]) == (None, None, None)
    registry._client.delete_registered_model("foreign")


def test_a_version_is_reproduced_bit_for_bit(home: Path, call: Call) -> None:
    found = call("reproduce", "digits@champion", "--json")
    result = json.loads(found.out)
    assert (found.status, result["reproduced"]) == (0, True)
    assert result["weights"] == "the same, bit for bit"
    assert result["differences"] == []
    assert all(was == now for was, now in result["metrics"].values())
    assert not list(home.glob(".reproduce-*"))
    assert len(json.loads(call("registry", "digits", "--json").out)) == 2


def test_different_weights_on_the_same_machine_are_reported(home: Path, call: Call) -> None:
    """Its recipe has another seed than the one it was trained with."""
    registry = services.open_registry(Context.from_environment())
    version = registry.version("digits", 2)
    true = version.tags["tessera.recipe"]
    registry.tag(version, {"tessera.recipe": json.dumps({**json.loads(true), "seed": 5})})
    done = call("reproduce", "digits/2")
    registry.tag(version, {"tessera.recipe": true})
    assert done.status == 1
    assert "apart" in done.out
    assert "none known" in done.out


def test_other_data_are_refused(home: Path, digits: Path, tmp_path: Path, call: Call) -> None:
    other = tmp_path / "other"
    pack.pack("digits", other, seed=3)
    done = call("reproduce", "digits/1", "--data", other)
    assert (done.status, "is not the one that the recipe names" in done.err) == (1, True)
