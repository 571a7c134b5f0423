from __future__ import annotations

import dataclasses

import examples
import pytest
import torch
from torch import Tensor

import models
from models.core.errors import UsageError
from models.core.family import Batch, BatchRng, DataSpec
from models.yolo import FAMILY, Net, Yolo, YoloConfig

DATA = examples.SPECS["detection"]
TINY = FAMILY.variants["tiny"]


def tiny(data: DataSpec = DATA, **changes: object) -> Net:
    torch.manual_seed(0)
    net = FAMILY.build(dataclasses.replace(TINY, **changes), data)
    assert isinstance(net, Net)
    return net


def batch(count: int = 4) -> Batch:
    return examples.train_batch(models.get("yolo"), count)


def without_objects(original: Batch) -> Batch:
    empty = {name: [one[:0] for one in original[name]] for name in ("boxes", "labels", "crowd")}
    return {**original, **empty}


def test_strides_follow_from_the_number_of_stages():
    assert FAMILY.variants["base"].strides == (8, 16, 32)
    assert TINY.strides == (4, 8, 16)
    assert YoloConfig(channels=(8, 8, 8, 8), scales=1).strides == (16,)


def test_the_grid_has_the_points_of_each_scale():
    for scales, points in ((3, 16**2 + 8**2 + 4**2), (1, 4**2)):
        outputs, grid = tiny(scales=scales)(batch()["image"])
        assert outputs.objects.shape == (4, points)
        assert outputs.classes.shape == (4, points, 3)
        assert outputs.distances.shape == (4, points, 4, TINY.reg_max)
        assert grid.points.shape == (points, 2)


def test_a_new_network_predicts_few_objects_and_the_class_frequencies():
    outputs, _ = tiny()(batch()["image"])
    assert outputs.objects.sigmoid().mean().item() == pytest.approx(0.01, rel=0.5)
    shares = outputs.classes.softmax(-1).mean((0, 1))
    expected = torch.tensor([10.0, 9.0, 8.0]) / 27
    torch.testing.assert_close(shares.detach(), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (50, 70), (7, 5)])
def test_boxes_are_inside_images_of_any_size(size):
    net = tiny(conf_threshold=0.0).eval()
    height, width = size
    images = torch.randn(2, 3, height, width)
    extent = torch.tensor([[height, width], [height - 3, width // 2]])
    predictions = FAMILY.predict(net, {"image": images, "extent": extent})
    for (rows, columns), prediction in zip(extent.tolist(), predictions):
        boxes = prediction["boxes"]
        assert 0 < len(boxes) <= 100
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([columns, rows, columns, rows])).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert prediction["scores"].tolist() == sorted(prediction["scores"].tolist(), reverse=True)


def gradients(net: Net, losses: dict[str, Tensor]) -> list[Tensor | None]:
    net.zero_grad()
    losses["loss"].backward()
    return [parameter.grad for parameter in net.parameters()]


def test_a_batch_without_objects_has_gradients_everywhere():
    """With DistributedDataParallel an unused parameter would stop the training."""
    net = tiny().train()
    losses = FAMILY.loss(net, without_objects(batch()))
    assert torch.isfinite(losses["loss"])
    assert all(g is not None and torch.isfinite(g).all() for g in gradients(net, losses))


def test_a_single_image_and_a_single_class():
    data = dataclasses.replace(DATA, classes=("cell",), counts=())
    original = batch(2)
    original = {name: value[1:] for name, value in original.items()}
    original["labels"] = [torch.zeros_like(one) for one in original["labels"]]
    net = tiny(data).train()
    losses = FAMILY.loss(net, original)
    assert all(g is not None and torch.isfinite(g).all() for g in gradients(net, losses))
    (prediction,) = FAMILY.predict(net.eval(), original)
    assert set(prediction["labels"].tolist()) <= {0}


def test_overlapping_boxes_of_one_class_are_suppressed():
    net = tiny(conf_threshold=0.0).eval()
    few = tiny(conf_threshold=0.0, nms_iou=0.1, max_detections=7).eval()
    many, one = (FAMILY.predict(n, batch())[1] for n in (net, few))
    assert len(one["boxes"]) == 7
    from torchvision.ops import box_iou

    for label in range(3):
        mine = one["boxes"][one["labels"] == label]
        assert (box_iou(mine, mine) - torch.eye(len(mine)) <= 0.1).all()
    assert (box_iou(many["boxes"], many["boxes"]).fill_diagonal_(0) > 0.1).any()


@pytest.mark.slow
def test_overfits_a_few_images():
    """From end to end: trained on eight painted images, it predicts the painted objects."""
    family = models.get("yolo")
    assert isinstance(family, Yolo)
    raw = examples.raw_batch(family)
    transform = family.augment(family.task.augment_settings(), DATA, train=True)
    seen = transform(raw, BatchRng(0, 8, slice(0, 8)))
    net = tiny().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        family.loss(net, seen)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    predictions = family.predict(net.eval(), seen)
    truths = family.task.targets(raw)
    records = [family.task.make_record(p, t, DATA) for p, t in zip(predictions, truths)]
    assert family.task.metrics(records, DATA)["map50"] > 0.9


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("channels", (8,)),
        ("scales", 5),
        ("reg_max", 1),
        ("topk", 0),
        ("nms_iou", 1.5),
        ("box_weight", 0.0),
    ],
)
def test_invalid_settings_are_refused(name, value):
    with pytest.raises(UsageError, match=f"model.{name}"):
        YoloConfig(**{name: value})
