"""An agent on each machine of a real cluster, which here is one machine."""

from __future__ import annotations

from pipelines.cluster import machines
from pipelines.cluster.connection import cluster_resources
from pipelines.cluster.machines import Agents, NoAnswer


def test_each_machine_answers_or_there_is_a_reason(ray_cluster: None) -> None:
    class Agent:  # in the function, so that Ray's workers need no import of the tests
        def double(self, number: int) -> int:
            return 2 * number

        def refuse(self) -> None:
            raise ValueError("not today")

        def sleep(self) -> None:
            import time

            time.sleep(60)

    (here,) = machines.machines()
    assert here.is_here
    assert (here.cpus, here.lost) == (4, "")
    agents = Agents([here], cluster_resources(), Agent)
    try:
        assert agents.call("double", {here.id: (21,)}, timeout_seconds=60) == {here.id: 42}
        refused = agents.call("refuse", {here.id: ()}, timeout_seconds=60)[here.id]
        assert isinstance(refused, NoAnswer)
        assert refused.reason == "failed: ValueError: not today"
        late = agents.call("sleep", {here.id: ()}, timeout_seconds=1)[here.id]
        assert late == NoAnswer("gave no answer in 1 s")
    finally:
        agents.end()
