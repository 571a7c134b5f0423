"""Folders with a manifest in an object store: complete or not used, whatever is interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines.data import card as cards
from pipelines.training import checkpoints, run_storage
from pipelines.training.checkpoints import DamagedError, Progress
from pipelines.training.run_storage import RunStorage


@pytest.fixture
def storage(tmp_path: Path) -> RunStorage:
    return RunStorage.open(f"memory://bucket/{tmp_path.name}")


@pytest.fixture(scope="module")
def saved(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network with one weight. Only read."""
    module = torch.nn.Linear(3, 2)
    return checkpoints.save(
        tmp_path_factory.mktemp("saved"),
        weights=module.state_dict(),
        training=None,
        optimizers={"model": torch.optim.SGD(module.parameters(), lr=0.1)},
        recipe=recipes.start("cnn", "tiny"),
        card=cards.read(digits),
        progress=Progress(epoch=1, step=4),
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_published_folder_is_fetched_as_it_was(
    storage: RunStorage, saved: Path, tmp_path: Path
) -> None:
    storage.publish_folder(saved, "checkpoints/step-000000004")
    copy = storage.fetch_folder("checkpoints/step-000000004", tmp_path / "here" / saved.name)
    assert content(copy) == content(saved)
    before = copy.stat().st_ino
    storage.fetch_folder("checkpoints/step-000000004", copy)
    assert copy.stat().st_ino == before, "an intact copy isn't downloaded again"
    (copy / "weights.safetensors").write_bytes(b"damaged")
    storage.fetch_folder("checkpoints/step-000000004", copy)
    assert content(copy) == content(saved), "a damaged copy is replaced"


@pytest.mark.fault(36)
def test_an_upload_that_dies_after_any_file_leaves_the_folder_before_in_use(
    storage: RunStorage, saved: Path, tmp_path: Path
) -> None:
    storage.publish_folder(saved, "checkpoints/step-000000004")
    upload = storage.storage.upload
    for uploads in range(len(content(saved))):
        left = uploads

        def fail_later(file: Path, path: str) -> None:
            nonlocal left
            if not left:
                raise TesseraError("the machine was lost")
            left -= 1
            upload(file, path)

        storage.storage.upload = fail_later  # type: ignore[method-assign]
        with pytest.raises(TesseraError, match="was lost"):
            storage.publish_folder(saved, f"checkpoints/step-{uploads + 10:09d}")
    storage.storage.upload = upload  # type: ignore[method-assign]
    complete, partial = storage.complete_folders("checkpoints")
    assert complete == ["step-000000004"]
    assert partial == [f"step-{n + 10:09d}" for n in range(1, len(content(saved)))]
    with pytest.raises(DamagedError, match="no readable manifest"):
        storage.fetch_folder(f"checkpoints/{partial[-1]}", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    for name in partial:
        storage.remove_folder(f"checkpoints/{name}")
    assert storage.complete_folders("checkpoints") == (complete, [])


@pytest.mark.fault(37)
@pytest.mark.parametrize("damage", [b"", b"x" * 40, None], ids=["empty", "changed", "missing"])
def test_a_damaged_file_is_noticed(
    storage: RunStorage, saved: Path, tmp_path: Path, damage: bytes | None
) -> None:
    storage.publish_folder(saved, "judge")
    for name in content(saved):
        if damage is None:
            storage.storage.remove(f"judge/{name}")
        else:
            storage.storage.write(f"judge/{name}", damage)
        with pytest.raises(DamagedError):
            storage.fetch_folder("judge", tmp_path / "copy")
        assert not (tmp_path / "copy").exists()
        storage.publish_folder(saved, "other")
        storage.remove_folder("judge")
        storage.publish_folder(saved, "judge")
    assert content(storage.fetch_folder("judge", tmp_path / "copy")) == content(saved)


@pytest.mark.control(36, 37)
def test_control_without_a_manifest_a_partial_folder_looks_complete(
    storage: RunStorage, saved: Path, tmp_path: Path
) -> None:
    for name in sorted(content(saved))[:2]:
        storage.publish_file(saved / name, f"folder/{name}")
    storage.fetch_files("folder", tmp_path / "copy")
    assert len(content(tmp_path / "copy")) == 2, "and nothing was raised"


def test_a_folder_with_other_content_is_replaced(
    storage: RunStorage, saved: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(saved, other)
    (other / "more.json").write_text("{}")
    checkpoints.write_model(saved, other)
    storage.publish_folder(other, "model")
    storage.publish_folder(saved, "model")
    assert storage.storage.names("model") == sorted(f"model/{name}" for name in content(saved))


def test_a_folder_that_cant_be_created_is_replaced_by_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_storage.scratch_folder(tmp_path / "a" / "run") == tmp_path / "a" / "run"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "file").write_text("")
    folder = run_storage.scratch_folder(tmp_path / "file" / "run")
    assert folder.is_dir()
    assert folder.name == "run"
    assert folder.is_relative_to(tmp_path)


def test_the_address_of_a_run_is_below_the_storage() -> None:
    assert run_storage.address_of("s3://b/x", "runs", "one") == "s3://b/x/runs/one"
    assert run_storage.address_of("", "runs", "one") == ""
