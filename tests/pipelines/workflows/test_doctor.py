"""What `doctor` makes of the reports of machines, and its checks of this process."""

from __future__ import annotations

import base64
import importlib.metadata
import platform
import threading
from collections.abc import Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipelines.cluster.machines import Machine, NoAnswer
from pipelines.workflows import doctor
from pipelines.workflows.context import Context
from pipelines.workflows.doctor import Finding, MachineReport
from pipelines.workflows.machine_probe import MachineFacts, PeerFacts, ProbeOptions

OPTIONS = ProbeOptions(
    context=Context.from_environment({"TESSERA_HOME": "/home"}),
    libraries=("ray",),
    storage="/home/runs",
    data="s3://data/digits",
    mlflow_run="run",
    token="token",
)
FACTS = MachineFacts(
    versions={"python": platform.python_version(), "ray": importlib.metadata.version("ray")},
    shared_memory_bytes=2**33,
    free_bytes={"/home": 2**36, "/tmp": 2**35},
    data_digest="digest",
    port=1,
)
GOOD = MachineReport(
    Machine("2", "worker", "10.0.0.2", 1, 0, False), FACTS, PeerFacts({}, []), 0.01
)
HERE = replace(GOOD, machine=Machine("1", "head", "10.0.0.1", 0, 0, True))


def problems(*reports: MachineReport, refusal: str = "") -> list[Finding]:
    findings = list(doctor.judge([HERE, *reports], OPTIONS, refusal))
    return [finding for finding in findings if finding.state != "ok"]


def with_facts(**changes: Any) -> MachineReport:
    return replace(GOOD, facts=replace(FACTS, **changes))


def test_nothing_is_wrong_with_a_good_machine() -> None:
    assert problems(GOOD) == []
    found = {f.check for f in doctor.judge([GOOD], OPTIONS) if f.machine == "worker"}
    assert found == set(doctor.MACHINE_CHECKS)


@pytest.mark.parametrize(
    ("report", "check", "state", "detail"),
    [
        (with_facts(versions={"ray": "1.0"}), "versions", "fail", "ray 1.0 (here "),
        (with_facts(versions={"ray": ""}), "versions", "fail", "ray missing"),
        (
            replace(GOOD, machine=replace(GOOD.machine, gpus=2)),
            "gpu",
            "warn",
            "Ray counts 2, torch can use 0",
        ),
        (with_facts(shared_memory_bytes=2**26), "shared memory", "warn", "0.1 GiB"),
        (with_facts(free_bytes={"/a": 2**40, "/b": 2**32}), "disk", "warn", "4.0 GiB free at /b"),
        (with_facts(free_bytes={"/b": 2**29}), "disk", "fail", "0.5 GiB free at /b"),
        (with_facts(problems={"disk": "read-only"}), "disk", "fail", "read-only"),
        (with_facts(problems={"storage": "refused"}), "storage", "fail", "refused"),
        (
            replace(GOOD, peers=PeerFacts({}, ["head"])),
            "storage",
            "fail",
            "sees no files of head in /home/runs",
        ),
        (with_facts(problems={"data": "no card"}), "data", "fail", "no card"),
        (with_facts(problems={"mlflow": "can't write"}), "mlflow", "fail", "can't write"),
        (with_facts(problems={"network": "no address"}), "network", "fail", "no address"),
        (
            replace(GOOD, peers=PeerFacts({"head": "no answer in 5 s"}, [])),
            "network",
            "fail",
            "can't reach head: no answer in 5 s",
        ),
        (replace(GOOD, ahead_seconds=-61.0), "clock", "warn", "-61.0 s"),
        (replace(GOOD, ahead_seconds=900.0), "clock", "fail", "+900.0 s"),
        (
            replace(GOOD, facts=None, problem="gave no answer in 60 s"),
            "ray",
            "fail",
            "gave no answer in 60 s",
        ),
        (
            replace(GOOD, facts=None, problem="lost", machine=replace(GOOD.machine, lost="lost")),
            "ray",
            "warn",
            "lost",
        ),
    ],
)
def test_each_problem_of_a_machine_is_found_with_a_hint(
    report: MachineReport, check: str, state: str, detail: str
) -> None:
    (finding,) = problems(report)
    assert (finding.machine, finding.check, finding.state) == ("worker", check, state)
    assert detail in finding.detail
    assert finding.hint
    assert doctor.has_failed([finding]) == (state == "fail")


