from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import models
from models.core.errors import UsageError
from models.core.family import BatchRng, DataSpec
from models.super_resolution import SuperResolutionConfig
from pipelines import recipe as recipes
from pipelines.inference.predictor import Predictor, save_image

FAMILY = models.get("super_resolution")
TASK = FAMILY.task
DATA = DataSpec("images", 3, 48, 48, (), (0.5, 0.4, 0.3), (0.3, 0.2, 0.25))
GREY = DataSpec("images", 1, 48, 48, (), (0.4,), (0.2,))


def discs(height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """uint8 (C, H, W): sharp, antialiased discs of many colours, which bicubic makes soft."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    image = torch.full((channels, height, width), 0.5)
    for _ in range(12):
        y, x, size, *colour = torch.rand(3 + channels, generator=generator).tolist()
        far = ((rows - y * height) ** 2 + (columns - x * width) ** 2).sqrt()
        inside = (3 + 10 * size - far + 0.5).clamp(0, 1)
        image = image + inside * (torch.tensor(colour)[:, None, None] - image)
    return (image * 255).round().to(torch.uint8)


def batch_of(*images: torch.Tensor) -> dict:
    sizes = torch.tensor([image.shape[-2:] for image in images])
    frame = torch.full(
        (len(images), images[0].shape[0], *sizes.amax(0).tolist()), 255, dtype=torch.uint8
    )
    for position, image in zip(frame, images):
        position[:, : image.shape[-2], : image.shape[-1]] = image
    return {
        "image": frame,
        "key": [f"image-{i}" for i in range(len(images))],
        "index": torch.arange(len(images)),
        "size": sizes,
        "extent": sizes.clone(),
    }


def seen(batch: dict, *, train: bool, data: DataSpec = DATA, seed: int = 0, **augment) -> dict:
    count = len(batch["key"])
    transform = FAMILY.augment(TASK.augment_settings(**augment), data, train=train)
    return transform(batch, BatchRng(seed, count, slice(0, count)))


def built(variant: str = "tiny", data: DataSpec = DATA, **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    config = dataclasses.replace(FAMILY.variants[variant], **settings)
    return FAMILY.build(config, data).eval()


def metrics(module: torch.nn.Module, *images: torch.Tensor) -> dict[str, float]:
    batch = batch_of(*images)
    predictions = FAMILY.predict(module, seen(batch, train=False))
    pairs = zip(predictions, TASK.targets(batch))
    return TASK.metrics([TASK.make_record(p, t, DATA) for p, t in pairs], DATA)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("variant", sorted(FAMILY.variants))
def test_every_variant_enlarges_colour_and_grey_by_every_scale(variant, scale):
    for data in (DATA, GREY):
        net = built(variant, data, scale=scale, blocks=2)
        with torch.no_grad():
            made = net(torch.randn(1, data.channels, 7, 5))
        assert made.shape == (1, data.channels, 7 * scale, 5 * scale)


@pytest.mark.parametrize(("scale", "millions"), [(2, 1.37), (3, 1.55), (4, 1.52)])
def test_edsr_has_as_many_parameters_as_published(scale, millions):
    count = sum(p.numel() for p in built("edsr", scale=scale).parameters())
    assert round(count / 1e6, 2) == millions


def test_begins_close_to_bicubic_interpolation():
    result = metrics(built(), discs(48, 48), discs(40, 32, seed=1))
    assert abs(result["psnr_gain"]) < 0.2
    far = metrics(built(bicubic=False), discs(48, 48))
    assert far["psnr_gain"] < -5, "the control: without it, nothing is known at the beginning"


@pytest.mark.slow
def test_learns_to_exceed_bicubic_interpolation():
    module = built().train()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for step in range(60):
        images = [discs(48, 48, seed=10 + 2 * (step % 2) + i) for i in range(2)]
        batch = seen(batch_of(*images), train=True, seed=step, patch=32, patches=4)
        FAMILY.loss(module, batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert metrics(module.eval(), discs(48, 48), discs(48, 48, seed=1))["psnr_gain"] > 0.3


def test_a_recipe_with_different_scales_is_refused():
    recipe = recipes.start("super_resolution")
    with pytest.raises(UsageError, match=r"model.scale = 3, but augment.scale = 2"):
        recipe.with_overrides({"model.scale": 3})
    for scale in (3, 4):
        changed = recipe.with_overrides({"model.scale": scale, "augment.scale": scale})
        assert (changed.config().scale, changed.augment_settings().scale) == (scale, scale)


def test_the_loss_refuses_different_scales():
    batch = seen(batch_of(discs(48, 48)), train=True, scale=2, patch=24)
    with pytest.raises(UsageError, match=r"model.scale and augment.scale"):
        FAMILY.loss(built(scale=3), batch)


def test_the_loss_of_a_batch_is_the_mean_over_its_images():
    batch = seen(batch_of(*(discs(48, 48, seed=s) for s in range(4))), train=True, patch=24)
    net = built()
    whole = float(FAMILY.loss(net, batch)["loss"].detach())
    parts = [{n: v[rows] for n, v in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    first, rest = (float(FAMILY.loss(net, part)["loss"].detach()) for part in parts)
    assert whole == pytest.approx((first + 3 * rest) / 4, rel=1e-5)


def test_predictions_do_not_depend_on_padding():
    images = [discs(48, 40), discs(23, 31, seed=1), discs(2, 3, seed=2)]
    net = built()
    together = FAMILY.predict(net, seen(batch_of(*images), train=False))
    for prediction, image in zip(together, images):
        (alone,) = FAMILY.predict(net, seen(batch_of(image), train=False))
        assert torch.equal(prediction["image"], alone["image"])
        assert torch.equal(prediction["low"], alone["low"])
        height, width = (side // 2 * 2 for side in image.shape[-2:])
        assert prediction["image"].shape == (3, height, width)


def test_tiles_give_the_result_of_the_whole_image():
    image = discs(200, 170)
    whole, tiled = built(tile=512), built(tile=64, overlap=32)
    batch = seen(batch_of(image), train=False)
    calls: list[tuple[int, ...]] = []
    tiled.register_forward_hook(lambda _, given, __: calls.append(tuple(given[0].shape)))
    (first,), (second,) = (FAMILY.predict(net, batch) for net in (whole, tiled))
    assert max(max(shape[-2:]) for shape in calls) == 64
    assert (first["image"].int() - second["image"].int()).abs().max() <= 1


@pytest.mark.parametrize("data", [DATA, GREY], ids=["colour", "grey"])
def test_a_users_file_of_any_size_is_enlarged(tmp_path, data):
    recipe = recipes.start("super_resolution", "tiny")
    predictor = Predictor(recipe, data, built("tiny", data).state_dict())
    image = discs(61, 90, data.channels)
    save_image(image, tmp_path / "a.png")
    (result,) = predictor.predict([tmp_path / "a.png"])
    assert {**result.output, "path": ""} == {"path": "", "height": 122, "width": 180, "scale": 2}
    assert torch.equal(result.prediction["low"], image)
    assert save_image(predictor.task.prediction_to_image(result.prediction), tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as written:
        assert written.size == (180, 122)
        plain = np.asarray(written.resize((90, 61), Image.Resampling.BICUBIC)).astype(int)
    given = image.permute(1, 2, 0).squeeze(-1).numpy().astype(int)
    assert abs(plain - given).mean() < 3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kind": "gan"}, "model.kind"),
        ({"scale": 8}, "model.scale"),
        ({"upsampler": "none"}, "model.upsampler"),
        ({"width": 1}, "model.width = 1"),
        ({"blocks": 0}, "model.blocks = 0"),
        ({"residual_scale": 0.0}, "model.residual_scale"),
        ({"tile": 64, "overlap": 40}, "model.overlap"),
    ],
)
def test_invalid_settings_are_refused(settings, named):
    with pytest.raises(UsageError, match=named):
        SuperResolutionConfig(**settings)
