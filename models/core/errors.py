"""The one error that a user reads: one line with what is wrong, one with how to correct it.

The lowest module of all: every layer may raise it; only `jobs` prints it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# The errors below say that they are of this module. cloudpickle copies a class, in place of naming
# it, if the module that it says isn't loaded.
import tessera  # noqa: F401


class TesseraError(Exception):
    """An error that the user can act on. Never printed with a traceback.

    `exit_code` is 1 for "refused or failed" and 2 for "wrong usage". Messages may contain file
    names and keys from untrusted data, so characters that could control a terminal are written as
    \\x1b. Passwords of addresses are hidden.
    """

    __module__ = "tessera"  # where users find it: a traceback says tessera.TesseraError
    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message = hide_passwords(_printable(message))
        self.hint = hide_passwords(_printable(hint))
        super().__init__(self.message, self.hint)

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message

    def __reduce__(
        self,
    ) -> tuple[object, ...]:  # so that Ray can pickle it with its keyword arguments
        return (_rebuild, (type(self), self.message, self.hint))


class UsageError(TesseraError):
    """The command, a setting or an argument is wrong."""

    __module__ = "tessera"
    exit_code = 2


_USER = re.compile(r"(?<=://)[^/\s'\"@]*(?:@[^/\s'\"@]*)*@")
_SECRET = re.compile(
    r"([?&;][\w-]*(?:password|passwd|secret|token|signature|credential|accountkey)[\w-]*="
    r"|\b\w*(?:password|passwd|secret)\w*=)[^&;\s'\"]+",
    re.IGNORECASE,
)


def hide_passwords(text: str) -> str:
    """The text without user and password in its addresses (`s3://user:password@host`), and without
    the values of an address's parameters that are called password, secret, token, signature or
    credential."""
    if "://" not in text and "=" not in text:
        return text
    return _SECRET.sub(r"\1…", _USER.sub("", text))


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    shown = (c if c.isprintable() or c == "\n" else _escape(c) for c in text)
    return "".join(shown)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _rebuild(kind: type[TesseraError], message: str, hint: str) -> TesseraError:
    return kind(message, hint=hint)


def value_problem(message: str) -> str:
    """What pydantic says about a value, as the end of a sentence: without the "Value error, " that
    it puts before our own texts."""
    text = message.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def unknown(what: str, given: str, allowed: Iterable[str], *, see: str = "") -> UsageError:
    """An error for a name that doesn't exist, with the nearest one that does.

    Names may be dotted paths: `lr` is answered with `optim.model.lr`. `see` is a command that lists
    all names; with it they aren't listed in the hint.
    """
    names = sorted(allowed)
    found = nearest(given, names)
    listed = ", ".join(names) if len(names) <= 12 else ", ".join(names[:12]) + ", …"
    rest = f"see: {see}" if see else f"known: {listed}"
    if found is not None:
        rest = f"did you mean {found!r}? {rest[0].upper()}{rest[1:]}"
    return UsageError(f"unknown {what} {given!r}", hint=rest)


def nearest(given: str, names: Iterable[str]) -> str | None:
    """The name that `given` was probably meant to be, or None if none is similar.

    A path that ends with `given` comes first, then a similar path, then one with a similar end.
    """
    names = list(names)
    wanted = given.lower()
    end = wanted.replace("-", "_")
    ends = [name for name in names if name.lower().endswith(f".{end}")]
    if ends:
        return min(ends, key=lambda name: (name.count("."), name))
    lower = {name.lower(): name for name in reversed(names)}
    if near := difflib.get_close_matches(wanted, lower, n=1, cutoff=0.5):
        return lower[near[0]]
    by_end = {name.rpartition(".")[2].lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(end.rpartition(".")[2], by_end, n=1, cutoff=0.6)
    return by_end[near[0]] if near else None
