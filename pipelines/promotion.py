"""The gate: which version may answer as `champion`, and the way back.

In: what is known of a candidate and of the champion. Out: a verdict with its reasons; `decide` is
pure. `promote` and `roll_back` apply it through the `Registry` port. Must not know MLflow.
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
from models.core.family import Figure
from pipelines import checkpoints
from pipelines.ports import Registry, Version

CHAMPION = "champion"
EVALUATION_TAG = "tessera.evaluation.test"
PREVIOUS_TAG = "tessera.previous_champion"
VERDICT_TAG = "tessera.verdict"


@dataclass(frozen=True)
class Policy:
    """The candidate's primary figure must be better by more than `margin`."""

    margin: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """What `tessera evaluate` found of one version on the test split."""

    model_digest: str
    data_digest: str
    split: str
    samples: int
    figures: Mapping[str, float]
    judge_digest: str = ""
    """Of the classifier that judged, where one did."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Standing:
    """All that the gate looks at of one version. `damage` is empty where the files are intact."""

    number: int
    digest: str
    damage: str
    classes: str
    evaluation: Evaluation | None


@dataclass(frozen=True)
class Verdict:
    passed: bool
    reasons: tuple[str, ...]
    candidate: int
    champion: int | None


def decide(
    candidate: Standing, champion: Standing | None, figure: Figure, policy: Policy
) -> Verdict:
    """Yes only if nothing speaks against it; every reason is given, not only the first."""
    against = _unfit(candidate, "the candidate", figure)
    reasons: list[str] = []
    if champion and champion.number == candidate.number:
        against = ["it is the champion already"]
    elif champion:
        # A champion whose files are gone or changed can't be held against a candidate that is
        # whole; one that was never evaluated on these data can still be evaluated.
        against += _incomparable(candidate, champion)
    if not against and candidate.evaluation:
        value = candidate.evaluation.figures[figure.name]
        if champion is None or champion.evaluation is None:
            reasons.append(f"{figure.name} {value:.4f}, and there is no champion yet")
        else:
            held = champion.evaluation.figures[figure.name]
            gain = value - held if figure.direction == "max" else held - value
            compared = (
                f"{figure.name} {value:.4f}, champion's (version {champion.number}) {held:.4f}"
            )
            if gain > policy.margin:
                reasons.append(f"better: {compared}")
            else:
                wanted = f"by more than {policy.margin:g}" if policy.margin else "at all"
                against.append(f"not better {wanted}: {compared}")
    number = champion.number if champion else None
    return Verdict(not against, tuple(against or reasons), candidate.number, number)


def _unfit(standing: Standing, who: str, figure: Figure) -> list[str]:
    if standing.damage:
        return [f"{who}'s files: {standing.damage}"]
    evaluation = standing.evaluation
    if evaluation is None:
        return [
            f"{who} (version {standing.number}) was not evaluated on a test split: "
            "tessera evaluate it first"
        ]
    against = []
    if evaluation.model_digest != standing.digest:
        against.append(f"{who}'s evaluation is of other files than it has now")
    if evaluation.split != "test":
        against.append(f"{who} was evaluated on {evaluation.split!r}, not on 'test'")
    if evaluation.samples < 1:
        against.append(f"{who} was evaluated on no image")
    bad = [name for name, value in evaluation.figures.items() if not math.isfinite(value)]
    if bad:
        against.append(f"{who}'s figures are not finite: {', '.join(sorted(bad))}")
    if figure.name not in evaluation.figures:
        against.append(f"{who}'s evaluation has no {figure.name}")
    return against


def _incomparable(candidate: Standing, champion: Standing) -> list[str]:
    if champion.evaluation is None:
        return [
            f"the champion (version {champion.number}) was not evaluated on a test split: "
            "tessera evaluate it on the same data"
        ]
    against = []
    mine = candidate.evaluation
    if mine and mine.data_digest != champion.evaluation.data_digest:
        against.append(
            f"it was evaluated on other data (digest {mine.data_digest[:12]}…) than the champion, "
            f"version {champion.number} (digest {champion.evaluation.data_digest[:12]}…): "
            "evaluate both on the same"
        )
    if mine and mine.judge_digest != champion.evaluation.judge_digest:
        against.append(
            f"another classifier judged it than the champion, version {champion.number}: "
            "evaluate both by the same"
        )
    if champion.classes != candidate.classes:
        against.append(f"its classes are not those of the champion, version {champion.number}")
    return against


def promote(
    registry: Registry, name: str, number: int, *, policy: Policy, dry_run: bool = False
) -> Verdict:
    """Decides on a version and, on yes, moves the alias. The verdict is written on the version.

    A crash between any two steps leaves the old champion or the new one; calling again finishes.
    """
    candidate = registry.version(name, number)
    champion = current_champion(registry, name)
    figure = models.get(_tag(candidate, "tessera.family")).task.primary
    verdict = decide(
        examine(registry, candidate),
        examine(registry, champion) if champion else None,
        figure,
        policy,
    )
    if dry_run:
        return verdict
    if verdict.passed:
        again = current_champion(registry, name)
        if (again.number if again else None) != verdict.champion:
            raise TesseraError(
                f"the champion of {name!r} changed while version {number} was compared with it",
                mend="promote again: it will be compared with the new one",
            )
        registry.tag(candidate, {PREVIOUS_TAG: str(verdict.champion or "")})
    registry.tag(candidate, {VERDICT_TAG: json.dumps(asdict(verdict))})
    if verdict.passed:
        registry.alias(name, CHAMPION, number)
    return verdict


def roll_back(registry: Registry, name: str) -> tuple[Version, Version]:
    """Makes the champion before the current one the champion again; gives (from, to)."""
    champion = current_champion(registry, name)
    if champion is None:
        raise TesseraError(f"model {name!r} has no champion to roll back from")
    before = champion.tags.get(PREVIOUS_TAG, "")
    if not before:
        raise TesseraError(
            f"version {champion.number} of {name!r} is the first champion",
            mend="there is nothing to roll back to",
        )
    target = registry.version(name, int(before))
    damage = examine(registry, target).damage
    if damage:
        raise TesseraError(f"version {before} can't serve again: {damage}")
    registry.alias(name, CHAMPION, target.number)
    return champion, target


def current_champion(registry: Registry, name: str) -> Version | None:
    for version in registry.versions(name):
        if CHAMPION in version.aliases:
            return version
    return None


def examine(registry: Registry, version: Version) -> Standing:
    """Fetches a version's files and compares them with the digest it was registered with."""
    digest = version.tags.get("tessera.digest", "")
    damage = "" if digest else "it was not registered by Tessera: it has no digest"
    if digest:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                checkpoints.check_digest(registry.download(version, Path(scratch)), digest)
            except TesseraError as error:
                damage = error.message
    classes = version.tags.get("tessera.classes", "")
    return Standing(version.number, digest, damage, classes, evaluation_of(version))


def evaluation_of(version: Version) -> Evaluation | None:
    text = version.tags.get(EVALUATION_TAG)
    if not text:
        return None
    try:
        content: dict[str, Any] = json.loads(text)
        return Evaluation(**content)
    except (ValueError, TypeError):
        return None


def _tag(version: Version, name: str) -> str:
    if name not in version.tags:
        raise TesseraError(
            f"version {version.number} of {version.name!r} was not registered by Tessera",
            mend="train and register it with tessera train",
        )
    return version.tags[name]
