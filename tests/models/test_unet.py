"""U-Net: the layers of the paper, its losses against their definitions, any image size."""

from __future__ import annotations

import examples
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import models
from models.core.errors import UsageError
from models.core.family import BatchRng, DataSpec
from models.core.losses import LossSettings
from models.unet import Unet, UnetConfig, losses_of, reflect
from pipelines import recipe as recipes
from pipelines.inference.predictor import Predictor, save_image

UNET = models.get("unet")
CLASSES = ("a", "b", "c")


def spec(height: int = 32, width: int = 32, channels: int = 3, counts=(9, 8, 1)) -> DataSpec:
    mean, std = (0.5,) * channels, (0.3,) * channels
    return DataSpec("semantic_segmentation", channels, height, width, CLASSES, mean, std, counts)


def net(data: DataSpec, **settings) -> nn.Module:
    torch.manual_seed(0)
    return Unet().build(UnetConfig(**{"depth": 2, "width": 4, **settings}), data)


def batch_of(images: torch.Tensor, extents: list[tuple[int, int]] | None = None) -> dict:
    count, (height, width) = len(images), images.shape[-2:]
    extent = torch.tensor(extents or [(height, width)] * count)
    return {"image": images, "extent": extent, "key": [str(i) for i in range(count)]}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_paper_has_the_layers_of_the_paper():
    """Channels, 23 convolutions and 31 million weights of figure 1 of Ronneberger et al., 2015."""
    data = DataSpec("semantic_segmentation", 1, 512, 512, ("membrane", "cell"))
    module = UNET.build(UNET.variants["paper"], data)
    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(layers) == 23
    widths = [(m.in_channels, m.out_channels) for m in layers if m.kernel_size == (3, 3)]
    down = [(1, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512)]
    assert widths[:10] == [*down, (512, 512), (512, 1024), (1024, 1024)]
    assert sorted(widths[10:]) == sorted(
        (before, after) for w in (64, 128, 256, 512) for before, after in ((2 * w, w), (w, w))
    )
    assert sum(p.numel() for p in module.parameters()) == 31_030_658
    assert recipes.start("unet", "paper").optim["model"].momentum == 0.99


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "none"])
@pytest.mark.parametrize("up", ["transpose", "bilinear"])
@pytest.mark.parametrize("size", [(1, 1), (3, 17), (8, 8), (33, 20)])
def test_works_on_any_image_size(norm, up, size):
    """Also with a single image, in training."""
    module = net(spec(*size), norm=norm, up=up, depth=3)
    images = noise(1, 3, *size)
    assert module(images).shape == (1, 3, *size)
    mask = torch.zeros(1, *size, dtype=torch.uint8)
    losses = UNET.loss(module, {"image": images, "mask": mask})
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])


def test_padding_is_by_reflection():
    image = noise(2, 3, 5, 6)
    assert torch.equal(reflect(image, 4), F.pad(image, (0, 2, 0, 3), mode="reflect"))
    assert reflect(image, 2).shape == (2, 3, 6, 6)
    assert torch.equal(reflect(image, 1), image)
    assert torch.equal(reflect(image[..., :1, :1], 2), image[..., :1, :1].expand(-1, -1, 4, 4))


def test_each_pixel_depends_on_near_and_far_pixels():
    """The lowest level has a larger receptive field than the convolutions of the first level."""
    module = net(spec(64, 64), norm="none").eval()
    image = noise(1, 3, 64, 64).requires_grad_()
    module(image)[0, 0, 32, 32].backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()[:, 0]
    assert int(rows.min()) < 22
    assert int(rows.max()) > 42
    assert image.grad[0, :, 32, 32].any()


def plain_losses(logits, mask, weights):
    """As defined, for one image and class after the other."""
    entropies, dices = [], []
    for one, truth in zip(logits, mask):
        known = truth != 255
        shares = one.softmax(0)
        total, result = 0.0, []
        for k in range(3):
            there = known & (truth == k)
            total += float(-(shares[k].log() * there).sum() * weights[k])
            if there.any():
                both = float((shares[k] * there).sum())
                result.append(2 * both / (float((shares[k] * known).sum()) + int(there.sum())))
        entropies.append(total / max(int(known.sum()), 1))
        dices.append(1 - sum(result) / len(result) if result else 0.0)
    return sum(entropies) / len(entropies), sum(dices) / len(dices)


def test_losses_agree_with_their_definitions():
    logits = noise(4, 3, 6, 5)
    mask = torch.randint(0, 4, (4, 6, 5), generator=torch.Generator().manual_seed(1))
    mask[mask == 3] = 255
    mask[1][mask[1] == 2] = 0
    mask[2] = 255
    weights = torch.tensor([0.5, 1.0, 3.0])
    losses = losses_of(logits, mask.to(torch.uint8), weights.tolist(), 0.7)
    entropy, missed = plain_losses(logits, mask, weights)
    assert float(losses["cross_entropy"]) == pytest.approx(entropy, rel=1e-5)
    assert float(losses["dice_loss"]) == pytest.approx(missed, rel=1e-5)
    assert float(losses["loss"]) == pytest.approx(entropy + 0.7 * missed, rel=1e-5)
    known = mask != 255
    right = (logits.argmax(1) == mask).flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)
    assert float(losses["pixel_accuracy"]) == pytest.approx(float(right.mean()))
    cross = F.cross_entropy(logits[:1], mask[:1], ignore_index=255)
    (first,) = (losses_of(logits[:1], mask[:1], (), 0.0)["loss"],)
    assert float(first) == pytest.approx(float(cross), rel=1e-5)


