"""Autoencoder: image sizes, codes and their rounding, the variational loss, and decoding of
codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models
from models.autoencoder import Net
from models.core.errors import UsageError
from models.core.family import BatchRng, DataSpec
from models.tasks.reconstruction import ReconstructionAugment
from pipelines import recipe as recipes
from pipelines.inference.predictor import Predictor
from pipelines.interfaces import Version
from pipelines.workflows import predict

FAMILY = models.get("autoencoder")
TINY = FAMILY.variants["tiny"]
GREY = DataSpec("images", 1, 16, 12, (), (0.4,), (0.3,))


def build(data: DataSpec = GREY, seed: int = 0, **settings) -> Net:
    torch.manual_seed(seed)
    return FAMILY.build(dataclasses.replace(TINY, **settings), data)


def squares(count: int = 8, data: DataSpec = GREY, seed: int = 0, **augment):
    """Grey squares on black, transformed."""
    draws = np.random.default_rng(seed)
    images = torch.zeros(count, *data.shape, dtype=torch.uint8)
    for image in images:
        top, left = draws.integers(0, data.height - 5), draws.integers(0, data.width - 5)
        image[:, top : top + 5, left : left + 5] = int(draws.integers(100, 256))
    extent = torch.tensor([[data.height, data.width]]).repeat(count, 1)
    batch = {"image": images, "key": [str(i) for i in range(count)], "extent": extent}
    transform = FAMILY.augment(ReconstructionAugment(**augment), data, train=True)
    return transform(batch, BatchRng(seed, count, slice(0, count)))


@pytest.mark.parametrize("variational", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (3, 9, 13), (1, 28, 28), (3, 17, 70), (3, 1, 1), (1, 5, 33)]
)
def test_trains_on_a_single_image_of_any_size(shape, variational):
    data = DataSpec("images", *shape, (), (0.5,) * shape[0], (0.2,) * shape[0])
    net = build(data, variational=variational).train()
    batch = {"image": torch.randn(1, *shape), "clean": torch.rand(1, *shape)}
    batch["extent"] = torch.tensor([shape[1:]])
    losses = FAMILY.loss(net, batch)
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(p.grad is not None for p in net.parameters())
    with torch.no_grad():
        reconstruction, code, _ = net.eval()(batch["image"])
    assert reconstruction.shape == (1, *shape)
    assert code.shape == (1, TINY.code)
    assert 0 <= reconstruction.min() <= reconstruction.max() <= 1
    assert max(net.core[1:]) <= 8


def test_the_smallest_feature_map_does_not_grow_with_the_image():
    net = build(DataSpec("images", 3, 480, 640, (), (0.5,) * 3, (0.5,) * 3), width=64)
    assert net.core == (256, 4, 5)


def test_overfits_a_few_images():
    net, batch = build(), squares()
    optimizer = torch.optim.Adam(net.parameters(), 0.005)
    result = []
    for _ in range(150):
        loss = FAMILY.loss(net, batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        result.append(float(loss.detach()))
    flat = (batch["clean"] - batch["clean"].mean(0)).square().mean()
    assert result[-1] < 0.1 * flat, "better than the mean of all"


def test_padding_is_excluded_from_the_loss():
    net, batch = build(), squares()
    batch["extent"][:, 0], batch["extent"][:, 1] = 9, 7
    loss = FAMILY.loss(net, batch)["loss"]
    reconstruction = net(batch["image"])[0]
    inner = (slice(None), slice(None), slice(9), slice(7))
    torch.testing.assert_close(loss, (reconstruction - batch["clean"])[inner].square().mean())
    batch["clean"][:, :, 9:], batch["clean"][:, :, :, 7:] = 5, 5
    torch.testing.assert_close(FAMILY.loss(net, batch)["loss"], loss)
    (prediction, *_) = FAMILY.predict(net.eval(), batch)
    assert prediction["image"].shape == (1, 9, 7)


def test_predictions_are_decoded_from_rounded_codes():
    net, batch = build(code_bits=16).eval(), squares()
    exact = build(code_bits=32).eval()
    for one, other in zip(FAMILY.predict(net, batch), FAMILY.predict(exact, batch)):
        assert torch.equal(one["code"], other["code"].half().float())
        assert not torch.equal(one["code"], other["code"])
        assert (one["bits"], other["bits"]) == (16 * TINY.code, 32 * TINY.code)


@pytest.mark.parametrize("bits", [16, 32])
def test_the_reconstruction_depends_on_the_code_only(bits):
    net, batch = build(code_bits=bits).eval(), squares()
    predictions = FAMILY.predict(net, batch)
    decoded = FAMILY.decode(net, torch.stack([p["code"] for p in predictions]))
    for prediction, again in zip(predictions, decoded, strict=True):
        torch.testing.assert_close(again["image"], prediction["image"])
        assert torch.equal(again["code"], prediction["code"])


def test_huge_codes_stay_finite():
    net, batch = build(code_bits=16).eval(), squares()
    net.to_code.weight.data *= 1e9
    assert all(torch.isfinite(p["code"]).all() for p in FAMILY.predict(net, batch))


def test_kl_agrees_with_torch_distributions():
    net, batch = build(variational=True), squares()
    with torch.no_grad():
        result = net.to_code(net.down(batch["image"]).flatten(1))
        distance = net(batch["image"])[2]
    mean, log_variance = result.split(TINY.code, 1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0)
    ).sum(1)
    torch.testing.assert_close(distance, expected)


def test_the_variational_loss_is_weighted_by_beta():
    batch, values = squares(), 16 * 12
    parts = []
    for beta in (0.0, 0.5):
        net = build(variational=True, beta=beta)
        torch.manual_seed(1)
        losses = FAMILY.loss(net, batch)
        parts.append(losses)
        torch.testing.assert_close(losses["loss"], losses["mse"] + beta * losses["kl"] / values)
    assert torch.equal(parts[0]["mse"], parts[1]["mse"])
    assert set(FAMILY.loss(build(), batch)) == {"loss"}


def test_codes_are_sampled_in_training_only():
    net, batch = build(variational=True), squares()

    def made(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return net(batch["image"])[0]

    assert torch.equal(made(0), made(0))
    assert not torch.allclose(made(0), made(1))
    net.eval()
    assert torch.equal(made(0), made(1))


def test_variants_set_the_corruption():
    settings = {v: recipes.start("autoencoder", v).augment_settings() for v in FAMILY.variants}
    assert settings["denoising"].noise > 0
    assert settings["inpainting"].mask > 0
    assert not settings["base"].noise
    assert not settings["base"].mask
    assert FAMILY.variants["variational"].variational


@pytest.mark.parametrize(
    "wrong", [{"code": 0}, {"width": 0}, {"beta": -1.0}, {"beta": float("nan")}, {"code_bits": 8}]
)
def test_invalid_settings_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(UsageError, match=rf"model\.{name} = "):
        recipes.start("autoencoder").with_overrides({f"model.{name}": wrong[name]})


def test_codes_of_another_length_or_not_finite_are_refused():
    net = build().eval()
    with pytest.raises(UsageError, match=r"codes of 5 numbers.*have 16"):
        FAMILY.decode(net, torch.zeros(2, 5))
    with pytest.raises(UsageError, match="not finite"):
        FAMILY.decode(net, torch.full((1, 16), float("nan")))


def test_an_image_of_another_size_is_refused():
    with pytest.raises(UsageError, match="20 by 20 pixels for an autoencoder of 16 by 12"):
        build()(torch.zeros(1, 1, 20, 20))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Image files of the network's size, and one of another size."""
    files = []
    for number, batch in enumerate((squares(3)["clean"], torch.rand(1, 1, 40, 30))):
        for row, image in enumerate(batch):
            path = tmp_path / f"image-{number}-{row}.png"
            Image.fromarray((image[0] * 255).byte().numpy()).save(path)
            files.append(path)
    return files


