"""Every listed fault has a test that injects it, and a control that shows its effect without us.

    @pytest.mark.fault(1, 2)    the test injects these faults and checks the outcome
    @pytest.mark.control(1)     the same case without the check, or in another library

Both are found by reading the tests, not by running them. A failure names the faults that are left.
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
        6: "two remote shards with the same base name",
        7: "a duplicate key: adjacent, apart, in two shards",
        8: "a missing label, a missing image, an unknown member",
        9: "an error that is skipped at the end of a shard",
        10: "keys with paths, terminal escapes, invalid text or of great length",
        11: "links, pipes, devices and sparse members",
        12: "false sizes, and data that expands when decompressed",
        13: "pickles, whatever their file name",
        14: "addresses that start a shell or select another library",
        15: "uneven shards, fewer shards than readers, one sample in all",
        16: "any numbers of samples, readers and interruptions, and any batch size",
        17: "all ranks killed, and resumed with another number of ranks",
        18: "resumed with other readers; with another seed, batch or data",
        19: "the order of two epochs, of the same seed, of other ranks",
    },
    "images and labels": {
        20: "a bit of a PNG flipped",
        21: "images truncated anywhere",
        22: "images of a hundred million pixels and more in a few bytes",
        23: "EXIF orientations",
        24: "CMYK, palettes, transparency, 1 and 16 bits, grey images among colour images",
        25: "other formats with the name of an image, and appended data",
        26: "boxes that are not finite, without area, inverted, outside, as fractions",
        27: "labels too small, too large, of many digits, as words; other counts than boxes",
        28: "JSON with NaN, with a duplicate key, very deep, empty",
        29: "an image without an annotation",
        30: "classes that train lacks, a single one, classes in another order",
        31: "the same image, or nearly, on both sides of a split",
    },
    "model, registry, promotion": {
        45: "files of a version swapped after it was registered",
        46: "a model or a checkpoint with a pickle in it",
        47: "two promotions at once, also when no alias exists yet",
        48: "a candidate not evaluated, on other data, of other classes, of a deleted run, from elsewhere",
        49: "a process that dies between any two steps of a promotion",
        50: "rolled back twice; the champion deleted",
    },
}
KNOWN = {number: text for section in FAULTS.values() for number, text in section.items()}
WITHOUT_CONTROL: dict[int, str] = {}
"""Faults for which a control makes no sense, and why."""
Marks = dict[str, dict[int, list[str]]]


def read_marks(source: str, where: str) -> Iterator[tuple[str, int, str]]:
    """(mark, number of the fault, test) of each fault that a test's marks name."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for mark in node.decorator_list:
            called = ast.unparse(mark).partition("(")
            kind = called[0].removeprefix("pytest.mark.")
            if kind in ("fault", "control"):
                assert isinstance(mark, ast.Call), f"{where}, {node.name}: {kind} of no fault"
                assert mark.args, f"{where}, {node.name}: {kind} of no fault"
                assert node.name.startswith("test_"), f"{where}: {node.name} is no test"
                for number in map(ast.literal_eval, mark.args):
                    assert number in KNOWN, f"{where}, {node.name}: there is no fault {number}"
                    yield kind, number, f"{where}: {node.name}"


@pytest.fixture(scope="module")
def marks() -> Marks:
    found: Marks = {"fault": defaultdict(list), "control": defaultdict(list)}
    for path in sorted(TESTS.rglob("test_*.py")):
        for kind, number, test in read_marks(path.read_text(), str(path.relative_to(TESTS))):
            found[kind][number].append(test)
    return found


def left(found: dict[int, list[str]]) -> list[str]:
    return [f"{number}: {text}" for number, text in KNOWN.items() if not found.get(number)]


def test_every_fault_is_injected(marks: Marks) -> None:
    assert not left(marks["fault"])


def test_every_fault_has_a_control_or_a_reason_why_not(marks: Marks) -> None:
    assert not left({**marks["control"], **{n: [why] for n, why in WITHOUT_CONTROL.items() if why}})
    assert not WITHOUT_CONTROL.keys() & marks["control"].keys(), "it has a control after all"


def test_a_fault_without_a_test_is_reported() -> None:
    """The control of the two above: a mark counts only on a test, and only for what it names."""
    source = "@pytest.mark.fault(1, 2)\n@pytest.mark.slow\ndef test_it(): ...\n"
    found: dict[int, list[str]] = defaultdict(list)
    for _, number, test in read_marks(source, "x.py"):
        found[number].append(test)
    assert found == {1: ["x.py: test_it"], 2: ["x.py: test_it"]}
    assert [line.partition(":")[0] for line in left(found)] == [str(n) for n in KNOWN if n > 2]
    for wrong in ("fault(99)", "fault()", "control"):
        with pytest.raises(AssertionError, match="fault"):
            list(read_marks(f"@pytest.mark.{wrong}\ndef test_it(): ...\n", "x.py"))
    with pytest.raises(AssertionError, match="no test"):
        list(read_marks("@pytest.mark.fault(1)\ndef helper(): ...\n", "x.py"))


def test_each_fault_has_a_number_of_its_own() -> None:
    numbers = [number for section in FAULTS.values() for number in section]
    assert numbers == sorted(set(numbers))
