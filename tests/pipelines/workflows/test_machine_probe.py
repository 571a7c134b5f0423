"""What a machine finds out about itself and about others; two probes in one process are two
machines here."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.workflows.context import Context
from pipelines.workflows.machine_probe import MachineProbe, Peer, ProbeOptions, free_bytes


@pytest.fixture
def options(tmp_path: Path) -> ProbeOptions:
    home = tmp_path / "home"
    return ProbeOptions(
        context=Context.from_environment({"TESSERA_HOME": str(home)}),
        libraries=("click", "no-such-library"),
        storage=str(home / "runs"),
        data=None,
        mlflow_run="",
        token="token",
    )


def test_two_machines_that_share_a_folder_see_each_other(options: ProbeOptions) -> None:
    first, second = MachineProbe(), MachineProbe()
    facts = first.collect("1", "127.0.0.1", 0, options)
    assert second.collect("2", "127.0.0.1", 0, options).problems.keys() == {"mlflow"}
    assert facts.versions["click"] == importlib.metadata.version("click")
    assert facts.versions["no-such-library"] == ""
    assert min(facts.free_bytes.values()) > 0
    peer = Peer("1", "first", "127.0.0.1", facts.port, has_written=True)
    seen = second.visit([peer])
    assert (seen.unreachable, seen.unseen) == ({}, [])
    first.clean("1")
    second.clean("2")
    assert list(Path(options.storage).iterdir()) == []
    assert second.visit([replace(peer, port=9)]).unreachable == {"first": "Connection refused"}


def test_a_machine_with_another_disk_is_noticed(options: ProbeOptions, tmp_path: Path) -> None:
    first, second = MachineProbe(), MachineProbe()
    port = first.collect("1", "127.0.0.1", 0, options).port
    second.collect("2", "127.0.0.1", 0, replace(options, storage=str(tmp_path / "other")))
    peer = Peer("1", "first", "127.0.0.1", port, has_written=True)
    assert second.visit([peer]).unseen == ["first"]
    assert second.visit([replace(peer, has_written=False)]).unseen == []
    first.clean("1")
    second.clean("2")


def test_each_problem_is_recorded(options: ProbeOptions, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    broken = replace(options, storage=str(file / "runs"), data=str(tmp_path / "nothing"))
    probe = MachineProbe()
    facts = probe.collect("1", "192.0.2.1", 0, broken)
    assert facts.problems.keys() == {"storage", "mlflow", "data", "network"}
    assert "is not on this machine" in facts.problems["mlflow"]
    assert "is not a packed data set" in facts.problems["data"]
    probe.clean("1")


def test_free_space_is_measured_where_a_folder_would_be_made(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "there") == pytest.approx(free_bytes(tmp_path), rel=0.1)
    assert list(tmp_path.iterdir()) == []
