"""JSON, XML, YAML and CSV from anywhere, read without what makes them dangerous.

In: bytes, and what to call them. Out: plain values. Must not know what they mean. Refused, each as
one TesseraError: more bytes than the limit, endless depth, broken UTF-8; in JSON NaN, Infinity and
a key that is there twice; in XML a DTD and entities; in YAML aliases, and no value is anything but
text.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from models.core.errors import TesseraError

MAX_XML_BYTES = 16 << 20
MAX_YAML_BYTES = 128 << 10
MAX_CSV_BYTES = 256 << 20
_MAX_DEPTH = 64


def read_json(data: bytes, where: str, limit: int) -> Any:
    """The value. Numbers too large for a float are infinite: whoever takes floats looks."""
    _check_size(data, where, limit)
    try:
        return json.loads(data, object_pairs_hook=_single, parse_constant=_refuse)
    except RecursionError:
        raise TesseraError(f"{where} can't be read: it is too deep") from None
    except ValueError as error:  # also broken UTF-8, and numbers of thousands of digits
        raise TesseraError(f"{where} can't be read: {error}") from None


def _single(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key is there twice")
    return fields


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")


def is_number(value: object) -> bool:
    """Whether a value of JSON is a number that a float holds exactly, or a float."""
    return type(value) is float or (type(value) is int and abs(value) < 1 << 53)


def read_xml(data: bytes, where: str) -> Element:
    """The root element. Nothing is fetched, and no entity stands for anything."""
    _check_size(data, where, MAX_XML_BYTES)
    builder, depth = TreeBuilder(), 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _MAX_DEPTH:
            raise TesseraError(f"{where} can't be read: it is too deep")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def refuse(*_: object) -> None:
        raise TesseraError(f"{where} has a DTD, which is refused", hint="remove its DOCTYPE")

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(data, True)
        return builder.close()
    # An encoding that nobody knows is a LookupError, one of several bytes a ValueError.
    except (expat.ExpatError, LookupError, ValueError) as error:
        raise TesseraError(f"{where} can't be read: {error}") from None


def read_yaml(data: bytes, where: str) -> Any:
    """The value, made of dictionaries, lists and text: `no` is "no" and `1` is "1"."""
    import yaml

    _check_size(data, where, MAX_YAML_BYTES)
    try:
        depth = 0
        # Before anything is built: the time goes with the square of the depth.
        for token in yaml.scan(data, yaml.BaseLoader):
            if isinstance(token, yaml.AliasToken):
                raise TesseraError(f"{where} has an alias, which is refused", hint="write it out")
            kind = type(token).__name__
            depth += kind.endswith("StartToken") - kind.endswith("EndToken")
            if depth > _MAX_DEPTH:
                raise TesseraError(f"{where} can't be read: it is too deep")
        return yaml.load(data, yaml.BaseLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise TesseraError(f"{where} can't be read: {' '.join(str(error).split())}") from None


def read_csv(data: bytes, where: str, delimiter: str) -> Iterator[list[str]]:
    """The rows, the header too."""
    _check_size(data, where, MAX_CSV_BYTES)
    try:
        text = data.decode("utf-8-sig")
        yield from csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    except UnicodeDecodeError as error:
        raise TesseraError(f"{where} is no UTF-8: {error}", hint="save it as UTF-8") from None
    except csv.Error as error:
        raise TesseraError(f"{where} can't be read: {error}") from None


def _check_size(data: bytes, where: str, limit: int) -> None:
    if len(data) > limit:
        raise TesseraError(f"{where} is larger than {limit} bytes")
