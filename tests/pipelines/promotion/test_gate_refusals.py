"""The gate: every reason to refuse a candidate before it is compared with the champion."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from pipelines.interfaces import Version
from pipelines.promotion import gate
from pipelines.promotion.gate import CandidateInfo, Evaluation


def info(number: int, accuracy: float = 0.9) -> CandidateInfo:
    digest = f"digest-{number}"
    evaluation = Evaluation(digest, "data", "test", 100, {"accuracy": accuracy})
    return CandidateInfo(number, digest, "", "", evaluation, "classification", ("a", "b"))


def with_evaluation(candidate: CandidateInfo, **fields: Any) -> CandidateInfo:
    assert candidate.evaluation is not None
    return replace(candidate, evaluation=replace(candidate.evaluation, **fields))


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (replace(info(2, 0.99), evaluation=None), "was not evaluated"),
        (with_evaluation(info(2, 0.99), data_digest="other"), "other data"),
        (with_evaluation(info(2, 0.99), split="val"), "evaluated on 'val'"),
        (with_evaluation(info(2, 0.99), model_digest="x"), "with other files"),
        (with_evaluation(info(2), metrics={"accuracy": math.nan}), "not finite"),
        (
            with_evaluation(info(2), metrics={"accuracy": 0.99, "loss": math.inf}),
            "not finite: loss",
        ),
        (with_evaluation(info(2, 0.99), samples=0), "on 0 images"),
        (replace(info(2, 0.99), damage="file weights is missing"), "file weights is missing"),
        (replace(info(2, 0.99), missing="its run was deleted"), "its run was deleted"),
        (replace(info(2, 0.99), classes=("b", "a")), "its classes"),
        (replace(info(2, 0.99), task="detection"), "its task is detection"),
        (replace(info(2, 0.99), judge_digest="x"), "its judge differs"),
        (info(1, 0.99), "champion already"),
    ],
)
@pytest.mark.fault(48)
@pytest.mark.control(48)
def test_each_refusal_has_its_reason(candidate: CandidateInfo, reason: str) -> None:
    reasons = gate.refusals(candidate, info(1), "data")
    assert any(reason in line for line in reasons), reasons
    assert gate.refusals(info(2), info(1), "data") == [], "control: a valid candidate"


def test_every_candidate_is_refused_while_the_champion_is_damaged() -> None:
    champion = replace(info(1), damage="file weights is missing")
    (reason,) = gate.refusals(info(2), champion, "data")
    assert "rollback" in reason


def test_all_reasons_are_listed() -> None:
    wrong = with_evaluation(info(2), split="val", samples=0)
    assert len(gate.refusals(wrong, info(1), "data")) >= 2


def test_an_evaluation_without_judge_and_data_is_read() -> None:
    written = json.loads(Evaluation("m", "d", "test", 1, {"accuracy": 0.5}).to_json())
    del written["judge_digest"], written["data"]
    version = Version("m", 1, "run", {gate.EVALUATION_TAG: json.dumps(written)})
    read = gate.evaluation_of(version)
    assert read is not None
    assert (read.judge_digest, read.data) == ("", "")
