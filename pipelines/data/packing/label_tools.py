"""Which tool wrote labels that no format reads, and what to export from it instead.

In: the label files of a folder. Out: the tool's name and an advice. Must not know formats.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_PEEK_BYTES = 1 << 16
_PEEK_FILES = 8


class LabelTool(NamedTuple):
    """A tool, the words that its files begin with (any of several groups), and what to do."""

    name: str
    words: tuple[tuple[str, ...], ...]
    advice: str


_TOOLS = (
    LabelTool(
        "VIA",
        (('"shape_attributes"', '"region_attributes"'), ("region_shape_attributes",), ('"_via_',)),
        "export it from VIA as COCO",
    ),
    LabelTool(
        "Supervisely", (('"classTitle"',), ('"geometryType"',)), "export the project as COCO"
    ),
    LabelTool(
        "Label Studio",
        (('"to_name"',), ('"annotator"', '"image"')),
        "export the project as COCO or YOLO, or as CSV if each image has one class",
    ),
    LabelTool(
        "FiftyOne",
        (('"samples"', '"filepath"'), ('"classes"', '"labels"')),
        "export it as COCODetectionDataset, or as ImageClassificationDirectoryTree for classes",
    ),
    LabelTool("Datumaro", (('"items"', '"label_id"'),), "convert it to COCO"),
    LabelTool("CreateML", (('"coordinates"', '"label"'),), "export it as COCO"),
    LabelTool("VoTT", (('"asset"', '"regions"'),), "export it as Pascal VOC"),
    LabelTool("V7 Darwin", (('"slots"', '"annotations"'),), "export it as COCO"),
    LabelTool("BDD100K or Scalabel", (('"box2d"',),), "convert it to COCO"),
    LabelTool("Labelbox", (('"data_row"',),), "convert it to COCO"),
)


def find_tool(folder: Path, labels: Iterable[str]) -> LabelTool | None:
    """The tool that wrote these files, judged by the first bytes of some of them."""
    for path in list(labels)[:_PEEK_FILES]:
        text = peek(folder / path)
        for tool in _TOOLS:
            if any(all(word in text for word in words) for words in tool.words):
                return tool
    return None


def could_be_coco(path: Path) -> bool:
    """Whether a JSON file has one of COCO's lists in its first bytes."""
    text = peek(path)
    return any(f'"{word}"' in text for word in ("images", "annotations", "categories"))


def peek(path: Path) -> str:
    """The first bytes of a file as text; empty if it can't be read."""
    try:
        with path.open("rb") as file:
            return file.read(_PEEK_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
