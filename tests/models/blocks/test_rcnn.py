"""The R-CNN families against torchvision's networks, and training with little data.

torchvision's network gets the same weights. With the same seed it samples the same regions, so
losses and predictions must be equal. `Net` differs only in its construction: it has no transform,
and keeps image sizes.
"""

from __future__ import annotations

import dataclasses
import functools

import examples
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import models
from models.blocks import pyramids, rcnn
from models.blocks.rcnn import RcnnConfig
from models.core.errors import TesseraError, UsageError
from models.mask_rcnn import MaskRcnnConfig
from pipelines import recipe as recipes

FAMILIES = ("faster_rcnn", "mask_rcnn")


@pytest.fixture(params=FAMILIES)
def family(request):
    return models.get(request.param)


def theirs(family, ours: nn.Module) -> nn.Module:
    """torchvision's network with the same weights, and a transform that does nothing."""
    from torchvision.models.detection import FasterRCNN, MaskRCNN, faster_rcnn, mask_rcnn
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    config, data = family.variants["tiny"], examples.spec(family)
    fresh = family.build(config, data)
    fresh.backbone.out_channels = config.features
    anchors = AnchorGenerator(config.anchors, (config.ratios,) * len(config.anchors))
    many = {"rpn_pre_nms_top_n_train": 64, "rpn_pre_nms_top_n_test": 64}
    kept = {"rpn_post_nms_top_n_train": 32, "rpn_post_nms_top_n_test": 32}
    masks = {}
    if family.name == "mask_rcnn":
        masks = {
            "mask_roi_pool": MultiScaleRoIAlign(["0", "1"], 14, 2),
            "mask_head": mask_rcnn.MaskRCNNHeads(16, [16], 1),
            "mask_predictor": mask_rcnn.MaskRCNNPredictor(16, 16, 4),
        }
    net = (MaskRCNN if masks else FasterRCNN)(
        fresh.backbone,
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 7, 2),
        box_head=faster_rcnn.TwoMLPHead(16 * 7**2, 32),
        box_predictor=faster_rcnn.FastRCNNPredictor(32, 4),
        rpn_batch_size_per_image=64,
        box_batch_size_per_image=16,
        box_detections_per_img=20,
        min_size=64,
        max_size=64,
        image_mean=[0, 0, 0],
        image_std=[1, 1, 1],
        _skip_resize=True,  # it would draw a size
        **many,
        **kept,
        **masks,
    )
    net.load_state_dict(ours.state_dict())
    return net


def without_crowd(batch):
    kept = [~crowd for crowd in batch["crowd"]]
    names = [n for n in ("boxes", "labels", "masks") if n in batch]
    rows = zip(*([v[k] for v, k in zip(batch[n], kept)] for n in names))
    targets = [dict(zip(names, row)) for row in rows]
    return [t | {"labels": t["labels"] + 1} for t in targets]


def trained(family) -> nn.Module:
    """Trained until some objects are detected."""
    module = examples.tiny(family)
    module.load_state_dict(trained_weights(family))
    return module


