"""The gate: a pure verdict, every refusal with its reason, and rollback."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml

from models.core.errors import TesseraError, UsageError
from pipelines import tag_names
from pipelines.evaluation.bootstrap import Difference, Estimate, McNemar
from pipelines.evaluation.results import Comparison, EvaluationResult, Robustness
from pipelines.interfaces import Version
from pipelines.promotion import champions, gate, policy
from pipelines.promotion.champions import ConcurrentPromotionError
from pipelines.promotion.gate import CandidateInfo, Evaluation, NearDuplicates, Verdict
from pipelines.promotion.policy import Policy
from pipelines.tracking.memory import MemoryRegistry
from pipelines.training import checkpoints

CLEAN = NearDuplicates(0, 100)


def info(number: int, accuracy: float = 0.9) -> CandidateInfo:
    digest = f"digest-{number}"
    evaluation = Evaluation(digest, "data", "test", 100, {"accuracy": accuracy})
    return CandidateInfo(number, digest, "", "", evaluation, "classification", ("a", "b"))


def with_evaluation(candidate: CandidateInfo, **fields: Any) -> CandidateInfo:
    assert candidate.evaluation is not None
    return replace(candidate, evaluation=replace(candidate.evaluation, **fields))


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


def test_the_first_valid_version_passes() -> None:
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


def test_a_metric_that_is_better_when_lower() -> None:
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


def test_the_largest_losses() -> None:
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
def test_leakage(near_duplicates: NearDuplicates, limit: float | None, passed: bool) -> None:
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
    assert gate.refusals(info(2), info(1), "data") == [], "the control"


def test_nothing_passes_against_a_damaged_champion() -> None:
    champion = replace(info(1), damage="file weights is missing")
    (reason,) = gate.refusals(info(2), champion, "data")
    assert "rollback" in reason


def test_every_reason_is_given() -> None:
    wrong = with_evaluation(info(2), split="val", samples=0)
    assert len(gate.refusals(wrong, info(1), "data")) >= 2


def test_an_evaluation_without_judge_and_data_is_read() -> None:
    written = json.loads(Evaluation("m", "d", "test", 1, {"accuracy": 0.5}).to_json())
    del written["judge_digest"], written["data"]
    version = Version("m", 1, "run", {gate.EVALUATION_TAG: json.dumps(written)})
    read = gate.evaluation_of(version)
    assert read is not None
    assert (read.judge_digest, read.data) == ("", "")


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
    made = [register(registry, tmp_path) for _ in range(4)]
    for version in (made[0], made[1], made[3]):
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
    registry.delete(first)  # the control: the registry itself lets it go
    assert champion(registry) is None


def test_a_failed_verdict_keeps_the_champion(registry: MemoryRegistry, tmp_path: Path) -> None:
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
def test_a_crash_at_any_step_leaves_a_champion(
    registry: MemoryRegistry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    crash_at: int,
) -> None:
    """The writes: the version's tags, the decision, the alias, the mark that it is done."""
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
    made = [register(registry, tmp_path) for _ in range(3)]
    promote(registry, made[0])
    state = champions.read_state(registry, "m")
    promote(registry, made[2])
    with pytest.raises(
        ConcurrentPromotionError, match="changed during the evaluation: it is version 3"
    ):
        gate.apply(registry, made[1], state, passed(made[1]), "run")
    assert champion(registry) == 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("floor: {accuracy: 0.9}", "did you mean 'floors'"),
        ("largest_losses: {class: 0.1}", "did you mean 'largest_losses.classes'"),
        ("margin: much", "margin = 'much'"),
        ("confidence: 95", "confidence = 95"),
        ("leakage: -1", "leakage = -1"),
        ("floors: {accuracy: .nan}", "floors.accuracy"),
        ("- 1", "not a mapping"),
        ("a: [", "can't be read as YAML"),
        ("!!python/object/apply:os.system ['touch marker']", "can't be read as YAML"),
    ],
)
def test_a_wrong_policy_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "promotion.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        policy.read(file)
    assert reason in f"{error.value.message} {error.value.hint}"
    assert not (tmp_path / "marker").exists()


def test_a_policy_is_read(tmp_path: Path) -> None:
    file = tmp_path / "promotion.yaml"
    file.write_text("floors: {accuracy: 0.9}\nlargest_losses: {classes: 0.1}\n")
    read = policy.read(file)
    assert (read.floors, read.largest_losses.classes) == ({"accuracy": 0.9}, 0.1)
    assert not read.needs_costs
    assert not read.needs_robustness
    assert Policy(floors={"robustness": 0.5}).needs_robustness
    assert Policy(ceilings={"latency_p95_ms": 5}).needs_costs
    assert Policy(ceilings={"size_bytes": 5}).needs_costs
    file.write_text("")
    assert policy.read(file) == Policy()


def test_the_policy_in_the_docs_is_valid() -> None:
    """And the defaults in the docs are those of the code."""
    page = (Path(__file__).parents[3] / "docs" / "policy.md").read_text()
    shown = policy.build(yaml.safe_load(page.partition("```yaml")[2].partition("```")[0]))
    assert shown.largest_losses.size == 1.0
    own = policy.default("classification")
    assert own.largest_losses.classes == shown.largest_losses.classes
    assert (own.margin, own.confidence, own.leakage) == (
        shown.margin,
        shown.confidence,
        shown.leakage,
    )
    others = {loss for task, loss in policy.CLASS_LOSSES.items() if task != "classification"}
    assert others == {0.1}
    assert "0.1 for detection and segmentation" in page


def values(assessment: EvaluationResult) -> Mapping[str, float]:
    return assessment.values()


def test_a_policy_can_limit_everything_that_is_measured() -> None:
    robust = Robustness(10, 0.9, {"fog": (0.8, 0.6)}, {"fgsm_2": 0.4})
    known = values(result(0.9, robustness=robust, costs={"parameters": 10.0}))
    assert known["robustness"] == pytest.approx(0.7)
    assert (known["fgsm_2"], known["parameters"], known["accuracy"]) == (0.4, 10.0, 0.9)
