"""Labels of tools that no format reads lead to an export that one reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.packing.formats import recognise
from pipelines.data.sources import AmbiguousError

EXPORTS: dict[str, Any] = {
    "VIA": {
        "0.png1": {
            "filename": "0.png",
            "regions": [{"shape_attributes": {"name": "rect"}, "region_attributes": {}}],
        }
    },
    "Supervisely": {"tags": [], "objects": [{"classTitle": "cat", "geometryType": "rectangle"}]},
    "Label Studio": [{"data": {"image": "/data/upload/1/0.png"}, "result": [{"to_name": "image"}]}],
    "FiftyOne": {"classes": ["cat"], "labels": {"0": 0}},
    "Datumaro": {"items": [{"id": "0", "annotations": [{"label_id": 0}]}]},
    "CreateML": [{"image": "0.png", "annotations": [{"label": "a", "coordinates": {"x": 1}}]}],
    "VoTT": {"assets": {"0": {"asset": {"name": "0.png"}, "regions": []}}},
    "V7 Darwin": {"item": {"slots": []}, "annotations": []},
    "BDD100K or Scalabel": [{"name": "0.png", "labels": [{"box2d": {"x1": 1}}]}],
}


@pytest.mark.parametrize("tool", EXPORTS)
def test_a_tool_is_named_with_what_to_export(
    tmp_path: Path, make_image: Callable[..., Path], tool: str
) -> None:
    make_image(tmp_path / "set" / "img" / "0.png")
    (tmp_path / "set" / "labels.json").write_text(json.dumps(EXPORTS[tool]))
    with pytest.raises(AmbiguousError, match=f"it looks like an export of {tool}; .*") as caught:
        recognise(str(tmp_path / "set"))
    assert [reading.format for reading in caught.value.readings] == ["images"]


def test_coco_is_offered_for_the_file_that_could_be_it(
    tmp_path: Path, make_image: Callable[..., Path]
) -> None:
    make_image(tmp_path / "set" / "img" / "0.png")
    (tmp_path / "set" / "a.json").write_text('{"author": "me"}')
    (tmp_path / "set" / "b.json").write_text('{"images": "in another file"}')
    with pytest.raises(AmbiguousError, match=r"which no format recognises as labels\.") as caught:
        recognise(str(tmp_path / "set"))
    assert [reading.options for reading in caught.value.readings] == [{"train": "b.json"}, {}]