def test_the_machine_whose_data_set_differs_from_the_others_is_named() -> None:
    third = replace(GOOD, machine=replace(GOOD.machine, id="3", name="other"))
    (finding,) = problems(with_facts(data_digest="changed"), third)
    assert (finding.machine, finding.check, finding.state) == ("worker", "data", "fail")


def test_a_refused_run_is_a_problem_of_every_machine() -> None:
    found = problems(GOOD, refusal="can't create a run: UNAUTHENTICATED")
    assert [(f.machine, f.check) for f in found] == [("head", "mlflow"), ("worker", "mlflow")]


class Answers:
    """Agents whose answers are known. Machine c doesn't answer, and b's clock is an hour ahead."""

    def __init__(self, names: str) -> None:
        self.machines = [Machine(n, n, f"10.0.0.{i}", 1, 0, i == 0) for i, n in enumerate(names)]
        self.visits: dict[str, list[str]] = {}

    def call(self, method: str, arguments: dict[str, Sequence[Any]], timeout_seconds: float) -> Any:
        return {id: self.answer(method, id, each) for id, each in arguments.items()}

    def answer(self, method: str, id: str, arguments: Sequence[Any]) -> Any:
        if id == "c":
            return NoAnswer("gave no answer")
        if method == "collect":
            return FACTS
        if method == "visit":
            self.visits[id] = [peer.name for peer in arguments[0]]
            return PeerFacts({}, [])
        return doctor.time.time() + (3600 if id == "b" else 0) if method == "clock" else None


def test_all_machines_are_asked_about_themselves_and_those_that_answer_about_each_other() -> None:
    answers = Answers("abcd")
    a, b, c, d = doctor.ask(answers, OPTIONS, 60)  # type: ignore[arg-type]
    assert answers.visits == {"a": ["b", "d"], "b": ["d", "a"], "d": ["a", "b"]}
    assert (c.facts, c.problem) == (None, "gave no answer")
    assert a.ahead_seconds == d.ahead_seconds == 0
    assert b.ahead_seconds == pytest.approx(3600, abs=1)
    found = doctor.judge([a, b, d], OPTIONS)
    (clock,) = (finding for finding in found if finding.state == "fail")
    assert (clock.machine, clock.check) == ("b", "clock")


def test_an_unreachable_mlflow_is_reported_with_a_hint() -> None:
    (finding,) = doctor.check_tracking("http://127.0.0.1:9")
    assert finding.state == "fail"
    assert "nothing listens there" in finding.detail
    assert "MLFLOW_TRACKING_URI" in finding.hint


def test_an_unsupported_library_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.1" if name == "ray" else real(name)
    )
    states = {f.check: f.state for f in doctor.check_versions()}
    assert states.pop("ray") == "fail"
    assert set(states.values()) == {"ok"}


def test_a_server_is_asked_with_the_login_of_its_address_which_is_not_shown() -> None:
    """urllib itself takes user and password for a part of the host."""
    asked: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Authorization"])
            self.send_response(200 if asked[-1] else 401)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        host = f"127.0.0.1:{server.server_port}"
        with_login = list(doctor.check_tracking(f"http://trainer:hunter%402@{host}"))
        (without, *_) = doctor.check_tracking(f"http://{host}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert asked == [f"Basic {base64.b64encode(b'trainer:hunter@2').decode()}", None]
    assert [finding.state for finding in with_login] == ["ok", "ok"]
    assert "hunter" not in str(with_login)
    assert (without.state, without.detail) == ("fail", f"http://{host} returns status 401")
    (store,) = doctor.check_tracking("postgresql://trainer:hunter2@db/mlflow")
    assert store.detail == "postgresql://db/mlflow (no server)"


def test_secrets_that_are_open_to_others_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    context = Context.from_environment({"TESSERA_HOME": str(tmp_path)})
    assert doctor.check_private(context).state == "ok", "there is none"
    search = tmp_path / "searches" / "one"
    search.mkdir(parents=True, mode=0o700)
    (search / "search.json").write_text("{}")
    for path in (tmp_path / "ray-token", tmp_path / "services.json"):
        path.write_text("")
        path.chmod(0o600)
    assert doctor.check_private(context).state == "ok"
    for path, mode in ((tmp_path / "ray-token", 0o640), (search, 0o755)):
        before = path.stat().st_mode
        path.chmod(mode)
        finding = doctor.check_private(context)
        assert finding.state == "fail"
        assert f"{path} is open to other users (mode {mode:o})" in finding.detail
        path.chmod(before)
