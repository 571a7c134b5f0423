"""Which tool wrote labels that no format reads, and what to export from it instead.

In: the label files of a folder. Out: the tool's name and an advice. Must not know formats.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pipelines.data.importers.support.json_peek import read_ends

_PEEK_FILES = 8


class LabelTool(NamedTuple):
    """A tool and what to do with its labels. A file is the tool's if its first bytes have all texts
    of one of the groups in `words`."""

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
        text = _text(folder / path)
        for tool in _TOOLS:
            if any(all(word in text for word in words) for words in tool.words):
                return tool
    return None


def could_be_coco(path: Path) -> bool:
    """Whether a JSON file has one of COCO's lists in its first bytes."""
    text = _text(path)
    return any(f'"{word}"' in text for word in ("images", "annotations", "categories"))


def _text(path: Path) -> str:
    """The first bytes of a file as text; empty if it can't be read."""
    return read_ends(path)[0].decode("utf-8", "replace")