@pytest.mark.parametrize("variant", ["base", "tiny", "variational"])
def test_written_codes_can_be_decoded(variant, paths, tmp_path):
    """As tessera predict does it: a line an image, and from these lines the images again."""
    recipe = recipes.start("autoencoder", variant)
    torch.manual_seed(3)
    weights = FAMILY.build(recipe.config(), GREY).state_dict()
    predictor = Predictor(recipe, GREY, weights)
    model = predict.TrainedModel(predictor, Version("squares", 1, "run"))
    options = predict.PredictionOptions(tuple(map(str, paths)), results=tmp_path / "made")
    lines = [result.to_dict() for result in model.run(options)]
    codes = tmp_path / "answers.jsonl"
    codes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    decode = predict.PredictionOptions(
        decode=codes, results=tmp_path / "decoded", annotated=tmp_path / "p"
    )
    again = [result.to_dict() for result in model.run(decode)]
    assert [line["line"] for line in again] == [1, 2, 3, 4]
    for line, other, path in zip(lines, again, paths):
        assert 0 < line["mse"] < 1
        first = np.asarray(Image.open(tmp_path / "made" / line["result"])).astype(int)
        second = np.asarray(Image.open(tmp_path / "decoded" / other["result"])).astype(int)
        assert first.shape == np.asarray(Image.open(path)).shape, "the image's own size"
        assert second.shape == (16, 12), "the network's size"
        assert (first.shape == second.shape) == (path != paths[-1])
        if path != paths[-1]:
            assert np.abs(first - second).max() <= 1
        assert (tmp_path / "p" / other["annotated"]).exists()
