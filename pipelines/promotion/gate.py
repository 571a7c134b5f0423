"""The gate: which version may answer as `champion`, and the way back.

In: what is known of a candidate and of the champion, and what one job found of both on the same
images. Out: a verdict, rule by rule. `refusals` and `decide` are pure; `promote` and `roll_back`
apply them through the ports. Must not know MLflow, nor how anything is measured.
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
from pipelines.promotion.policy import Policy
from pipelines.training import checkpoints

EVALUATION_TAG = f"{tag_names.EVALUATION_PREFIX}test"


@dataclass(frozen=True)
class Evaluation:
    """What `tessera evaluate` found of one version on the test split."""

    model_digest: str
    data_digest: str
    split: str
    samples: int
    metrics: Mapping[str, float]
    judge_digest: str = ""
    """Of the classifier that judged, where one did."""
    data: str = ""
    """Where the data set lies."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class CandidateInfo:
    """All that is known of one version before it is evaluated beside the champion. `damage` is
    empty where the files are intact, `missing` where its run and its place are. `task`, `classes`,
    and where and what it was trained on, `data` and `data_digest`, are from its files: tags can be
    edited by whoever sees the page."""

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
    """How many of the test images look like images that the candidate was trained on. `unknown`
    says why that can't be told."""

    images: int
    samples: int
    unknown: str = ""


@dataclass(frozen=True)
class Rule:
    """One line of a verdict: what was asked, the candidate's value and the champion's or the limit,
    as text."""

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
    """What speaks against a candidate before anything is measured; every reason is given."""
    if champion and champion.number == candidate.number:
        return ["it is the champion already"]
    if candidate.damage:
        return [f"its files: {candidate.damage}"]
    evaluation, against = candidate.evaluation, []
    if candidate.missing:
        against.append(candidate.missing)
    if evaluation is None:
        against.append("it was not evaluated on a test split: tessera evaluate it first")
        return against
    if evaluation.model_digest != candidate.digest:
        against.append("its evaluation is of other files than it has now")
    if evaluation.split != "test":
        against.append(f"it was evaluated on {evaluation.split!r}, not on 'test'")
    if evaluation.samples < 1:
        against.append("it was evaluated on no image")
    if data_digest and evaluation.data_digest != data_digest:
        against.append(
            f"it was evaluated on other data (digest {evaluation.data_digest[:12]}…) than this "
            f"(digest {data_digest[:12]}…): evaluate it on the same"
        )
    bad = [name for name, value in evaluation.metrics.items() if not math.isfinite(value)]
    if bad:
        against.append(f"its figures are not finite: {', '.join(sorted(bad))}")
    if champion and not champion.damage and champion.task != candidate.task:
        against.append(
            f"it does {candidate.task.replace('_', ' ')}, the champion, version "
            f"{champion.number}, {champion.task.replace('_', ' ')}"
        )
    elif champion and not champion.damage and champion.classes != candidate.classes:
        against.append(f"its classes are not those of the champion, version {champion.number}")
    if champion and not champion.damage and champion.judge_digest != candidate.judge_digest:
        against.append(
            f"another classifier judged it than the champion, version {champion.number}: train both "
            "with the same judge"
        )
    if champion and champion.damage:
        against.append(
            f"the files of the champion, version {champion.number}: {champion.damage}; nothing can "
            "be compared with it: tessera rollback first"
        )
    return against


