"""Parsers of JSON, XML, YAML and CSV from untrusted sources.

In: bytes, and a name for them in messages. Out: plain values. Must not know what they mean.

Each of these raises one TesseraError: more bytes than the limit, too deep nesting, broken UTF-8; in
JSON NaN, Infinity and duplicate keys; in XML entities; in YAML aliases. YAML values are always
text.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from models.core.errors import TesseraError

MAX_XML_BYTES = 16 << 20
MAX_YAML_BYTES = 128 << 10
MAX_CSV_BYTES = 256 << 20
_MAX_DEPTH = 64
_XML_ENCODING = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([A-Za-z0-9._-]+)"
)
_ENCODINGS = re.compile(
    r"gbk|gb2312|gb18030|big5|shift_jis|euc-(jp|kr|cn)|cp(932|936|949|950|125[0-8])|"
    r"windows-125[0-8]|iso-8859-[0-9]{1,2}|koi8-[ru]",
    re.I,
)
"""Encodings of XML that Python reads for expat, which knows few."""


def read_json(data: bytes, where: str, limit: int) -> Any:
    """The value. A number too large for a float becomes infinite: callers check for that."""
    _check_size(data, where, limit)
    try:
        return json.loads(data, object_pairs_hook=_single, parse_constant=_refuse)
    except RecursionError:
        raise TesseraError(f"{where} can't be read: it is nested too deeply") from None
    except ValueError as error:  # also broken UTF-8 and numbers with thousands of digits
        raise TesseraError(f"{where} can't be read: {error}") from None


def _single(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("it has a duplicate key")
    return fields


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def is_number(value: object) -> bool:
    """Whether a JSON value is a float, or an integer that a float can represent exactly."""
    return type(value) is float or (type(value) is int and abs(value) < 1 << 53)


def read_xml(data: bytes, where: str, limit: int = MAX_XML_BYTES) -> Element:
    """The root element. Nothing is fetched: a DTD outside is passed over. Entities are refused.

    Expat with handlers rather than defusedxml, which limits neither depth nor size.
    """
    _check_size(data, where, limit)
    data, encoding = _decode_xml(data, where)
    builder, depth = TreeBuilder(), 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _MAX_DEPTH:
            raise TesseraError(f"{where} can't be read: it is nested too deeply")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def refuse(*_: object) -> None:
        raise TesseraError(
            f"{where} has an entity of a DTD, which is not allowed",
            hint="write its text in place of the entity",
        )

    parser = expat.ParserCreate(encoding)
    parser.EntityDeclHandler = parser.SkippedEntityHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(data, True)
        return builder.close()
    # An unknown encoding is a LookupError, a multi-byte one a ValueError.
    except (expat.ExpatError, LookupError, ValueError) as error:
        raise TesseraError(f"{where} can't be read: {error}") from None


def _decode_xml(data: bytes, where: str) -> tuple[bytes, str | None]:
    """The document, and its encoding if that isn't what the document says: UTF-8."""
    match = _XML_ENCODING.match(data)
    name = match[1].decode() if match else "utf-8"
    if _ENCODINGS.fullmatch(name):
        codec = "gb18030" if name.lower().startswith("gb") else name
        try:
            return data.decode(codec).encode(), "utf-8"
        except UnicodeDecodeError as error:
            raise TesseraError(f"{where} is not in its encoding, {name}: {error.reason}") from None
    if name.lower() in ("utf-8", "utf8") and data[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise TesseraError(
                f"{where} is not in the encoding UTF-8: byte {error.start}",
                hint='name its encoding in its first line: <?xml version="1.0" encoding="GBK"?>',
            ) from None
    return data, None


def read_yaml(data: bytes, where: str) -> Any:
    """The value, of dictionaries, lists and text: `no` is "no" and `1` is "1"."""
    import yaml

    _check_size(data, where, MAX_YAML_BYTES)
    try:
        depth = 0
        # Before anything is built: building takes time quadratic in the depth.
        for token in yaml.scan(data, yaml.BaseLoader):
            if isinstance(token, yaml.AliasToken):
                raise TesseraError(
                    f"{where} has an alias, which is not allowed", hint="repeat the value instead"
                )
            kind = type(token).__name__
            depth += kind.endswith("StartToken") - kind.endswith("EndToken")
            if depth > _MAX_DEPTH:
                raise TesseraError(f"{where} can't be read: it is nested too deeply")
        return yaml.load(data, yaml.BaseLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise TesseraError(f"{where} can't be read: {' '.join(str(error).split())}") from None


def read_csv(data: bytes, where: str, delimiter: str) -> Iterator[list[str]]:
    """The rows, with the header."""
    _check_size(data, where, MAX_CSV_BYTES)
    try:
        text = data.decode("utf-8-sig")
        yield from csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    except UnicodeDecodeError as error:
        raise TesseraError(f"{where} is not UTF-8: {error}", hint="save it as UTF-8") from None
    except csv.Error as error:
        raise TesseraError(f"{where} can't be read: {error}") from None


def _check_size(data: bytes, where: str, limit: int) -> None:
    if len(data) > limit:
        raise TesseraError(f"{where} is larger than {limit} bytes")