@functools.cache
def trained_weights(family) -> dict[str, torch.Tensor]:
    module, batch = examples.tiny(family).train(), examples.train_batch(family)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for step in range(15):
        torch.manual_seed(step)
        family.loss(module, batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.state_dict()


@pytest.mark.slow
def test_losses_agree_with_torchvision(family):
    ours = examples.tiny(family).train()
    reference = theirs(family, ours).train()
    batch = examples.train_batch(family)
    no_crowd = {**batch, "crowd": [torch.zeros_like(c) for c in batch["crowd"]]}
    torch.manual_seed(3)
    losses = family.loss(ours, no_crowd)
    torch.manual_seed(3)
    expected = reference(list(batch["image"]), without_crowd(no_crowd))
    assert losses.keys() - {"loss"} == {rcnn.LOSS_NAMES[name] for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(losses[rcnn.LOSS_NAMES[name]], value)
    torch.testing.assert_close(losses["loss"], sum(expected.values()))


@pytest.mark.slow
def test_predictions_agree_with_torchvision(family):
    ours = trained(family).eval()
    reference = theirs(family, ours).eval()
    batch = examples.train_batch(family)
    predictions = family.predict(ours, batch)
    with torch.no_grad():
        expected = reference(list(batch["image"]))
    assert sum(len(p["boxes"]) for p in predictions) > 5
    for prediction, one in zip(predictions, expected):
        torch.testing.assert_close(prediction["boxes"], one["boxes"])
        torch.testing.assert_close(prediction["scores"], one["scores"])
        assert prediction["labels"].tolist() == (one["labels"] - 1).tolist()
        if "masks" in prediction:
            assert torch.equal(prediction["masks"], (one["masks"][:, 0] >= 0.5).byte())


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_resnet50_fpn_has_torchvisions_parameters(name):
    """Then its COCO weights can be loaded."""
    from torchvision.models import detection

    family = models.get(name)
    data = examples.spec(family)
    with torch.device("meta"):
        ours = family.build(family.variants["resnet50_fpn"], data).state_dict()
        make = getattr(detection, f"{name.replace('_', '')}_resnet50_fpn")
        reference = make(weights=None, weights_backbone=None, num_classes=4).state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in reference.items()}


def test_older_weights_files_are_renamed():
    """torchvision's files for these networks have the older names."""
    renamed = {
        "backbone.fpn.inner_blocks.2.weight": "backbone.fpn.inner_blocks.2.0.weight",
        "backbone.fpn.layer_blocks.0.bias": "backbone.fpn.layer_blocks.0.0.bias",
        "rpn.head.conv.weight": "rpn.head.conv.0.0.weight",
        "roi_heads.mask_head.mask_fcn3.bias": "roi_heads.mask_head.2.0.bias",
        "roi_heads.mask_predictor.conv5_mask.bias": "roi_heads.mask_predictor.conv5_mask.bias",
        "rpn.head.conv.0.0.weight": "rpn.head.conv.0.0.weight",
    }
    assert {old: pyramids._rename(old) for old in renamed} == renamed


class TestWarmStart:
    def start(self, family, tensors, path, **settings):
        save_file({n: t.contiguous() for n, t in tensors.items()}, path)
        config = dataclasses.replace(family.variants["tiny"], weights=str(path), **settings)
        torch.manual_seed(5)
        module = family.build(config, examples.spec(family))
        family.warm_start(config, module)
        return config, module

    def test_loads_all_weights_of_the_same_network(self, family, tmp_path):
        given = examples.tiny(family, seed=1).state_dict()
        _, module = self.start(family, given, tmp_path / "w.safetensors")
        assert all(torch.equal(t, given[n]) for n, t in module.state_dict().items())

    def test_heads_for_other_classes_stay_new(self, family, tmp_path):
        data = dataclasses.replace(examples.spec(family), classes=("a", "b", "c", "d", "e"))
        given = family.build(family.variants["tiny"], data).state_dict()
        _, module = self.start(family, given, tmp_path / "w.safetensors")
        fresh = examples.tiny(family, seed=5).state_dict()
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, (fresh if name.startswith(rcnn.HEADS) else given)[name])

    def test_a_mask_network_loads_a_detector(self, tmp_path):
        given = examples.tiny(models.get("faster_rcnn"), seed=1).state_dict()
        _, module = self.start(models.get("mask_rcnn"), given, tmp_path / "w.safetensors")
        assert all(torch.equal(module.state_dict()[name], t) for name, t in given.items())

    def test_a_detector_loads_a_mask_network(self, tmp_path):
        given = examples.tiny(models.get("mask_rcnn"), seed=1).state_dict()
        _, module = self.start(models.get("faster_rcnn"), given, tmp_path / "w.safetensors")
        assert all(torch.equal(given[name], t) for name, t in module.state_dict().items())

    def test_a_classifier_is_loaded_into_the_body(self, tmp_path):
        from torchvision.models import resnet18

        family = models.get("faster_rcnn")
        config = dataclasses.replace(
            family.variants["tiny"], body="resnet18", norm="batch", anchors=((16,),) * 5
        )
        given = resnet18(num_classes=7).state_dict()
        save_file(given, tmp_path / "w.safetensors")
        config = dataclasses.replace(config, weights=str(tmp_path / "w.safetensors"))
        data = dataclasses.replace(examples.spec(family), channels=1, mean=(0.5,), std=(0.3,))
        module = family.build(config, data)
        family.warm_start(config, module)
        body = module.backbone.body.state_dict()
        assert torch.equal(body["conv1.weight"], given["conv1.weight"].sum(1, keepdim=True))
        assert torch.equal(body["layer4.1.bn2.running_var"], given["layer4.1.bn2.running_var"])
        frozen = family.frozen(config, module, 0)
        assert "backbone.body.layer4.1.bn2.weight" in frozen
        assert "backbone.body.layer4.1.conv2.weight" not in frozen
        whole = dataclasses.replace(config, freeze="backbone")
        expected = {f"backbone.body.{n}" for n, _ in module.backbone.body.named_parameters()}
        assert family.frozen(whole, module, 0) == expected

    def test_weights_of_another_network_are_refused(self, family, tmp_path):
        with pytest.raises(TesseraError, match="none of their layers"):
            self.start(family, {"layer.weight": torch.zeros(3)}, tmp_path / "w.safetensors")

    def test_freezing_without_weights_is_refused(self, family):
        config = dataclasses.replace(family.variants["tiny"], freeze="backbone")
        with pytest.raises(UsageError, match="random values"):
            family.warm_start(config, examples.tiny(family))


def picked(batch, rows):
    return {
        name: [value[r] for r in rows] if isinstance(value, list) else value[rows]
        for name, value in batch.items()
    }


def without_objects(batch):
    fields = ("boxes", "labels", "crowd", "masks")
    return {n: [v[:0] for v in value] if n in fields else value for n, value in batch.items()}