def test_losses_of_perfect_and_wrong_predictions():
    mask = torch.tensor([[[0, 1], [2, 255]]], dtype=torch.uint8)
    sure = 50.0 * F.one_hot(mask.long() % 255, 3).movedim(-1, 1)
    assert float(losses_of(sure, mask, (), 1.0)["loss"]) < 1e-6
    assert float(losses_of(sure.roll(1, 1), mask, (), 1.0)["loss"]) > 50


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_without_labelled_pixels_the_loss_is_zero(norm):
    module = net(spec(), norm=norm)
    mask = torch.full((2, 32, 32), 255, dtype=torch.uint8)
    losses = UNET.loss(module, {"image": noise(2, 3, 32, 32), "mask": mask})
    losses["loss"].backward()
    assert float(losses["loss"].detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_the_loss_of_a_batch_is_the_mean_over_its_images():
    """Then it doesn't depend on how the batch is divided among ranks and accumulation steps."""
    module = net(spec(), norm="group")
    images = noise(4, 3, 32, 32)
    mask = torch.randint(0, 3, (4, 32, 32), generator=torch.Generator().manual_seed(2))
    mask[1, :30] = 255
    mask = mask.to(torch.uint8)
    weighed = UNET.with_loss(LossSettings("cross_entropy", (0.5, 2.0, 1.0)))
    with torch.no_grad():
        whole = weighed.loss(module, {"image": images, "mask": mask})["loss"]
        each = [
            weighed.loss(module, {"image": images[i : i + 1], "mask": mask[i : i + 1]})["loss"]
            for i in range(4)
        ]
    torch.testing.assert_close(whole, torch.stack(each).mean())


def test_patches_have_the_weight_of_images():
    module = net(spec(16, 16), norm="group")
    images, masks = noise(6, 3, 16, 16), torch.randint(0, 3, (6, 16, 16)).to(torch.uint8)
    flat = UNET.loss(module, {"image": images, "mask": masks})["loss"]
    patches = {"image": images.unflatten(0, (2, 3)), "mask": masks.unflatten(0, (2, 3))}
    assert torch.equal(UNET.loss(module, patches)["loss"], flat)


def test_rare_classes_can_count_more():
    weighed = UNET.with_loss(LossSettings("cross_entropy", (1.0, 5.0, 1.0)))
    module, images = net(spec(), norm="group"), noise(2, 3, 32, 32)
    batches = [
        {"image": images, "mask": torch.full((2, 32, 32), k, dtype=torch.uint8)} for k in range(3)
    ]
    for batch, factor in zip(batches, (1, 5, 1)):
        plain, other = (f.loss(module, batch)["cross_entropy"] for f in (UNET, weighed))
        torch.testing.assert_close(other, factor * plain)


def test_predictions_do_not_depend_on_padding():
    """The prediction depends on neither the padding nor the rest of the batch."""
    module = net(spec(), norm="batch").eval()
    images = noise(3, 3, 32, 32)
    extents = [(32, 32), (20, 11), (1, 32)]
    result = UNET.predict(module, batch_of(images, extents))
    assert [tuple(p["mask"].shape) for p in result] == extents
    other = images.clone()
    other[1, :, 20:] = 5
    other[1, :, :, 11:] = -5
    again = UNET.predict(module, batch_of(other, extents))
    assert torch.equal(again[1]["mask"], result[1]["mask"])
    (alone,) = UNET.predict(module, batch_of(images[1:2, :, :20, :11]))
    assert torch.equal(alone["mask"], result[1]["mask"])
    assert alone["mask"].dtype == torch.uint8
    assert 1 / 3 < alone["confidence"] <= 1


def test_large_images_are_predicted_in_tiles():
    """No input of the network is larger than a tile, and predictions nearly equal those of the
    whole image."""
    module = net(spec(96, 80), tile=48, overlap=24).eval()
    whole = net(spec(96, 80)).eval()
    whole.load_state_dict(module.state_dict())
    image = noise(1, 3, 96, 80)
    sizes = []
    hook = module.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[-2:]))
    (tiled,) = UNET.predict(module, batch_of(image))
    hook.remove()
    assert set(sizes) == {(48, 48)}
    (expected,) = UNET.predict(whole, batch_of(image))
    assert (tiled["mask"] == expected["mask"]).float().mean() > 0.98
    assert tiled["confidence"] == pytest.approx(expected["confidence"], abs=0.01)
    sizes.clear()
    hook = module.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[-2:]))
    UNET.predict(module, batch_of(image[..., :48, :48]))
    hook.remove()
    assert sizes == [(48, 48)]


