"""Embedding: the margin loss, classes without images, and the choice of the backbone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

import models
from models.core.errors import TesseraError, UsageError
from models.core.family import DataSpec
from models.embedding import EmbeddingConfig, _with_margin

EMBEDDING = models.get("embedding")
TINY = EMBEDDING.variants["tiny"]
SPEC = DataSpec("classification", 1, 12, 12, ("a", "b", "c", "d"), (0.3,), (0.2,), (5, 0, 5, 5))


def network(seed: int = 0, data: DataSpec = SPEC, **changes) -> torch.nn.Module:
    torch.manual_seed(seed)
    return EMBEDDING.build(dataclasses.replace(TINY, **changes), data)


def images(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def test_embeddings_have_unit_length_and_the_set_dimensions():
    with torch.no_grad():
        result = network(dimensions=7).eval()(images())
    assert result.shape == (6, 7)
    torch.testing.assert_close(result.norm(dim=1), torch.ones(6))


def test_logits_are_scaled_cosines_with_a_margin_for_the_true_class():
    labels = torch.tensor([0, 2, 3, 0, 2, 3])
    plain = network(head="cosine", scale=10.0).eval()
    with torch.no_grad():
        cosines = plain(images()) @ F.normalize(plain.directions).T
        logits, output = plain(images(), labels)
        torch.testing.assert_close(logits[:, [0, 2, 3]], 10 * cosines[:, [0, 2, 3]])
        assert torch.equal(output, labels)
        strict = network(head="arcface", margin=0.4, scale=10.0).eval()
        logits, _ = strict(images(), labels)
    for row, label in enumerate(labels.tolist()):
        for k in (0, 2, 3):
            angle = math.acos(float(cosines[row, k])) + (0.4 if k == label else 0.0)
            assert float(logits[row, k]) == pytest.approx(10 * math.cos(angle), abs=1e-4)


@pytest.mark.parametrize("cosine", [1.0, 1 - 1e-7, 0.3, -math.cos(0.4), -0.97, -1.0])
def test_the_margin_is_finite_and_falls_everywhere(cosine):
    """Also where angle plus margin exceeds half a turn: the loss falls with the similarity."""
    inputs = torch.tensor([[cosine, 0.2]], requires_grad=True)
    harder = _with_margin(inputs, torch.tensor([0]), 0.4)
    true, other = harder.detach()[0].tolist()
    assert other == pytest.approx(0.2)
    assert true < cosine - 0.05
    harder[0, 0].backward()
    assert 0 < float(inputs.grad[0, 0]) < 1000


def test_classes_without_training_images_are_ignored():
    labels = torch.tensor([0, 2, 3, 0, 2, 3])
    batch = {"image": images(), "label": labels}
    module = network()
    loss = EMBEDDING.loss(module, batch)["loss"]
    loss.backward()
    gradient = module.directions.grad
    assert not gradient[1].any()
    assert all(gradient[k].any() for k in (0, 2, 3))
    with torch.no_grad():
        module.directions[1] = -module.directions[0]
        assert EMBEDDING.loss(module, batch)["loss"] == loss
        every = network(data=dataclasses.replace(SPEC, counts=()))
        assert EMBEDDING.loss(every, batch)["loss"] != loss


def test_a_single_training_class_is_refused():
    with pytest.raises(TesseraError, match="nothing to compare"):
        network(data=dataclasses.replace(SPEC, counts=(5, 0, 0, 0)))


def test_dropout_is_active_in_training_only():
    module = network(dropout=0.5)
    with torch.no_grad():
        assert not torch.equal(module.train()(images()), module(images()))
        assert torch.equal(module.eval()(images()), module(images()))


@pytest.mark.parametrize("backbone", ["rnn", "vit", "resnet"])
def test_any_family_with_a_single_classifier_can_be_the_backbone(backbone):
    data = dataclasses.replace(SPEC, height=16, width=16)
    module = network(data=data, backbone=backbone)
    batch = {"image": torch.randn(4, 1, 16, 16), "label": torch.tensor([0, 2, 3, 2])}
    EMBEDDING.loss(module, batch)["loss"].backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("backbone", ["cnn", "resnet", "vit", "rnn", "densenet", "vgg", "alexnet"])
def test_with_a_projection_the_embedding_is_the_input_of_the_last_layer(backbone):
    data = dataclasses.replace(SPEC, height=32, width=32)
    module = network(data=data, backbone=backbone, projection=20)
    inputs = torch.randn(4, 1, 32, 32)
    EMBEDDING.loss(module, {"image": inputs, "label": torch.tensor([0, 2, 3, 2])})[
        "loss"
    ].backward()
    assert all(p.grad is not None for p in module.parameters())
    assert module.projection[0].out_features == 20
    family, settings = module_settings(backbone)
    names = tuple(str(number) for number in range(TINY.dimensions))
    whole = family.build(settings, dataclasses.replace(data, classes=names, counts=()))
    missing, unexpected = whole.load_state_dict(module.backbone.state_dict(), strict=False)
    assert unexpected == []
    (weight, bias) = missing  # of the last layer
    layer = whole.get_submodule(weight.removesuffix(".weight"))
    assert layer is whole.get_submodule(bias.removesuffix(".bias"))
    taken = []
    layer.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    with torch.no_grad():
        whole.eval()(inputs)
        torch.testing.assert_close(module.eval()(inputs), F.normalize(taken[0]))


def module_settings(backbone: str):
    return EmbeddingConfig(backbone=backbone, backbone_variant="tiny").find_backbone()


def test_a_single_image_can_be_trained_on_with_a_projection():
    module = network(projection=20)
    one = {"image": images(1), "label": torch.tensor([2])}
    assert EMBEDDING.loss(module, one)["loss"].isfinite()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "cn"}, "did you mean 'cnn'"),
        ({"backbone": "embedding"}, "model.backbone = 'embedding' doesn't return plain logits"),
        ({"backbone": "googlenet"}, "doesn't return plain logits"),
        ({"backbone_variant": "tyni"}, "did you mean 'tiny'"),
        ({"dimensions": 1}, r"model\.dimensions = 1\. give 2"),
        ({"projection": -1}, r"model\.projection = -1\. give 0"),
        ({"margin": 2.0}, r"model\.margin = 2"),
        ({"margin": float("nan")}, r"model\.margin = nan"),
        ({"scale": 0.0}, r"model\.scale = 0"),
        ({"head": "softmax"}, r"model\.head = 'softmax'"),
        ({"turns": 2}, r"model\.turns = 2\. give one of: 1, 4, 8"),
        ({"dropout": 1.0}, r"model\.dropout = 1"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        EmbeddingConfig(**settings)


def test_rotated_images_are_separate_classes():
    labels = torch.tensor([0, 2, 3, 2])
    module = network(turns=8, head="cosine").eval()
    inputs = images(4)
    with torch.no_grad():
        logits, output = module(inputs, labels)
        directions = F.normalize(module.directions)
        assert logits.shape == (32, 32)
        for way in range(8):
            turned = inputs.rot90(way % 4, (-2, -1))
            turned = turned.flip(-1) if way > 3 else turned
            expected = module.scale * module(turned) @ directions.T
            result = logits[4 * way : 4 * way + 4]
            torch.testing.assert_close(result[:, module.trained], expected[:, module.trained])
        assert (logits[:, 1::4] == -torch.inf).all(), "class 1 has no images, turned or not"
        loss = EMBEDDING.loss(module, {"image": inputs, "label": labels})["loss"]
    assert torch.equal(output, torch.cat([labels + 4 * way for way in range(8)]))
    torch.testing.assert_close(loss, F.cross_entropy(logits, output))
    alone = network(turns=1, head="cosine").eval()
    assert alone(inputs, labels)[0].shape == (4, 4)


def test_join_turns_concatenates_the_embeddings():
    single, joined = (network(turns=8, join_turns=join).eval() for join in (False, True))
    inputs = images(4)
    with torch.no_grad():
        ways = [inputs.rot90(k, (-2, -1)) for k in range(4)]
        each = [single(turned) for turned in [*ways, *(way.flip(-1) for way in ways)]]
        result = joined(inputs)
    assert result.shape == (4, 8 * TINY.dimensions)
    mean = torch.stack([one @ one.T for one in each]).mean(0)
    torch.testing.assert_close(result @ result.T, mean)
    torch.testing.assert_close(result.norm(dim=1), torch.ones(4))


def test_rotations_need_square_training_images():
    """Images that are only embedded can have any shape."""
    wide = torch.zeros(2, 1, 12, 16)
    module = network(data=dataclasses.replace(SPEC, width=16), turns=4)
    with pytest.raises(UsageError, match="12 by 16 pixels can't be rotated"):
        module(wide, torch.tensor([0, 2]))
    assert module(wide).shape == (2, 16)


def test_embeddings_are_centred_and_a_single_image_can_be_trained_on():
    """What all embeddings have in common carries no information about an image."""
    module = network()
    with torch.no_grad():
        for name, parameter in module.backbone.named_parameters():
            if name == "head.bias":
                parameter.fill_(100.0)
        together = module.train()(images(64))
        assert together.mean(0).norm() < 0.2
        assert F.normalize(module.backbone(images(64))).mean(0).norm() > 0.9
        one = module(images(1))
        assert torch.equal(one, module.eval()(images(1)))
    loss = EMBEDDING.loss(module.train(), {"image": images(1), "label": torch.tensor([2])})["loss"]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_halves_create_a_class_for_each_pair():
    labels = torch.tensor([0, 2, 3, 2, 0, 3, 2])
    module = network(halves=True, turns=4, head="cosine").eval()
    inputs = images(7)
    with torch.no_grad():
        logits, output = module(inputs, labels)
        assert logits.shape == (28, 64)
        pairs = [(0, 3), (2, 0), (3, 2), (2, 2), (0, 0), (3, 3), (2, 2)]  # above, below
        expected = [16 * way + 4 * above + below for way in range(4) for above, below in pairs]
        assert output.tolist() == expected
        mixed = torch.cat([inputs[:1, :, :6], inputs[2:3, :, 6:]], 2)
        made, _ = module(mixed.rot90(1, (-2, -1)), labels[:1])  # one alone is left as it is
        torch.testing.assert_close(logits[7:8, module.trained], made[:1, module.trained])
    untrained = [k for k in range(64) if 1 in ((k % 16) // 4, k % 4)]
    assert (~module.trained).nonzero()[:, 0].tolist() == untrained
    loss = EMBEDDING.loss(module.train(), {"image": inputs, "label": labels})["loss"]
    loss.backward()
    assert loss.isfinite()


def test_too_many_classes_with_halves_are_refused():
    names = tuple(map(str, range(600)))
    many = dataclasses.replace(SPEC, classes=names, counts=(1,) * 600)
    with pytest.raises(UsageError, match="360,000 classes of 600"):
        network(data=many, halves=True)
    assert network(data=many)
