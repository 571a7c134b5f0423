"""Reconstruction: corruption of the input, metrics, and predictions in the size of the image."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
import torch

from models.core.errors import TesseraError, UsageError
from models.core.family import BatchRng, DataSpec
from models.metrics import image_quality
from models.tasks.reconstruction import RECONSTRUCTION, ReconstructionAugment, as_bytes, inside
from pipelines.data import images as data_images

DATA = DataSpec("images", 3, 28, 21, (), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
MEAN = torch.tensor(DATA.mean)[:, None, None]
STD = torch.tensor(DATA.std)[:, None, None]


def raw(count: int = 6, extents: tuple[int, int] = (28, 21)):
    generator = torch.Generator().manual_seed(1)
    shape = (count, *DATA.shape)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    extent = torch.tensor([extents]).repeat(count, 1)
    images *= inside(extent, 28, 21).byte()
    return {
        "image": images,
        "key": [str(i) for i in range(count)],
        "index": torch.arange(count),
        "size": extent.clone(),
        "extent": extent,
    }


def transformed(batch, *, train: bool = True, seed: int = 0, **settings):
    count = len(batch["key"])
    transform = RECONSTRUCTION.augment(ReconstructionAugment(**settings), DATA, train=train)
    return transform(batch, BatchRng(seed, count, slice(0, count)))


def test_without_settings_input_and_target_are_equal():
    batch = raw()
    output = transformed(batch)
    torch.testing.assert_close(output["clean"], batch["image"] / 255)
    torch.testing.assert_close(output["image"] * STD + MEAN, output["clean"])
    assert "seen" not in output
    assert set(output) == {*batch, "clean"}


@pytest.mark.parametrize("train", [True, False])
def test_noise_is_in_the_input_only(train):
    batch = raw()
    batch["image"] = torch.full_like(batch["image"], 128)
    output = transformed(batch, train=train, noise=0.1)
    torch.testing.assert_close(output["clean"], batch["image"] / 255)
    noise = output["image"] * STD + MEAN - output["clean"]
    assert float(noise.std()) == pytest.approx(0.1, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.005)
    assert torch.equal(output["seen"], as_bytes(output["image"] * STD + MEAN))
    strong = transformed(batch, train=train, noise=3.0)["image"] * STD + MEAN
    assert strong.min() > -1e-5, "as a camera would: not below black"
    assert strong.max() < 1 + 1e-5


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_mask_sets_random_squares_to_zero(train, share):
    batch = raw()
    batch["image"].clamp_(min=200)
    output = transformed(batch, train=train, mask=share)
    assert torch.equal(output["clean"], batch["image"] / 255)
    blank = (output["image"] == 0).all(1)
    whole = 7 * 10 * 3 * 3  # a grid of squares of 3 by 3 pixels, the last row of it 1 pixel high
    expected = round(share * 70) * 9
    for one in blank:
        assert expected - 7 * 6 <= int(one.sum()) <= min(expected, whole)
        corners = one[::3, ::3]
        assert int(corners.sum()) == round(share * 70)
        assert torch.equal(one, corners.repeat_interleave(3, 0)[:28].repeat_interleave(3, 1))
    assert not torch.equal(blank[0], blank[1]), "each image has its own"
    elsewhere = ~blank[:, None].expand_as(output["clean"])
    seen = output["image"] * STD + MEAN
    torch.testing.assert_close(seen[elsewhere], output["clean"][elsewhere])


def test_a_users_image_is_not_corrupted():
    settings = ReconstructionAugment(flip=True, crop_padding=3, noise=0.5, mask=0.5)
    batch = raw()
    output = RECONSTRUCTION.prepare(settings, DATA)(batch, BatchRng(0, 6, slice(0, 6)))
    torch.testing.assert_close(output["image"] * STD + MEAN, batch["image"] / 255)
    assert "seen" not in output


def test_evaluations_do_not_mirror_or_shift():
    batch = raw()
    output = transformed(batch, train=False, flip=True, crop_padding=3)
    assert torch.equal(output["clean"], batch["image"] / 255)


def test_images_are_mirrored_and_shifted_inside_their_extent():
    batch = raw(40, extents=(20, 9))
    output = transformed(batch, flip=True, crop_padding=2)
    clean, image = output["clean"], batch["image"] / 255
    assert not (clean * ~inside(batch["extent"], 28, 21)).any(), (
        "what is no picture stays where it is"
    )
    result = set()
    for after, before in zip(clean[:, :, :20, :9], image[:, :, :20, :9]):
        for way in itertools.product((False, True), range(-2, 3), range(-2, 3)):
            mirrored, down, right = way
            moved = before.flip(-1) if mirrored else before
            inner = moved[:, 2 + down : 18 + down, 2 + right : 7 + right]
            if torch.equal(inner, after[:, 2:18, 2:7]):
                result.add(way)
                break
        else:
            pytest.fail("an image is neither")
    assert len(result) > 15
    assert {way[0] for way in result} == {False, True}


def test_images_of_one_pixel_can_be_shifted():
    output = transformed(raw(4, extents=(1, 1)), flip=True, crop_padding=5)
    assert torch.equal(output["clean"], raw(4, extents=(1, 1))["image"] / 255)


def test_augmentation_does_not_depend_on_the_ranks():
    batch = raw()
    settings = ReconstructionAugment(flip=True, crop_padding=3, noise=0.2, mask=0.3)
    transform = RECONSTRUCTION.augment(settings, DATA, train=True)
    whole = transform(batch, BatchRng(5, 6, slice(0, 6)))
    part = transform({k: v[2:5] for k, v in batch.items()}, BatchRng(5, 6, slice(2, 5)))
    for name in ("image", "clean", "seen"):
        assert torch.equal(part[name], whole[name][2:5])
    other = transform(batch, BatchRng(6, 6, slice(0, 6)))
    assert not torch.equal(other["image"], whole["image"])


@pytest.mark.parametrize(
    "wrong", [{"crop_padding": -1}, {"noise": -0.1}, {"noise": math.inf}, {"mask": 1.0}]
)
def test_invalid_settings_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(UsageError, match=rf"augment\.{name} = "):
        ReconstructionAugment(**wrong)


def test_padding_larger_than_the_image_is_refused():
    with pytest.raises(UsageError, match="28 by 21 pixels"):
        RECONSTRUCTION.augment(ReconstructionAugment(crop_padding=21), DATA, train=True)


def test_targets_are_the_images_without_padding():
    batch = raw(extents=(11, 15))
    expected = [image[:, :11, :15] for image in batch["image"]]
    for given in (batch, transformed(batch, train=False, noise=0.3, mask=0.5)):
        targets = RECONSTRUCTION.targets(given)
        assert all(torch.equal(t["image"], image) for t, image in zip(targets, expected))


def prediction(image: torch.Tensor, numbers: int = 8, **more):
    code = torch.arange(numbers) / 2
    return {"image": image, "code": code, "bits": 16 * numbers, **more}


def test_metrics_are_means_over_the_images():
    batch = raw(4)
    targets = RECONSTRUCTION.targets(batch)
    output = [(t["image"] / 255 + 0.02 * i).clamp(0, 1) for i, t in enumerate(targets)]
    records = [
        RECONSTRUCTION.make_record(prediction(image), target, DATA)
        for image, target in zip(output, targets)
    ]
    metrics = RECONSTRUCTION.metrics(records, DATA)
    pairs = [(m, t["image"] / 255) for m, t in zip(output, targets)]
    assert metrics["mse"] == pytest.approx(sum(image_quality.mse(*p) for p in pairs) / 4, rel=1e-5)
    assert metrics["psnr"] == pytest.approx(
        sum(image_quality.psnr(*p, peak=1) for p in pairs) / 4, rel=1e-5
    )
    assert metrics["ssim"] == pytest.approx(sum(image_quality.ssim(*p, peak=1) for p in pairs) / 4)
    assert metrics["bits_per_pixel"] == 8 * 16 / (28 * 21)
    assert metrics["compression"] == (28 * 21 * 3 * 8) / (8 * 16)
    for seed in range(5):
        random.Random(seed).shuffle(records)
        assert RECONSTRUCTION.metrics(records, DATA) == metrics
    assert RECONSTRUCTION.error_score(records[0]) == records[0]["mse"]


def test_reconstructions_are_not_rounded_to_bytes():
    (target,) = RECONSTRUCTION.targets(raw(1))
    output = (target["image"] + 0.4) / 255
    record = RECONSTRUCTION.make_record(prediction(output), target, DATA)
    assert record["mse"] == pytest.approx((0.4 / 255) ** 2, rel=1e-3)


def test_metrics_of_no_records_are_refused():
    with pytest.raises(TesseraError, match="no predictions"):
        RECONSTRUCTION.metrics([], DATA)


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
@pytest.mark.parametrize(
    "size", [(28, 21), (20, 13), (40, 60), (10, 50), (29, 21), (7, 21), (1, 1)]
)
def test_reconstructions_are_converted_to_the_image_size(fit, size):
    """A network that returns its input reconstructs the image, as far as it was visible."""
    rows, columns = (torch.arange(side) / 100 for side in size)
    image = (100 + 50 * (rows[:, None] + columns).sin()).expand(3, -1, -1).round().byte()
    fitted = data_images.fit_image(image, 28, 21, fit)
    (extent,) = data_images.extents(torch.tensor([size]), 28, 21, fit).tolist()
    seen = fitted[:, : extent[0], : extent[1]] / 255
    restored = RECONSTRUCTION.to_original_size(
        prediction(seen), data_images.view(size, 28, 21, fit)
    )
    output = as_bytes(restored["image"]).int()
    assert output.shape == image.shape
    if fit != "crop":
        assert (output - image).abs().max() <= 2
        return
    shown = output != 0
    assert torch.equal(output[shown], image.int()[shown])
    kept = min(size[0], 28) * min(size[1], 21)
    assert int(shown.sum()) == 3 * kept


def test_predictions_are_plain_json():
    image = torch.rand(3, 28, 21)
    answer = RECONSTRUCTION.prediction_to_json(prediction(image, 4, mse=0.01), DATA)
    assert json.loads(json.dumps(answer)) == answer
    assert answer == {"mse": 0.01, "psnr": 20, "code": [0, 0.5, 1, 1.5], "bits": 64}
    assert set(RECONSTRUCTION.prediction_to_json(prediction(image, 4), DATA)) == {"code", "bits"}


def test_panels_show_the_input_if_it_was_corrupted():
    image = torch.randint(0, 256, DATA.shape, dtype=torch.uint8)
    output = prediction(image / 255, mse=0.01)
    target = {"image": image}
    plain = RECONSTRUCTION.panels(image, output, target, DATA)
    assert [p.caption for p in plain] == ["original", "20.0 dB"]
    assert torch.equal(plain[1].image, image)
    output["seen"] = 255 - image
    corrupted = RECONSTRUCTION.panels(image, output, target, DATA)
    assert [p.caption for p in corrupted] == ["original", "input", "20.0 dB"]
    assert torch.equal(corrupted[1].image, 255 - image)
    (decoded,) = RECONSTRUCTION.panels(image, prediction(image / 255), None, DATA)
    assert decoded.caption == "from a code"


def test_sample_panels_show_target_and_corrupted_input():
    batch = raw(3, extents=(11, 15))
    (group, *_) = RECONSTRUCTION.sample_panels(transformed(batch), DATA)
    assert torch.equal(group[0].image, batch["image"][0, :, :11, :15])
    assert len(group) == 1
    output = transformed(batch, mask=0.5)
    (group, *_) = RECONSTRUCTION.sample_panels(output, DATA)
    assert torch.equal(group[0].image, batch["image"][0, :, :11, :15])
    assert torch.equal(group[1].image, output["seen"][0, :, :11, :15])


def test_the_image_file_is_rounded():
    values = torch.tensor([0.0, 0.4, 0.6, 254.6, 255.0, 300, -20]) / 255
    output = RECONSTRUCTION.prediction_to_image(prediction(values.reshape(1, 1, 7)))
    assert output.flatten().tolist() == [0, 0, 1, 255, 255, 255, 0]
