"""Promotes a version: evaluates candidate and champion, applies the policy, moves the alias.

In: a registered version and a policy. Out: a `Promotion` with the verdict, rule by rule; the
decision is a run in MLflow. `rollback` undoes it. Must not print, nor read the environment.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import tag_names

if TYPE_CHECKING:
    from pipelines.interfaces import Registry, Version
    from pipelines.promotion.champions import ChampionState
    from pipelines.promotion.gate import CandidateInfo, NearDuplicates, Verdict
    from pipelines.promotion.policy import Policy
    from pipelines.workflows.context import Context

EXPERIMENT = "promotions"
"""The MLflow experiment of all decisions."""


@dataclass(frozen=True)
class Promotion:
    """The decision about a version of `model`. After a `dry_run` nothing has changed."""

    model: str
    verdict: Verdict
    dry_run: bool = False

    @property
    def passed(self) -> bool:
        """Whether the policy allows the promotion."""
        return self.verdict.passed

    @property
    def why(self) -> str:
        """The rules that the candidate fails, otherwise the reasons for the verdict."""
        failed = [rule.name for rule in self.verdict.rules if not rule.passed]
        return "; ".join(failed or self.verdict.reasons)


@dataclass(frozen=True)
class Rollback:
    """`before` was the champion of `model`, `now` is the champion."""

    model: str
    before: Version
    now: Version


def promote(
    model: str | Version,
    *,
    policy: str | os.PathLike[str] | Policy | None = None,
    margin: float | None = None,
    data: str | os.PathLike[str] | None = None,
    workers: int = 0,
    to_name: str | None = None,
    to_registry: str | None = None,
    dry_run: bool = False,
    verbose: bool = False,
    context: Context | None = None,
) -> Promotion:
    """Makes a version the champion of its name, if the policy allows it.

    Args:
        model: A reference (`NAME`, `NAME/2`, `NAME@alias`) or a version.
        policy: A policy or its YAML file; the task's default otherwise.
        margin: Overrides the policy's margin.
        data: A packed data set to evaluate on; by default the one that the candidate was
            evaluated on.
        workers: Data-parallel workers; 0 evaluates in this process.
        to_name: Copies the version into this model and promotes it there. The version must be the
            champion of its own model.
        to_registry: Address of another MLflow to do the same in.
        dry_run: Decides, but changes nothing.
        verbose: Whether to show Ray's own output.
        context: Where MLflow and Ray are; from the environment by default.

    Raises TesseraError if the model, the policy or the data set can't be read. A version that the
    policy refuses is not an error: see `Promotion.passed`.
    """
    from pipelines.promotion import policy as policies
    from pipelines.workflows import model_reference, services
    from pipelines.workflows.context import Context
    from pipelines.workflows.copy_model import copy_version

    context = context or Context.from_environment()
    if policy is not None and not isinstance(policy, policies.Policy):
        policy = policies.read(Path(policy))
    registry: Registry = services.open_registry(context)
    candidate = model_reference.resolve(registry, model)
    name, number = candidate.name, candidate.number
    if to_name or to_registry:
        registry, name, number = copy_version(
            registry, name, number, to_name or name, to_registry, dry_run=dry_run
        )
        candidate = registry.version(name, number)
    verdict = _decide(
        context,
        registry,
        candidate,
        policy=policy,
        margin=margin,
        data=os.fspath(data) if data else None,
        workers=workers,
        dry_run=dry_run,
        verbose=verbose,
    )
    return Promotion(name, verdict, dry_run)


def rollback(model: str | Version, *, context: Context | None = None) -> Rollback:
    """Makes an earlier champion the champion again.

    Args:
        model: `NAME` for the champion before the current one; `NAME/2`, `NAME@alias` or a version
            for another one that was champion once.
        context: Where MLflow is; from the environment by default.

    Raises TesseraError if there is no such champion, or if its files are damaged.
    """
    from pipelines.promotion import gate
    from pipelines.workflows import model_reference, services
    from pipelines.workflows.context import Context

    context = context or Context.from_environment()
    registry = services.open_registry(context)
    named = model_reference.of(model)
    to = named.resolve(registry).number if named.alias else named.number
    before, now = gate.roll_back(registry, named.name, to=to)
    return Rollback(named.name, before, now)


def _decide(
    context: Context,
    registry: Registry,
    candidate: Version,
    *,
    policy: Policy | None,
    margin: float | None,
    data: str | None,
    workers: int,
    dry_run: bool,
    verbose: bool,
) -> Verdict:
    """The verdict on a version, applied unless `dry_run`."""
    from pipelines.promotion import champions, gate
    from pipelines.promotion import policy as policies

    state = champions.read_state(registry, candidate.name)
    if state.champion and state.champion.number == candidate.number:
        return gate.Verdict(
            True, ("it is already the champion",), candidate.number, candidate.number
        )
    policy = policy or policies.default(_task(candidate))
    if margin is not None:
        policy = policies.build({**policy.model_dump(), "margin": margin}, "--margin")
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report"
        verdict = _judge(
            context,
            registry,
            candidate,
            state,
            policy,
            report,
            data=data,
            workers=workers,
            verbose=verbose,
        )
        if not dry_run:
            _record(context, registry, candidate, state, policy, verdict, report)
    return verdict


def _judge(
    context: Context,
    registry: Registry,
    candidate: Version,
    state: ChampionState,
    policy: Policy,
    report: Path,
    *,
    data: str | None,
    workers: int,
    verbose: bool,
) -> Verdict:
    """Evaluates candidate and champion and applies the policy. A candidate that is refused for
    another reason is not evaluated."""
    from pipelines.data import card as cards
    from pipelines.promotion import gate
    from pipelines.storage.base import absolute_location
    from pipelines.workflows import evaluate

    current = state.champion.number if state.champion else None
    info = gate.inspect_candidate(registry, candidate)
    champion = gate.inspect_candidate(registry, state.champion) if state.champion else None
    where = absolute_location(data) if data else _evaluated_on(candidate)
    card = cards.read(where) if where else None
    reasons = gate.refusals(info, champion, card.digest if card else "")
    if reasons or card is None:
        return gate.Verdict(False, tuple(reasons), candidate.number, current)
    versions = [candidate, *([state.champion] if state.champion else [])]
    options = evaluate.EvaluationOptions(
        robustness=evaluate.ROBUSTNESS if policy.needs_robustness else 0,
        costs=policy.needs_costs,
        confidence=policy.confidence,
        report=report,
    )
    results, comparisons = evaluate.measure(
        context, registry, versions, where, options, workers=workers, verbose=verbose
    )
    near_duplicates = _near_duplicates(info, where) if policy.leakage is not None else None
    return gate.decide(
        candidate.number,
        current,
        results[0],
        results[1] if state.champion else None,
        comparisons[0] if comparisons else None,
        near_duplicates,
        policy,
    )


def _record(
    context: Context,
    registry: Registry,
    candidate: Version,
    state: ChampionState,
    policy: Policy,
    verdict: Verdict,
    report: Path,
) -> None:
    """Records the decision as a run in MLflow, then applies it."""
    from pipelines.promotion import champions, gate
    from pipelines.workflows import evaluate, services

    current = str(verdict.champion or "none")
    tags = {
        tag_names.PROMOTION: candidate.name,
        tag_names.PROMOTION_CANDIDATE: str(candidate.number),
        tag_names.PROMOTION_CHAMPION: current,
        tag_names.PROMOTION_VERDICT: "yes" if verdict.passed else "no",
    }
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    name = f"promote-{candidate.name}-{candidate.number}-{stamp}"
    tracker = services.open_tracker(context, name, experiment=EXPERIMENT, tags=tags)
    tracker.params(
        {"model": candidate.name, "candidate": str(candidate.number), "champion": current}
    )
    with tempfile.TemporaryDirectory() as scratch:
        for file, content in (("policy", policy.model_dump()), ("verdict", asdict(verdict))):
            path = Path(scratch) / f"{file}.json"
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            tracker.artifact(path, "")
    if report.is_dir():
        evaluate.store(tracker, report, "report")
    status, outcome = "FINISHED", "promoted" if verdict.passed else "refused"
    try:
        gate.apply(registry, candidate, state, verdict, tracker.run_id)
    except champions.ConcurrentPromotionError as error:
        outcome = f"overtaken: {error.message}"
        raise
    except BaseException:
        status, outcome = "FAILED", "not finished"
        raise
    finally:
        tracker.tags({tag_names.PROMOTION_OUTCOME: outcome})
        tracker.finish(status)


def _near_duplicates(candidate: CandidateInfo, where: str) -> NearDuplicates:
    """How many test images have a near duplicate among the images of the training."""
    from models.core.errors import TesseraError
    from pipelines.data import card as cards
    from pipelines.data.inspection import overlap
    from pipelines.promotion.gate import NearDuplicates

    tested = cards.read(where)
    samples = tested.split("test").samples
    if candidate.data_digest == tested.digest:
        return NearDuplicates(overlap.seen_before((where, tested), (where, tested)), samples)
    try:
        trained = cards.read(candidate.data)
    except TesseraError as error:
        return NearDuplicates(0, samples, f"its training data can't be read: {error.message}")
    if trained.digest != candidate.data_digest:
        return NearDuplicates(0, samples, f"its training data is no longer in {candidate.data}")
    return NearDuplicates(overlap.seen_before((candidate.data, trained), (where, tested)), samples)


def _evaluated_on(candidate: Version) -> str:
    """The location of the data set that the candidate was evaluated on; empty if it never was."""
    from pipelines.promotion import gate

    evaluation = gate.evaluation_of(candidate)
    if evaluation is None:
        return ""
    if evaluation.data:
        return evaluation.data
    tree: dict[str, Any] = json.loads(candidate.tags.get(tag_names.RECIPE, "{}"))
    return str(tree.get("data", {}).get("path", ""))


def _task(version: Version) -> str:
    import models
    from models.core.errors import TesseraError

    family = version.tags.get(tag_names.FAMILY)
    if family is None:
        raise TesseraError(
            f"version {version.number} of {version.name!r} was not registered by Tessera",
            hint="train and register it with tessera train",
        )
    return models.get(family).task.name
