"""The promotion gate: which version may become champion, and the way back.

In: what is known of a candidate and of the champion, and the results of one job that evaluated both
on the same images. Out: a verdict, rule by rule. `refusals` and `decide` are pure; `apply` and
`roll_back` act on the registry. Must not know MLflow, nor how anything is measured.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import models
from models.core.errors import TesseraError
from pipelines import tag_names
from pipelines.evaluation.results import Comparison, EvaluationResult
from pipelines.interfaces import Registry, Version
from pipelines.promotion import champions
from pipelines.promotion.champions import ChampionState
from pipelines.promotion.policy import Losses, Policy
from pipelines.training import checkpoints

EVALUATION_TAG = f"{tag_names.EVALUATION_PREFIX}test"


@dataclass(frozen=True)
class Evaluation:
    """The result of `tessera evaluate` for one version, as its tag keeps it."""

    model_digest: str
    data_digest: str
    split: str
    samples: int
    metrics: Mapping[str, float]
    judge_digest: str = ""
    """Digest of the judge, the classifier that scored generated images; empty without one."""
    data: str = ""
    """Path or address of the data set."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class CandidateInfo:
    """What is known of a version before it is evaluated beside the champion.

    `damage` says what is wrong with its files and `missing` what is wrong with its run; both are
    empty if nothing is. `task`, `classes`, `data` and `data_digest` (what it was trained on) are
    read from its files, not from tags, which every user of MLflow's pages can edit.
    """

    number: int
    digest: str
    damage: str
    missing: str
    evaluation: Evaluation | None
    task: str = ""
    classes: tuple[str, ...] = ()
    data: str = ""
    data_digest: str = ""
    judge_digest: str = ""


@dataclass(frozen=True)
class NearDuplicates:
    """How many of the `samples` test images are near duplicates of training images of the
    candidate. `unknown` says why they can't be counted; empty if they were."""

    images: int
    samples: int
    unknown: str = ""


@dataclass(frozen=True)
class Rule:
    """One line of a verdict: the rule's name, the candidate's value, and the value that it is
    compared with (the champion's or a limit), as text."""

    name: str
    candidate: str
    other: str
    passed: bool


@dataclass(frozen=True)
class Verdict:
    passed: bool
    reasons: tuple[str, ...]
    candidate: int
    champion: int | None
    rules: tuple[Rule, ...] = ()


def refusals(
    candidate: CandidateInfo, champion: CandidateInfo | None, data_digest: str
) -> list[str]:
    """Returns every reason against a candidate that is known before anything is measured."""
    if champion and champion.number == candidate.number:
        return ["it is the champion already"]
    if candidate.damage:
        return [f"its files: {candidate.damage}"]
    reasons = [candidate.missing] if candidate.missing else []
    if candidate.evaluation is None:
        return [*reasons, "it was not evaluated on a test split: tessera evaluate it first"]
    reasons += _evaluation_refusals(candidate.evaluation, candidate.digest, data_digest)
    return reasons + (_champion_refusals(candidate, champion) if champion else [])


def _evaluation_refusals(evaluation: Evaluation, digest: str, data_digest: str) -> list[str]:
    reasons = []
    if evaluation.model_digest != digest:
        reasons.append("it was evaluated with other files than it has now")
    if evaluation.split != "test":
        reasons.append(f"it was evaluated on {evaluation.split!r}, not on 'test'")
    if evaluation.samples < 1:
        reasons.append("it was evaluated on 0 images")
    if data_digest and evaluation.data_digest != data_digest:
        reasons.append(
            f"it was evaluated on other data (digest {evaluation.data_digest[:12]}…) than this "
            f"(digest {data_digest[:12]}…): evaluate it on the same data"
        )
    bad = [name for name, value in evaluation.metrics.items() if not math.isfinite(value)]
    if bad:
        reasons.append(f"its metrics are not finite: {', '.join(sorted(bad))}")
    return reasons


def _champion_refusals(candidate: CandidateInfo, champion: CandidateInfo) -> list[str]:
    name = f"the champion, version {champion.number}"
    if champion.damage:
        return [
            f"the files of {name}: {champion.damage}; no candidate can be compared with it: "
            "tessera rollback first"
        ]
    reasons = []
    if champion.task != candidate.task:
        own, other = (task.replace("_", " ") for task in (candidate.task, champion.task))
        reasons.append(f"its task is {own}, that of {name}, is {other}")
    elif champion.classes != candidate.classes:
        reasons.append(f"its classes differ from those of {name}")
    if champion.judge_digest != candidate.judge_digest:
        reasons.append(f"its judge differs from that of {name}: train both with the same judge")
    return reasons


