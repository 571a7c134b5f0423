"""The display of a training: plain lines where no terminal is, and nothing wider than one."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from jobs.shared.progress import Display


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
    event(10, 0, train_loss=0.5, train_images_per_second=12345.0, train_data_wait_share=0.02),
    event(15, 0, train_loss=0.25, train_images_per_second=12345.0, train_data_wait_share=0.02),
    event(1, 1, val_accuracy=0.9876, val_loss=0.1),
    {"kind": "restart", "attempt": 1, "reason": "worker 1 died"},
    {"kind": "resume", "checkpoint": "step-000000015", "epoch": 1},
    {"kind": "notice", "text": "MLflow doesn't answer"},
    {"kind": "worker", "pid": 1},
]


def test_a_line_an_epoch_and_one_for_what_happens(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("accuracy") as display:
        for one in EVENTS:
            display(one)
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("epoch 1/20  val accuracy 0.9876  step 15  loss 0.2500  12,345 ima")
    assert "waiting for data 2%" in lines[0]
    assert lines[1] == "workers started again (attempt 1): worker 1 died"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("accuracy", quiet=True) as display:
        for one in EVENTS:
            display(one)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_of_80_columns_shows_all() -> None:
    display = Display("accuracy")
    shown = io.StringIO()
    display.console = Console(file=shown, force_terminal=True, width=80)
    display.live = True
    for one in EVENTS[:3]:
        display(one)
    display.console.print(display.bar.get_renderable())
    text = shown.getvalue()
    assert "…" not in text
    for part in ("epoch 2/20", "loss 0.2500", "12,345 images/s", "waiting for data 2%", "0.9876"):
        assert part in text
