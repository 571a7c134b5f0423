"""When a group that keeps failing is given up. Groups that really fail are in tests/integration."""

from __future__ import annotations

import signal

import pytest

from models.core.errors import TesseraError
from pipelines.cluster.workers import OUT_OF_MEMORY, Failed, FailureCount, _explain, _own_interrupt

FAILED = Failed("worker 1: died", RuntimeError("died"))


def test_failures_count_since_the_last_checkpoint() -> None:
    failures = FailureCount(allowed=3)
    for committed in range(1, 20):  # a machine is taken away twice between two checkpoints
        failures.add(committed, FAILED)
        failures.add(committed, FAILED)
    assert failures.in_all == 38
    failures.add(19, FAILED)
    with pytest.raises(TesseraError, match=r"failed 4 times since the last checkpoint.*worker 1"):
        failures.add(19, FAILED)


@pytest.mark.control(32)
@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_without_progress_so_many_failures_are_allowed(allowed: int) -> None:
    failures = FailureCount(allowed)
    for _ in range(allowed):
        failures.add(0, FAILED)
    with pytest.raises(TesseraError, match="failed"):
        failures.add(0, FAILED)


@pytest.mark.fault(40)
def test_a_machine_without_memory_twice_at_the_same_place_ends_the_training() -> None:
    killed = Failed(f"worker 1: {OUT_OF_MEMORY}", RuntimeError("killed"))
    failures = FailureCount(allowed=3)
    failures.add(0, killed)
    failures.add(1, killed)  # there was a checkpoint in between
    with pytest.raises(TesseraError, match="failed 2 times since the last checkpoint") as error:
        failures.add(1, killed)
    assert "--batch-size" in error.value.hint


def test_the_handler_of_ctrl_c_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="failed"), _own_interrupt():  # noqa: PT012
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise ValueError("failed")
    assert signal.getsignal(signal.SIGINT) is before


class GroupError(Exception):
    """As Ray Train reports it: the failure of each rank that it noticed."""

    def __init__(self, worker_failures: dict[int, Exception]) -> None:
        super().__init__("training failed")
        self.worker_failures = worker_failures


GLOO = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error")


def test_the_worker_that_died_is_named_and_not_those_that_lost_it() -> None:
    died = ValueError("no more memory")
    assert _explain(GroupError({0: GLOO, 1: died})) == (
        None,
        "worker 1: ValueError: no more memory",
    )
    assert _explain(GroupError({0: GLOO})) == (
        None,
        "worker 0 lost its connection to another worker",
    )


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("The actor is dead because its worker process has died. Worker exit", "its process died"),
        ("The actor is temporarily unavailable: RpcError", "it can't be reached any more"),
        ("The actor died because its node has died. Node Id: 7", "its machine is gone"),
        ("Task was killed due to the node running low on memory.", "its machine ran out of memory"),
    ],
)
def test_a_worker_that_ray_lost_is_told_in_a_few_words(said: str, line: str) -> None:
    assert _explain(GroupError({2: RuntimeError(said)}))[1] == f"worker 2: {line}"


def test_a_refusal_of_a_worker_is_found() -> None:
    refusal = TesseraError("the loss is not finite")
    assert _explain(GroupError({0: GLOO, 1: refusal}))[0] is refusal
