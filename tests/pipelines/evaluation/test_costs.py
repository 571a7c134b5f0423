"""Costs: operations agree with hand counts, and measurements are of the right size."""

from __future__ import annotations

import time
from pathlib import Path

import examples
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from models.core.errors import TesseraError
from pipelines.evaluation import costs
from pipelines.training.evaluator import Evaluator

MEGABYTE = 1 << 20


class Attention(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(tokens, tokens, tokens)


TOKENS = torch.zeros(1, 10, 16)
COUNTED = {
    "a multiplication and an addition for each weight": (
        nn.Linear(30, 7),
        torch.zeros(4, 30),
        2 * 4 * 30 * 7,
    ),
    "weights of a place times places": (
        nn.Conv2d(3, 8, 5, stride=2, padding=2),
        torch.zeros(2, 3, 16, 12),
        2 * 2 * (3 * 5 * 5) * 8 * (8 * 6),
    ),
    "groups": (
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        torch.zeros(1, 8, 6, 6),
        2 * 9 * 8 * 36,
    ),
    "each token with each, twice": (
        Attention(),
        torch.zeros(1, 2, 10, 16),
        2 * 2 * (2 * 10 * 10 * 16),
    ),
    "four gates of a step": (
        nn.LSTM(8, 16, batch_first=True),
        torch.zeros(1, 5, 8),
        5 * 2 * (8 + 16) * (4 * 16),
    ),
    "a layer of a transformer": (
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        TOKENS,
        2 * 10 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 2 * 10 * 10 * 16,
    ),
    "no norm nor activation": (nn.Sequential(nn.ReLU(), nn.LayerNorm(16)), TOKENS, 0),
}


@pytest.mark.parametrize("what", COUNTED)
def test_flops_agree_with_hand_counts(what: str) -> None:
    module, example, expected = COUNTED[what]
    assert costs.flops(module, example) == expected
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled


def test_the_counter_alone_misses_recurrent_layers_and_transformers() -> None:
    """Therefore these kernels are replaced. Remove this once PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    missed = []
    for what in ("four gates of a step", "a layer of a transformer"):
        module, example, expected = COUNTED[what]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module.eval()(example)
        missed.append(expected - counter.get_total_flops())
    assert any(missed)


@pytest.mark.parametrize("name", models.names())
def test_every_family_has_costs(name: str) -> None:
    """Counted over `predict`, as in an evaluation. Twice the images need twice the operations."""
    family = models.get(name)
    module = examples.tiny(family).eval()

    def ask(count: int) -> object:
        return family.predict(module, examples.train_batch(family, count))

    one, two = costs.flops(ask, 1), costs.flops(ask, 2)
    assert one > 1000
    assert two == pytest.approx(2 * one, rel=0.5)
    if family.task.name == "classification":
        assert two == 2 * one
    assert costs.parameters(module) == sum(np.prod(p.shape) for p in module.parameters())


def test_parameters() -> None:
    linear = nn.Linear(30, 7)
    assert costs.parameters(linear) == 30 * 7 + 7
    linear.weight.requires_grad_(False)
    assert costs.parameters(nn.Sequential(linear, linear, nn.BatchNorm2d(5))) == 217 + 10


def test_measuring_does_not_change_a_network() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
    before, images = net[0].running_mean.clone(), torch.ones(4, 3, 8, 8)
    costs.flops(net, images)
    costs.latency(net, images, "cpu", seconds=0, least_calls=1)
    costs.peak_memory(net, images, "cpu")
    costs.throughput(net, lambda n: images[:n], "cpu", largest=2, seconds=0)
    assert torch.equal(net[0].running_mean, before)
    assert net.training
    assert net[1].training
    net(images)
    assert not torch.equal(net[0].running_mean, before), "what a call in training would do"


def test_the_latency_of_an_evaluator() -> None:
    family = models.get("cnn")
    settings = family.task.augment_settings()
    ask = Evaluator(
        family, examples.tiny(family), examples.spec(family), "cpu", augment_settings=settings
    )
    result = costs.latency(ask, examples.raw_batch(family, 1), "cpu", seconds=0.05)
    assert result.calls >= 30
    assert 0 < result.p50_milliseconds <= result.p95_milliseconds


def test_latency_excludes_the_warm_up() -> None:
    """Every tenth call is slow, and so are the first calls."""
    calls = []

    def ask(seconds: float) -> None:
        calls.append(seconds)
        time.sleep(0.1 if len(calls) <= 5 else 0.03 if len(calls) % 10 == 0 else 0.003)

    result = costs.latency(ask, 0.0, "cpu", seconds=0.4, warm_up=5)
    assert len(calls) == result.calls + 5
    assert result.calls >= 30
    assert 3 <= result.p50_milliseconds < 30 <= result.p95_milliseconds < 100


def test_the_number_of_timed_calls_is_limited() -> None:
    """A small network could be called thousands of times per second."""
    sizes = []
    result = costs.latency(sizes.append, 0, "cpu", seconds=60, most_calls=40, warm_up=5)
    assert (result.calls, len(sizes)) == (40, 45)
    sizes.clear()
    costs.throughput(sizes.append, lambda n: n, "cpu", largest=1, seconds=60, most_calls=40)
    assert len(sizes) == 41, "one of them for its memory"


@pytest.mark.slow
def test_throughput_uses_the_best_batch_size() -> None:
    """A call costs 40 ms, and 1 ms per image; beyond 4 images, 30 ms per image. So 4 is best,
    and 16 is the last size that is tried."""
    calls = []

    def ask(count: int) -> None:
        calls.append(count)
        time.sleep(0.040 + count * (0.001 if count <= 4 else 0.030))

    result = costs.throughput(ask, lambda count: count, "cpu", seconds=0.03)
    assert result.batch_size == 4
    assert set(result.tried) == set(calls) == {1, 2, 4, 8, 16}
    assert result.images_per_second == max(result.tried.values())
    assert 40 < result.images_per_second <= 4 / 0.044
    assert max(costs.throughput(ask, lambda n: n, "cpu", largest=2, seconds=0).tried) == 2


def test_throughput_stops_when_memory_is_exhausted() -> None:
    def ask(count: int) -> None:
        if count > limit:
            torch.empty(1 << 60, dtype=torch.uint8)
        time.sleep(0.02)

    limit = 4
    result = costs.throughput(ask, lambda count: count, "cpu", seconds=0)
    assert result.batch_size == max(result.tried) == 4
    limit = 0
    with pytest.raises(TesseraError, match="memory"):
        costs.throughput(ask, lambda count: count, "cpu", seconds=0)

    def broken(count: int) -> None:
        raise RuntimeError("shapes don't fit")

    with pytest.raises(RuntimeError, match="shapes"):
        costs.throughput(broken, lambda count: count, "cpu", seconds=0)


class Hungry(nn.Module):
    def forward(self, example: Tensor) -> Tensor:
        return torch.ones(50 * MEGABYTE).sum() + example  # of 4 bytes each


def test_memory_is_the_peak_of_a_call() -> None:
    """Also when measured repeatedly, and less for a smaller call."""
    if costs.peak_memory(nn.Identity(), torch.zeros(1), "cpu") is None:
        pytest.skip("the system doesn't tell")
    held = torch.ones(100 * MEGABYTE, dtype=torch.uint8)
    for _ in range(2):
        result = costs.peak_memory(Hungry(), torch.zeros(1), "cpu")
        assert result is not None
        assert result.growth_bytes == pytest.approx(200 * MEGABYTE, rel=0.1)
        assert result.peak_bytes > result.growth_bytes + len(held)
        little = costs.peak_memory(nn.Identity(), torch.zeros(1), "cpu")
        assert little is not None
        assert little.growth_bytes < 20 * MEGABYTE
        assert little.peak_bytes < result.peak_bytes - 150 * MEGABYTE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_costs_on_a_gpu() -> None:
    net, example = nn.Conv2d(3, 64, 3, padding=1).cuda(), torch.zeros(1, 3, 256, 256)

    def batch(count: int) -> Tensor:
        return example.repeat(count, 1, 1, 1).cuda()

    memory = costs.peak_memory(net, batch(8), "cuda:0")
    assert memory is not None
    assert memory.growth_bytes >= 8 * 64 * 256 * 256 * 4
    assert costs.flops(net, batch(1)) == costs.flops(net.cpu(), example)
    net.cuda()
    result = costs.latency(net, batch(1), "cuda:0", seconds=0.1)
    assert 0 < result.p50_milliseconds <= result.p95_milliseconds
    assert costs.throughput(net, batch, "cuda:0", seconds=0.05).images_per_second > 0


def test_size_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "weights").write_bytes(bytes(1000))
    (tmp_path / "below" / "card").write_bytes(bytes(23))
    assert costs.size_bytes(tmp_path) == 1023


@pytest.mark.slow
def test_throughput_does_not_exhaust_system_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next batch size would need twice the memory of this one. It is skipped if that is more
    than half of the available memory."""
    if costs.peak_memory(nn.Identity(), torch.zeros(1), "cpu") is None:
        pytest.skip("the system doesn't tell")
    left = 256 * MEGABYTE
    monkeypatch.setattr(costs, "_available_bytes", lambda: left)

    def ask(count: int) -> None:
        torch.ones(count * 10 * MEGABYTE).sum()  # 40 MB an image

    def sizes() -> set[int]:
        return set(costs.throughput(ask, lambda n: n, "cpu", largest=4, seconds=0).tried)

    assert sizes() == {1, 2}
    left = 1 << 40
    assert sizes() == {1, 2, 4}
