"""Every listed fault has a test that injects it, and a control that shows its effect otherwise.

    @pytest.mark.fault(1, 2)    the test injects these faults and checks the outcome
    @pytest.mark.control(1)     the same case without the check, or in another library

The marks are read from the source of the tests, which are not run. A failure lists the faults
without a test.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FAULTS = {
    "data": {
        1: "a shard truncated at a member's boundary, in a header, in the data",
        2: "a header byte flipped, zeros in the middle of a shard",
        3: "a bit of a JPEG in a shard flipped",
        4: "a shard that is empty, an error page, missing, or a tar without members",
        5: "a remote body truncated, 503, 404, silence, a slow drip",
        6: "two remote shards with the same file name",
        7: "a duplicate key: adjacent, apart, in two shards",
        8: "a missing label, a missing image, an unknown member",
        9: "an error skipped at the end of a shard",
        10: "keys with paths, terminal escapes, invalid text or of great length",
        11: "links, pipes, devices and sparse members",
        12: "wrong sizes, and data that expands when decompressed",
        13: "pickles, whatever their file name",
        14: "addresses that start a shell or select another library",
        15: "uneven shards, fewer shards than readers, a single sample",
        16: "any number of samples, readers and interruptions, any batch size",
        17: "all ranks killed, and resumed with another number of ranks",
        18: "resumed with other readers; with another seed, batch or data",
        19: "the order of two epochs, of the same seed, of other ranks",
    },
    "images and labels": {
        20: "a bit of a PNG flipped",
        21: "images truncated anywhere",
        22: "images of a hundred million pixels and more in a few bytes",
        23: "EXIF orientations",
        24: "CMYK, palettes, transparency, 1 and 16 bits, grey and colour images mixed",
        25: "other formats with the extension of an image, and appended data",
        26: "boxes that are not finite, without area, inverted, outside the image, normalised",
        27: "labels too small, too large, of many digits, as words; other counts than boxes",
        28: "JSON with NaN, with a duplicate key, very deep, empty",
        29: "an image without an annotation",
        30: "classes missing in train, a single class, classes in another order",
        31: "the same image, or a near duplicate, in two splits",
    },
    "training": {
        32: "a worker killed at any moment",
        33: "a worker that is stopped",
        34: "a worker that is told to end, as on a spot machine",
        35: "the machine of the driver lost",
        36: "a checkpoint whose upload dies after any file",
        37: "the newest checkpoint truncated, changed, missing, empty",
        38: "a disk that is full at a checkpoint",
        39: "a loss that is not finite",
        40: "memory that is too small for a step",
        41: "a worker that is three times slower than the others",
        42: "MLflow down during a training",
        43: "the object store down during a training",
    },
    "model, registry, promotion": {
        45: "files of a registered version replaced",
        46: "a model or a checkpoint with a pickle in it",
        47: "two promotions at once, also when no alias exists yet",
        48: "a candidate not evaluated, on other data, with other classes, of a deleted run, with a"
        " foreign source",
        49: "a process that dies between any two steps of a promotion",
        50: "rolled back twice; the champion deleted",
    },
    "deployment": {
        55: "a secret that is unset or empty; a secret in a file, a log or a process list",
        56: "ports that are reached from elsewhere without being meant to",
        57: "Ray asked without a token or with a wrong one, on each of its ports",
        58: "MLflow asked without a login, by a foreign host or page, for another user's files",
    },
}
KNOWN = {number: text for section in FAULTS.values() for number, text in section.items()}
WITHOUT_CONTROL: dict[int, str] = {}
"""Faults for which a control makes no sense, and why."""
Marks = dict[str, dict[int, list[str]]]


def read_marks(source: str, where: str) -> Iterator[tuple[str, int, str]]:
    """Yields (mark, number of the fault, test) for each fault in the marks of the tests."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for mark in node.decorator_list:
            called = ast.unparse(mark).partition("(")
            kind = called[0].removeprefix("pytest.mark.")
            if kind in ("fault", "control"):
                assert isinstance(mark, ast.Call), (
                    f"{where}, {node.name}: {kind} needs the number of a fault"
                )
                assert mark.args, f"{where}, {node.name}: {kind} needs the number of a fault"
                assert node.name.startswith("test_"), f"{where}: {node.name} is not a test"
                for number in map(ast.literal_eval, mark.args):
                    assert number in KNOWN, f"{where}, {node.name}: there is no fault {number}"
                    yield kind, number, f"{where}: {node.name}"


@pytest.fixture(scope="module")
def marks() -> Marks:
    result: Marks = {"fault": defaultdict(list), "control": defaultdict(list)}
    for path in sorted(TESTS.rglob("test_*.py")):
        for kind, number, test in read_marks(path.read_text(), str(path.relative_to(TESTS))):
            result[kind][number].append(test)
    return result


def missing(tests: dict[int, list[str]]) -> list[str]:
    return [f"{number}: {text}" for number, text in KNOWN.items() if not tests.get(number)]


def test_every_fault_is_injected(marks: Marks) -> None:
    assert not missing(marks["fault"])


def test_every_fault_has_a_control_or_a_reason_for_having_none(marks: Marks) -> None:
    assert not missing(
        {**marks["control"], **{n: [why] for n, why in WITHOUT_CONTROL.items() if why}}
    )
    assert not WITHOUT_CONTROL.keys() & marks["control"].keys(), "a fault without a control has one"


def test_a_fault_without_a_test_is_reported() -> None:
    """Control of the two tests above: a mark counts only on a test, and only for its numbers."""
    source = "@pytest.mark.fault(1, 2)\n@pytest.mark.slow\ndef test_it(): ...\n"
    tests: dict[int, list[str]] = defaultdict(list)
    for _, number, test in read_marks(source, "x.py"):
        tests[number].append(test)
    assert tests == {1: ["x.py: test_it"], 2: ["x.py: test_it"]}
    assert [line.partition(":")[0] for line in missing(tests)] == [str(n) for n in KNOWN if n > 2]
    for wrong in ("fault(99)", "fault()", "control"):
        with pytest.raises(AssertionError, match="fault"):
            list(read_marks(f"@pytest.mark.{wrong}\ndef test_it(): ...\n", "x.py"))
    with pytest.raises(AssertionError, match="is not a test"):
        list(read_marks("@pytest.mark.fault(1)\ndef helper(): ...\n", "x.py"))


def test_fault_numbers_are_unique_and_ascending() -> None:
    numbers = [number for section in FAULTS.values() for number in section]
    assert numbers == sorted(set(numbers))
