"""The MLflow of docker-compose.yml, with users and without default permissions, and with its files
in an object store that only the server reaches: refusals, and the whole way from training to
prediction as a user without rights of an administrator."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3_server
from cli_runner import Call
from PIL import Image
from secured_mlflow import BUCKET, SEARCH, STORE_HOST, SecuredMlflow, can_hide_the_store, password

from models.core.errors import TesseraError
from pipelines.tracking import mlflow_runs
from pipelines.tracking.mlflow_errors import RefusedError
from pipelines.tracking.mlflow_registry import MlflowRegistry
from pipelines.workflows import evaluate, promote, services, train
from pipelines.workflows.context import Context

PUBLIC = "https://mlflow.example.com"
pytestmark = [pytest.mark.usefixtures("mlflow_settings"), pytest.mark.cluster]


@pytest.fixture(scope="module")
def store_address(request: pytest.FixtureRequest) -> str | None:
    """The address of an S3 server; None where there can be none: files are then in a folder."""
    if s3_server.missing() or not can_hide_the_store():
        return None
    import boto3

    endpoint: str = request.getfixturevalue("s3_server").endpoint
    keys = {"aws_access_key_id": s3_server.KEY, "aws_secret_access_key": s3_server.SECRET}
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
    client.create_bucket(Bucket=BUCKET)
    return endpoint


@pytest.fixture(scope="module")
def server(
    prepared_store: Path, store_address: str | None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SecuredMlflow]:
    made = SecuredMlflow(prepared_store, tmp_path_factory.mktemp("mlflow"), store_address)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def trainer(
    server: SecuredMlflow, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Context]:
    """The environment of a user who trained `digits`, registered it twice and promoted both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSERA_HOME", str(tmp_path_factory.mktemp("home")))
        for name, value in server.client("trainer").items():
            patch.setenv(name, value)
        patch.setenv("MLFLOW_PUBLIC_URL", PUBLIC)
        trained = train.train(
            "cnn",
            data=digits,
            variant="tiny",
            workers=0,
            set={"train.epochs": 1},
            model="digits",
            progress=False,
        )
        assert trained.link.startswith(f"{PUBLIC}/#/experiments/")
        evaluate.evaluate(trained.version, data=digits, report=False, intervals=False)
        assert promote.promote(trained.version).passed
        context = Context.from_environment()
        registry = services.open_registry(context)
        first = registry.version("digits", 1)
        files = registry.download(first, tmp_path_factory.mktemp("files"))
        again = registry.register("digits", files, run_id=first.run_id, tags=dict(first.tags))
        assert promote.promote(again, margin=-1).passed
        yield context


def test_a_user_without_rights_goes_the_whole_way(
    trainer: Context, digits: Path, call: Call, tmp_path: Path
) -> None:
    registry = services.open_registry(trainer)
    assert [v.aliases for v in registry.versions("digits")] == [("challenger",), ("champion",)]
    listed = json.loads(call("registry", "--json").out)
    assert [(row["model"], row["versions"], row["champion"]) for row in listed] == [
        ("digits", 2, 2)
    ]
    evaluated = call("evaluate", "digits@champion", "--data", digits, "--no-report", "--json")
    assert evaluated.status == 0, evaluated.err
    assert json.loads(call("lineage", "digits/2", "--json").out)["aliases"] == ["champion"]
    assert call("rollback", "digits").status == 0
    assert registry.version("digits", "champion").number == 1
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    predicted = call("predict", "digits@champion", tmp_path / "image.png")
    assert predicted.status == 0, predicted.err
    assert json.loads(predicted.out.splitlines()[0])["class"] in map(str, range(10))
    assert call("registry", "digits/2", "--delete").status == 0
    assert [v.number for v in registry.versions("digits")] == [1]


def test_a_model_that_is_not_there_is_reported_at_once(
    trainer: Context, digits: Path, call: Call
) -> None:
    registry = services.open_registry(trainer)
    started = time.monotonic()
    assert registry.versions("nothing") == []
    assert registry.decisions("nothing") == []
    for arguments in (
        ["evaluate", "nothing", "--data", digits],
        ["promote", "nothing"],
        ["rollback", "nothing"],
        ["predict", "nothing", "image.png"],
        ["lineage", "nothing/2"],
        ["registry", "nothing@champion"],
        ["export", "nothing", "--format", "pt2"],
    ):
        refused = call(*arguments)
        assert refused.status in (1, 2), arguments
        assert "nothing" in refused.err, arguments
        assert "Traceback" not in refused.err
    with pytest.raises(TesseraError, match="unknown model 'nothing'"):
        registry.alias("nothing", "champion", 1)
    with pytest.raises(TesseraError, match="isn't in MLflow, or this user may not"):
        registry.register("digits", Path(), run_id="0" * 32, tags={})
    with pytest.raises(RefusedError, match=r"run '0+'"):
        mlflow_runs.attach_run(trainer.tracking_uri, "0" * 32)
    assert time.monotonic() - started < 60


def test_what_belongs_to_another_user_is_refused_at_once(
    trainer: Context, server: SecuredMlflow, tmp_path: Path
) -> None:
    other = {"username": "other", "password": password("other")}
    assert server.ask("/api/2.0/mlflow/users/create", "admin", other)[0] == 200
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.client("other").items():
            patch.setenv(name, value)
        registry = MlflowRegistry(server.address)
        assert registry.names() == []
        assert registry.versions("digits") == []
        with pytest.raises(RefusedError, match="experiment 'tessera' to this user"):
            mlflow_runs.open_run(
                server.address, experiment="tessera", name="n", tags={}, artifact_root=None
            )
        run = mlflow_runs.open_run(
            server.address, experiment="others", name="n", tags={}, artifact_root=None
        )
        (tmp_path / "weights").write_bytes(b"0")
        with pytest.raises(RefusedError, match="a new version of model 'digits' to this user"):
            registry.register("digits", tmp_path, run_id=run.run_id, tags={})


