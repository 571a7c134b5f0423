"""A link is printed with a note if its server can't be reached, and reading creates no store."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from cli_runner import Call

from models.core.errors import TesseraError
from pipelines.workflows import services
from pipelines.workflows.context import Context


def test_a_command_that_only_reads_creates_no_store(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / ".tessera"
    monkeypatch.setenv("TESSERA_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    done = call("registry")
    assert (done.status, done.out[:30]) == (0, "no model is registered yet; tr")
    assert call("registry", "--json").out == "[]\n"
    for words in (["registry", "digits"], ["lineage", "digits"], ["rollback", "digits"]):
        refused = call(*words)
        assert (refused.status, "no model is registered yet" in refused.err) == (1, True), words
    with pytest.raises(TesseraError, match="no model is registered yet"):
        services.open_registry(Context.from_environment())
    assert not home.exists()


def test_a_link_has_a_warning_if_the_server_does_not_respond() -> None:
    here = Context.from_environment({})
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        link = f"http://127.0.0.1:{held.getsockname()[1]}/#/experiments/1"
        assert services.page(here, link) == f"{link} (once `tessera up` runs)"
        held.listen()
        assert services.page(here, link) == link
    assert services.page(here, "https://name.invalid/x") == (
        "https://name.invalid/x (not reachable now)"
    )


def test_a_public_link_is_for_another_machine_and_gets_no_warning() -> None:
    context = Context.from_environment({"MLFLOW_PUBLIC_URL": "https://name.invalid"})
    assert services.page(context, "https://name.invalid/x") == "https://name.invalid/x"
