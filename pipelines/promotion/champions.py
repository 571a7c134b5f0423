"""Which version is the champion: one alias, moved by decisions, of which no two can both count.

In: a registry, and the champion that a decision was made against. Out: the alias, moved, or
`ConcurrentPromotionError`. Must not know why a version is promoted.

A registry sets an alias for any client, without checking its old value. So each decision is first
appended to the model's record, with the number of the decision that it is based on (`base`). The
registry numbers the entries, and this order is the only truth: an entry counts if its base is the
last entry that counted before it. Then the alias moves, and the entry is marked done.

Two clients promote at once; version 1 is champion by decision 1:

    client A                        client B                        record                alias
    reads: champion 1, base 1       reads: champion 1, base 1       1                     1
    appends "2 replaces 1, base 1"                                  1, 2(A)               1
                                    appends "3 replaces 1, base 1"  1, 2(A), 3(B)         1
    reads: entry 2 counts                                           1, 2(A), 3(B)         1
    is killed                                                       1, 2(A), 3(B)         1
                                    reads: entry 3 has base 1, but  1, 2(A), 3(B)         1
                                    2 was the last that counted:
                                    it lost. Finishes entry 2:      1, 2(A) done, 3(B)    2
                                    sets the alias, marks it done
                                    raises ConcurrentPromotionError

So an interruption at any step leaves the old champion or the new one, and the next client that
reads the state finishes what was interrupted.
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
    """The champion, and the number of the decision that made it champion; 0 if there is none."""

    champion: Version | None
    base: int


class ConcurrentPromotionError(TesseraError):
    """Another decision was recorded first."""


def effective(decisions: Sequence[Decision]) -> list[Decision]:
    """The decisions that count, in their order."""
    chain: list[Decision] = []
    for decision in sorted(decisions, key=lambda one: one.number):
        base = chain[-1].number if chain else 0
        # A client that lost the response appends its decision twice. The second entry has the
        # base of the first one, which no longer is the last that counted.
        if decision.base == base:
            chain.append(decision)
    return chain


def read_state(registry: Registry, name: str) -> ChampionState:
    """Returns the current champion. First finishes a decision that counts and isn't done."""
    chain = effective(registry.decisions(name))
    if chain and not chain[-1].done:
        _finish(registry, name, chain[-1])
    return ChampionState(current_champion(registry, name), chain[-1].number if chain else 0)


def current_champion(registry: Registry, name: str) -> Version | None:
    """The version that has the alias in the registry."""
    for version in registry.versions(name):
        if CHAMPION in version.aliases:
            return version
    return None


def move(registry: Registry, name: str, state: ChampionState, to: Version, *, kind: str) -> None:
    """Makes `to` the champion. `kind` is "promotion" or "rollback".

    Raises ConcurrentPromotionError if the champion is no longer that of `state`.
    """
    before = state.champion.number if state.champion else None
    champion = current_champion(registry, name)
    if (champion.number if champion else None) != before:
        raise _concurrent(name, champion)
    token = secrets.token_hex(8)
    registry.decide(name, Decision(0, state.base, to.number, before, kind, token))
    chain = effective(registry.decisions(name))
    own = next((one for one in chain if one.token == token), None)
    if own is None:
        _finish(registry, name, chain[-1])
        raise _concurrent(name, current_champion(registry, name))
    _finish(registry, name, own)


def predecessor(registry: Registry, name: str, champion: int) -> int | None:
    """The version that the newest promotion of `champion` replaced; None if it was the first."""
    for decision in reversed(effective(registry.decisions(name))):
        if decision.target == champion and decision.kind == "promotion":
            return decision.before
    return None


def _finish(registry: Registry, name: str, decision: Decision) -> None:
    known = {version.number for version in registry.versions(name)}
    if decision.target in known and not _is_done(registry, name, decision):
        registry.alias(name, CHAMPION, decision.target)
    registry.done(name, decision)
    # If another client has decided since then and moved the alias first, ours has just undone that.
    last = effective(registry.decisions(name))[-1]
    if last.number != decision.number and last.target in known:
        registry.alias(name, CHAMPION, last.target)


def _is_done(registry: Registry, name: str, decision: Decision) -> bool:
    return any(d.number == decision.number and d.done for d in registry.decisions(name))


def _concurrent(name: str, champion: Version | None) -> ConcurrentPromotionError:
    now = f"version {champion.number}" if champion else "none"
    return ConcurrentPromotionError(
        f"the champion of {name!r} changed during the evaluation: it is {now}",
        hint="promote again: the candidate will be compared with the new champion",
    )
