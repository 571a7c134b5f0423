"""DCGAN: a generator for images of any size, and the losses and updates of both networks."""

from __future__ import annotations

import math

import pytest
import torch

import models
from models.core.errors import UsageError
from models.core.family import DataSpec
from models.dcgan import DcganConfig

FAMILY = models.get("dcgan")
DATA = DataSpec("images", 1, 12, 12, (), (0.3,), (0.2,))


def network(data: DataSpec = DATA, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    return FAMILY.build(DcganConfig(**{"latent_dim": 8, "channels": (8, 16), **changes}), data)


def ask(module: torch.nn.Module, indices: list[int], **fields) -> torch.Tensor:
    predictions = FAMILY.predict(module.eval(), {"index": torch.tensor(indices), **fields})
    return torch.stack([p["image"] for p in predictions])


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize(
    "shape", [(1, 28, 28), (3, 33, 20), (1, 8, 8), (3, 17, 64), (1, 4, 5)], ids=str
)
def test_images_of_any_size_are_generated_in_that_size(shape, norm):
    data = DataSpec("images", *shape, (), (0.5,) * shape[0], (0.2,) * shape[0])
    module = network(data, channels=(4, 8, 12), generator_norm=norm, discriminator_norm=norm)
    fake = ask(module, [0, 1])
    assert fake.shape == (2, *shape)
    assert fake.dtype == torch.uint8
    batch = {"image": torch.randn(1, *shape)}  # a rank can have one image
    for _, losses in FAMILY.updates(FAMILY.parts(module.train()), batch):
        losses["loss"].backward()
        assert torch.isfinite(losses["loss"])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_radford_has_the_layers_of_the_paper():
    data = DataSpec("images", 3, 64, 64, (), (0.5,) * 3, (0.2,) * 3)
    module = FAMILY.build(FAMILY.variants["radford"], data)
    assert module.generator.start == (1024, 4, 4)
    kernels = [tuple(p.shape) for p in module.generator.parameters() if p.ndim == 4]
    assert kernels == [(1024, 512, 4, 4), (512, 256, 4, 4), (256, 128, 4, 4), (128, 3, 4, 4)]


def test_weights_are_initialised_as_in_the_paper():
    module = network(channels=(32, 64))
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1), name
            assert abs(float(parameter.detach().mean())) < 0.002, name


def test_a_fake_image_does_not_depend_on_the_rest_of_the_batch():
    module = network().eval()
    together = ask(module, [3, 4, 5, 600])
    for position, index in enumerate((3, 4, 5, 600)):
        assert torch.equal(ask(module, [index])[0], together[position])
    assert len({image.numpy().tobytes() for image in ask(module, list(range(50)))}) == 50
    assert torch.equal(ask(module, [3, 4], seed=0), together[:2]), "0 is the seed of evaluations"
    for seed in (1, 2**31, 2**32, -1):
        assert not torch.equal(ask(module, [3, 4], seed=seed), together[:2]), seed


def test_fake_images_are_normalised_like_real_ones():
    """The discriminator gets a fake image as it would get the same image from the data."""
    module = network().eval()
    latent = torch.randn(4, 8)
    pixels = module(latent)
    assert 0 <= float(pixels.detach().min()) < float(pixels.detach().max()) <= 1
    shown = module.generator(latent)
    torch.testing.assert_close(shown, (pixels - 0.3) / 0.2)


def test_losses_of_an_untrained_discriminator():
    module = network()
    torch.nn.init.zeros_(module.discriminator.head.weight)
    batch = {"image": torch.randn(6, 1, 12, 12)}
    result = {
        part: float(x["loss"].detach()) for part, x in FAMILY.updates(FAMILY.parts(module), batch)
    }
    assert result == {
        "discriminator": pytest.approx(2 * math.log(2)),
        "generator": pytest.approx(math.log(2)),
    }


def test_each_update_has_gradients_of_its_network_only():
    module = network()
    updates = FAMILY.updates(FAMILY.parts(module), {"image": torch.randn(6, 1, 12, 12)})
    for expected, other in (
        ("discriminator", module.generator),
        ("generator", module.discriminator),
    ):
        part, losses = next(updates)
        losses["loss"].backward()
        assert part == expected
        assert all(p.grad is None for p in other.parameters()), part
        assert all(p.grad is not None for p in getattr(module, part).parameters())
        module.zero_grad(set_to_none=True)
    assert next(updates, None) is None
    assert all(p.requires_grad for p in module.parameters())


def test_the_generator_learns_from_the_discriminators_new_weights():
    """The losses of the second update are computed only when it runs."""
    batch = {"image": torch.randn(6, 1, 12, 12)}
    result = []
    for bias in (0.0, 5.0):
        module = network()
        torch.manual_seed(1)
        updates = FAMILY.updates(FAMILY.parts(module), batch)
        next(updates)
        with torch.no_grad():
            module.discriminator.head.bias.fill_(bias)
        result.append(float(next(updates)[1]["loss"].detach()))
    assert result[1] < result[0] / 10


@pytest.mark.slow
def test_learns_to_generate_two_kinds_of_images():
    """Images with a white left or right half: fake images become similar."""
    module = network(DataSpec("images", 1, 8, 8, (), (0.5,), (0.5,)), discriminator_norm="none")
    images = torch.full((32, 1, 8, 8), -1.0)
    images[:, :, :, :4] = 1
    images[16:] = images[16:].flip(-1)
    parts = FAMILY.parts(module.train())
    optimizers = {
        name: torch.optim.Adam(part.parameters(), lr=2e-3, betas=(0.5, 0.999))
        for name, part in parts.items()
    }

    def apart() -> float:
        fake = ask(module, list(range(64))).float() / 127.5 - 1
        return float((fake[:, None] - images[[0, 16]]).abs().mean((2, 3, 4)).amin(1).mean())

    before = apart()
    module.train()
    for step in range(150):
        torch.manual_seed(step)
        for part, losses in FAMILY.updates(parts, {"image": images}):
            losses["loss"].backward()
            optimizers[part].step()
            for optimizer in optimizers.values():
                optimizer.zero_grad()
    assert apart() < before / 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"latent_dim": 0}, "model.latent_dim"),
        ({"channels": ()}, "model.channels"),
        ({"channels": (8, 0)}, "model.channels"),
        ({"generator_norm": "layer"}, "model.generator_norm"),
    ],
)
def test_invalid_settings_are_refused(changes, named):
    with pytest.raises(UsageError, match=named):
        DcganConfig(**changes)


def test_images_that_are_too_small_are_refused():
    with pytest.raises(UsageError, match=r"3 by 9 pixels.*data\.height"):
        network(DataSpec("images", 1, 3, 9))
