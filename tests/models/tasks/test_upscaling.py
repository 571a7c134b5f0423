from __future__ import annotations

import numpy as np
import pytest
import torch

from models.core.errors import TesseraError, UsageError
from models.core.family import BatchRng, DataSpec
from models.tasks.upscaling import (
    SHOWN_PIXELS,
    UPSCALING,
    UpscalingAugment,
    crop_to_multiple,
    enlarge,
    reduce,
)

DATA = DataSpec("images", 3, 40, 48, (), (0.5, 0.4, 0.3), (0.3, 0.2, 0.25))


def texture(height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """uint8 (C, H, W) with coarse and fine structure."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    waves = [
        torch.sin(rows / (2 + c) + seed) * torch.cos(columns / (3 + c)) for c in range(channels)
    ]
    edges = ((rows // 7 + columns // 5 + seed) % 2) * 60
    return torch.stack([100 + 60 * wave + edges for wave in waves]).round().to(torch.uint8)


def batch_of(*images: torch.Tensor) -> dict:
    """As from the loader with data.fit=pad. The padding isn't black, so that it would be
    noticed."""
    sizes = torch.tensor([image.shape[-2:] for image in images])
    height, width = sizes.amax(0).tolist()
    frame = torch.full((len(images), images[0].shape[0], height, width), 255, dtype=torch.uint8)
    for position, image in zip(frame, images):
        position[:, : image.shape[-2], : image.shape[-1]] = image
    return {
        "image": frame,
        "key": [f"image-{i}" for i in range(len(images))],
        "index": torch.arange(len(images)),
        "size": sizes,
        "extent": sizes.clone(),
    }


def transformed(batch: dict, train: bool, seed: int = 0, data: DataSpec = DATA, **settings) -> dict:
    count = len(batch["key"])
    transform = UPSCALING.augment(UpscalingAugment(**settings), data, train=train)
    return transform(batch, BatchRng(seed, count, slice(0, count)))


def by_bicubic(image: torch.Tensor, scale: int) -> dict:
    low = reduce(crop_to_multiple(image, scale), scale).to(torch.uint8)
    return {"image": enlarge(low, scale), "low": low}


def test_metrics_agree_with_scikit_image_on_cropped_luma():
    from skimage.color import rgb2ycbcr
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    image = texture(41, 50)
    prediction = by_bicubic(image, 3)
    record = UPSCALING.make_record(prediction, {"image": image}, DATA)
    luma = [
        rgb2ycbcr(np.asarray(i.permute(1, 2, 0)))[3:-3, 3:-3, 0]
        for i in (image[:, :39, :48], prediction["image"])
    ]
    assert record["psnr"] == pytest.approx(peak_signal_noise_ratio(*luma, data_range=255))
    _, likeness = structural_similarity(
        *luma,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    assert record["ssim"] == pytest.approx(likeness[5:-5, 5:-5].mean())


def test_reducing_agrees_with_pillow():
    from PIL import Image

    image = texture(40, 48)
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
        (24, 20), Image.Resampling.BICUBIC
    )
    theirs = torch.from_numpy(np.array(pillow)).permute(2, 0, 1).float()
    # Pillow rounds between the axes, and continues an image otherwise at its edges.
    inside = (slice(None), slice(2, -2), slice(2, -2))
    assert (reduce(image, 2) - theirs)[inside].abs().max() <= 1


def test_metrics_of_a_perfect_and_of_a_bicubic_prediction():
    image = texture(40, 48)
    plain = by_bicubic(image, 2)
    perfect = {**plain, "image": image}
    records = [UPSCALING.make_record(p, {"image": image}, DATA) for p in (perfect, plain)]
    assert (records[0]["psnr"], records[0]["ssim"]) == (100, pytest.approx(1))
    assert records[1]["psnr"] == records[1]["psnr_bicubic"] < 40
    assert UPSCALING.error_score(records[1]) > UPSCALING.error_score(records[0])
    metrics = UPSCALING.metrics(records, DATA)
    assert metrics["psnr_gain"] == pytest.approx((100 - records[1]["psnr"]) / 2)
    assert UPSCALING.metrics(records[::-1], DATA) == metrics
    with pytest.raises(TesseraError, match="no predictions"):
        UPSCALING.metrics([], DATA)


def test_a_prediction_of_another_size_is_refused():
    with pytest.raises(TesseraError, match="its target"):
        UPSCALING.make_record(by_bicubic(texture(20, 20), 2), {"image": texture(30, 30)}, DATA)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (3, 3), (5, 4)])
def test_metrics_of_images_smaller_than_the_border(size, channels):
    image = texture(*size, channels=channels)
    record = UPSCALING.make_record(by_bicubic(image, 4), {"image": image}, DATA)
    assert all(np.isfinite(value) for value in record.values())


def test_evaluations_see_whole_images_in_their_own_sizes():
    images = [texture(40, 48), texture(21, 33, seed=1), texture(1, 5, seed=2)]
    seen = transformed(batch_of(*images), train=False, scale=2)
    assert seen["extent"].tolist() == [[20, 24], [10, 16], [1, 2]]
    targets = UPSCALING.targets(seen)
    for row, image in enumerate(images):
        alone = transformed(batch_of(image), train=False, scale=2)
        height, width = alone["extent"][0].tolist()
        assert torch.equal(seen["image"][row, :, :height, :width], alone["image"][0])
        assert torch.equal(targets[row]["image"], crop_to_multiple(image, 2))
    std, mean = (torch.tensor(v)[:, None, None] for v in (DATA.std, DATA.mean))
    pixels = (seen["image"][0] * std + mean) * 255
    torch.testing.assert_close(pixels, reduce(images[0], 2), atol=1e-3, rtol=0)


def test_targets_are_the_images_without_padding():
    images = [texture(40, 48), texture(21, 33, seed=1)]
    for target, image in zip(UPSCALING.targets(batch_of(*images)), images):
        assert torch.equal(target["image"], image)


def test_a_users_image_is_not_reduced():
    image = texture(31, 47)
    prepared = UPSCALING.prepare(UpscalingAugment(), DATA)(
        batch_of(image), BatchRng(0, 1, slice(0, 1))
    )
    assert prepared["image"].shape == (1, 3, 31, 47)
    assert "high" not in prepared


def test_training_sees_reduced_patches_and_their_originals():
    batch = batch_of(texture(40, 48), texture(21, 33, seed=1))
    seen = transformed(batch, train=True, scale=3, patch=24, patches=5)
    assert seen["image"].shape == (2, 5, 3, 8, 8)
    assert seen["high"].shape == (2, 5, 3, 24, 24)
    std, mean = (torch.tensor(v)[:, None, None] for v in (DATA.std, DATA.mean))
    pixels = (seen["image"] * std + mean) * 255
    torch.testing.assert_close(pixels, reduce(seen["high"] * 255, 3), atol=1e-3, rtol=0)


def numbered(height: int, width: int) -> torch.Tensor:
    """An image whose pixels encode their position."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    one = torch.ones(height, width, dtype=torch.int64)
    return torch.stack([rows * one, columns * one, one * 9]).to(torch.uint8)


@pytest.mark.parametrize("turned", [False, True])
def test_patches_are_mirrored_and_rotated_crops(turned):
    image = numbered(30, 37)
    settings = {"patch": 8, "patches": 200, "flip": turned, "turn": turned}
    seen = transformed(batch_of(image), train=True, **settings)
    poses = set()
    corners = set()
    for patch in (seen["high"][0] * 255).round().to(torch.uint8):
        rows, columns = patch[0].long(), patch[1].long()
        top, left = int(rows.min()), int(columns.min())
        corners.add((top, left))
        square = image[:, top : top + 8, left : left + 8]
        result = [
            (turn, flip)
            for turn in range(4)
            for flip in (False, True)
            if torch.equal(torch.rot90(square.flip(-1) if flip else square, turn, (1, 2)), patch)
        ]
        assert len(result) == 1
        poses.update(result)
    assert len(poses) == (8 if turned else 1)
    tops, lefts = zip(*corners)
    assert (min(tops), max(tops), min(lefts), max(lefts)) == (0, 22, 0, 29)


def test_patches_are_inside_the_image_or_reflected():
    batch = batch_of(numbered(40, 40), numbered(5, 3))
    seen = transformed(batch, train=True, patch=16, patches=20)
    small = (seen["high"][1] * 255).round()
    assert set(small[:, 2].flatten().tolist()) == {9}, "nothing of what fills the frame"
    assert set(small[:, 0].flatten().tolist()) <= set(range(5))
    assert set(small[:, 1].flatten().tolist()) <= set(range(5))
    steps = small[:, 0].diff(dim=-1).abs() + small[:, 0].diff(dim=-2).abs().transpose(-1, -2)
    assert steps.max() <= 1, "no jump where it is mirrored"


def test_augmentation_does_not_depend_on_the_ranks():
    batch = batch_of(*(texture(40, 48, seed=s) for s in range(5)))
    transform = UPSCALING.augment(UpscalingAugment(patch=16), DATA, train=True)
    whole = transform(batch, BatchRng(3, 5, slice(0, 5)))
    for rows in (slice(0, 1), slice(1, 5)):
        part = transform({n: v[rows] for n, v in batch.items()}, BatchRng(3, 5, rows))
        assert torch.equal(part["image"], whole["image"][rows])
        assert torch.equal(part["high"], whole["high"][rows])
    other = transform(batch, BatchRng(4, 5, slice(0, 5)))
    assert not torch.equal(other["high"], whole["high"])


def test_panels_show_input_bicubic_prediction_and_truth():
    image = texture(200, 130)
    prediction = by_bicubic(image, 2)
    panels = UPSCALING.panels(image, prediction, {"image": image}, DATA)
    assert [p.caption.split()[0] for p in panels] == ["input", "bicubic", "network", "truth"]
    assert all(panel.image.shape == (3, SHOWN_PIXELS, SHOWN_PIXELS) for panel in panels)
    assert torch.equal(panels[3].image, image[:, 52:148, 17:113])
    users = UPSCALING.panels(prediction["low"], prediction, None, DATA)
    assert [p.caption for p in users] == ["bicubic", "network"]
    assert UPSCALING.prediction_to_json(prediction, DATA) == {
        "height": 200,
        "width": 130,
        "scale": 2,
    }
    assert torch.equal(UPSCALING.prediction_to_image(prediction), prediction["image"])


def test_sample_panels_show_a_patch_and_its_target():
    batch = batch_of(texture(40, 48), texture(21, 33, seed=1))
    seen = transformed(batch, train=True, patch=24, patches=3)
    for row, (low, high) in enumerate(UPSCALING.sample_panels(seen, DATA)):
        assert low.image.shape == (3, 12, 12)
        assert torch.equal(low.image, reduce(high.image, 2).to(torch.uint8))
        assert torch.equal(high.image, (seen["high"][row, 0] * 255).round().to(torch.uint8))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"scale": 5}, "augment.scale = 5"),
        ({"patch": 50, "scale": 4}, "augment.patch = 50"),
        ({"patch": 0}, "augment.patch = 0"),
        ({"patches": 0}, "augment.patches = 0"),
    ],
)
def test_invalid_settings_are_refused(settings, named):
    with pytest.raises(UsageError, match=named):
        UpscalingAugment(**settings)
