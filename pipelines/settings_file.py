"""The one reader of files and texts with settings that a user wrote: recipes, spaces, policies.

In: a YAML or JSON file, or a text of one. Out: plain values: mappings whose keys are text, lists,
text, numbers, booleans and None. Must not know what they mean.

Each of these is a UsageError in one line, within a second: a file that is no file, is too large or
isn't UTF-8; nesting or repetition by aliases without end; a duplicate key or one that isn't text;
a tag. A date stays text, and so does 2:8, which YAML 1.1 reads as 128.
"""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from models.core.errors import UsageError

MAX_BYTES = 256 << 10
MAX_VALUES = 20_000
"""Keys, values and lists of a file, each alias counted with all that it repeats."""
MAX_DEPTH = 32
_TAGS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("str", "int", "float", "bool", "null", "map", "seq", "merge")
}


def read(path: Path, what: str, *, example: str = "", may_be_empty: bool = False) -> dict[str, Any]:
    """The mapping in a file. `what` it is, as in "recipe", and `example`, a line of such a file,
    are for messages. Raises UsageError if the file isn't one."""
    name = f"{what} {path}"
    try:
        if not path.is_file():
            path.stat()  # raises if there is nothing
            raise UsageError(f"{name} can't be read: it is not a file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{name} can't be read: {reason}") from None
    kind = "JSON" if path.suffix == ".json" else "YAML"
    tree = _parse(data, kind, name)
    if tree is None and may_be_empty:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(
            f"{name} is not a mapping of settings: it is {_kind(tree)}",
            hint=f"write lines like: {example}" if example else "",
        )
    return tree


def parse(text: str, what: str) -> Any:
    """The value of a text in YAML, such as the one of `--set`. Raises UsageError if it has none."""
    return _parse(text.encode(errors="surrogateescape"), "YAML", what)


def short(value: Any) -> str:
    """A value for a message, cut where it is long or nested."""
    return _short.repr(value)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlist = _short.maxdict = _short.maxtuple = 6


def _kind(value: Any) -> str:
    return {dict: "a mapping", list: "a list", type(None): "empty"}.get(type(value), short(value))


def _parse(data: bytes, kind: str, name: str) -> Any:
    if len(data) > MAX_BYTES:
        raise UsageError(f"{name} is not valid {kind}: it has more than {MAX_BYTES:,} bytes")
    try:
        text = data.decode("utf-8-sig")
        return _read_json(text) if kind == "JSON" else _read_yaml(text)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not valid {kind}: byte {error.start} is not UTF-8", hint="save it as UTF-8"
        ) from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UsageError(f"{name} is not valid {kind}: {line}{error.problem}") from None
    except RecursionError:
        raise UsageError(f"{name} is not valid {kind}: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # also a number with thousands of digits
        line = " ".join(str(error).split())[:200]
        raise UsageError(f"{name} is not valid {kind}: {line}") from None


def _read_json(text: str) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        if len(tree) != len(pairs):
            raise ValueError("it has a duplicate key")
        return tree

    def constant(word: str) -> Any:
        raise ValueError(f"{word} is not a JSON number")

    tree = json.loads(text, object_pairs_hook=mapping, parse_constant=constant)
    level, depth = [tree], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [
            v
            for values in inner
            if not isinstance(values, str | int | float | None)
            for v in values
        ]
    return tree


class _YamlError(yaml.MarkedYAMLError):
    """A problem at a place of the file."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem=problem, problem_mark=mark)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML 1.1 without dates and without numbers of base 60."""

    yaml_implicit_resolvers = {
        first: [
            ("tag:yaml.org,2002:str", re.compile(r"[-+]?[\d_]+(?::[\d.]+)+$")),
            *(pair for pair in resolvers if not pair[0].endswith("timestamp")),
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _read_yaml(text: str) -> Any:
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):  # before anything is built
        kind = type(event)
        depth += (kind in (yaml.SequenceStartEvent, yaml.MappingStartEvent)) - (
            kind in (yaml.SequenceEndEvent, yaml.MappingEndEvent)
        )
        if depth > MAX_DEPTH or count > 2 * MAX_VALUES:
            raise _YamlError(
                "it is nested too deeply" if depth > MAX_DEPTH else "it has too many values",
                event.start_mark,
            )
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _measure(node: Node, known: dict[int, int]) -> int:
    """The number of values that a node stands for. Raises MarkedYAMLError for one that can't be
    built, or that is too large."""

    def refuse(problem: str, where: Node = node) -> None:
        raise _YamlError(problem, where.start_mark)

    if id(node) in known:
        if not known[id(node)]:
            refuse("an alias contains itself")
        return known[id(node)]
    if node.tag not in _TAGS:
        refuse(f"the tag {short(node.tag)} is not allowed")
    known[id(node)] = 0
    children: list[Node] = []
    if isinstance(node, MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if not (isinstance(key, ScalarNode) and key.tag.endswith((":str", ":merge"))):
                refuse(f"the key {short(getattr(key, 'value', '…'))} is not text", key)
            if key.value in keys:
                refuse(f"the key {short(key.value)} is there twice", key)
            keys.add(key.value)
            children += [key, value]
    elif not isinstance(node, ScalarNode):
        children = node.value
    size = 1 + sum(_measure(child, known) for child in children)
    if size > MAX_VALUES:
        refuse("it has too many values, with those that aliases repeat")
    known[id(node)] = size
    return size
