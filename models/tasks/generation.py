"""Generation: new images like those of a data set.

In: uint8 images; later as many fake ones, and the outputs of the judge, a classifier of the same
data, for both. Out: the images as the discriminator sees them, the metrics, and fake images as
files. Must not know any network, nor which classifier judges.

    B images, N images of a whole split, C channels, H height, W width, D features, K classes of
    the judge

A sample has only its image. A prediction has `image`, uint8 (C, H, W). It doesn't belong to a
sample: the i-th fake image comes with the i-th real one only so that there are as many of both.
After `apply_judge` it also has its `features` (D,), `predicted`, the most probable of the judge's
`classes`, and the `confidence` in it. A record takes 8 D bytes: 10 MB for 10,000 images with the
128 features of a small classifier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.core.errors import TesseraError
from models.core.family import (
    Batch,
    BatchRng,
    DataSpec,
    Judge,
    Metric,
    Panel,
    Prediction,
    Record,
    Target,
    Task,
    Transform,
)


@dataclass(frozen=True)
class GenerationAugment:
    flip: bool = False
    """Mirror half of the training images, left to right."""


class Generation(Task):
    name = "generation"
    reads = "images"
    primary = Metric("frechet", "min")
    extra_metrics = ("class_share_min",)
    augment_settings = GenerationAugment
    needs_judge = True
    knows_classes = False
    takes_images = False

    def targets(self, batch: Batch) -> list[Target]:
        """`image` (C, H, W) with its padding, because the generator learns that too."""
        return [{"image": image} for image in batch["image"].detach().cpu()]

    def augment(self, settings: GenerationAugment, data: DataSpec, *, train: bool) -> Transform:
        return _Augment(settings.flip and train, data)

    def apply_judge(
        self, judge: Judge, predictions: Sequence[Prediction], targets: Sequence[Target]
    ) -> None:
        fake, probabilities = judge(torch.stack([p["image"] for p in predictions]))
        real, _ = judge(torch.stack([t["image"] for t in targets]))
        confidences, predicted_classes = probabilities.max(1)
        rows = zip(predictions, fake, predicted_classes.tolist(), confidences.tolist())
        for prediction, features, predicted, confidence in rows:
            prediction.update(
                features=features.clone(),  # pickling a view would pickle the whole batch
                predicted=predicted,
                confidence=confidence,
                classes=probabilities.shape[1],
            )
        for target, features in zip(targets, real):
            target["features"] = features.clone()

    def make_record(self, prediction: Prediction, target: Target, data: DataSpec) -> Record:
        """`fake` and `real`, features (D,) of a fake and a real image; `predicted`, `classes` and
        `confidence` of the fake one."""
        if "features" not in prediction or "features" not in target:
            raise TesseraError(
                "the fake images were not judged",
                hint="name a classifier of the same data: --set judge=models:/NAME@ALIAS",
            )
        known = ("predicted", "classes", "confidence")
        return {
            "fake": prediction["features"],
            "real": target["features"],
            **{name: prediction[name] for name in known},
        }

    def metrics(self, records: Sequence[Record], data: DataSpec) -> dict[str, float]:
        """`frechet`, the Fréchet distance of the judge's features; `class_share_min` and
        `class_share_max`, the shares of the fake images in the judge's rarest and most frequent
        class; `class_entropy` of all these shares, 1 if they are equal; `confidence`, the mean
        probability of the predicted class.

        Shares and confidence are exact sums. `frechet` is computed in float64: another order of the
        images would change its last digits.
        """
        if not records:
            raise TesseraError("there are no images to compute metrics of")
        count, classes = len(records), records[0]["classes"]
        predicted_classes = torch.tensor([r["predicted"] for r in records])
        shares = [n / count for n in torch.bincount(predicted_classes, minlength=classes).tolist()]
        entropy = math.fsum(share * math.log(1 / share) for share in shares if share)
        return {
            "frechet": frechet_distance(
                torch.stack([r["fake"] for r in records]),
                torch.stack([r["real"] for r in records]),
            ),
            "class_share_min": min(shares),
            "class_share_max": max(shares),
            "class_entropy": entropy / math.log(classes) if classes > 1 else 1.0,
            "confidence": math.fsum(r["confidence"] for r in records) / count,
        }

    def error_score(self, record: Record) -> float:
        """1 - the judge's confidence, in 0..1."""
        return 1 - float(record["confidence"])

    def prediction_to_json(self, prediction: Prediction, data: DataSpec) -> dict[str, Any]:
        """`height` and `width` of the fake image, which itself is a file."""
        height, width = prediction["image"].shape[-2:]
        return {"height": height, "width": width}

    def panels(
        self,
        image: Tensor,
        prediction: Prediction | None,
        target: Target | None,
        data: DataSpec,
    ) -> list[Panel]:
        """The fake image, or without a prediction the real one."""
        if prediction is None:
            return [Panel(image)]
        caption = ""
        if "predicted" in prediction:
            caption = f"class {prediction['predicted']}, {prediction['confidence']:.0%}"
        return [Panel(prediction["image"], caption)]

    def prediction_to_image(self, prediction: Prediction) -> Tensor:
        image: Tensor = prediction["image"]
        return image


GENERATION = Generation()


def frechet_distance(fake: Tensor, real: Tensor) -> float:
    """Fréchet distance between Gaussians with the mean and covariance of two sets of features
    (N, D) and (M, D), as in Heusel et al., https://arxiv.org/abs/1706.08500:

        |m - r|² + tr(A + B - 2 (A B)^½)

    In float64. With the covariances as A = P'P and B = Q'Q, the trace of (A B)^½ is the sum of the
    singular values of P Q'. So no matrix root is needed, and sets with fewer images than features
    are possible. The covariance of a single image is 0.
    """
    mean_fake, root_fake = _gaussian(fake)
    mean_real, root_real = _gaussian(real)
    apart = (mean_fake - mean_real).square().sum()
    spread = root_fake.square().sum() + root_real.square().sum()
    shared = torch.linalg.svdvals(root_fake @ root_real.T).sum()
    return max(float(apart + spread - 2 * shared), 0.0)


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,), and P (min(N, D), D) with the covariance P'P."""
    values = features.double()
    mean = values.mean(0)
    centred = (values - mean) / math.sqrt(max(len(values) - 1, 1))
    return mean, torch.linalg.qr(centred, mode="r").R


class _Augment:
    """The transform: half of the images mirrored, then normalisation."""

    def __init__(self, flip: bool, data: DataSpec) -> None:
        self._flip = flip
        self._std = torch.tensor(data.std)[:, None, None]
        self._mean = torch.tensor(data.mean)[:, None, None]

    def __call__(self, batch: Batch, rng: BatchRng) -> Batch:
        images: Tensor = batch["image"]
        self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        if self._flip:
            mirrored = (rng.uniform(1, 1, 1) < 0.5).to(images.device, non_blocking=True)
            images = torch.where(mirrored, images.flip(-1), images)
        return {**batch, "image": (images.float() / 255 - self._mean) / self._std}
