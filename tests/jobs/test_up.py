"""`tessera up` where it can't start, and the token of Ray. Services that run are in
`tests/integration/test_local_services.py`."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from cli_runner import Call

from jobs import up
from jobs.shared import local_services


def test_a_port_in_use_is_reported_and_nothing_is_started(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path))
    options = ("--ray-port", "--dashboard-port", "--mlflow-port")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for option in options:
            ports = {name: local_services.free_port() for name in options} | {option: port}
            refused = call("up", *(word for pair in ports.items() for word in pair))
            assert refused.status == 1
            assert f"port {port}" in refused.err
            assert option in refused.err
            assert len(refused.err.splitlines()) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["services.lock"]


def test_a_token_set_in_the_shell_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    made = up.write_token(tmp_path).read_text()
    assert len(made) == 64
    assert up.write_token(tmp_path).read_text() == made
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 32)
    assert up.write_token(tmp_path).read_text() == "a" * 32
