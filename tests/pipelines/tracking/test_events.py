"""The event log: its lines, and reading them while others write."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from pipelines.tracking.events import FILE, Event, EventLog, read_events


def metric(step: int, **values: float) -> Event:
    return {"kind": "metrics", "step": step, "time_ms": 1000 + step, "values": values}


def test_events_are_lines_of_plain_json(tmp_path: Path) -> None:
    emit = EventLog(tmp_path / "run" / FILE)
    emit({"kind": "metrics", "step": np.int64(3), "values": {"a": np.float32(0.5), "b": math.nan}})
    emit({"kind": "progress", "worst": [math.inf, -math.inf], "path": tmp_path, "none": None})
    emit.flush()

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} isn't JSON")

    lines = (tmp_path / "run" / FILE).read_text().splitlines()
    first, second = (json.loads(line, parse_constant=no_constant) for line in lines)
    assert first["step"] == 3
    assert first["values"] == {"a": 0.5, "b": "nan"}
    assert abs(first["time_ms"] - time.time() * 1000) < 60_000
    assert second["worst"] == ["inf", "-inf"]
    assert (second["path"], second["none"]) == (str(tmp_path), None)


def test_a_partial_line_is_skipped_and_terminated(tmp_path: Path) -> None:
    path = tmp_path / FILE
    EventLog(path)(metric(1, a=1.0))
    with open(path, "ab") as file:
        file.write(b'{"kind":"metrics","st')  # a crash while writing
    assert [event["step"] for event, _ in read_events(path)] == [1]
    EventLog(path)(metric(2, a=2.0))
    assert [event["step"] for event, _ in read_events(path)] == [1, 2]


def test_reading_resumes_at_every_offset(tmp_path: Path) -> None:
    path = tmp_path / FILE
    emit = EventLog(path)
    for step in range(5):
        emit(metric(step, a=float(step)))
    events = list(read_events(path))
    for index, (_, offset) in enumerate(events):
        assert list(read_events(path, offset)) == events[index + 1 :]
    assert list(read_events(tmp_path / "none")) == []


def test_writers_in_threads_and_processes_keep_lines_whole(tmp_path: Path) -> None:
    path = tmp_path / FILE
    code = (
        "import sys; from pathlib import Path; from pipelines.tracking.events import EventLog\n"
        "emit = EventLog(Path(sys.argv[1]))\n"
        "for i in range(300): emit({'kind': 'p', 'i': i, 'fill': 'x' * 3000})\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(2)]
    emit = EventLog(path)
    threads = [
        threading.Thread(target=lambda: [emit({"kind": "t", "i": i}) for i in range(300)])
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [writer.wait() for writer in writers] == [0, 0]
    # A line that another process is writing looks partial on opening: that adds an empty line.
    kinds = [json.loads(line)["kind"] for line in path.read_bytes().splitlines() if line]
    assert [event["kind"] for event, _ in read_events(path)] == kinds
    assert (kinds.count("p"), kinds.count("t")) == (600, 600)


def test_importing_events_loads_no_service() -> None:
    code = (
        "import sys, pipelines.tracking.events, pipelines.tracking.mlflow_runs\n"
        "import pipelines.tracking.mlflow_registry, pipelines.workflows.context\n"
        "print({'mlflow', 'ray', 'torch', 'webdataset', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
