"""Metrics against scikit-learn; augmentation against the expected crops of an image."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch

from models.core.errors import TesseraError, UsageError
from models.core.family import BatchRng, DataSpec, View
from models.tasks.semantic_segmentation import SEMANTIC_SEGMENTATION as TASK
from models.tasks.semantic_segmentation import SegmentationAugment
from pipelines.data.images import fit_image, view

CLASSES = ("road", "sky/blue", "tree", "car", "cat")
SPEC = DataSpec("semantic_segmentation", 1, 24, 24, CLASSES, (0.0,), (1.0,))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masks(count: int, absent: tuple[int, ...] = (), seed: int = 0) -> list[torch.Tensor]:
    """Masks of several sizes with each class except the absent one, and ignored pixels."""
    made = []
    for number in range(count):
        size = (10 + number, 13)
        mask = torch.randint(0, 6, size, generator=generator(seed + number)).to(torch.uint8)
        for label in absent:
            mask[mask == label] = 0
        mask[mask == 5] = 255
        made.append(mask)
    return made


def said(truths: list[torch.Tensor], absent: tuple[int, ...] = ()) -> list[dict]:
    """Predictions that are right for most pixels."""
    result = []
    for number, truth in enumerate(truths):
        mask = torch.where(truth == 255, 2, truth)
        noise = torch.rand(truth.shape, generator=generator(number + 50)) < 0.3
        shifted = (mask + 1) % 5
        for label in absent:
            shifted[shifted == label] = 0
        mask = torch.where(noise, shifted, mask)
        result.append({"mask": mask, "confidence": 0.5})
    return result


def records(predictions, truths):
    return [
        TASK.make_record(p, {"mask": t}, SPEC) for p, t in zip(predictions, truths, strict=True)
    ]


@pytest.mark.parametrize("absent", [(), (4,), (3, 4)])
def test_metrics_agree_with_scikit_learn(absent):
    from sklearn import metrics as sklearn_metrics

    truths = masks(4, absent)
    predictions = said(truths, absent)
    result = records(predictions, truths)
    metrics = TASK.metrics(result, SPEC)
    truth = torch.cat([t.flatten() for t in truths])
    prediction = torch.cat([p["mask"].flatten() for p in predictions])
    truth, prediction = (t[truth != 255].numpy() for t in (truth, prediction))
    present = [k for k in range(5) if k not in absent]
    each = sklearn_metrics.jaccard_score(truth, prediction, labels=present, average=None)
    dice = sklearn_metrics.f1_score(truth, prediction, labels=present, average="macro")
    assert metrics["miou"] == pytest.approx(each.mean(), rel=1e-12)
    assert metrics["dice"] == pytest.approx(dice, rel=1e-12)
    assert metrics["pixel_accuracy"] == pytest.approx(
        sklearn_metrics.accuracy_score(truth, prediction)
    )
    names = ["road", "sky_blue", "tree", "car", "cat"]
    assert [metrics[f"iou/{names[k]}"] for k in present] == pytest.approx(list(each), rel=1e-12)
    assert not any(metrics.get(f"iou/{names[k]}") for k in absent)
    expected = sklearn_metrics.confusion_matrix(truth, prediction, labels=range(5))
    assert torch.equal(TASK.confusion(result, SPEC), torch.from_numpy(expected))


def test_a_class_only_in_predictions_has_an_iou_of_zero():
    truth = torch.zeros(2, 4, dtype=torch.uint8)
    prediction = truth.clone()
    prediction[0, 0] = 3
    metrics = TASK.metrics(records([{"mask": prediction}], [truth]), SPEC)
    assert metrics["iou/road"] == 7 / 8
    assert metrics["iou/car"] == 0
    assert metrics["miou"] == 7 / 16


def test_metrics_do_not_depend_on_the_order():
    truths = masks(6)
    result = records(said(truths), truths)
    assert TASK.metrics(result[::-1], SPEC) == TASK.metrics(result, SPEC)


def test_unlabelled_pixels_are_ignored():
    truth = torch.full((3, 3), 255, dtype=torch.uint8)
    (empty,) = records([{"mask": torch.ones(3, 3, dtype=torch.uint8)}], [truth])
    assert int(empty["counts"].sum()) == 0
    assert TASK.error_score(empty) == 0
    with pytest.raises(TesseraError, match="no pixel of these images has a class"):
        TASK.metrics([empty], SPEC)
    truths = masks(2)
    some = records(said(truths), truths)
    assert TASK.metrics([*some, empty], SPEC) == TASK.metrics(some, SPEC)


def test_error_score_grows_with_wrong_pixels():
    truths = masks(3)
    right = [{"mask": torch.where(t == 255, 0, t)} for t in truths]
    wrong = [{"mask": (r["mask"] + 1) % 5} for r in right]
    assert [TASK.error_score(r) for r in records(right, truths)] == [0, 0, 0]
    assert [TASK.error_score(r) for r in records(wrong, truths)] == [1, 1, 1]
    (some,) = records(said(truths)[:1], truths[:1])
    assert 0 < TASK.error_score(some) < 1


def test_masks_of_another_size_or_class_are_refused():
    truth = torch.zeros(3, 3, dtype=torch.uint8)
    with pytest.raises(TesseraError, match=r"\(2, 3\) pixels, its target \(3, 3\)"):
        TASK.make_record({"mask": truth[:2]}, {"mask": truth}, SPEC)
    with pytest.raises(TesseraError, match="a target has the class 9, but there are 5"):
        TASK.make_record({"mask": truth}, {"mask": truth + 9}, SPEC)
    with pytest.raises(TesseraError, match="a prediction has the class 5"):
        TASK.make_record({"mask": truth + 5}, {"mask": truth}, SPEC)


def test_json_image_and_panels():
    mask = torch.tensor([[0, 0, 1], [2, 0, 255]], dtype=torch.uint8)
    prediction = {"mask": mask, "confidence": 0.75}
    answer = TASK.prediction_to_json(prediction, SPEC)
    assert answer == {
        "shares": {"road": 0.6, "sky/blue": 0.2, "tree": 0.2, "car": 0.0, "cat": 0.0},
        "confidence": 0.75,
    }
    assert json.loads(json.dumps(answer)) == answer
    assert TASK.prediction_to_image(prediction) is mask
    image = torch.zeros(1, 2, 3, dtype=torch.uint8)
    truth, result = TASK.panels(image, prediction, {"mask": mask}, SPEC)
    assert (truth.caption, result.caption) == ("truth", "mean IoU 1.00")
    assert truth.mask is mask
    (alone,) = TASK.panels(image, prediction, None, SPEC)
    assert alone.caption == "confidence 75%"
    nothing = {"mask": torch.full_like(mask, 255), "confidence": 0.0}
    assert set(TASK.prediction_to_json(nothing, SPEC)["shares"].values()) == {0.0}


@pytest.mark.parametrize("size", [(40, 30), (10, 17), (24, 24), (9, 60)])
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_to_original_size_undoes_each_fit(size, fit):
    """A mask of whole blocks that is fitted like an image is converted back exactly."""
    mask = torch.zeros(1, *size, dtype=torch.uint8)
    mask[:, size[0] // 2 :] += 1
    mask[:, :, size[1] // 3 :] += 2
    frame = (24, 24)
    seen = view(size, *frame, fit)
    fitted = fit_image(mask * 60, *frame, fit)[0]
    if fit == "pad":
        fitted = fitted[: round(size[0] * seen.scale[0]), : round(size[1] * seen.scale[1])]
    fitted = (fitted.float() / 60).round().to(torch.uint8)
    prediction = {"mask": fitted, "confidence": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = TASK.to_original_size(prediction, seen)
    assert back["mask"].shape == size
    assert back["confidence"] == 0.5
    known = back["mask"] != 255
    if fit == "crop":
        assert int(known.sum()) == min(size[0], 24) * min(size[1], 24)
        assert torch.equal(back["mask"][known], mask[0][known])
    else:
        assert known.all()
        assert (back["mask"] == mask[0]).float().mean() > 0.85
        at = [side * part // 8 for side in size for part in (1, 7)]
        corners = [(r, c) for r in at[:2] for c in at[2:]]
        assert all(back["mask"][r, c] == mask[0, r, c] for r, c in corners)


def test_to_original_size_of_a_shifted_image():
    mask = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    seen = View((2, 6), (3, 4), shift=(1, -1))
    back = TASK.to_original_size({"mask": mask, "confidence": 1.0}, seen)["mask"]
    assert back.tolist() == [[255, 4, 5, 6, 7, 255], [255, 8, 9, 10, 11, 255]]


def batch_of(count: int, high: int, wide: int, extents=None, channels: int = 1) -> dict:
    """Images whose pixels encode their position, with a mask of the same values: row * 7 +
    column, different for each image."""
    at = torch.arange(high)[:, None] * 7 + torch.arange(wide)
    mask = torch.stack([(at + 3 * i) % 251 for i in range(count)]).to(torch.uint8)
    extent = torch.tensor(extents or [[high, wide]] * count)
    image = mask[:, None].repeat(1, channels, 1, 1)
    for one, pixels, (h, w) in zip(image, mask, extent.tolist()):
        one[:, h:] = 0
        one[:, :, w:] = 0
        pixels[h:] = 255
        pixels[:, w:] = 255
    return {
        "image": image,
        "mask": mask,
        "key": [str(i) for i in range(count)],
        "index": torch.arange(count),
        "size": extent.clone(),
        "extent": extent,
    }


def rows(count: int, total: int | None = None, start: int = 0, seed: int = 5) -> BatchRng:
    return BatchRng(seed, total or count, slice(start, start + count))


def transformed(settings: SegmentationAugment, batch: dict, draws: BatchRng | None = None) -> dict:
    transform = TASK.augment(settings, SPEC, train=True)
    return transform(batch, draws or rows(len(batch["key"])))


EVERYTHING = SegmentationAugment(
    patch=10,
    patches=3,
    flip=True,
    flip_vertical=True,
    rotate=True,
    zoom=0.3,
    elastic=2.0,
    brightness=0.2,
    contrast=0.2,
)


def test_evaluation_only_normalises():
    spec = dataclasses.replace(SPEC, mean=(0.4,), std=(0.2,))
    batch = batch_of(3, 20, 16, [[20, 16], [5, 16], [20, 1]])
    for transform in (
        TASK.augment(EVERYTHING, spec, train=False),
        TASK.prepare(EVERYTHING, spec),
    ):
        seen = transform(batch, rows(3))
        torch.testing.assert_close(seen["image"], (batch["image"].float() / 255 - 0.4) / 0.2)
        assert seen["mask"] is batch["mask"]
        assert [tuple(t["mask"].shape) for t in TASK.targets(seen)] == [(20, 16), (5, 16), (20, 1)]
    unknown = {name: value for name, value in batch.items() if name != "mask"}
    assert "mask" not in TASK.prepare(EVERYTHING, spec)(unknown, rows(3))


def test_without_settings_images_are_unchanged():
    batch = batch_of(2, 20, 16)
    seen = transformed(SegmentationAugment(), batch)
    torch.testing.assert_close(seen["image"] * 255, batch["image"].float())
    assert torch.equal(seen["mask"], batch["mask"])


def test_patches_are_crops_of_the_image():
    """Each patch is a crop of the rotated and mirrored image, with the same crop of its mask."""
    batch = batch_of(6, 21, 17)
    batch["mask"] = torch.randint(0, 251, (6, 21, 17), generator=generator()).to(torch.uint8)
    batch["image"] = batch["mask"][:, None]
    settings = SegmentationAugment(patch=8, patches=5, flip=True, flip_vertical=True, rotate=True)
    seen = transformed(settings, batch)
    assert seen["image"].shape == (6, 5, 1, 8, 8)
    assert seen["mask"].shape == (6, 5, 8, 8)
    kinds, corners = set(), set()
    for whole, patches, masks in zip(batch["image"], seen["image"], seen["mask"]):
        for patch, mask in zip(patches[:, 0], masks):
            pixels = (patch * 255).round().to(torch.uint8)
            assert torch.equal(pixels, mask)
            result = [
                (turn, flip, top, left)
                for turn in range(4)
                for flip in (False, True)
                for turned in [_turned(pixels, turn, flip)]
                for top in range(14)
                for left in range(10)
                if torch.equal(whole[0, top : top + 8, left : left + 8], turned)
            ]
            assert len(result) == 1
            kinds.add(result[0][:2])
            corners.add(result[0][2:])
    assert len(kinds) == 8
    assert len(corners) > 20
    assert all(min(c[i] for c in corners) <= 1 for i in (0, 1))
    assert max(c[0] for c in corners) == 13


def _turned(pixels: torch.Tensor, turn: int, flip: bool) -> torch.Tensor:
    return torch.rot90(pixels.flip(-1) if flip else pixels, turn)


@pytest.mark.parametrize("settings", [EVERYTHING, SegmentationAugment(patch=8, zoom=0.5)])
def test_masks_follow_the_image(settings):
    """In an image with two halves, the mask is right for nearly every pixel."""
    settings = dataclasses.replace(settings, brightness=0.0, contrast=0.0)
    batch = batch_of(8, 40, 32)
    batch["mask"] = torch.zeros_like(batch["mask"])
    batch["mask"][:, :, 16:] = 1
    batch["image"] = batch["mask"][:, None] * 200
    seen = transformed(settings, batch)
    image, mask = seen["image"].reshape(-1), seen["mask"].reshape(-1)
    assert 0.1 < float((mask == 1).float().mean()) < 0.9
    agree = (image * 255 > 100) == (mask == 1)
    assert float(agree[mask != 255].float().mean()) > 0.99


def test_zoom_shows_more_or_less_of_the_image():
    batch = batch_of(64, 40, 40)
    ramp = torch.arange(40, dtype=torch.uint8).expand(64, 1, 40, 40)
    batch["image"] = ramp
    seen = transformed(SegmentationAugment(patch=16, zoom=0.5), batch)["image"] * 255
    steps = (seen[:, 0, 8, 15] - seen[:, 0, 8, 0]) / 15
    assert float(steps.min()) > 1 / 1.5 - 1e-3
    assert float(steps.max()) < 1.5 + 1e-3
    assert float(steps.min()) < 0.8 < 1.25 < float(steps.max())


def test_elastic_deforms_smoothly():
    batch = batch_of(32, 40, 40)
    batch["image"] = torch.arange(40, dtype=torch.uint8).expand(32, 1, 40, 40)
    seen = transformed(SegmentationAugment(elastic=2.0), batch)["image"] * 255
    moved = (seen - batch["image"])[:, 0, 10:30, 10:30]
    assert 1 < float(moved.std()) < 3
    neighbours = moved.diff(dim=-1).abs()
    assert 0.001 < float(neighbours.max()) < 0.8


@pytest.mark.parametrize("elastic", [0.0, 1.0])
def test_patches_are_inside_images_that_are_large_enough(elastic):
    """Padding is never visible: its pixels are 0, those of images are not. A smaller image is
    mirrored, and the mirrored part is ignored."""
    extents = [[24, 20], [12, 9], [5, 24], [1, 1]]
    batch = batch_of(4, 24, 24, extents)
    batch["image"] = (batch["image"] > 0).to(torch.uint8) * 200 + 20
    for image, (height, width) in zip(batch["image"], extents):
        image[:, height:] = 0
        image[:, :, width:] = 0
    batch["mask"][batch["mask"] != 255] = 1
    settings = SegmentationAugment(patch=8, patches=6, rotate=True, elastic=elastic)
    seen = transformed(settings, batch)
    assert float(seen["image"].min()) * 255 > 19
    known = (seen["mask"] == 1).flatten(2).sum(2)
    assert set(seen["mask"].unique().tolist()) <= {1, 255}
    if elastic:
        assert known[:3].min() >= 20
        return
    assert known[0].tolist() == [64] * 6
    assert known[1].tolist() == [64] * 6
    assert known[2].tolist() == [40] * 6
    assert known[3].tolist() == [1] * 6


def test_a_rotated_whole_image_keeps_its_frame():
    batch = batch_of(16, 20, 12)
    seen = transformed(SegmentationAugment(rotate=True), batch)
    assert seen["image"].shape == (16, 1, 20, 12)
    without = (seen["mask"] == 255).flatten(1).sum(1)
    assert set(without.tolist()) == {0, 8 * 12}


@pytest.mark.parametrize("settings", [EVERYTHING, SegmentationAugment(flip=True, contrast=0.1)])
def test_augmentation_does_not_depend_on_the_ranks(settings):
    batch = batch_of(7, 24, 24)
    whole = transformed(settings, batch)
    for start, count in ((0, 4), (4, 2), (6, 1)):
        part = {name: value[start : start + count] for name, value in batch.items()}
        mine = transformed(settings, part, rows(count, total=7, start=start))
        for name in ("image", "mask"):
            assert torch.equal(mine[name], whole[name][start : start + count])
    again = transformed(settings, batch, rows(7, seed=6))
    assert not torch.equal(again["image"], whole["image"])


def test_brightness_and_contrast_do_not_change_masks():
    spec = dataclasses.replace(SPEC, mean=(0.5,), std=(0.25,))
    batch = batch_of(40, 8, 8)
    batch["image"] = torch.full_like(batch["image"], 255)
    settings = SegmentationAugment(brightness=0.1, contrast=0.2)
    seen = TASK.augment(settings, spec, train=True)(batch, rows(40))
    assert torch.equal(seen["mask"], batch["mask"])
    values = seen["image"].flatten(1)
    assert torch.equal(values.amin(1), values.amax(1))
    shown = values[:, 0] * 0.25 + 0.5
    assert 0.8 - 1e-6 <= float(shown.min()) < 0.87  # 0.5 + 0.5 * (1 ± 0.2) ± 0.1
    assert 1.13 < float(shown.max()) <= 1.2 + 1e-6


def test_sample_panels_show_patches_with_their_truth():
    batch = batch_of(3, 24, 24)
    shown = TASK.sample_panels(transformed(dataclasses.replace(EVERYTHING, patches=6), batch), SPEC)
    assert [len(group) for group in shown] == [4, 4, 4]
    panel = shown[2][3]
    assert panel.image.shape == (1, 10, 10)
    assert panel.mask is not None
    assert panel.mask.shape == (10, 10)
    shown = TASK.sample_panels(transformed(SegmentationAugment(), batch), SPEC)
    assert [len(group) for group in shown] == [1, 1, 1]
    assert torch.equal(shown[1][0].image, batch["image"][1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": -1}, "augment.patch = -1"),
        ({"elastic": -1.0}, "augment.elastic = -1"),
        ({"patches": 0}, "augment.patches = 0"),
        ({"zoom": 1.0}, "augment.zoom = 1.0"),
        ({"brightness": -0.1}, "augment.brightness = -0.1"),
        ({"contrast": 2.0}, "augment.contrast = 2.0"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        SegmentationAugment(**settings)