def decide(
    number: int,
    champion: int | None,
    candidate: EvaluationResult,
    held: EvaluationResult | None,
    compared: Comparison | None,
    leak: NearDuplicates | None,
    policy: Policy,
) -> Verdict:
    """Holds the policy against what was found; every rule is told, not only the first that fails.
    `compared` is the candidate less the champion, with the policy's confidence."""
    values = candidate.values()
    rules = [
        *_floors(values, policy),
        *_leakage(leak, policy),
    ]
    if held is not None and compared is not None:
        rules += _against(candidate, held, compared, policy)
    bad = sorted(n for n, e in candidate.metrics.items() if not math.isfinite(e.value))
    if bad:
        rules.append(Rule("finite figures", ", ".join(bad), "finite", False))
    failed = [_said(rule) for rule in rules if not rule.passed]
    if failed:
        return Verdict(False, tuple(failed), number, champion, tuple(rules))
    primary = candidate.metrics[candidate.primary]
    said = f"{candidate.primary} {primary.value:.4f}"
    if held is None:
        said += ", and there is no champion yet"
    else:
        other = held.metrics[held.primary].value
        said = f"better: {said}, champion's (version {champion}) {other:.4f}"
    return Verdict(True, (said,), number, champion, tuple(rules))


def _said(rule: Rule) -> str:
    return f"{rule.name}: {rule.candidate}, {rule.other}"


def _floors(values: Mapping[str, float], policy: Policy) -> list[Rule]:
    rules = []
    for limits, word, sign in ((policy.floors, "floor", 1), (policy.ceilings, "ceiling", -1)):
        for name, limit in limits.items():
            value = values.get(name, math.nan)
            text = f"{value:.4g}" if math.isfinite(value) else "not known"
            passed = math.isfinite(value) and sign * (value - limit) >= 0
            rules.append(Rule(f"{word} of {name}", text, f"limit {limit:g}", passed))
    return rules


def _leakage(leak: NearDuplicates | None, policy: Policy) -> list[Rule]:
    if policy.leakage is None or leak is None:
        return []
    limit = f"limit {policy.leakage:.4%}"
    if leak.unknown:
        return [Rule("leakage", f"not known: {leak.unknown}", limit, False)]
    share = leak.images / max(leak.samples, 1)
    text = f"{leak.images:,} of {leak.samples:,} test images look like training images"
    return [Rule("leakage", text, limit, share <= policy.leakage)]


def _against(
    candidate: EvaluationResult, held: EvaluationResult, compared: Comparison, policy: Policy
) -> list[Rule]:
    """What is asked beside the champion."""
    name, sign = candidate.primary, 1 if candidate.direction == "max" else -1
    rules = []
    difference = compared.metrics.get(name)
    low = math.nan
    if difference:
        low = difference.low if sign > 0 else -difference.high
    own, other = candidate.metrics.get(name), held.metrics.get(name)
    texts = [f"{one.value:.4f}" if one else "not known" for one in (own, other)]
    sure = f"by {low:+.4f} or more with {policy.confidence:.0%} confidence"
    wanted = f"champion's {texts[1]}, to be better by more than {policy.margin:g}"
    rules.append(Rule(f"lead in {name}", f"{texts[0]} ({sure})", wanted, low > policy.margin))
    if compared.mcnemar and name == "accuracy" and policy.margin >= 0:
        test = compared.mcnemar
        text = f"right alone on {test.only_first} images (p = {test.p_value:.3g})"
        wanted = (
            f"more than the champion's {test.only_second}, and p below {1 - policy.confidence:.3g}"
        )
        passed = test.only_first > test.only_second and test.p_value < 1 - policy.confidence
        rules.append(Rule("McNemar's test", text, wanted, passed))
    losses = policy.largest_losses
    if losses.classes is not None:
        rules += _class_losses(candidate, held, compared, losses.classes)
    values = candidate.values(), held.values()
    if losses.robustness is not None:
        mine, its = (one.get("robustness", math.nan) for one in values)
        passed = sign * (its - mine) <= losses.robustness
        limit = f"champion's {its:.4f}, at most {losses.robustness:g} worse"
        rules.append(Rule("robustness", f"{mine:.4f}", limit, passed))
    for word, cost in (("latency", "latency_p95_ms"), ("size", "size_bytes")):
        share = losses.latency if word == "latency" else losses.size
        if share is not None:
            mine, its = (one.get(cost, math.nan) for one in values)
            limit = f"champion's {its:,.4g}, at most {share:.0%} more"
            rules.append(Rule(word, f"{mine:,.4g}", limit, mine <= its * (1 + share)))
    return rules


