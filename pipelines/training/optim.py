"""Optimizers and the learning rate.

In: a part of the network and its settings. Out: an optimizer, and the learning rate as a pure
function of the samples seen: there is no state to save, and another batch size doesn't stretch it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from pipelines.recipe_sections import Optim, Schedule


def build(module: nn.Module, settings: Optim) -> Optimizer:
    """The optimizer of one part. Vectors and scalars (norms, biases) get no weight decay
    (https://arxiv.org/abs/1812.01187, section 3.1)."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, settings.weight_decay), (vectors, 0.0))
        if params
    ]
    if settings.kind == "sgd":
        nesterov = settings.nesterov and settings.momentum > 0
        return _without_compiler(SGD)(
            groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov, fused=True
        )
    kind = Adam if settings.kind == "adam" else AdamW
    return _without_compiler(kind)(groups, lr=settings.lr, betas=settings.betas, fused=True)


@cache
def _without_compiler(kind: type[Any]) -> Callable[..., Optimizer]:
    """The same optimizer, which doesn't load torch.compile. PyTorch wraps these methods so that the
    compiler leaves them alone, and the wrappers import it at their first call: more than a second
    and 150 MB in every worker, for something that no training uses."""
    names = ("add_param_group", "state_dict", "load_state_dict", "zero_grad")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    step = torch.no_grad()(inspect.unwrap(kind.step))
    made: type[Optimizer] = type(kind.__name__, (kind,), {**methods, "step": step})
    return made


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Sets the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def factor(schedule: Schedule, seen: int, total: int) -> float:
    """Factor of the base learning rate after `seen` of `total` samples.

    `one_cycle` rises from 1/25 and falls along cosines (https://arxiv.org/abs/1708.07120); the
    others rise linearly during the warmup.
    """
    progress = min(seen / total, 1.0) if total else 1.0
    if progress < schedule.warmup:
        share = progress / schedule.warmup
        if schedule.kind == "one_cycle":
            return _cosine(1 / 25, 1.0, share)
        return max(share, 1e-3)
    share = (progress - schedule.warmup) / (1 - schedule.warmup)
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "step":
        return float(schedule.gamma ** sum(progress >= m for m in schedule.milestones))
    return _cosine(1.0, schedule.final, share)


def _cosine(start: float, end: float, share: float) -> float:
    """From `start` at share 0 to `end` at share 1."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
