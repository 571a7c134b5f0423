"""scikit-learn's bundled handwritten digits: 1,797 grey images of 8 by 8 pixels, as source
`digits`.

In: the word `digits`. Out: a `Source` without splits; values 0..16 become 0..255. E. Alpaydin and
C. Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998, CC BY 4.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from pipelines.data.images import encode_png
from pipelines.data.sources import Item, Source

NAME = "digits"
OPTIONS: Mapping[str, str] = {}


def recognises(source: str) -> str:
    return "the handwritten digits bundled with scikit-learn" if source == NAME else ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Reads the images from the installed package."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    pixels = np.rint(bundled.images * (255 / 16)).astype(np.uint8)
    labels = bundled.target.tolist()
    items = [
        Item(key=f"{row:04d}", label=label, origin=f"digits[{row}]", row=row)
        for row, label in enumerate(labels)
    ]
    classes = tuple(str(digit) for digit in range(max(labels) + 1))
    return Source(NAME, "classification", classes, items, partial(_encode, pixels))


def _encode(pixels: np.ndarray[Any, Any], item: Item) -> bytes:
    return encode_png(pixels[item.row])
