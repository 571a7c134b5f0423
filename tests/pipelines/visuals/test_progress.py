"""The progress display: plain lines without a terminal, and no line wider than the terminal."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
from rich.console import Console

from pipelines.visuals.progress import Display, show_progress


def event(step: int, epoch: int, **values: float) -> dict[str, Any]:
    named = {name.replace("_", "/", 1): value for name, value in values.items()}
    return {
        "kind": "metrics",
        "step": step,
        "values": named,
        "epoch": epoch,
        "epochs": 20,
        "seen": step * 100,
        "samples": 2000,
    }


EVENTS = [
    {"kind": "run", "name": "cnn-1", "page": "http://pages/1", "metric": "accuracy"},
    event(10, 0, train_loss=0.5, train_images_per_second=12345.0, train_data_wait_share=0.02),
    event(15, 0, train_loss=0.25, train_images_per_second=12345.0, train_data_wait_share=0.02),
    event(1, 1, val_accuracy=0.9876, val_loss=0.1),
    {"kind": "restart", "attempt": 1, "reason": "worker 1 died"},
    {"kind": "resume", "checkpoint": "step-000000015", "epoch": 1},
    {"kind": "notice", "text": "MLflow doesn't answer"},
    {"kind": "worker", "pid": 1},
]


def test_each_epoch_and_each_notice_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as display:
        for one in EVENTS:
            display(one)
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert lines.pop(0) == "run cnn-1"
    assert lines.pop(0) == "watch http://pages/1"
    assert len(lines) == 4
    assert lines[0].startswith("epoch 1/20  val accuracy 0.9876  step 15  loss 0.2500  12,345 ima")
    assert "waiting for data 2%" in lines[0]
    assert lines[1] == "workers restarted (attempt 1): worker 1 died"


def test_no_progress_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(False) as listener:
        for one in EVENTS:
            listener(one)
    assert capsys.readouterr() == ("", "")


def test_a_callback_replaces_the_display_and_may_print(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        show_progress(lambda event: print(event["kind"])) as listener,
        contextlib.redirect_stdout(io.StringIO()),  # as a workflow that starts Ray does
    ):
        listener(EVENTS[0])
    assert capsys.readouterr() == ("run\n", "")


def test_a_pack_shows_its_progress(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    shown = io.StringIO()
    display.console = Console(file=shown, force_terminal=True, width=80)
    display.live = True
    display({"kind": "advance", "done": 1200, "total": 5000, "unit": "images"})
    display.console.print(display.bar.get_renderable())
    assert "1,200 of 5,000 images" in shown.getvalue()


def test_all_values_fit_into_80_columns() -> None:
    display = Display()
    shown = io.StringIO()
    display.console = Console(file=shown, force_terminal=True, width=80)
    display.live = True
    for one in EVENTS[:4]:
        display(one)
    display.console.print(display.bar.get_renderable())
    text = shown.getvalue()
    assert "…" not in text
    for part in ("epoch 2/20", "loss 0.2500", "12,345 images/s", "waiting for data 2%", "0.9876"):
        assert part in text
