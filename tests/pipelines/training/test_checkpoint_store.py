"""Checkpoints in a storage: the upload runs beside the training and is the commit."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.data.card import Card
from pipelines.training import checkpoint_store
from pipelines.training.checkpoint_store import PublishedCheckpoints
from pipelines.training.checkpoints import Progress, name_of
from pipelines.training.run_storage import RunStorage


class Emitted:
    def __init__(self) -> None:
        self.events: list[Mapping[str, Any]] = []
        self.flushed = 0

    def __call__(self, event: Mapping[str, Any]) -> None:
        self.events.append(event)

    def flush(self) -> None:
        self.flushed += 1

    def notices(self) -> list[str]:
        return [str(e["text"]) for e in self.events if e["kind"] == "notice"]


@pytest.fixture(scope="module")
def card(digits: Path) -> Card:
    return cards.read(digits)


@pytest.fixture
def storage(tmp_path: Path) -> RunStorage:
    return RunStorage.open(f"memory://bucket/{tmp_path.name}")


def save(store: PublishedCheckpoints, card: Card, step: int, best: int | None = None) -> None:
    module = torch.nn.Linear(3, 2)
    store.save(
        weights=module.state_dict(),
        training=None,
        optimizers={"model": torch.optim.SGD(module.parameters(), lr=0.1)},
        recipe=recipes.start("cnn", "tiny"),
        card=card,
        progress=Progress(epoch=1, step=step, best_step=best),
    )


def test_a_save_does_not_wait_for_its_upload_and_the_next_one_does(
    storage: RunStorage, card: Card, tmp_path: Path
) -> None:
    emitted, gate = Emitted(), threading.Event()
    upload = storage.storage.upload

    def slow(file: Path, path: str) -> None:
        assert gate.wait(30)
        upload(file, path)

    storage.storage.upload = slow  # type: ignore[method-assign]
    store = PublishedCheckpoints(tmp_path / "checkpoints", emitted, storage, keep=2)
    save(store, card, 1)
    assert (tmp_path / "checkpoints" / name_of(1)).is_dir(), "on this machine at once"
    assert emitted.events == []
    second = threading.Thread(target=save, args=(store, card, 2))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "it waits for the upload before it"
    assert storage.complete_folders("checkpoints") == ([], [])
    gate.set()
    second.join(30)
    store.wait()
    assert [e["path"] for e in emitted.events] == [name_of(1), name_of(2)]
    assert storage.complete_folders("checkpoints") == ([name_of(1), name_of(2)], [])


def test_events_are_flushed_before_the_checkpoint_is_complete(
    storage: RunStorage, card: Card, tmp_path: Path
) -> None:
    complete: list[list[str]] = []

    class Watching(Emitted):
        def flush(self) -> None:
            complete.append(storage.complete_folders("checkpoints")[0])

    store = PublishedCheckpoints(tmp_path / "checkpoints", Watching(), storage, keep=2)
    save(store, card, 1)
    store.wait()
    assert complete == [[]]


def test_the_newest_and_the_best_are_kept(storage: RunStorage, card: Card, tmp_path: Path) -> None:
    store = PublishedCheckpoints(tmp_path / "checkpoints", Emitted(), storage, keep=2)
    for step in range(1, 6):
        save(store, card, step, best=2)
    store.wait()
    kept = [name_of(2), name_of(4), name_of(5)]
    assert storage.complete_folders("checkpoints") == (kept, [])
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == kept


@pytest.mark.fault(37)
def test_another_machine_finds_the_newest_intact_checkpoint(
    storage: RunStorage, card: Card, tmp_path: Path
) -> None:
    store = PublishedCheckpoints(tmp_path / "checkpoints", Emitted(), storage, keep=3)
    for step in (1, 2):
        save(store, card, step)
    store.wait()
    storage.storage.write(f"checkpoints/{name_of(2)}/weights.safetensors", b"damaged")
    storage.storage.write(f"checkpoints/{name_of(3)}/weights.safetensors", b"partial")
    emitted = Emitted()
    other = PublishedCheckpoints(tmp_path / "other", emitted, storage, keep=3)
    never_committed = tmp_path / "other" / name_of(4)
    never_committed.mkdir(parents=True)
    state = other.newest()
    assert state is not None
    assert state.progress.step == 1
    (notice,) = emitted.notices()
    assert notice.startswith(f"checkpoint {name_of(2)} is damaged and ignored")
    assert storage.complete_folders("checkpoints") == ([name_of(1)], [])
    assert not never_committed.exists()


@pytest.mark.control(43)
def test_control_an_upload_that_is_not_retried_ends_the_training_with_one_line(
    storage: RunStorage, card: Card, tmp_path: Path
) -> None:
    store = PublishedCheckpoints(tmp_path / "checkpoints", Emitted(), storage, keep=2)
    save(store, card, 1)
    store.wait()

    def refuse(file: Path, path: str) -> None:
        raise TesseraError("access is denied")

    storage.storage.upload = refuse  # type: ignore[method-assign]
    save(store, card, 2)
    for call in (store.wait, store.raise_failure, lambda: save(store, card, 3)):
        with pytest.raises(TesseraError, match="step-000000002 can't be uploaded: access is deni"):
            call()
    assert storage.complete_folders("checkpoints") == ([name_of(1)], [])


def test_checkpoints_of_one_run_replace_those_of_another(
    storage: RunStorage, card: Card, tmp_path: Path
) -> None:
    donor, taker = f"{storage.where}/donor", f"{storage.where}/taker"
    for address, steps in ((donor, (4, 8)), (taker, (2, 4, 6))):
        store = PublishedCheckpoints(
            tmp_path / "machine" / address[-5:], Emitted(), RunStorage.open(address), keep=3
        )
        for step in steps:
            save(store, card, step)
        store.wait()
    copies = tmp_path / "elsewhere" / "donor"
    checkpoint_store.fetch_all(donor, copies)
    assert sorted(p.name for p in copies.glob("step-*")) == [name_of(4), name_of(8)]
    checkpoint_store.replace_all(taker, copies)
    expected = {n.removeprefix("donor"): storage.storage.read(n) for n in names(storage, "donor")}
    replaced = {n.removeprefix("taker"): storage.storage.read(n) for n in names(storage, "taker")}
    assert replaced == expected


def names(storage: RunStorage, folder: str) -> list[str]:
    return storage.storage.names(folder)
