"""Promotes a version: evaluates candidate and champion, applies the policy, moves the alias."""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from dataclasses import asdict
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


def why(verdict: Verdict) -> str:
    """The rules that it fails, or what speaks for it, in a line."""
    failed = [rule.name for rule in verdict.rules if not rule.passed]
    return "; ".join(failed or verdict.reasons)


def promote(
    context: Context,
    registry: Registry,
    model: str,
    number: int,
    *,
    policy_file: Path | None = None,
    margin: float | None = None,
    data: str | None = None,
    workers: int = 0,
    dry_run: bool = False,
    verbose: bool = False,
) -> Verdict:
    """Decides on a version and, on yes, makes it champion."""
    from pipelines.promotion import champions, gate
    from pipelines.promotion import policy as promotion_policy

    given = promotion_policy.read(policy_file) if policy_file else None
    candidate = registry.version(model, number)
    seat = champions.read_state(registry, model)
    if seat.champion and seat.champion.number == candidate.number:
        return gate.Verdict(True, ("it is the champion already",), number, number)
    policy = given or promotion_policy.default(_task(candidate))
    if margin is not None:
        policy = promotion_policy.build({**policy.model_dump(), "margin": margin}, "--margin")
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report"
        verdict = _judge(
            context,
            registry,
            candidate,
            seat,
            policy,
            report,
            data=data,
            workers=workers,
            verbose=verbose,
        )
        if not dry_run:
            _record(context, registry, candidate, seat, policy, verdict, report)
    return verdict


def _judge(
    context: Context,
    registry: Registry,
    candidate: Version,
    seat: ChampionState,
    policy: Policy,
    report: Path,
    *,
    data: str | None,
    workers: int,
    verbose: bool,
) -> Verdict:
    """What the policy says; refused at once where there is nothing to measure."""
    from pipelines.data import card as cards
    from pipelines.promotion import gate
    from pipelines.storage.base import absolute_location
    from pipelines.workflows import evaluate

    held = seat.champion.number if seat.champion else None
    standing = gate.inspect_candidate(registry, candidate)
    champion = gate.inspect_candidate(registry, seat.champion) if seat.champion else None
    where = absolute_location(data) if data else _evaluated_on(candidate)
    card = cards.read(where) if where else None
    against = gate.refusals(standing, champion, card.digest if card else "")
    if against or card is None:
        return gate.Verdict(False, tuple(against), candidate.number, held)
    versions = [candidate, *([seat.champion] if seat.champion else [])]
    wanted = evaluate.Wanted(
        robustness=evaluate.ROBUSTNESS if policy.needs_robustness else 0,
        costs=policy.needs_costs,
        confidence=policy.confidence,
        report=report,
    )
    found, compared = evaluate.examine(
        context, registry, versions, where, wanted, workers=workers, verbose=verbose
    )
    leak = _leak(standing, where) if policy.leakage is not None else None
    return gate.decide(
        candidate.number,
        held,
        found[0],
        found[1] if seat.champion else None,
        compared[0] if compared else None,
        leak,
        policy,
    )


def _record(
    context: Context,
    registry: Registry,
    candidate: Version,
    seat: ChampionState,
    policy: Policy,
    verdict: Verdict,
    report: Path,
) -> None:
    """Makes the decision's run in MLflow, then applies it."""
    from pipelines.promotion import champions, gate
    from pipelines.workflows import evaluate, services

    held = str(verdict.champion or "none")
    tags = {
        tag_names.PROMOTION: candidate.name,
        tag_names.PROMOTION_CANDIDATE: str(candidate.number),
        tag_names.PROMOTION_CHAMPION: held,
        tag_names.PROMOTION_VERDICT: "yes" if verdict.passed else "no",
    }
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    name = f"promote-{candidate.name}-{candidate.number}-{stamp}"
    tracker = services.open_tracker(context, name, experiment=EXPERIMENT, tags=tags)
    tracker.params({"model": candidate.name, "candidate": str(candidate.number), "champion": held})
    with tempfile.TemporaryDirectory() as scratch:
        for file, content in (("policy", policy.model_dump()), ("verdict", asdict(verdict))):
            path = Path(scratch) / f"{file}.json"
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            tracker.artifact(path, "")
    if report.is_dir():
        evaluate.store(tracker, report, "report")
    status, outcome = "FINISHED", "promoted" if verdict.passed else "refused"
    try:
        gate.apply(registry, candidate, seat, verdict, tracker.run_id)
    except champions.ConcurrentPromotionError as error:
        outcome = f"overtaken: {error.message}"
        raise
    except BaseException:
        status, outcome = "FAILED", "not finished"
        raise
    finally:
        tracker.tags({tag_names.PROMOTION_OUTCOME: outcome})
        tracker.finish(status)


def _leak(candidate: CandidateInfo, where: str) -> NearDuplicates:
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
        return NearDuplicates(0, samples, f"its training data isn't in {candidate.data} any more")
    return NearDuplicates(overlap.seen_before((candidate.data, trained), (where, tested)), samples)


def _evaluated_on(candidate: Version) -> str:
    """Where the data set lies that the candidate was evaluated on; empty where it never was."""
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