def decide(
    number: int,
    champion_number: int | None,
    candidate: EvaluationResult,
    champion: EvaluationResult | None,
    compared: Comparison | None,
    near_duplicates: NearDuplicates | None,
    policy: Policy,
) -> Verdict:
    """Applies the policy to the results. The verdict has every rule, not only the first that fails.

    `compared` is the candidate minus the champion, at the policy's confidence.
    """
    rules = [
        *_limit_rules(candidate.values(), policy),
        *_leakage_rule(near_duplicates, policy),
    ]
    if champion is not None and compared is not None:
        rules += _champion_rules(candidate, champion, compared, policy)
    bad = sorted(n for n, e in candidate.metrics.items() if not math.isfinite(e.value))
    if bad:
        rules.append(Rule("finite metrics", ", ".join(bad), "finite", False))
    failed = [f"{rule.name}: {rule.candidate}, {rule.other}" for rule in rules if not rule.passed]
    if failed:
        return Verdict(False, tuple(failed), number, champion_number, tuple(rules))
    reason = f"{candidate.primary} {candidate.metrics[candidate.primary].value:.4f}"
    if champion is None:
        reason += ", and there is no champion yet"
    else:
        other = champion.metrics[champion.primary].value
        reason = f"better: {reason}, champion's (version {champion_number}) {other:.4f}"
    return Verdict(True, (reason,), number, champion_number, tuple(rules))


def _limit_rules(values: Mapping[str, float], policy: Policy) -> list[Rule]:
    rules = []
    for limits, word, sign in ((policy.floors, "floor", 1), (policy.ceilings, "ceiling", -1)):
        for name, limit in limits.items():
            value = values.get(name, math.nan)
            text = f"{value:.4g}" if math.isfinite(value) else "not known"
            passed = math.isfinite(value) and sign * (value - limit) >= 0
            rules.append(Rule(f"{word} of {name}", text, f"limit {limit:g}", passed))
    return rules


def _leakage_rule(near_duplicates: NearDuplicates | None, policy: Policy) -> list[Rule]:
    if policy.leakage is None or near_duplicates is None:
        return []
    limit = f"limit {policy.leakage:.4%}"
    if near_duplicates.unknown:
        return [Rule("leakage", f"not known: {near_duplicates.unknown}", limit, False)]
    images, samples = near_duplicates.images, near_duplicates.samples
    text = f"{images:,} of {samples:,} test images are near duplicates of training images"
    return [Rule("leakage", text, limit, images / max(samples, 1) <= policy.leakage)]


def _champion_rules(
    candidate: EvaluationResult, champion: EvaluationResult, compared: Comparison, policy: Policy
) -> list[Rule]:
    """The rules that compare a candidate with the champion."""
    rules = [_gain_rule(candidate, champion, compared, policy)]
    if compared.mcnemar and candidate.primary == "accuracy" and policy.margin >= 0:
        test = compared.mcnemar
        text = f"{test.only_first} images that only it classifies right (p = {test.p_value:.3g})"
        limit = (
            f"required: more than the champion's {test.only_second}, and "
            f"p < {1 - policy.confidence:.3g}"
        )
        passed = test.only_first > test.only_second and test.p_value < 1 - policy.confidence
        rules.append(Rule("McNemar's test", text, limit, passed))
    losses = policy.largest_losses
    if losses.classes is not None:
        rules += _class_rules(candidate, champion, compared, losses.classes)
    return rules + _robustness_and_cost_rules(candidate, champion, losses)


def _gain_rule(
    candidate: EvaluationResult, champion: EvaluationResult, compared: Comparison, policy: Policy
) -> Rule:
    name = candidate.primary
    low, difference = math.nan, compared.metrics.get(name)
    if difference:
        low = difference.low if candidate.direction == "max" else -difference.high
    own, other = candidate.metrics.get(name), champion.metrics.get(name)
    texts = [f"{one.value:.4f}" if one else "not known" for one in (own, other)]
    gain = f"gain at least {low:+.4f} with {policy.confidence:.0%} confidence"
    limit = f"champion's {texts[1]}, required gain: more than {policy.margin:g}"
    return Rule(f"gain in {name}", f"{texts[0]} ({gain})", limit, low > policy.margin)


def _robustness_and_cost_rules(
    candidate: EvaluationResult, champion: EvaluationResult, losses: Losses
) -> list[Rule]:
    rules = []
    own_values, other_values = candidate.values(), champion.values()
    if losses.robustness is not None:
        sign = 1 if candidate.direction == "max" else -1
        own, other = (v.get("robustness", math.nan) for v in (own_values, other_values))
        passed = sign * (other - own) <= losses.robustness
        limit = f"champion's {other:.4f}, at most {losses.robustness:g} worse"
        rules.append(Rule("robustness", f"{own:.4f}", limit, passed))
    for name, cost, share in (
        ("latency", "latency_p95_ms", losses.latency),
        ("size", "size_bytes", losses.size),
    ):
        if share is not None:
            own, other = (v.get(cost, math.nan) for v in (own_values, other_values))
            limit = f"champion's {other:,.4g}, at most {share:.0%} more"
            rules.append(Rule(name, f"{own:,.4g}", limit, own <= other * (1 + share)))
    return rules


