"""Who is champion: one alias, moved by decisions of which no two can win.

In: a registry and whom a decision was made against. Out: the alias, moved, or a refusal. Must not
know why a version is promoted.

A registry moves an alias for whoever asks, without looking what it was. So each decision is first
appended to the model's record, whose order the registry itself fixes, with the number of the
decision that it was based on. It counts only if that was still the last one that counted: of two
that were based on the same, the first in the record wins and the other is told. Then the alias
moves. Whoever finds a decision that counts and isn't done, because its maker died, finishes it.
So after a death at any moment the champion is the old one or the new one.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from models.core.errors import TesseraError
from pipelines.interfaces import Decision, Registry, Version

CHAMPION = "champion"


@dataclass(frozen=True)
class ChampionState:
    """Who is champion, and the number of the decision that made it so; 0 where none did."""

    champion: Version | None
    base: int


class ConcurrentPromotionError(TesseraError):
    """Another decision came first."""


def effective(decisions: Sequence[Decision]) -> list[Decision]:
    """Those that count, in their order."""
    chain: list[Decision] = []
    for decision in sorted(decisions, key=lambda one: one.number):
        base = chain[-1].number if chain else 0
        # The same decision twice, because an answer got lost, is based on what came before it.
        if decision.base == base:
            chain.append(decision)
    return chain


def read_state(registry: Registry, name: str) -> ChampionState:
    """Who is champion now. Finishes a decision that counts and isn't done."""
    chain = effective(registry.decisions(name))
    if chain and not chain[-1].done:
        _finish(registry, name, chain[-1])
    return ChampionState(current_champion(registry, name), chain[-1].number if chain else 0)


def current_champion(registry: Registry, name: str) -> Version | None:
    """Whose alias it is, as the registry has it."""
    for version in registry.versions(name):
        if CHAMPION in version.aliases:
            return version
    return None


def move(registry: Registry, name: str, seat: ChampionState, to: Version, *, kind: str) -> None:
    """Makes `to` champion, if the champion is still that of `seat`; else raises OvertakenError.
    `kind` is "promotion" or "rollback"."""
    before = seat.champion.number if seat.champion else None
    held = current_champion(registry, name)
    if (held.number if held else None) != before:
        raise _overtaken(name, held)
    token = secrets.token_hex(8)
    decided = Decision(0, seat.base, to.number, before, kind, token)
    registry.decide(name, decided)
    chain = effective(registry.decisions(name))
    own = next((one for one in chain if one.token == token), None)
    if own is None:
        _finish(registry, name, chain[-1])
        raise _overtaken(name, current_champion(registry, name))
    _finish(registry, name, own)


def predecessor(registry: Registry, name: str, champion: int) -> int | None:
    """Whom the newest promotion of `champion` replaced; None where it was the first."""
    for decision in reversed(effective(registry.decisions(name))):
        if decision.target == champion and decision.kind == "promotion":
            return decision.before
    return None


def _finish(registry: Registry, name: str, decision: Decision) -> None:
    known = {version.number for version in registry.versions(name)}
    if decision.target in known and not _is_done(registry, name, decision):
        registry.alias(name, CHAMPION, decision.target)
    registry.done(name, decision)
    # Somebody may have decided on this one in the meantime, and moved the alias before us.
    last = effective(registry.decisions(name))[-1]
    if last.number != decision.number and last.target in known:
        registry.alias(name, CHAMPION, last.target)


def _is_done(registry: Registry, name: str, decision: Decision) -> bool:
    return any(d.number == decision.number and d.done for d in registry.decisions(name))


def _overtaken(name: str, held: Version | None) -> ConcurrentPromotionError:
    now = f"version {held.number}" if held else "none"
    return ConcurrentPromotionError(
        f"the champion of {name!r} changed meanwhile: it is {now}",
        hint="promote again: it will be compared with that one",
    )