def test_files_go_through_the_server(
    trainer: Context, store_address: str | None, call: Call, tmp_path: Path
) -> None:
    """Control of the whole way: straight from the store's address they can't be had, and that is
    said in one line, and soon."""
    if store_address is None:
        pytest.skip("no S3 server that this process can't reach: needs radosgw and unshare")
    registry = services.open_registry(trainer)
    assert registry.download(registry.version("digits", 1), tmp_path).is_dir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "true")
        started = time.monotonic()
        refused = call("export", "digits/1", "--format", "pt2", "--out", tmp_path / "x.pt2")
        assert time.monotonic() - started < 30
    assert refused.status == 1
    message, hint = refused.err.strip().splitlines()[-2:]
    assert f"MLflow's object store http://{STORE_HOST}" in message
    assert "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD" in hint


ROUTES = [
    ("GET", SEARCH),
    ("GET", "/api/2.0/mlflow/experiments/get-by-name?experiment_name=tessera"),
    ("POST", "/api/2.0/mlflow/experiments/create"),
    ("POST", "/api/2.0/mlflow/runs/create"),
    ("POST", "/api/2.0/mlflow/runs/search"),
    ("GET", "/api/2.0/mlflow/runs/get?run_id=0"),
    ("POST", "/api/2.0/mlflow/runs/log-batch"),
    ("POST", "/api/2.0/mlflow/runs/log-inputs"),
    ("GET", "/api/2.0/mlflow/metrics/get-history?run_id=0&metric_key=x"),
    ("GET", "/api/2.0/mlflow/artifacts/list?run_id=0"),
    ("POST", "/api/2.0/mlflow/logged-models"),
    ("POST", "/api/2.0/mlflow/registered-models/create"),
    ("GET", "/api/2.0/mlflow/registered-models/get?name=digits"),
    ("GET", "/api/2.0/mlflow/registered-models/search"),
    ("POST", "/api/2.0/mlflow/registered-models/alias"),
    ("POST", "/api/2.0/mlflow/model-versions/create"),
    ("GET", "/api/2.0/mlflow/model-versions/search"),
    ("GET", "/api/2.0/mlflow/model-versions/get-download-uri?name=digits&version=1"),
    ("POST", "/api/2.0/mlflow/model-versions/set-tag"),
    ("DELETE", "/api/2.0/mlflow/model-versions/delete"),
    ("GET", "/api/2.0/mlflow-artifacts/artifacts?path=0"),
    ("GET", "/api/2.0/mlflow-artifacts/artifacts/0/x"),
    ("PUT", "/api/2.0/mlflow-artifacts/artifacts/0/x"),
    ("GET", "/ajax-api/2.0/mlflow/runs/get?run_id=0"),
    ("GET", "/get-artifact?run_uuid=0&path=x"),
    ("POST", "/api/2.0/mlflow/users/create"),
    ("POST", "/graphql"),
    ("GET", "/"),
]
"""Those that a client or a browser asks, and some that nobody should."""


@pytest.mark.fault(58)
def test_nobody_gets_in_without_a_login(server: SecuredMlflow) -> None:
    assert server.ask("/health")[0] == 200
    for user in ("", "stranger"):
        statuses = {
            route: server.ask(route[1], user, None if route[0] == "GET" else {}, method=route[0])[0]
            for route in ROUTES
        }
        assert {route: status for route, status in statuses.items() if status != 401} == {}
    assert server.ask(SEARCH, "trainer")[0] == 200


@pytest.mark.fault(58)
def test_a_foreign_page_changes_nothing(server: SecuredMlflow) -> None:
    """A browser that is logged in sends its login with what another page asks for."""
    create = "/api/2.0/mlflow/experiments/create"
    foreign = server.ask(create, "trainer", {"name": "foreign"}, Origin="https://evil.example")
    assert foreign[0] == 403
    own = server.ask(create, "trainer", {"name": "own"}, Origin="http://127.0.0.1:5000")
    assert own[0] == 200


@pytest.mark.fault(58)
def test_only_the_named_hosts_are_answered(server: SecuredMlflow) -> None:
    for host in ("mlflow", "mlflow:5000", "localhost", "localhost:5000", "127.0.0.1:9"):
        assert server.ask(SEARCH, "trainer", Host=host)[0] == 200, host
    for host in ("evil.example", "10.evil.com", "mlflow:80", "mlflow.evil.com", "10.0.0.3"):
        assert server.ask(SEARCH, "trainer", Host=host)[0] == 403, host


@pytest.mark.fault(58)
def test_a_user_sees_nothing_of_anothers(server: SecuredMlflow) -> None:
    status, made = server.ask("/api/2.0/mlflow/experiments/create", "trainer", {"name": "mine"})
    assert status == 200
    get = f"/api/2.0/mlflow/experiments/get?experiment_id={made['experiment_id']}"
    assert server.ask(get, "trainer")[0] == 200
    stranger = {"username": "stranger-2", "password": password("stranger-2")}
    assert server.ask("/api/2.0/mlflow/users/create", "trainer", stranger)[0] == 403
    assert server.ask("/api/2.0/mlflow/users/create", "admin", stranger)[0] == 200
    assert server.ask(get, "stranger-2")[0] == 403
