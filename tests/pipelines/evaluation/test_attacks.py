"""Adversarial attacks: the exact optimum of a linear network, the limits, and no lasting
changes."""

from __future__ import annotations

import examples
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from models.core.errors import UsageError
from models.core.family import Batch, BatchRng, DataSpec
from pipelines.evaluation.attacks import KINDS, attack, fgsm, pgd
from pipelines.evaluation.gradients import frozen

CLASSIFIERS = [n for n in models.names() if models.get(n).task.name == "classification"]
EPSILON = 8 / 255
SPEC = examples.SPECS["classification"]


def limits(data: DataSpec) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    return -mean / std, (1 - mean) / std


def allowed(data: DataSpec) -> Tensor:
    return EPSILON / torch.tensor(data.std)[:, None, None]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Batch]:
    """The tiny variant of `cnn`, trained for some steps on which quarter of an image is bright,
    and a batch of these images."""
    family = models.get("cnn")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 128, (128, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.arange(128) % 4
    for image, label in zip(images, labels.tolist()):
        row, column = 8 * (label // 2), 8 * (label % 2)
        image[:, row : row + 8, column : column + 8] += 24
    raw: Batch = {"image": images, "label": labels, "index": torch.arange(128) + 1000}
    raw["key"] = [str(i) for i in range(128)]
    settings = family.task.augment_settings()
    batch = family.augment(settings, SPEC, train=False)(raw, BatchRng(0, 128, slice(0, 128)))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        family.loss(net, batch)["loss"].backward()
        optimizer.step()
    net.zero_grad()
    return net, batch


def test_fgsm_reaches_the_optimum_of_a_linear_network() -> None:
    """The logistic loss falls with w·x, so the worst image in the ball is x - epsilon sign(w),
    clipped to the valid range."""
    weights = torch.tensor([[1.0, -2.0], [0.5, -0.25]])
    images = torch.tensor([[[[0.2, 0.5], [0.02, 0.97]]]])

    def loss(x: Tensor) -> Tensor:
        return F.softplus(-(x * weights).sum((1, 2, 3)))

    low, high, epsilon = torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.full((1, 1, 1), 0.1)
    result = fgsm(loss, images, epsilon, low, high)
    torch.testing.assert_close(result, torch.tensor([[[[0.1, 0.6], [0.0, 1.0]]]]))
    for seed in range(3):
        start = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        more = pgd(loss, images, epsilon, low, high, steps=10, step=epsilon / 4, start=start)
        torch.testing.assert_close(more, result)


def test_attacks_increase_the_loss_of_each_image(trained: tuple[nn.Module, Batch]) -> None:
    """PGD at least as much as FGSM, and both far more than noise of the same size."""
    net, batch = trained
    family = models.get("cnn")
    losses = {}
    for kind in KINDS:
        images = attack(family, net, batch, SPEC, kind, EPSILON)
        losses[kind] = F.cross_entropy(net(images), batch["label"], reduction="none").detach()
    noise = torch.randn(batch["image"].shape, generator=torch.Generator().manual_seed(1)).sign()
    noisy = batch["image"] + allowed(SPEC) * noise
    plain = F.cross_entropy(net(batch["image"]), batch["label"], reduction="none").detach()
    losses["noise"] = F.cross_entropy(net(noisy), batch["label"], reduction="none").detach()
    assert losses["fgsm"].mean() > plain.mean() + 3 * (losses["noise"].mean() - plain.mean()).abs()
    assert losses["pgd"].mean() >= losses["fgsm"].mean()
    assert (losses["fgsm"] > plain).float().mean() > 0.95


def test_a_larger_epsilon_increases_the_loss_more(trained: tuple[nn.Module, Batch]) -> None:
    net, batch = trained
    rights = []
    for epsilon in (0.0, EPSILON / 4, EPSILON, 4 * EPSILON):
        images = attack(models.get("cnn"), net, batch, SPEC, "pgd", epsilon)
        rights.append(float((net(images).argmax(1) == batch["label"]).float().mean()))
        if not epsilon:
            assert torch.equal(images, batch["image"])
    assert rights == sorted(rights, reverse=True)
    assert rights[0] > 0.9
    assert rights[-1] < 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_can_be_attacked_and_is_not_changed(name: str, kind: str) -> None:
    family = models.get(name)
    module, batch = examples.tiny(family).train(), examples.train_batch(family)
    first = next(module.children())
    first.eval()
    parameters = list(module.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    state = {key: value.clone() for key, value in module.state_dict().items()}
    images = attack(family, module, batch, SPEC, kind, EPSILON, steps=3)
    assert not images.requires_grad
    assert images.shape == batch["image"].shape
    low, high = limits(SPEC)
    assert ((images - batch["image"]).abs() <= allowed(SPEC) * (1 + 1e-5)).all()
    assert ((images >= low - 1e-6) & (images <= high + 1e-6)).all()
    assert (images != batch["image"]).float().mean() > 0.5
    assert module.training
    assert not first.training
    assert all(part.training for part in list(module.children())[1:])
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    assert [p.grad is None for p in parameters] == [n != 1 for n in range(len(parameters))]
    assert (parameters[1].grad == 1).all()
    after = module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())


def test_a_network_is_restored_after_an_error(trained: tuple[nn.Module, Batch]) -> None:
    net, _ = trained
    net.train()
    with pytest.raises(KeyError), frozen(net):
        raise KeyError
    assert net.training
    assert all(p.requires_grad for p in net.parameters())


def test_random_starts_depend_only_on_the_sample(trained: tuple[nn.Module, Batch]) -> None:
    net, batch = trained
    family = models.get("cnn")
    whole = attack(family, net, batch, SPEC, "pgd", EPSILON, steps=1)
    rows = torch.tensor([90, 3, 17])
    part = {name: batch[name][rows] for name in ("image", "label", "index")}
    again = attack(family, net, part, SPEC, "pgd", EPSILON, steps=1)
    torch.testing.assert_close(again, whole[rows])
    other = {**part, "index": part["index"] + 1}
    assert not torch.equal(attack(family, net, other, SPEC, "pgd", EPSILON, steps=1), again)
    smoothed = {**part, "target": torch.full((3, 4), 0.25)}
    assert torch.equal(attack(family, net, smoothed, SPEC, "pgd", EPSILON, steps=1), again)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_not_attacked(trained: tuple[nn.Module, Batch], kind: str) -> None:
    net, batch = trained
    framed = {**batch, "extent": torch.tensor([[10, 7]]).repeat(128, 1)}
    images = attack(models.get("cnn"), net, framed, SPEC, kind, EPSILON)
    changed = images != batch["image"]
    assert changed[:, :, :10, :7].float().mean() > 0.5
    assert not changed[:, :, 10:].any()
    assert not changed[:, :, :, 7:].any()


def test_attacks_are_the_same_under_no_grad(trained: tuple[nn.Module, Batch]) -> None:
    net, batch = trained
    family = models.get("cnn")
    expected = attack(family, net, batch, SPEC, "fgsm", EPSILON)
    with torch.no_grad():
        assert torch.equal(attack(family, net, batch, SPEC, "fgsm", EPSILON), expected)


def test_tasks_that_cannot_be_attacked_are_refused(trained: tuple[nn.Module, Batch]) -> None:
    net, batch = trained
    cnn, unlabelled = models.get("cnn"), {"image": batch["image"], "index": batch["index"]}
    for family, given, kind, epsilon in (
        (cnn, batch, "cw", EPSILON),
        (cnn, unlabelled, "fgsm", EPSILON),
        (cnn, batch, "fgsm", -0.1),
        (models.get("unet"), batch, "fgsm", EPSILON),
    ):
        with pytest.raises(UsageError):
            attack(family, net, given, SPEC, kind, epsilon)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("name", ["rnn", "cnn"])
def test_attacks_on_a_gpu(name: str) -> None:
    """Also recurrent layers: cuDNN refuses their gradients in eval mode, as the control shows."""
    family = models.get(name)
    module = examples.tiny(family).cuda()
    batch = {
        k: v.cuda() if isinstance(v, Tensor) else v for k, v in examples.train_batch(family).items()
    }
    if name == "rnn":
        images = batch["image"].clone().requires_grad_()
        with pytest.raises(RuntimeError, match="cudnn RNN backward"):
            family.loss(module.eval(), {**batch, "image": images})["loss"].backward()
    images = attack(family, module, batch, SPEC, "pgd", EPSILON)
    assert images.is_cuda
    assert (images != batch["image"]).float().mean() > 0.5
