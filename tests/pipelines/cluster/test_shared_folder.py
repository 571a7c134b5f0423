"""Whether machines share a folder; several machines are in tests/cluster."""

from __future__ import annotations

from pathlib import Path

from pipelines.cluster import shared_folder


def test_a_machine_answers_what_it_sees(tmp_path: Path) -> None:
    probe, reply = tmp_path / ".probe", tmp_path / ".probe-node"
    assert shared_folder.answer_probe(str(probe), str(reply), "t") == "doesn't see its files"
    probe.write_text("of another cluster")
    assert shared_folder.answer_probe(str(probe), str(reply), "t") == "doesn't see its files"
    assert not reply.exists()
    probe.write_text("t")
    assert shared_folder.answer_probe(str(probe), str(tmp_path / "no" / "reply"), "t").startswith(
        "can't write to it"
    )
    assert shared_folder.answer_probe(str(probe), str(reply), "t") == ""
    assert reply.read_text() == "t"


def test_a_cluster_of_one_machine_is_not_asked(ray_cluster: None, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shared_folder.check_shared(folder)
    assert not folder.exists()