def _class_losses(
    candidate: EvaluationResult, held: EvaluationResult, compared: Comparison, most: float
) -> list[Rule]:
    """The class that surely lost most, of each figure that is told by class: of few images of a
    class some are always lost by chance."""
    sign = 1 if candidate.direction == "max" else -1
    worst: dict[str, tuple[float, str]] = {}
    for name, estimate in held.metrics.items():
        kind, slash, of = name.partition("/")
        if not slash:
            continue
        lost, difference = math.inf, compared.metrics.get(name)
        if name in candidate.metrics and difference:
            lost = sign * (estimate.value - candidate.metrics[name].value)
            if difference.low <= 0 <= difference.high:
                lost = min(lost, 0.0)
        if lost > worst.get(kind, (-math.inf, ""))[0]:
            worst[kind] = (lost, of)
    return [
        Rule(
            f"largest sure loss of {kind} in a class",
            f"{lost:.4f} in {of!r}" if lost > 0 else "none",
            f"limit {most:g}",
            lost <= most,
        )
        for kind, (lost, of) in worst.items()
    ]


def apply(
    registry: Registry, candidate: Version, seat: ChampionState, verdict: Verdict, run: str
) -> None:
    """Writes the verdict on the version and, on yes, makes it champion. Raises OvertakenError where
    the champion isn't the one any more that it was compared with.

    A death between any two steps leaves the old champion or the new one; promoting again finishes.
    """
    tags = {tag_names.VERDICT: json.dumps(asdict(verdict)), tag_names.DECISION: run}
    registry.tag(candidate, tags)
    if verdict.passed:
        champions.move(registry, candidate.name, seat, candidate, kind="promotion")


def roll_back(registry: Registry, name: str, *, to: int | None = None) -> tuple[Version, Version]:
    """Makes the champion before the current one, or version `to`, the champion again; gives
    (from, to). Only what was champion once can be again."""
    seat = champions.read_state(registry, name)
    champion = seat.champion
    if champion is None:
        raise TesseraError(f"model {name!r} has no champion to roll back from")
    before = champions.predecessor(registry, name, champion.number) if to is None else to
    if before is None:
        raise TesseraError(
            f"version {champion.number} of {name!r} is the first champion",
            hint="there is nothing to roll back to",
        )
    once = {one.target for one in champions.effective(registry.decisions(name))}
    target = registry.version(name, before)
    if target.number not in once:
        raise TesseraError(
            f"version {before} of {name!r} was never champion",
            hint="tessera promote it: the gate will look at it",
        )
    if target.number == champion.number:
        raise TesseraError(f"version {before} of {name!r} is the champion already")
    with tempfile.TemporaryDirectory() as scratch:
        _, damage = _fetch(registry, target, Path(scratch))
    if damage:
        raise TesseraError(f"version {before} can't serve again: {damage}")
    champions.move(registry, name, seat, target, kind="rollback")
    return champion, target


def delete(registry: Registry, name: str, number: int) -> None:
    """Removes a version that isn't champion."""
    version = registry.version(name, number)
    seat = champions.read_state(registry, name)
    if seat.champion and seat.champion.number == number:
        raise TesseraError(
            f"version {number} of {name!r} is the champion and is not deleted",
            hint="promote another, or tessera rollback, first",
        )
    registry.delete(version)


def inspect_candidate(registry: Registry, version: Version) -> CandidateInfo:
    """Fetches a version's files and compares them with the digest it was registered with."""
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
    """The version's files, and what is wrong with them."""
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
    text = version.tags.get(EVALUATION_TAG)
    if not text:
        return None
    try:
        content: dict[str, Any] = json.loads(text)
        return Evaluation(**content)
    except (ValueError, TypeError):
        return None
