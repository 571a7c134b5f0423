"""Lists of classes beside masks: their colours or numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.data.importers.support.mask_tables import find_class_list

ROAD, SKY = ("road", 0x804080), ("sky", 0x4682B4)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("class_dict.csv", "name,r,g,b\r\nroad,128,64,128\r\nsky, 70,130,180\r\n"),
        ("class_dict.csv", "\ufeffroad,128,64,128\nsky,70,130,180"),
        ("label_colors.txt", "128 64 128\t\troad\n70 130 180\t\tsky\n"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nroad:128,64,128::\nsky:70,130,180::\n"),
    ],
)
def test_colours_are_read(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / name).write_text(content, encoding="utf-8")
    found = find_class_list([tmp_path, tmp_path / "inner"])
    assert found is not None
    assert (found.colours, found.names) == ((ROAD, SKY), ("road", "sky"))
    assert found.file == tmp_path / "inner" / name
    assert find_class_list([tmp_path]) is None


def test_codes_are_names_by_number(tmp_path: Path) -> None:
    (tmp_path / "codes.txt").write_text("road\n\nsky\n")
    found = find_class_list([tmp_path])
    assert found is not None
    assert (found.colours, found.names) == ((), ("road", "sky"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("sky,70,130", "line 3: 'sky,70,130' is not a class"),
        ("sky,70,130,256", "line 3"),
        ("road,1,2,3", "has a name twice"),
        ("sky,128,64,128", "has a colour twice"),
    ],
)
def test_invalid_lists_are_refused(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "class_dict.csv").write_text(f"name,r,g,b\nroad,128,64,128\n{row}\n")
    with pytest.raises(TesseraError, match=message):
        find_class_list([tmp_path])
