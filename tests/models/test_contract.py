"""The contract of every family, tested with its `tiny` variant. New files in models/ are included.

Golden losses: ten training losses from a fixed seed are stored next to this file. They are compared
with a relative tolerance of 1e-4, because convolutions add in a different order on another
processor. Within a process they are bit-identical, which is tested too. After an intended change:
UPDATE_GOLDEN=1 pytest tests/models/test_contract.py -k golden
"""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
from functools import cache
from pathlib import Path

import examples
import gloo_ranks
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from models.core import spaces
from models.core.family import BatchRng, Family
from pipelines import recipe as recipes
from pipelines.visuals import plots

OVERFITS = {
    "classification": 0.1,
    "detection": 0.3,
    "instance_segmentation": 0.3,
    "reconstruction": 0.75,
    "semantic_segmentation": 0.2,
    "verification": 0.5,
}
"""By task: 60 steps of Adam on one batch bring the loss below this share of the first. Of a
generator the losses say nothing: it has no entry."""
HERE = Path(__file__).parent


@pytest.fixture(params=models.names())
def family(request) -> Family:
    return models.get(request.param)


def losses_on_one_batch(family: Family, steps: int, optimizer: type = torch.optim.SGD):
    """The losses of a plain training with SGD. Adam's first steps turn noise in a gradient near
    zero into full steps, so its losses would differ between processors."""
    parts = family.parts(examples.tiny(family).train())
    optimizers = {p: optimizer(m.parameters(), lr=0.01) for p, m in parts.items()}
    batch = examples.train_batch(family)
    result = []
    for step in range(steps):
        torch.default_generator.manual_seed(step)
        for part, losses in family.updates(parts, batch):
            losses["loss"].backward()
            optimizers[part].step()
            for each in optimizers.values():
                each.zero_grad()
            result.append(float(losses["loss"].detach()))
    return result


def test_has_tiny_and_base(family):
    assert {"tiny", "base"} <= set(family.variants)
    about = (sys.modules[type(family).__module__].__doc__ or "").splitlines()[0]
    assert about.endswith(".")
    assert len(about) < 100


def test_every_variant_has_a_recipe(family):
    parts = set(family.parts(examples.tiny(family)))
    for variant in family.variants:
        recipe = recipes.start(family.name, variant)
        assert recipe.config() == family.variants[variant]
        assert set(recipe.optim) == parts


