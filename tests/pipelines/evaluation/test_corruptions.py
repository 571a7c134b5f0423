"""Corruptions: reproducible, stronger with severity, and without effect on the padding."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from models.core.errors import UsageError
from pipelines.evaluation.corruptions import KINDS, STRENGTHS, corrupt, kinds_for

SIDES = (8, 28, 32, 96, 224)
CASES = [(kind, channels) for channels in (1, 3) for kind in kinds_for(channels)]


@cache
def _photographs() -> tuple[np.ndarray, ...]:
    from sklearn.datasets import load_sample_images

    return tuple(load_sample_images().images)


@cache
def photographs(side: int, channels: int = 3) -> Tensor:
    """uint8 (12, C, side, side): crops of two photographs, scaled to the size."""
    pieces = []
    for photograph in _photographs():
        pixels = torch.tensor(photograph).permute(2, 0, 1)[:, :420, :630].float()
        for row in range(2):
            for column in range(3):
                top, left = 210 * row, 210 * column
                pieces.append(pixels[:, top : top + 210, left : left + 210])
    scaled = torch.nn.functional.interpolate(
        torch.stack(pieces), (side, side), mode="bilinear", antialias=True
    )
    if channels == 1:
        scaled = scaled.mean(1, keepdim=True)
    return scaled.round().clamp(0, 255).to(torch.uint8)


def distance(images: Tensor, others: Tensor) -> float:
    return float((images.float() - others.float()).abs().mean())


@pytest.mark.parametrize(("kind", "channels"), CASES)
@pytest.mark.parametrize("side", SIDES)
def test_a_higher_severity_changes_the_image_more(kind: str, channels: int, side: int) -> None:
    images = photographs(side, channels)
    numbers = range(len(images))
    distances = [0.0]
    for strength in STRENGTHS:
        corrupted = corrupt(images, kind, strength, numbers)
        assert corrupted.shape == images.shape
        assert corrupted.dtype == torch.uint8
        distances.append(distance(images, corrupted))
    assert distances == sorted(set(distances))
    assert distances[-1] > 1


@pytest.mark.parametrize(("kind", "channels"), CASES)
def test_the_corruption_of_a_sample_does_not_depend_on_the_batch(kind: str, channels: int) -> None:
    images, numbers = photographs(28, channels), list(range(100, 112))
    whole = corrupt(images, kind, 2, numbers)
    assert torch.equal(whole, corrupt(images, kind, 2, numbers))
    order = [7, 3, 5]
    part = corrupt(images[order], kind, 2, [numbers[i] for i in order])
    assert torch.equal(whole[order], part)
    given = images.clone()
    corrupt(images, kind, 2, numbers)
    assert torch.equal(images, given)


@pytest.mark.parametrize("kind", KINDS)
def test_random_corruptions_differ_between_samples(kind: str) -> None:
    """The same image as two samples is corrupted differently."""
    images = photographs(32)[:1].repeat(2, 1, 1, 1)
    first, second = corrupt(images, kind, 3, [0, 1])
    by_chance = ("gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "fog")
    assert torch.equal(first, second) == (kind not in by_chance)


@pytest.mark.parametrize(("kind", "channels"), CASES)
@pytest.mark.parametrize("size", [(20, 31), (8, 40), (40, 8), (3, 5), (1, 1)])
def test_padding_is_not_corrupted(kind: str, channels: int, size: tuple[int, int]) -> None:
    """And the content of the padding has no influence on the image."""
    height, width = size
    images = photographs(40, channels)[:2].clone()
    extent = torch.tensor([[height, width], [0, 0]])
    corrupted = corrupt(images, kind, 3, [4, 5], extent)
    outside = torch.ones(40, 40, dtype=torch.bool)
    outside[:height, :width] = False
    assert torch.equal(corrupted[0][:, outside], images[0][:, outside])
    assert torch.equal(corrupted[1], images[1])
    alone = corrupt(images[:1, :, :height, :width], kind, 3, [4])
    assert torch.equal(corrupted[:1, :, :height, :width], alone)


def test_blur_and_pixelate_do_not_shift_the_image() -> None:
    """The centroid of a spot moves by less than a tenth of a pixel."""
    images = torch.zeros(1, 1, 129, 129, dtype=torch.uint8)
    images[:, :, 56:73, 56:73] = 255
    positions = torch.arange(129.0)
    for kind in ("defocus_blur", "motion_blur", "pixelate"):
        for number in range(4):
            corrupted = corrupt(images, kind, 3, [number])[0, 0].float()
            assert distance(images, corrupted) > 1
            for axis in (0, 1):
                mass = corrupted.sum(axis)
                assert float((mass * positions).sum() / mass.sum()) == pytest.approx(64, abs=0.1)


def test_blurs_scale_with_the_image_size() -> None:
    """An image and its enlargement are blurred alike, beyond the sizes that have their own
    constants."""
    images = photographs(224)[:4]
    large = images.repeat_interleave(3, 2).repeat_interleave(3, 3)
    for kind in ("defocus_blur", "motion_blur"):
        corrupted = corrupt(images, kind, 2, range(4)).float()
        enlarged = corrupt(large, kind, 2, range(4)).float()
        again = torch.nn.functional.avg_pool2d(enlarged, 3)
        assert distance(corrupted, again) < 0.15 * distance(images, corrupted)


def test_noise_has_the_published_strength() -> None:
    grey = torch.full((1, 1, 224, 224), 128, dtype=torch.uint8)
    noise = corrupt(grey, "gaussian_noise", 1, [0]).float() - 128
    assert float(noise.std()) == pytest.approx(0.08 * 255, rel=0.02)
    shot = corrupt(grey, "shot_noise", 1, [0]).float() - 128
    assert float(shot.std()) == pytest.approx(255 * (128 / 255 / 60) ** 0.5, rel=0.02)
    hit = corrupt(grey, "impulse_noise", 2, [0])
    assert float((hit == 0).float().mean()) == pytest.approx(0.045, rel=0.1)
    assert float((hit == 255).float().mean()) == pytest.approx(0.045, rel=0.1)
    small = corrupt(grey[:, :, :32, :32], "brightness", 2, [0])
    assert set(small.flatten().tolist()) == {128 + round(0.15 * 255)}


def test_brightness_and_saturation_agree_with_hsv() -> None:
    import colorsys

    images = photographs(32)[:2].clone()
    images[0, :, 0, 0] = 0
    images[0, :, 0, 1] = 77
    brighter = corrupt(images, "brightness", 3, [0, 1])
    richer = corrupt(images, "saturation", 2, [0, 1])
    for row, column in ((0, 0), (0, 1), (9, 4), (17, 30), (25, 25)):
        for number in (0, 1):
            hue, saturation, value = colorsys.rgb_to_hsv(
                *(images[number, :, row, column] / 255).tolist()
            )
            expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1))
            result = (brighter[number, :, row, column] / 255).tolist()
            assert result == pytest.approx(expected, abs=0.003)
            more = min(saturation * 2 + 0.1, 1) if saturation else 0
            expected = colorsys.hsv_to_rgb(hue, more, value)
            result = (richer[number, :, row, column] / 255).tolist()
            assert result == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0, 255])
def test_black_and_white_images_can_be_corrupted(kind: str, level: int) -> None:
    images = torch.full((1, 3, 16, 16), level, dtype=torch.uint8)
    for strength in STRENGTHS:
        corrupted = corrupt(images, kind, strength, [0])
        assert corrupted.shape == images.shape
        if kind.endswith("blur") or kind in ("contrast", "jpeg_compression", "pixelate"):
            assert (corrupted.int() - level).abs().max() <= (kind == "jpeg_compression")


def test_invalid_arguments_are_refused() -> None:
    grey = photographs(8, 1)[:2]
    assert "saturation" in kinds_for(3)
    assert "saturation" not in kinds_for(1)
    for images, kind, strength, numbers in (
        (grey, "blur", 1, [0, 1]),
        (grey, "fog", 4, [0, 1]),
        (grey, "saturation", 1, [0, 1]),
        (grey.float(), "fog", 1, [0, 1]),
        (grey.repeat(1, 2, 1, 1), "fog", 1, [0, 1]),
        (grey, "fog", 1, [0]),
    ):
        with pytest.raises(UsageError):
            corrupt(images, kind, strength, numbers)
