"""Image quality against scikit-image, luma against ITU-R BT.601, resizing against Pillow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from models.core.errors import TesseraError
from models.metrics import image_quality


def picture(*shape: int, seed: int = 0) -> torch.Tensor:
    """uint8 (C, H, W) with smooth parts, an edge and noise."""
    channels, height, width = shape
    draws = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / (3 + c)) * np.cos(columns / (5 + c + seed)) for c in range(channels)]
    pixels = 128 + 60 * np.stack(waves) + 40 * (columns > width // 2)
    pixels = pixels + draws.normal(0, 8, shape)
    return torch.from_numpy(pixels.round().clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 40, 33), (3, 11, 12)])
@pytest.mark.parametrize("peak", [255, 1])
def test_metrics_agree_with_scikit_image(shape, peak):
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    first, second = (picture(*shape, seed=s).double() / (255 / peak) for s in (0, 1))
    arrays = first.numpy(), second.numpy()
    assert image_quality.mse(first, second) == pytest.approx(np.mean((arrays[0] - arrays[1]) ** 2))
    assert image_quality.psnr(first, second, peak=peak) == pytest.approx(
        peak_signal_noise_ratio(*arrays, data_range=peak), rel=1e-12
    )
    expected = structural_similarity(
        *arrays,
        data_range=peak,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=0,
    )
    assert image_quality.ssim(first, second, peak=peak) == pytest.approx(expected, abs=1e-12)


def test_bytes_are_compared_without_overflow():
    black, white = torch.zeros(1, 12, 12).byte(), torch.full((1, 12, 12), 255).byte()
    assert image_quality.mse(black, white) == 255**2
    assert image_quality.psnr(black, white, peak=255) == 0
    assert 0 < image_quality.ssim(black, white, peak=255) < 0.001


def test_equal_images_have_finite_metrics():
    image = picture(3, 20, 20)
    assert image_quality.psnr(image, image, peak=255) == image_quality.MAX_DECIBELS == 100
    assert image_quality.ssim(image, image, peak=255) == pytest.approx(1)
    nearly = image.double() + 1e-9
    assert image_quality.psnr(image.double(), nearly, peak=255) == 100


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 40), (1, 1, 1)])
def test_the_window_is_cropped_to_smaller_images(shape):
    first = picture(*shape)
    assert image_quality.ssim(first, first, peak=255) == pytest.approx(1)
    assert -1 <= image_quality.ssim(first, torch.zeros_like(first), peak=255) < 0.9


def test_images_of_different_shapes_are_refused():
    with pytest.raises(TesseraError, match=r"\(1, 8, 8\) and \(3, 8, 8\)"):
        image_quality.mse(picture(1, 8, 8), picture(3, 8, 8))


def test_luma_agrees_with_bt601():
    """MATLAB's documentation: black 16, white 235; the primaries by the standard's weights."""
    from skimage.color import rgb2ycbcr

    colours = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)]
    image = torch.tensor(colours).T.reshape(3, 1, 5).byte()
    expected = [16, 235, 81.481, 144.553, 40.966]
    assert image_quality.luma(image).flatten().tolist() == pytest.approx(expected)
    pixels = picture(3, 9, 7)
    theirs = rgb2ycbcr(pixels.permute(1, 2, 0).numpy())[..., 0]
    np.testing.assert_allclose(image_quality.luma(pixels)[0].numpy(), theirs, atol=1e-9)


def test_luma_of_grey_is_grey():
    grey = picture(1, 6, 6)
    assert torch.equal(image_quality.luma(grey), grey.double())


def mirrored_and_resized(channel: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pillow's bicubic resize of an image with mirrored edges, cropped again, as in MATLAB.
    Without mirroring, Pillow ignores pixels beyond the edge."""
    rows, columns = channel.shape
    large = np.pad(channel, ((2 * rows,) * 2, (2 * columns,) * 2), mode="symmetric")
    resized = Image.fromarray(large).resize((5 * width, 5 * height), Image.Resampling.BICUBIC)
    return np.asarray(resized)[2 * height : 3 * height, 2 * width : 3 * width]


@pytest.mark.parametrize(
    ("height", "width"), [(20, 15), (10, 8), (13, 7), (80, 60), (41, 61), (40, 9), (40, 30), (1, 1)]
)
def test_resizing_agrees_with_reflected_bicubic(height, width):
    image = picture(2, 40, 30).double()
    resized = image_quality.bicubic(image, height, width)
    assert resized.dtype == torch.float64
    assert resized.shape == (2, height, width)
    for ours, channel in zip(resized, image):
        theirs = mirrored_and_resized(channel.float().numpy(), height, width)
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-3)


def test_resizing_agrees_with_torch_away_from_the_edges():
    image = picture(3, 48, 36).double()
    ours = image_quality.bicubic(image, 24, 18)
    theirs = F.interpolate(image[None], (24, 18), mode="bicubic", antialias=True)[0]
    inner = (slice(None), slice(3, -3), slice(3, -3))
    torch.testing.assert_close(ours[inner], theirs[inner])
    assert not torch.allclose(ours, theirs), "the edges differ"
    plain = F.interpolate(image[None], (24, 18), mode="bicubic")[0]
    assert not torch.allclose(ours[inner], plain[inner], atol=1), "the control: no antialias"


def test_resizing_supports_batches_keeps_the_dtype_and_has_a_gradient():
    images = torch.rand(2, 3, 16, 12, requires_grad=True)
    resized = image_quality.bicubic(images, 8, 24)
    assert resized.dtype == torch.float32
    torch.testing.assert_close(resized[1], image_quality.bicubic(images[1], 8, 24))
    resized.sum().backward()
    assert images.grad is not None
    assert math.isclose(float(images.grad.sum()), resized.numel(), rel_tol=1e-5)
    constant = torch.full((1, 9, 9), 7).byte()
    assert image_quality.bicubic(constant, 5, 20).sub(7).abs().max() < 1e-12
