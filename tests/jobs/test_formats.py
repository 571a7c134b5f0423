"""`tessera formats`: every format with its options."""

from __future__ import annotations

import json

from cli_runner import Call


def test_formats(call: Call) -> None:
    rows = json.loads(call("formats", "--json").out)
    assert {"image_folder", "coco", "torchvision"} <= {row["format"] for row in rows}
    listed = call("formats").out
    for row in rows:
        assert row["about"] in listed
        assert all(f"--option {name}=" in listed for name in row["options"])
