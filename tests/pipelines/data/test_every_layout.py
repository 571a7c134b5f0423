"""Each layout in docs/layouts.md is built, packed and compared with what it should become.

`UPDATE_LAYOUTS=1 pytest tests/pipelines/data/test_every_layout.py -k table` writes the table.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from layouts import boxes, folders, pixels, tables
from layouts.base import Layout

from models.core.errors import TesseraError
from pipelines.data.card import Card
from pipelines.data.packing.pack import pack

PAGE = Path(__file__).parents[3] / "docs" / "layouts.md"
SECTIONS = {
    "Classes, and images without labels": folders.LAYOUTS,
    "Tables of images": tables.LAYOUTS,
    "Boxes and polygons": boxes.LAYOUTS,
    "Masks, and images": pixels.LAYOUTS,
}
LAYOUTS = [layout for layouts in SECTIONS.values() for layout in layouts]


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_is_packed_as_the_docs_say(tmp_path: Path, layout: Layout) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    layout.build(folder)
    source, to = str(folder / layout.inside), tmp_path / "packed"
    if layout.refused:
        with pytest.raises(TesseraError) as caught:
            _pack(layout, source, to)
        assert re.search(layout.refused, f"{caught.value.message}. {caught.value.hint}", re.S)
        return
    card = _pack(layout, source, to)
    assert (card.task, card.classes) == (layout.task, layout.classes)
    assert {name: split.samples for name, split in card.splits.items()} == layout.samples
    assert card.rejected == 0
    if layout.objects is not None:
        counts = [split.class_counts or {} for split in card.splits.values()]
        assert sum(sum(count.values()) for count in counts) == layout.objects


def _pack(layout: Layout, source: str, to: Path) -> Card:
    return pack(source, to, format=layout.format, options=layout.options, allow_unused=layout.allow)


def test_the_table_in_the_docs_has_these_layouts() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)
    text = PAGE.read_text()
    head = text[: text.index("\n## ")]
    parts = [head]
    for title, layouts in SECTIONS.items():
        if layouts:
            rows = [layout.row() for layout in layouts]
            table = ["| layout | exported by | task | how |", "|---|---|---|---|", *rows]
            parts.append(f"\n## {title}\n\n" + "\n".join(table) + "\n")
    page = "".join(parts)
    if os.environ.get("UPDATE_LAYOUTS"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page
