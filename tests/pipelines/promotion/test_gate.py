"""The gate: the rules of a verdict, promotion and rollback."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from models.core.errors import TesseraError
from pipelines import tag_names
from pipelines.evaluation.bootstrap import Difference, Estimate, McNemar
from pipelines.evaluation.results import Comparison, EvaluationResult, Robustness
from pipelines.interfaces import Version
from pipelines.promotion import champions, gate, policy
from pipelines.promotion.champions import ConcurrentPromotionError
from pipelines.promotion.gate import NearDuplicates, Verdict
from pipelines.tracking.memory import MemoryRegistry
from pipelines.training import checkpoints

CLEAN = NearDuplicates(0, 100)


def result(accuracy: float = 0.9, **more: Any) -> EvaluationResult:
    metrics = {"accuracy": accuracy, **more.pop("metrics", {})}
    return EvaluationResult(
        model="m",
        digest="d",
        family="cnn",
        task="classification",
        primary="accuracy",
        direction=more.pop("direction", "max"),
        data="data",
        data_digest="data",
        split="test",
        samples=100,
        metrics={name: Estimate(value, value, value) for name, value in metrics.items()},
        **more,
    )


def compared(
    low: float,
    high: float,
    test: McNemar | None = None,
    classes: Mapping[str, Difference] = MappingProxyType({}),
) -> Comparison:
    lead = Difference((low + high) / 2, low, high)
    return Comparison("a", "b", {"accuracy": lead, **classes}, test)


def decide(
    candidate: EvaluationResult,
    champion: EvaluationResult | None = None,
    lead: Comparison | None = None,
    near_duplicates: NearDuplicates | None = CLEAN,
    **rules: Any,
) -> Verdict:
    number = 1 if champion else None
    return gate.decide(2, number, candidate, champion, lead, near_duplicates, policy.build(rules))


def failed(verdict: Verdict) -> list[str]:
    assert verdict.passed == (not [rule for rule in verdict.rules if not rule.passed])
    return [rule.name for rule in verdict.rules if not rule.passed]


def test_the_first_version_passes_without_a_champion() -> None:
    verdict = decide(result(0.1))
    assert verdict.passed
    assert "no champion yet" in verdict.reasons[0]


@pytest.mark.parametrize(
    ("low", "high", "margin", "passed"),
    [
        (0.005, 0.02, 0.0, True),
        (0.0, 0.02, 0.0, False),
        (-0.001, 0.2, 0.0, False),  # much better on average, but not significantly
        (0.005, 0.02, 0.01, False),
        (-0.005, 0.02, -0.01, True),  # not significantly better, but significantly not much worse
    ],
)
def test_the_gain_must_be_significantly_above_the_margin(
    low: float, high: float, margin: float, passed: bool
) -> None:
    verdict = decide(result(0.91), result(0.9), compared(low, high), margin=margin)
    assert verdict.passed is passed
    assert failed(verdict) == ([] if passed else ["gain in accuracy"])
    assert "0.9000" in verdict.reasons[0]


def test_a_lower_value_can_be_better() -> None:
    metrics = {"direction": "min"}
    assert decide(result(0.1, **metrics), result(0.2, **metrics), compared(-0.15, -0.05)).passed
    assert not decide(result(0.2, **metrics), result(0.1, **metrics), compared(0.05, 0.15)).passed


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value", "passed"),
    [(30, 5, 1e-5, True), (3, 0, 0.25, False), (5, 30, 1e-5, False)],
)
def test_a_classifier_must_pass_mcnemars_test_too(
    only_first: int, only_second: int, p_value: float, passed: bool
) -> None:
    """With few test images three lucky ones can make the bootstrap interval look significant."""
    test = McNemar(only_first, only_second, p_value)
    verdict = decide(result(0.93), result(0.9), compared(0.01, 0.06, test))
    assert failed(verdict) == ([] if passed else ["McNemar's test"])


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        ({"floors": {"accuracy": 0.95}}, "floor of accuracy"),
        ({"floors": {"recall/a": 0.5}}, "floor of recall/a"),  # not known
        ({"floors": {"robustness": 0.8}}, "floor of robustness"),
        ({"ceilings": {"latency_p95_ms": 4}}, "ceiling of latency_p95_ms"),
        ({"ceilings": {"pgd_2": 0.0}}, "ceiling of pgd_2"),
    ],
)
def test_floors_and_ceilings_apply_to_any_value(rules: dict[str, Any], name: str) -> None:
    robust = Robustness(10, 0.9, {"fog": (0.8, 0.7, 0.6)}, {"pgd_2": 0.1})
    candidate = result(0.9, robustness=robust, costs={"latency_p95_ms": 5.0})
    assert failed(decide(candidate, **rules)) == [name]
    assert failed(decide(candidate, floors={"accuracy": 0.9, "robustness": 0.7})) == []


def test_each_limit_on_losses_is_checked() -> None:
    robust = [Robustness(10, 0.9, {"fog": (value,)}) for value in (0.5, 0.6)]
    own = {"recall/cat": 0.8, "recall/dog": 0.99, "precision/cat": 1.0, "precision/dog": 0.9}
    its = {"recall/cat": 0.9, "recall/dog": 0.9, "precision/cat": 0.9, "precision/dog": 0.9}
    costs = (
        {"latency_p95_ms": 1.3, "size_bytes": 1000.0},
        {"latency_p95_ms": 1.0, "size_bytes": 900.0},
    )
    candidate = result(0.95, metrics=own, robustness=robust[0], costs=costs[0])
    champion = result(0.9, metrics=its, robustness=robust[1], costs=costs[1])
    significant = {
        name: Difference(own[name] - its[name], *2 * [own[name] - its[name]]) for name in own
    }
    lead = compared(0.02, 0.08, classes=significant)
    low_limits = {"classes": 0.05, "robustness": 0.05, "latency": 0.25, "size": 0.1}
    verdict = decide(candidate, champion, lead, largest_losses=low_limits)
    lost = "largest significant loss of recall in a class"
    assert failed(verdict) == [lost, "robustness", "latency", "size"]
    assert next(rule for rule in verdict.rules if rule.name == lost).candidate == "0.1000 in 'cat'"
    high_limits = {"classes": 0.11, "robustness": 0.11, "latency": 0.35, "size": 0.12}
    assert decide(candidate, champion, lead, largest_losses=high_limits).passed
    assert decide(candidate, champion, lead, largest_losses={}).passed
    by_chance = {**significant, "recall/cat": Difference(-0.1, -0.3, 0.1)}
    maybe = compared(0.02, 0.08, classes=by_chance)
    assert decide(candidate, champion, maybe, largest_losses={"classes": 0.05}).passed


def test_metrics_by_class_have_a_direction_of_their_own() -> None:
    """Of the primary metric, an error, lower values are better; of recall higher ones."""
    candidate = result(0.1, direction="min", metrics={"recall/cat": 0.9})
    champion = result(0.2, direction="min", metrics={"recall/cat": 0.5})
    gained = {"recall/cat": Difference(0.4, 0.3, 0.5)}
    lead = compared(-0.12, -0.08, classes=gained)
    assert decide(candidate, champion, lead, largest_losses={"classes": 0.0}).passed
    lost = {"recall/cat": Difference(-0.4, -0.5, -0.3)}
    lead = compared(-0.12, -0.08, classes=lost)
    verdict = decide(champion, candidate, lead, largest_losses={"classes": 0.0})
    assert failed(verdict) == ["largest significant loss of recall in a class"]


def test_a_class_that_the_candidate_never_predicts_is_a_total_loss() -> None:
    candidate, champion = result(0.95), result(0.9, metrics={"precision/cat": 0.2})
    verdict = decide(candidate, champion, compared(0.01, 0.1), largest_losses={"classes": 0.9})
    assert failed(verdict) == ["largest significant loss of precision in a class"]


@pytest.mark.parametrize(
    ("near_duplicates", "limit", "passed"),
    [
        (NearDuplicates(1, 100), 0.01, True),
        (NearDuplicates(2, 100), 0.01, False),
        (NearDuplicates(100, 100), None, True),
        (NearDuplicates(0, 100, "its training data is gone"), 0.01, False),
    ],
)
def test_near_duplicates_above_the_limit_are_refused(
    near_duplicates: NearDuplicates, limit: float | None, passed: bool
) -> None:
    verdict = decide(result(), near_duplicates=near_duplicates, leakage=limit)
    assert failed(verdict) == ([] if passed else ["leakage"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_metrics_that_are_not_finite_are_refused(value: float) -> None:
    assert failed(decide(result(0.9, metrics={"loss": value}))) == ["finite metrics"]


def test_every_rule_that_fails_is_listed() -> None:
    verdict = decide(
        result(0.5), near_duplicates=NearDuplicates(9, 10), floors={"accuracy": 0.9, "f1": 0.9}
    )
    assert failed(verdict) == ["floor of accuracy", "floor of f1", "leakage"]
    assert len(verdict.reasons) == 3


def test_every_measured_value_can_be_limited_by_a_policy() -> None:
    robust = Robustness(10, 0.9, {"fog": (0.8, 0.6)}, {"fgsm_2": 0.4})
    known = result(0.9, robustness=robust, costs={"parameters": 10.0}).values()
    assert known["robustness"] == pytest.approx(0.7)
    assert (known["fgsm_2"], known["parameters"], known["accuracy"]) == (0.4, 10.0, 0.9)


@pytest.fixture
def registry(tmp_path: Path) -> MemoryRegistry:
    return MemoryRegistry(tmp_path / "registry")


def register(registry: MemoryRegistry, tmp_path: Path) -> Version:
    folder = tmp_path / f"model-{len(registry.versions('m'))}"
    folder.mkdir()
    (folder / "weights.safetensors").write_text(folder.name)
    tags = {"tessera.digest": checkpoints._seal(folder), "tessera.family": "cnn"}
    return registry.register("m", folder, run_id="r", tags=tags)


def passed(version: Version) -> Verdict:
    return Verdict(True, ("better",), version.number, None)


def promote(registry: MemoryRegistry, version: Version) -> None:
    gate.apply(registry, version, champions.read_state(registry, "m"), passed(version), "run")


def champion(registry: MemoryRegistry) -> int | None:
    version = champions.current_champion(registry, "m")
    return version.number if version else None


@pytest.mark.fault(50)
def test_promote_and_roll_back(registry: MemoryRegistry, tmp_path: Path) -> None:
    versions = [register(registry, tmp_path) for _ in range(4)]
    for version in (versions[0], versions[1], versions[3]):
        promote(registry, version)
    assert champion(registry) == 4
    back = [gate.roll_back(registry, "m")[1].number for _ in range(2)]
    assert back == [2, 1]
    with pytest.raises(TesseraError, match="first champion"):
        gate.roll_back(registry, "m")
    assert champion(registry) == 1
    assert gate.roll_back(registry, "m", to=4)[1].number == 4
    with pytest.raises(TesseraError, match="never champion"):
        gate.roll_back(registry, "m", to=3)
    with pytest.raises(TesseraError, match="is the champion already"):
        gate.roll_back(registry, "m", to=4)
    assert champion(registry) == 4


def test_a_damaged_version_is_not_rolled_back_to(registry: MemoryRegistry, tmp_path: Path) -> None:
    for _ in range(2):
        promote(registry, register(registry, tmp_path))
    (tmp_path / "registry" / "m" / "1" / "weights.safetensors").write_text("other")
    with pytest.raises(TesseraError, match="can't become champion again"):
        gate.roll_back(registry, "m")
    assert champion(registry) == 2


@pytest.mark.fault(50)
@pytest.mark.control(50)
def test_the_champion_is_not_deleted(registry: MemoryRegistry, tmp_path: Path) -> None:
    first, second = (register(registry, tmp_path) for _ in range(2))
    promote(registry, first)
    with pytest.raises(TesseraError, match="is the champion and can't be deleted"):
        gate.delete(registry, "m", first.number)
    gate.delete(registry, "m", second.number)
    assert [version.number for version in registry.versions("m")] == [1]
    registry.delete(first)  # control: the registry itself deletes it
    assert champion(registry) is None


def test_a_failed_verdict_does_not_change_the_champion(
    registry: MemoryRegistry, tmp_path: Path
) -> None:
    first, second = (register(registry, tmp_path) for _ in range(2))
    promote(registry, first)
    failed_verdict = Verdict(False, ("worse",), second.number, 1)
    gate.apply(registry, second, champions.read_state(registry, "m"), failed_verdict, "run")
    assert champion(registry) == 1
    stored = json.loads(registry.version("m", 2).tags[tag_names.VERDICT])
    assert (stored["passed"], stored["reasons"]) == (False, ["worse"])


class Crash(Exception):
    pass


@pytest.mark.parametrize("crash_at", range(6))
@pytest.mark.fault(49)
def test_there_is_a_champion_after_a_crash_at_any_step(
    registry: MemoryRegistry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    crash_at: int,
) -> None:
    """The steps: the tags of the version, the decision, the alias, the mark that it is done."""
    first, second = (register(registry, tmp_path) for _ in range(2))
    promote(registry, first)
    calls = 0

    def crashing(name: str) -> None:
        real = getattr(registry, name)

        def call(*args: object) -> object:
            nonlocal calls
            if calls == crash_at:
                raise Crash
            calls += 1
            return real(*args)

        monkeypatch.setattr(registry, name, call)

    for name in ("tag", "decide", "alias", "done"):
        crashing(name)
    crashed = False
    try:
        promote(registry, second)
    except Crash:
        crashed = True
        assert champion(registry) == (1 if crash_at <= 2 else 2)
    assert crashed is (crash_at < 4)
    monkeypatch.undo()
    state = champions.read_state(registry, "m")
    if state.champion and state.champion.number == 1:
        promote(registry, second)  # again
    assert champion(registry) == 2
    assert gate.roll_back(registry, "m")[1].number == 1


def test_of_two_concurrent_promotions_one_fails(registry: MemoryRegistry, tmp_path: Path) -> None:
    versions = [register(registry, tmp_path) for _ in range(3)]
    promote(registry, versions[0])
    state = champions.read_state(registry, "m")
    promote(registry, versions[2])
    with pytest.raises(
        ConcurrentPromotionError, match="changed during the evaluation: it is version 3"
    ):
        gate.apply(registry, versions[1], state, passed(versions[1]), "run")
    assert champion(registry) == 3
