"""The registry: one contract for the in-memory one and MLflow's."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from mlflow_server import MlflowServer

from models.core.errors import TesseraError, UsageError
from pipelines.interfaces import Decision, Registry
from pipelines.tracking import mlflow_runs, mlflow_store
from pipelines.tracking.memory import MemoryRegistry
from pipelines.tracking.mlflow_registry import MlflowRegistry, check_name, valid_name

pytestmark = pytest.mark.usefixtures("mlflow_settings")


def open_here(root: Path) -> tuple[MlflowRegistry, mlflow_runs.MlflowTracker]:
    uri = mlflow_store.embedded_uri(root)
    artifacts = mlflow_store.embedded_artifacts(root)
    run = mlflow_runs.open_run(uri, experiment="e", name="n", tags={}, artifact_root=artifacts)
    return MlflowRegistry(uri), run


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


SLOW = pytest.mark.slow


@pytest.fixture(params=["memory", *(pytest.param(p, marks=SLOW) for p in ("sqlite", "http"))])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Registry, str]:
    """A registry, and the run of its models."""
    if request.param == "memory":
        return MemoryRegistry(tmp_path / "memory"), "run"
    if request.param == "sqlite":
        registry, run = open_here(request.getfixturevalue("store"))
        return registry, run.run_id
    server = request.getfixturevalue("mlflow_server")
    name = request.node.name.replace("[", "-").replace("]", "")
    run = mlflow_runs.open_run(server.uri, experiment="e", name=name, tags={}, artifact_root=None)
    return MlflowRegistry(server.uri), run.run_id


def test_a_version_is_registered_tagged_and_gets_an_alias(
    either: tuple[Registry, str], package: Path, tmp_path: Path
) -> None:
    registry, run_id = either
    assert registry.versions("net 1.0") == []
    first = registry.register("net 1.0", package, run_id=run_id, tags={"digest": "a"}, step=3)
    assert (first.name, first.number, first.run_id) == ("net 1.0", 1, run_id)
    assert first.aliases == ()
    (package / "weights.safetensors").write_bytes(b"other")
    second = registry.register("net 1.0", package, run_id=run_id, tags={})
    assert second.number == 2

    registry.tag(first, {"accuracy": "0.98", "digest": "b"})
    assert registry.version("net 1.0", 1).tags == {"digest": "b", "accuracy": "0.98"}
    assert registry.version("net 1.0", 2).tags == {}

    registry.alias("net 1.0", "challenger", 1)
    registry.alias("net 1.0", "champion", 1)
    assert registry.version("net 1.0", "champion").aliases == ("challenger", "champion")
    registry.alias("net 1.0", "champion", 2)
    assert registry.version("net 1.0", "champion").number == 2
    assert [v.number for v in registry.versions("net 1.0")] == [1, 2]
    assert [v.aliases for v in registry.versions("net 1.0")] == [("challenger",), ("champion",)]

    folder = registry.download(second, tmp_path / "out")
    assert contents(folder) == contents(package)
    older = registry.download(registry.version("net 1.0", "1"), tmp_path / "out")
    assert contents(older)["weights.safetensors"] == bytes(range(256))
    assert registry.link(first) != registry.link(second)


def test_missing_models_and_versions_raise_tessera_errors(
    either: tuple[Registry, str], package: Path
) -> None:
    registry, run_id = either
    with pytest.raises(TesseraError):
        registry.version("nothing-like-it", 1)
    registry.register("some", package, run_id=run_id, tags={})
    for ref in (7, "7", "champion", "v1"):
        with pytest.raises(TesseraError, match=f"no version or alias .*{ref}"):
            registry.version("some", ref)
    with pytest.raises(TesseraError, match="no version or alias"):
        registry.alias("some", "champion", 7)


@pytest.mark.control(58)
def test_a_server_without_users_answers_everybody(mlflow_server: MlflowServer) -> None:
    """Control of tests/integration/test_mlflow_auth.py: there all of this needs a login."""
    search = f"{mlflow_server.uri}/api/2.0/mlflow/registered-models/search"
    with urllib.request.urlopen(search, timeout=20) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    "name", ["it's", 'say "hi"', "猫 😀", "cafe\u0301", "100%.`x`", "-- a;b", "a#b?c%2F"]
)
def test_a_model_has_any_name(name: str, store: Path, package: Path, tmp_path: Path) -> None:
    registry, run = open_here(store)
    version = registry.register(name, package, run_id=run.run_id, tags={})
    registry.alias(name, "champion", version.number)
    assert registry.version(name, "champion").number == 1
    assert registry.names() == [name]
    assert registry.missing(version) == ""
    fetched = registry.download(version, tmp_path / "fetched")
    assert {p.name for p in fetched.iterdir()} == {p.name for p in package.iterdir()}
    registry.decide(name, Decision(0, 0, 1, None, "promotion", "token"))
    assert [decision.target for decision in registry.decisions(name)] == [1]
    assert registry.register(name, package, run_id=run.run_id, tags={}).number == 2


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a/b:c\\d@e", "a-b-c-d-e"),
        ("cafe\u0301", "caf\u00e9"),
        ("it's 猫 😀", "it's 猫 😀"),
        ("both ' and \"", "both ' and -"),
        ("..", "model"),
        ("line\nbreak", "line-break"),
        ("x" * 300, "x" * 256),
    ],
)
def test_every_data_set_has_a_default_name_of_its_model(text: str, name: str) -> None:
    assert valid_name(text) == name
    assert check_name(name) == name


def test_errors_list_what_exists(store: Path, package: Path, tmp_path: Path) -> None:
    registry, run = open_here(store)
    with pytest.raises(TesseraError, match="no model is registered yet"):
        registry.version("digits", 1)
    version = registry.register("digits", package, run_id=run.run_id, tags={})
    registry.alias("digits", "champion", 1)
    with pytest.raises(UsageError, match="did you mean 'digits'"):
        registry.version("digit", 1)
    with pytest.raises(TesseraError, match="version 1, and the aliases champion"):
        registry.version("digits", "champ")
    for name in ("a/b", "a:b", 'it\'s "so"', "a\\b", "a\nb", "", " ", "..", "x" * 300):
        with pytest.raises(UsageError, match="is not a valid name of a model"):
            registry.register(name, package, run_id=run.run_id, tags={})
    for alias in ("latest", "v3", "a b"):
        with pytest.raises(UsageError, match="is not a valid alias"):
            registry.alias("digits", alias, 1)
    with pytest.raises(TesseraError, match="isn't in MLflow"):
        registry.register("digits", package, run_id="0" * 32, tags={})
    registry.download(version, tmp_path / "out")
    with pytest.raises(TesseraError, match="exists already"):
        registry.download(version, tmp_path / "out")
    assert [v.number for v in registry.versions("digits")] == [1]


def test_mlflow_links_a_version_to_its_run(store: Path, package: Path) -> None:
    registry, run = open_here(store)
    version = registry.register("a.b", package, run_id=run.run_id, tags={"t": "1"}, step=12)
    client = run._client
    row = client.get_model_version("a.b", "1")
    model_id = row.source.removeprefix("models:/")
    model = client.get_logged_model(model_id)
    assert model.source_run_id == row.run_id == run.run_id
    assert str(model.status) == "READY"
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "a.b", "version": 1}]
    outputs = client.get_run(run.run_id).outputs.model_outputs
    assert [(output.model_id, output.step) for output in outputs] == [(model_id, 12)]
    assert registry.link(version) == (
        "http://127.0.0.1:5000/#/models/a.b/versions/1?workflowType=machine_learning"
    )


def test_files_that_cannot_be_stored_create_no_version(store: Path, package: Path) -> None:
    registry, run = open_here(store)
    artifacts = mlflow_store.embedded_artifacts(store)
    artifacts.mkdir(exist_ok=True)
    (artifacts / "models").write_text("a file where the folder of models should be")
    with pytest.raises(Exception, match="models"):
        registry.register("digits", package, run_id=run.run_id, tags={})
    assert registry.versions("digits") == []
    result = run._client.search_logged_models([run.experiment_id])
    assert [str(model.status) for model in result] == ["FAILED"]