def all_crowd(batch):
    return {**batch, "crowd": [torch.ones_like(crowd) for crowd in batch["crowd"]]}


def one_crowd_over_everything(batch):
    batch = all_crowd(picked(batch, [1, 2]))
    for boxes in batch["boxes"]:
        boxes[:] = torch.tensor([-500.0, -500, 600, 600])
    return batch


@pytest.mark.parametrize(
    "change",
    [lambda b: b, without_objects, lambda b: picked(without_objects(b), [0]),
     lambda b: picked(b, [2]), all_crowd, one_crowd_over_everything],
    ids=["as is", "no objects", "one image without", "one image", "only crowds", "in a crowd"],
)  # fmt: skip
def test_every_parameter_is_used_in_each_step(family, change):
    """DistributedDataParallel waits for the gradients of all parameters."""
    module = examples.tiny(family).train()
    losses = family.loss(module, change(examples.train_batch(family)))
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_anchors_in_a_crowd_are_not_background():
    family = models.get("faster_rcnn")
    module = examples.tiny(family).train()
    crowd = torch.tensor([[0.0, 0, 32, 64]])
    target = {"boxes": torch.tensor([[20.0, 20, 36, 36]]), "labels": torch.tensor([1])}
    anchors = torch.tensor(
        [
            [4.0, 4, 20, 20],  # in the crowd
            [44, 4, 60, 20],  # background
            [20, 20, 36, 36],  # the object, most of it in the crowd
        ]
    )
    for regions, expected in ((crowd, [-1, 0, 1]), (crowd[:0], [0, 0, 1])):
        with_crowd = target | {"crowd": regions}
        labels, _ = module.rpn.assign_targets_to_anchors([anchors], [with_crowd])
        assert labels[0].tolist() == expected
        kept = rcnn._outside_crowd(anchors, with_crowd)
        assert torch.equal(kept, anchors[[label >= 0 for label in expected]])


def test_crowds_are_not_trained_on():
    """Their only effect is that their area is not background."""
    family = models.get("mask_rcnn")
    (target,) = rcnn._targets(picked(examples.train_batch(family), [2]))
    assert target["labels"].tolist() == [3]
    assert len(target["boxes"]) == len(target["masks"]) == len(target["crowd"]) == 1


@pytest.mark.slow
def test_predictions_stay_inside_each_image(family):
    """With fit=pad: predictions are inside the image, and don't depend on the sizes of other
    images."""
    module, batch = trained(family).eval(), examples.train_batch(family)
    batch["extent"][3] = torch.tensor([40, 30])
    prediction = family.predict(module, batch)[3]
    assert len(prediction["boxes"])
    assert (prediction["boxes"] <= torch.tensor([30, 40, 30, 40])).all()
    if "masks" in prediction:
        assert prediction["masks"].shape[1:] == (40, 30)
    small = {**batch, "extent": torch.tensor([[20, 20]] * 8)}
    family.predict(module, small)
    again = family.predict(module, batch)[3]
    assert torch.equal(again["boxes"], prediction["boxes"])
    fresh = trained(family).eval()
    family.predict(fresh, small)  # torchvision would settle its scales here
    assert torch.equal(family.predict(fresh, batch)[3]["boxes"], prediction["boxes"])


@pytest.mark.slow
def test_images_of_any_size(family):
    """A size that the levels don't divide equals the same image with padding."""
    module, batch = trained(family).eval(), examples.train_batch(family)
    batch["extent"] = torch.tensor([[64, 61]] * 8)
    odd = family.predict(module, {**batch, "image": batch["image"][..., :61]})
    batch["image"][..., 61:] = 0
    for prediction, expected in zip(odd, family.predict(module, batch)):
        assert all(torch.equal(value, expected[name]) for name, value in prediction.items())


def test_invalid_settings_are_refused():
    for wrong, message in (
        ({"anchors": ((16,), (32,))}, "each of 4 levels"),
        ({"anchors": ((16,), (32,), (64,), (96, 128))}, "of one length"),
        ({"channels": (12, 32, 64, 64)}, "multiples of 8"),
        ({"body": "vgg"}, "give one of"),
        ({"ratios": ()}, "model.ratios"),
        ({"proposals": 0}, "model.proposals"),
        ({"nms_iou": 1.0}, "model.nms_iou"),
    ):
        with pytest.raises(UsageError, match=message):
            RcnnConfig(**wrong)
    with pytest.raises(UsageError, match="mask_channels"):
        MaskRcnnConfig(mask_channels=())


def test_settings_can_be_overridden(family):
    path, value = recipes.parse_override("model.anchors=[[8, 12], [16, 24], [32, 48], [64, 96]]")
    config = recipes.start(family.name).with_overrides({path: value}).config()
    assert config.anchors == ((8, 12), (16, 24), (32, 48), (64, 96))
    net = family.build(config, examples.spec(family))
    assert net.rpn.head.cls_logits.out_channels == 6