def test_builds_the_same_weights_from_the_same_seed(family):
    first, again, other = (examples.tiny(family, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_every_parameter_gets_a_gradient(family):
    module = examples.tiny(family).train()
    for part, losses in family.updates(family.parts(module), examples.train_batch(family)):
        assert losses["loss"].ndim == 0, part
        assert all(torch.isfinite(value).all() for value in losses.values())
        losses["loss"].backward()
    without = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@pytest.mark.slow
def test_overfits_one_batch(family):
    share = OVERFITS.get(family.task.name)
    if share is None:
        pytest.skip(f"of {family.task.name} the losses say nothing")
    losses = losses_on_one_batch(family, 60, torch.optim.Adam)
    assert losses[-1] < losses[0] * share


def test_predictions_have_metrics_json_and_panels(family, tmp_path):
    task, data, raw = family.task, examples.spec(family), examples.raw_batch(family)
    batch = examples.train_batch(family)
    predictions = family.predict(examples.tiny(family).eval(), batch)
    targets = task.targets(raw)
    assert len(predictions) == len(targets) == len(batch["key"])
    if task.needs_judge:
        task.apply_judge(examples.judge, predictions, targets)
    records = [task.make_record(p, t, data) for p, t in zip(predictions, targets)]
    assert all(len(pickle.dumps(record)) < 20_000 for record in records)
    metrics = task.metrics(records, data)
    assert task.primary.name in metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(math.isfinite(task.error_score(record)) for record in records)
    groups = []
    for image, prediction, target in zip(raw["image"], predictions, targets):
        answer = task.prediction_to_json(prediction, data)
        assert json.loads(json.dumps(answer, allow_nan=False)) == answer
        assert not any(isinstance(v, torch.Tensor) and v.is_cuda for v in prediction.values())
        groups.append(task.panels(image, prediction, target, data))
        assert task.panels(image, prediction, None, data)
        pixels = task.prediction_to_image(prediction)
        assert pixels is None or pixels.dtype == torch.uint8
        assert task.writes_coco_results or not task.prediction_to_coco(prediction)
    plots.grid(groups, data.classes, tmp_path / "answers.png")


def test_training_samples_have_panels(family, tmp_path):
    """With all augmentation of the family's default recipe."""
    data, count = examples.spec(family), 8
    transform = family.augment(recipes.start(family.name).augment_settings(), data, train=True)
    batch = transform(examples.raw_batch(family), BatchRng(0, count, slice(0, count)))
    assert len(batch["key"]) == count
    plots.grid(family.task.sample_panels(batch, data), data.classes, tmp_path / "samples.png")


def test_predictions_do_not_depend_on_the_rest_of_the_batch(family):
    module = examples.tiny(family).eval()
    batch = examples.train_batch(family)
    together = family.predict(module, batch)
    one = {name: value[2:3] for name, value in batch.items()}
    (alone,) = family.predict(module, one)
    for name, value in alone.items():
        torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(together[2][name]))


def test_recipe_round_trips(family):
    for variant in family.variants:
        recipe = recipes.start(family.name, variant)
        text = recipe.to_json()
        again = recipes.build(json.loads(text))
        assert again.to_json() == text
        assert again.config() == recipe.config()


@pytest.mark.slow
def test_search_space_is_valid_at_its_ends(family):
    space = family.search_space()
    assert space
    recipe = recipes.start(family.name)
    for path, dimension in space.items():
        for value in spaces.examples(dimension):
            changed = recipe.with_overrides({path: value})
            assert json.loads(json.dumps(dict(recipes.leaves(changed.model_dump()))[path])) == value
            family.augment(changed.augment_settings(), examples.spec(family), train=True)
            if path.startswith("model."):
                family.build(changed.config(), examples.spec(family))


def test_weights_survive_a_file_bit_for_bit(family, tmp_path):
    module = examples.tiny(family, seed=1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    for value in module.state_dict().values():
        value.zero_()
    module.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.slow
def test_exportable_agrees_with_predict_for_any_batch_size(family):
    module, data = examples.tiny(family).train(), examples.spec(family)
    exportable = family.exportable(module, data)
    if exportable is None:
        pytest.skip(f"{family.name} can't be exported")
    output_name = family.task.output_name
    assert output_name, "an exported tensor needs a name"
    assert module.training, "exporting must not change the network in training"
    assert not exportable.training
    images = examples.raw_batch(family)["image"].permute(0, 2, 3, 1).contiguous()
    predictions = family.predict(module.eval(), examples.train_batch(family))
    if output_name not in predictions[0]:
        pytest.skip(f"{family.name} exports no field of a prediction: its own tests check it")
    expected = torch.stack([p[output_name] for p in predictions])
    with torch.no_grad():
        torch.testing.assert_close(exportable(images), expected)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(exportable, (images[:2],), dynamic_shapes=shapes).module()
    for count in (1, 3, 8):
        with torch.no_grad():
            torch.testing.assert_close(exported(images[:count].contiguous()), expected[:count])


def test_runs_under_bf16_autocast(family):
    module, batch = examples.tiny(family).train(), examples.train_batch(family)
    parts = family.parts(module)
    torch.manual_seed(0)
    exact = [float(losses["loss"].detach()) for _, losses in family.updates(parts, batch)]
    torch.manual_seed(0)
    updates = family.updates(parts, batch)
    for expected in exact:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, losses = next(updates)
        losses["loss"].backward()
        assert float(losses["loss"].detach()) == pytest.approx(expected, rel=0.05)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


@cache
def first_losses(name: str) -> list[float]:
    return losses_on_one_batch(models.get(name), 10)


def test_trains_the_same_twice(family):
    again = losses_on_one_batch(family, 2)
    assert again == first_losses(family.name)[: len(again)]


def losses_at_rest(family: Family, steps: int):
    """For networks whose norms see maps of one pixel: the batch variance of some channels is
    rounding noise, so losses would differ between processors. The norms keep their statistics,
    and the network computes in float64 because the losses change little."""
    network = examples.tiny(family).train().double()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    optimizer = torch.optim.SGD(network.parameters(), lr=3.0)
    batch = examples.train_batch(family)
    batch["image"] = batch["image"].double()
    result = []
    for step in range(steps):
        torch.default_generator.manual_seed(step)
        for _, losses in family.updates(family.parts(network), batch):
            losses["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            result.append(float(losses["loss"].detach()))
    return result


def test_golden_losses(family):
    path = HERE / "golden" / f"{family.name}.json"
    at_rest = family.name in ("backbone", "googlenet")
    losses = losses_at_rest(family, 10) if at_rest else first_losses(family.name)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(json.dumps(losses, indent=1) + "\n")
    assert path.exists(), "make it: UPDATE_GOLDEN=1 pytest tests/models/test_contract.py -k golden"
    assert losses == pytest.approx(json.loads(path.read_text()), rel=1e-6 if at_rest else 1e-4)


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    gloo_ranks.run(HERE.parent / "support" / "rank_updates.py", "train", 2, {"folder": str(folder)})
    return folder


@pytest.mark.slow
def test_two_ranks_stay_bit_identical(family, trained_by_two):
    first, second = (load_file(trained_by_two / f"{family.name}-{r}.safetensors") for r in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    start = {
        f"{part}.{name}": value
        for part, module in family.parts(examples.tiny(family)).items()
        for name, value in module.named_parameters()
    }
    assert any(not torch.equal(first[name], start[name]) for name in start)