def _class_rules(
    candidate: EvaluationResult, champion: EvaluationResult, compared: Comparison, limit: float
) -> list[Rule]:
    """For each metric by class: the class with the largest statistically significant loss. With
    few images per class, some class is always worse by chance."""
    sign = 1 if candidate.class_direction == "max" else -1
    worst: dict[str, tuple[float, str]] = {}
    for name, estimate in champion.metrics.items():
        metric, slash, class_name = name.partition("/")
        if not slash:
            continue
        lost, difference = math.inf, compared.metrics.get(name)
        if name in candidate.metrics and difference:
            lost = sign * (estimate.value - candidate.metrics[name].value)
            if difference.low <= 0 <= difference.high:
                lost = min(lost, 0.0)
        if lost > worst.get(metric, (-math.inf, ""))[0]:
            worst[metric] = (lost, class_name)
    return [
        Rule(
            f"largest significant loss of {metric} in a class",
            f"{lost:.4f} in {class_name!r}" if lost > 0 else "none",
            f"limit {limit:g}",
            lost <= limit,
        )
        for metric, (lost, class_name) in worst.items()
    ]


def apply(
    registry: Registry, candidate: Version, state: ChampionState, verdict: Verdict, run: str
) -> None:
    """Writes the verdict to the version's tags and, if it passed, makes the version champion.

    Raises ConcurrentPromotionError if the champion is no longer the one that the candidate was
    compared with. An interruption between any two steps leaves the old champion or the new one;
    promoting again finishes.
    """
    tags = {tag_names.VERDICT: json.dumps(asdict(verdict)), tag_names.DECISION: run}
    registry.tag(candidate, tags)
    if verdict.passed:
        champions.move(registry, candidate.name, state, candidate, kind="promotion")


def roll_back(registry: Registry, name: str, *, to: int | None = None) -> tuple[Version, Version]:
    """Makes the previous champion, or version `to`, the champion again. Returns (from, to).

    Raises TesseraError if there is no champion, no previous one, or `to` was never champion.
    """
    state = champions.read_state(registry, name)
    champion = state.champion
    if champion is None:
        raise TesseraError(f"model {name!r} has no champion to roll back from")
    before = champions.predecessor(registry, name, champion.number) if to is None else to
    if before is None:
        raise TesseraError(
            f"version {champion.number} of {name!r} is the first champion",
            hint="there is nothing to roll back to",
        )
    former = {one.target for one in champions.effective(registry.decisions(name))}
    target = registry.version(name, before)
    if target.number not in former:
        raise TesseraError(
            f"version {before} of {name!r} was never champion",
            hint="use tessera promote, which evaluates it first",
        )
    if target.number == champion.number:
        raise TesseraError(f"version {before} of {name!r} is the champion already")
    with tempfile.TemporaryDirectory() as scratch:
        _, damage = _fetch(registry, target, Path(scratch))
    if damage:
        raise TesseraError(f"version {before} can't become champion again: {damage}")
    champions.move(registry, name, state, target, kind="rollback")
    return champion, target


def delete(registry: Registry, name: str, number: int) -> None:
    """Deletes a version. Raises TesseraError if it is the champion."""
    version = registry.version(name, number)
    state = champions.read_state(registry, name)
    if state.champion and state.champion.number == number:
        raise TesseraError(
            f"version {number} of {name!r} is the champion and can't be deleted",
            hint="first promote another version, or use tessera rollback",
        )
    registry.delete(version)


def inspect_candidate(registry: Registry, version: Version) -> CandidateInfo:
    """Downloads a version's files and checks them against the digest in its tags."""
    digest = version.tags.get(tag_names.DIGEST, "")
    missing, evaluation = registry.missing(version), evaluation_of(version)
    with tempfile.TemporaryDirectory() as scratch:
        folder, damage = _fetch(registry, version, Path(scratch))
        if damage:
            return CandidateInfo(version.number, digest, damage, missing, evaluation)
        try:
            recipe, card = checkpoints.read_identity(folder)
        except TesseraError as error:
            return CandidateInfo(version.number, digest, error.message, missing, evaluation)
    return CandidateInfo(
        version.number,
        digest,
        damage,
        missing,
        evaluation,
        task=models.get(recipe.family).task.name,
        classes=card.classes,
        data=recipe.data.path,
        data_digest=card.digest,
        judge_digest=recipe.judge_digest,
    )


def _fetch(registry: Registry, version: Version, scratch: Path) -> tuple[Path, str]:
    """Returns the folder of the version's files, and what is wrong with them (empty if nothing)."""
    digest = version.tags.get(tag_names.DIGEST, "")
    if not digest:
        return scratch, "it was not registered by Tessera: it has no digest"
    try:
        folder = registry.download(version, scratch)
        checkpoints.check_digest(folder, digest)
    except TesseraError as error:
        return scratch, error.message
    return folder, ""


def evaluation_of(version: Version) -> Evaluation | None:
    """The evaluation in the version's tags; None if there is none or it can't be read."""
    text = version.tags.get(EVALUATION_TAG)
    if not text:
        return None
    try:
        content: dict[str, Any] = json.loads(text)
        return Evaluation(**content)
    except (ValueError, TypeError):
        return None
