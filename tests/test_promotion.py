"""The gate: a pure verdict, every refusal with its reason, and a way back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from models.core.errors import TesseraError
from models.core.family import Figure
from pipelines import checkpoints, promotion
from pipelines.ports import MemoryRegistry, Version
from pipelines.promotion import Evaluation, Policy, Standing

ACCURACY = Figure("accuracy", "max")


def standing(number: int, accuracy: float = 0.9) -> Standing:
    digest = f"digest-{number}"
    evaluation = Evaluation(digest, "data", "test", 100, {"accuracy": accuracy})
    return Standing(number, digest, "", '["a", "b"]', evaluation)


def change(given: Standing, **fields: object) -> Standing:
    assert given.evaluation is not None
    return replace(given, evaluation=replace(given.evaluation, **fields))  # type: ignore[arg-type]


def test_the_first_sound_version_passes() -> None:
    verdict = promotion.decide(standing(1), None, ACCURACY, Policy())
    assert verdict.passed
    assert "no champion yet" in verdict.reasons[0]


@pytest.mark.parametrize(
    ("accuracy", "margin", "passed"),
    [(0.91, 0.0, True), (0.9, 0.0, False), (0.89, 0.0, False), (0.91, 0.02, False)],
)
def test_better_by_the_margin(accuracy: float, margin: float, passed: bool) -> None:
    verdict = promotion.decide(standing(2, accuracy), standing(1), ACCURACY, Policy(margin))
    assert verdict.passed is passed
    assert "0.9000" in verdict.reasons[0]


def test_where_less_is_better() -> None:
    loss = Figure("accuracy", "min")
    assert promotion.decide(standing(2, 0.1), standing(1, 0.2), loss, Policy()).passed
    assert not promotion.decide(standing(2, 0.3), standing(1, 0.2), loss, Policy()).passed


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (replace(standing(2, 0.99), evaluation=None), "was not evaluated"),
        (change(standing(2, 0.99), data_digest="other"), "other data"),
        (change(standing(2, 0.99), split="val"), "evaluated on 'val'"),
        (change(standing(2, 0.99), judge_digest="other"), "another classifier judged it"),
        (change(standing(2, 0.99), model_digest="x"), "of other files"),
        (change(standing(2), figures={"accuracy": math.nan}), "not finite"),
        (change(standing(2), figures={"accuracy": 0.99, "loss": math.inf}), "not finite: loss"),
        (change(standing(2), figures={"loss": 0.1}), "has no accuracy"),
        (change(standing(2, 0.99), samples=0), "on no image"),
        (replace(standing(2, 0.99), damage="file weights is missing"), "file weights is missing"),
        (replace(standing(2, 0.99), classes='["b", "a"]'), "its classes"),
        (standing(1, 0.99), "champion already"),
    ],
)
def test_refused_with_its_reason(candidate: Standing, reason: str) -> None:
    verdict = promotion.decide(candidate, standing(1), ACCURACY, Policy())
    assert not verdict.passed
    assert any(reason in line for line in verdict.reasons), verdict.reasons


def test_the_same_judge_is_needed_on_both_sides() -> None:
    judged = {number: change(standing(number, 0.1 * number), judge_digest="j") for number in (1, 2)}
    assert promotion.decide(judged[2], judged[1], ACCURACY, Policy()).passed
    assert not promotion.decide(standing(2, 0.2), judged[1], ACCURACY, Policy()).passed


def test_an_evaluation_from_before_there_were_judges_is_read() -> None:
    written = json.loads(Evaluation("m", "d", "test", 1, {"accuracy": 0.5}).to_json())
    del written["judge_digest"]
    version = Version("m", 1, "run", {promotion.EVALUATION_TAG: json.dumps(written)})
    found = promotion.evaluation_of(version)
    assert found is not None
    assert found.judge_digest == ""


def test_every_reason_is_given() -> None:
    wrong = change(standing(2), split="val", samples=0)
    assert len(promotion.decide(wrong, standing(1), ACCURACY, Policy()).reasons) >= 2


@pytest.fixture
def registry(tmp_path: Path) -> MemoryRegistry:
    return MemoryRegistry(tmp_path / "registry")


def register(registry: MemoryRegistry, tmp_path: Path, accuracy: float) -> Version:
    folder = tmp_path / f"model-{accuracy}"
    folder.mkdir()
    (folder / "weights.safetensors").write_text(str(accuracy))
    digest = checkpoints._seal(folder)
    evaluation = Evaluation(digest, "data", "test", 100, {"accuracy": accuracy})
    tags = {
        "tessera.digest": digest,
        "tessera.family": "cnn",
        "tessera.classes": "[]",
        promotion.EVALUATION_TAG: evaluation.to_json(),
    }
    return registry.register("m", folder, run_id="r", tags=tags)


def champion(registry: MemoryRegistry) -> int | None:
    version = promotion.current_champion(registry, "m")
    return version.number if version else None


def test_promote_and_roll_back(registry: MemoryRegistry, tmp_path: Path) -> None:
    for accuracy in (0.8, 0.9, 0.85, 0.95):
        register(registry, tmp_path, accuracy)
    passed = [promotion.promote(registry, "m", n, policy=Policy()).passed for n in (1, 2, 3, 4)]
    assert passed == [True, True, False, True]
    assert champion(registry) == 4
    back = [promotion.roll_back(registry, "m")[1].number for _ in range(2)]
    assert back == [2, 1]
    with pytest.raises(TesseraError, match="first champion"):
        promotion.roll_back(registry, "m")
    assert champion(registry) == 1


def test_a_dry_run_changes_nothing(registry: MemoryRegistry, tmp_path: Path) -> None:
    version = register(registry, tmp_path, 0.9)
    tags = dict(version.tags)
    assert promotion.promote(registry, "m", 1, policy=Policy(), dry_run=True).passed
    assert champion(registry) is None
    assert registry.version("m", 1).tags == tags


def test_tampered_files_are_refused(registry: MemoryRegistry, tmp_path: Path) -> None:
    register(registry, tmp_path, 0.9)
    weights = tmp_path / "registry" / "m" / "1" / "weights.safetensors"
    weights.write_text("other")
    verdict = promotion.promote(registry, "m", 1, policy=Policy())
    assert not verdict.passed
    assert "checksum differs" in verdict.reasons[0]
    assert champion(registry) is None


class Crash(Exception):
    pass


@pytest.mark.parametrize("crash_at", range(4))
def test_a_crash_between_steps_leaves_a_champion(
    registry: MemoryRegistry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    crash_at: int,
) -> None:
    for accuracy in (0.8, 0.9):
        register(registry, tmp_path, accuracy)
    promotion.promote(registry, "m", 1, policy=Policy())
    calls = 0

    def crashing(name: str) -> None:
        real = getattr(registry, name)

        def call(*args: object) -> object:
            nonlocal calls
            if calls == crash_at:
                calls += 1
                raise Crash
            calls += 1
            return real(*args)

        monkeypatch.setattr(registry, name, call)

    crashing("tag")
    crashing("alias")
    crashed = False
    try:
        promotion.promote(registry, "m", 2, policy=Policy())
    except Crash:
        crashed = True
        assert champion(registry) == 1
    assert crashed is (crash_at < 3)
    if crashed:
        promotion.promote(registry, "m", 2, policy=Policy())
    assert champion(registry) == 2
    monkeypatch.undo()
    assert promotion.roll_back(registry, "m")[1].number == 1


def test_of_two_promotions_at_once_one_is_told(
    registry: MemoryRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for accuracy in (0.8, 0.9, 0.95):
        register(registry, tmp_path, accuracy)
    promotion.promote(registry, "m", 1, policy=Policy())
    real = promotion.decide

    def overtaken(*args: object) -> promotion.Verdict:
        monkeypatch.setattr(promotion, "decide", real)
        promotion.promote(registry, "m", 3, policy=Policy())
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(promotion, "decide", overtaken)
    with pytest.raises(TesseraError, match="changed while"):
        promotion.promote(registry, "m", 2, policy=Policy())
    assert champion(registry) == 3
