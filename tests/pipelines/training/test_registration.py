"""What a version says of its classes. How a run becomes one is tested with the driver."""

from __future__ import annotations

import json

from pipelines.training.registration import MAX_TAG_CHARACTERS, _short_list


def test_a_list_that_is_too_long_for_a_tag_is_counted() -> None:
    few, many = ["cat", "dog"], [f"class {n}" for n in range(1000)]
    assert json.loads(_short_list(few)) == few
    assert _short_list(many) == "1000 classes; see card.json"
    assert len(_short_list(["x" * (MAX_TAG_CHARACTERS - 4)])) == MAX_TAG_CHARACTERS
