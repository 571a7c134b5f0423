"""Safe parsers of text formats; each control shows what an ordinary parser does."""

from __future__ import annotations

import json
import math
import resource
from xml.etree import ElementTree

import pytest
import yaml

from models.core.errors import TesseraError
from pipelines.data.safe_parsers import is_number, read_csv, read_json, read_xml, read_yaml

BOMB = b"<!DOCTYPE a [<!ENTITY a0 'ha'>%s]><a>&a9;</a>" % b"".join(
    b"<!ENTITY a%d '%s'>" % (n, b"&a%d;" % (n - 1) * 4) for n in range(1, 10)
)


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"NaN",
        b"[-Infinity]",
        b'{"a":1,"a":2}',
        b'[{"a":{"b":1,"b":1}}]',
        b"\xff",
        b"1" * 5000,
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"[" * 200_000 + b"]" * 200_000,
    ],
)
def test_invalid_json_is_refused(data: bytes) -> None:
    with pytest.raises(TesseraError, match=r"^x\.json can't be read"):
        read_json(data, "x.json", 1 << 20)


def test_json_has_a_size_limit_and_plain_values_are_read() -> None:
    assert read_json(b'{"a":[1,2.5,null]}', "x", 100) == {"a": [1, 2.5, None]}
    with pytest.raises(TesseraError, match="larger than 10 bytes"):
        read_json(b" " * 11, "x", 10)


@pytest.mark.control(28)
def test_the_json_library_accepts_what_is_refused_here() -> None:
    assert json.loads('{"a":1,"a":2}') == {"a": 2}
    assert math.isnan(json.loads("NaN"))
    with pytest.raises(RecursionError):
        json.loads("[" * 200_000)


def test_only_numbers_that_a_float_represents_are_accepted() -> None:
    assert [is_number(v) for v in (1, 1.5, -3, 1 << 52, True, "1", None, 1 << 53)] == [
        *[True] * 4,
        *[False] * 4,
    ]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<a>",
        b"<a></b>",
        b"<a>\xff</a>",
        b"<a>&nbsp;</a>",
        b"<?xml version='1.0' encoding='nowhere'?><a/>",
        b"<?xml version='1.0' encoding='utf-7'?><a/>",
        b"<!DOCTYPE a SYSTEM 'file:///etc/passwd'><a>&x;</a>",
        b"<!DOCTYPE a SYSTEM 'x.dtd' [<!ENTITY % p SYSTEM 'y.dtd'> %p;]><a/>",
        b"<?xml version='1.0' encoding='GBK'?><a>\xff\xff</a>",
        b"<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/hostname'>]><a>&x;</a>",
        BOMB,
        b"<a>" * 65,
        b"<a>" * 200_000,
    ],
)
def test_invalid_xml_and_entities_are_refused(data: bytes) -> None:
    with pytest.raises(TesseraError, match=r"^x\.xml (can't be read|has an entity|is not in)"):
        read_xml(data, "x.xml")


@pytest.mark.parametrize("encoding", ["GBK", "gb2312", "Big5", "Shift_JIS", "euc-kr", "UTF-16"])
def test_xml_in_the_encoding_that_it_names_is_read(encoding: str) -> None:
    text = "漢" if encoding != "gb2312" else "汉"
    data = f"<?xml version='1.0' encoding='{encoding}'?><a>{text}</a>".encode(encoding)
    assert read_xml(data, "x.xml").text == text


@pytest.mark.parametrize(
    "head",
    [
        "",
        "<!DOCTYPE a>",
        "<!DOCTYPE a SYSTEM 'file:///etc/passwd'>",
        "<!DOCTYPE a [<!ELEMENT a ANY>]>",
    ],
)
def test_a_dtd_is_passed_over(head: str) -> None:
    assert read_xml(f"{head}<a>x</a>".encode(), "x.xml").text == "x"


def test_plain_xml_is_read_and_the_standard_parser_expands_the_bomb() -> None:
    root = read_xml("<a b='1'><c>\u00e9&lt;</c><c/></a>".encode(), "x.xml")
    assert (root.tag, root.get("b"), root.findtext("c"), len(root)) == ("a", "1", "\u00e9<", 2)
    assert len(ElementTree.fromstring(BOMB).text or "") == 2 * 4**9


@pytest.mark.parametrize(
    "data",
    [
        b"a: [",
        b"a: &x [1]\nb: *x",
        b"\xff\xfe\xff",
        b"a: \x00",
        b"[" * 100_000,
        b"- " * 50_000,
        b"{a: " * 30_000,
        b"? {a: b}\n: c",
        b"!!python/object/apply:os.system [echo]: ["  # no tag is looked at, and this is no YAML
        b"x" * (130 << 10),
    ],
)
def test_invalid_yaml_and_aliases_are_refused(data: bytes) -> None:
    with pytest.raises(TesseraError, match=r"^x\.yaml (can't be read|has an alias|is larger)"):
        read_yaml(data, "x.yaml")


def test_yaml_is_text_only() -> None:
    """A class named no stays "no"; yaml.safe_load returns False."""
    data = b"names: {0: no, 1: 1e3, 2: 2001-01-01}"
    assert read_yaml(data, "x") == {"names": {"0": "no", "1": "1e3", "2": "2001-01-01"}}
    assert yaml.safe_load(data)["names"][0] is False


def test_yaml_tags_create_no_objects(tmp_path: object) -> None:
    assert read_yaml(b"a: !!python/object/apply:os.getpid []", "x") == {"a": []}


@pytest.mark.parametrize("data", [b'a,"b', b"a,\xff", b'"a"b,c', b"a" * 200_000])
def test_invalid_csv_is_refused(data: bytes) -> None:
    with pytest.raises(TesseraError, match=r"^x\.csv (can't be read|is not UTF-8)"):
        list(read_csv(data, "x.csv", ","))


def test_csv_can_have_quotes_and_a_byte_order_mark() -> None:
    rows = list(read_csv(b'\xef\xbb\xbfa;b\r\n"1;\n2";3\r\n', "x", ";"))
    assert rows == [["a", "b"], ["1;\n2", "3"]]


def test_bombs_need_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (BOMB, b"[" * 1_000_000, b"<a>" * 1_000_000):
        for read in (read_xml, lambda d, w: read_json(d, w, 1 << 24)):
            with pytest.raises(TesseraError):
                read(data, "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10