@pytest.mark.slow
def test_learns_from_the_context_of_a_pixel():
    """The class of a square depends on pixels far from its centre: a frame around it."""
    torch.manual_seed(0)
    data = DataSpec("semantic_segmentation", 1, 32, 32, ("ground", "plain", "framed"))
    module = net(data, width=8, norm="batch")
    generator = torch.Generator().manual_seed(0)

    def made(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, masks = torch.zeros(count, 1, 32, 32), torch.zeros(count, 32, 32).to(torch.uint8)
        for image, mask in zip(images, masks):
            top, left = torch.randint(4, 14, (2,), generator=generator).tolist()
            framed = bool(torch.rand(1, generator=generator) < 0.5)
            if framed:
                image[:, top - 3 : top + 15, left - 3 : left + 15] = -1
                image[:, top - 2 : top + 14, left - 2 : left + 14] = 0
            image[:, top : top + 12, left : left + 12] = 1
            mask[top : top + 12, left : left + 12] = 1 + framed
        return images, masks

    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(40):
        images, masks = made(8)
        UNET.loss(module, {"image": images, "mask": masks})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    images, masks = made(32)
    predictions = UNET.predict(module.eval(), batch_of(images))
    records = [UNET.task.make_record(p, {"mask": m}, data) for p, m in zip(predictions, masks)]
    # One class for all squares would reach 0.5.
    assert UNET.task.metrics(records, data)["miou"] > 0.75


def test_trains_with_the_default_augmentation():
    """Patches from images of several sizes in one batch, through transform and loss."""
    settings = recipes.start("unet").with_overrides(
        {"augment.patch": 16, "augment.patches": 2, "augment.rotate": True, "augment.zoom": 0.2}
    )
    data = examples.spec(UNET)
    batch = examples.raw_batch(UNET)
    batch["extent"][:4] = torch.tensor([9, 30])
    seen = UNET.augment(settings.augment_settings(), data, train=True)(
        batch, BatchRng(0, 8, slice(0, 8))
    )
    module = net(data)
    losses = UNET.loss(module, seen)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert settings.data.fit == "pad"


@pytest.mark.slow
def test_exportable_agrees_with_predict_for_any_batch_size():
    """It returns probabilities per pixel; a prediction is the best class."""
    data = spec(20, 24)
    module = net(data).train()
    exportable = UNET.exportable(module, data)
    assert module.training
    assert not exportable.training
    images = torch.randint(0, 256, (5, 20, 24, 3), dtype=torch.uint8)
    pixels = (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.3
    predictions = UNET.predict(module.eval(), batch_of(pixels))
    with torch.no_grad():
        output_name = exportable(images)
    assert output_name.shape == (5, 20, 24, 3)
    assert torch.equal(output_name.argmax(3), torch.stack([p["mask"] for p in predictions]).long())
    confidence = [p["confidence"] for p in predictions]
    assert output_name.amax(3).mean((1, 2)).tolist() == pytest.approx(confidence, rel=1e-5)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(exportable, (images[:2],), dynamic_shapes=shapes).module()
    for count in (1, 3, 5):
        with torch.no_grad():
            torch.testing.assert_close(exported(images[:count].contiguous()), output_name[:count])


@pytest.mark.parametrize("fit", ["pad", "stretch", "crop"])
def test_predictions_have_the_size_of_the_image(fit, tmp_path):
    """Predictions of padded images are not resized: they equal the output of the network."""
    data = spec(24, 24)
    recipe = recipes.start("unet", "tiny").with_overrides({"data.fit": fit})
    torch.manual_seed(1)
    module = UNET.build(recipe.config(), data).eval()
    predictor = Predictor(recipe, data, module.state_dict())
    sizes = [(50, 37), (9, 30), (24, 24)]
    images = [(noise(3, *size, seed=i) * 60 + 128).clamp(0, 255) for i, size in enumerate(sizes)]
    pixels = [image.to(torch.uint8) for image in images]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for image, path in zip(pixels, paths):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    result = list(predictor.predict(paths))
    for one, size, image in zip(result, sizes, pixels):
        mask = one.prediction["mask"]
        assert tuple(mask.shape) == size
        assert sum(one.output["shares"].values()) == pytest.approx(1)
        seen = fit == "crop" and (min(size[0], 24) * min(size[1], 24))
        assert int((mask != 255).sum()) == (seen or size[0] * size[1])
        if fit == "pad" or size == (24, 24):
            (own,) = UNET.predict(module, batch_of((image[None].float() / 255 - 0.5) / 0.3))
            assert torch.equal(mask, own["mask"])
        picture = tmp_path / "picture.png"
        assert save_image(UNET.task.prediction_to_image(one.prediction), picture)
        assert torch.equal(torch.from_numpy(np.array(Image.open(picture))), mask)


@pytest.mark.parametrize(
    "settings",
    [
        {"depth": 0},
        {"width": 0},
        {"norm": "layer"},
        {"up": "nearest"},
        {"dropout": 1.0},
        {"dice": -1.0},
        {"dice": float("nan")},
        {"overlap": 600},
        {"tile": 0},
    ],
)
def test_invalid_settings_are_refused(settings):
    with pytest.raises(UsageError, match=r"model|tile"):
        UnetConfig(**settings)
