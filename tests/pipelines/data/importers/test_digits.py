"""scikit-learn's bundled digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.data import shards
from pipelines.data.images import decode_image
from pipelines.data.packing.pack import pack


@pytest.mark.slow
def test_all_digits_are_read(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    card = pack("digits", tmp_path / "out")
    bundled = load_digits()
    assert sum(s.samples for s in card.splits.values()) == len(bundled.target) == 1797
    assert card.classes == tuple("0123456789")
    assert (card.name, card.image.channels, card.image.max_height) == ("digits", 1, 8)
    result = 0
    for split in card.splits:
        reader = shards.ShardReader(tmp_path / "out", card, split)
        for i in range(len(reader)):
            sample = reader.read(i)
            row = int(sample.key)
            pixels = decode_image(sample.image, 1)[0].numpy()
            np.testing.assert_array_equal(np.rint(pixels / 255 * 16), bundled.images[row])
            assert sample.label == bundled.target[row]
            result += 1
    assert result == 1797
