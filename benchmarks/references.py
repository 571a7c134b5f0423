"""Reference values of simple methods, which are written next to a recipe's metrics.

In: a packed data set. Out: a line of JSON on stdout with the task's metrics, on the split that the
recipe is measured on.

    python benchmarks/references.py pca DIR --components 32
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BATCH = 512
MOST_VALUES = 20_000
"""Limit of values per image: their covariance matrix takes 3 GiB."""


def pca(data: str, components: int = 32, split: str = "test") -> dict[str, Any]:
    """Metrics of reconstructing `split` from principal components that are fitted on `train`.

    Reconstructions are clamped to 0..1 as those of an autoencoder, and codes have 16 bits per
    component. Raises UsageError if there are more components than values in an image, or if the
    images are too large.
    """
    import torch

    from models.core.errors import UsageError
    from models.tasks.reconstruction import RECONSTRUCTION
    from pipelines.data import card as cards

    card = cards.read(data)
    spec = card.spec(reads="images")
    values = spec.channels * spec.height * spec.width
    if not 0 < components <= values:
        raise UsageError(f"{components} components of {values}", hint=f"give 1 to {values}")
    if values > MOST_VALUES:
        raise UsageError(f"images of {values:,} values, more than {MOST_VALUES:,}")
    count = 0
    total = torch.zeros(values, dtype=torch.float64)
    products = torch.zeros(values, values, dtype=torch.float64)
    for rows in _images(data, "train"):
        count += len(rows)
        total += rows.sum(0)
        products += rows.T @ rows
    mean = total / count
    _, vectors = torch.linalg.eigh(products / count - mean[:, None] * mean)
    basis = vectors[:, -components:]
    records = []
    for rows in _images(data, split):
        codes = ((rows - mean) @ basis).half()
        reconstructed = (codes.double() @ basis.T + mean).clamp(0, 1)
        truths = (rows * 255).round().to(torch.uint8)
        for code, image, truth in zip(codes, reconstructed, truths):
            prediction = {"image": image.view(spec.shape), "code": code, "bits": 16 * components}
            target = {"image": truth.view(spec.shape)}
            records.append(RECONSTRUCTION.make_record(prediction, target, spec))
    metrics = RECONSTRUCTION.metrics(records, spec)
    return {"reference": "pca", "components": components, "split": split, **metrics}


def _images(data: str, split: str) -> Iterator[Any]:
    """Rows (B, C * H * W) of a split as float64 in 0..1."""
    from pipelines.data import card as cards
    from pipelines.data.loading.loaders import EvalLoader
    from pipelines.interfaces import World

    card = cards.read(data)
    loader = EvalLoader(
        data,
        card,
        card.spec(reads="images"),
        batch_size=BATCH,
        world=World(),
        split=split,
        cache="none",
    )
    for _, batch in loader.batches():
        yield batch["image"].flatten(1).double() / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    pca_parser = kinds.add_parser(
        "pca", help="principal components, a reference for reconstruction"
    )
    pca_parser.add_argument("data", help="a packed data set")
    pca_parser.add_argument("--components", type=int, default=32, help="number of components")
    pca_parser.add_argument("--split", default="test", help="split to evaluate")
    options = parser.parse_args()
    print(json.dumps(pca(options.data, options.components, options.split)))


if __name__ == "__main__":
    main()
