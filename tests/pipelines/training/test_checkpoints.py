"""Checkpoints are complete or absent, and any damage is detected."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from small_disk import fill, small_disk
from torch import nn

from models.core.errors import TesseraError
from pipelines import recipe as recipes
from pipelines.data.card import Card, ImageCard, Shard, SplitCard
from pipelines.training import checkpoints, optim
from pipelines.training.checkpoints import DamagedError, Progress


def make_card() -> Card:
    image = ImageCard(
        channels=1, min_height=8, max_height=8, min_width=8, max_width=8, mean=(0.5,), std=(0.5,)
    )
    shard = Shard(path="train/000000.tar", samples=2, size_bytes=1, sha256="", rows_sha256="")
    split = SplitCard(samples=2, shards=(shard,), index="", index_bytes=0, index_sha256="")
    return Card(
        name="tiny",
        task="classification",
        classes=("a", "b"),
        image=image,
        splits={"train": split},
    ).sealed()


def save(
    folder: Path, step: int, *, best: int | None = None, width: int = 4
) -> tuple[Path, nn.Module]:
    torch.manual_seed(step)
    module = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
    recipe = recipes.start("cnn", "tiny")
    optimizer = optim.build(module, recipe.optim["model"])
    module(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    path = checkpoints.save(
        folder,
        weights=module.state_dict(),
        training=None,
        optimizers={"model": optimizer},
        recipe=recipe,
        card=make_card(),
        progress=Progress(step=step, best_step=best),
    )
    return path, module


def test_a_checkpoint_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    path, module = save(tmp_path, 3)
    state = checkpoints.load(path)
    for name, tensor in module.state_dict().items():
        assert torch.equal(state.weights[name], tensor)
    assert state.recipe == recipes.start("cnn", "tiny")
    assert state.card == make_card()
    assert state.progress.step == 3


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_a_stored_optimizer_continues_exactly(kind: str) -> None:
    settings = recipes.Optim(kind=kind, lr=0.1, weight_decay=0.01)  # type: ignore[arg-type]
    torch.manual_seed(0)
    data = torch.randn(6, 5, 3, 4, 4)

    def build() -> nn.Module:  # in channels_last, as the loop has it
        return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    def steps(module: nn.Module, optimizer: torch.optim.Optimizer, rows: torch.Tensor) -> None:
        for row in rows:
            optimizer.zero_grad()
            module(row).square().sum().backward()
            optimizer.step()

    module = build()
    optimizer = optim.build(module, settings)
    steps(module, optimizer, data[:3])
    tensors, numbers = checkpoints.pack_optimizer(optimizer)
    # As it comes back from a file: contiguous.
    packed = (
        {
            k: v.contiguous().clone(memory_format=torch.contiguous_format)
            for k, v in tensors.items()
        },
        numbers,
    )
    other = build()
    other.load_state_dict(module.state_dict())
    again = optim.build(other, settings)
    checkpoints.unpack_optimizer(again, packed)
    steps(module, optimizer, data[3:])
    steps(other, again, data[3:])
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters()))


def test_the_newest_intact_checkpoint_is_used_and_damaged_ones_are_reported(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    newest = tmp_path / "step-000000003"
    (newest / "weights.safetensors").write_bytes(b"")
    (tmp_path / "step-000000002" / "manifest.json").unlink()
    state, notices = checkpoints.newest(tmp_path)
    assert state is not None
    assert state.progress.step == 1
    assert len(notices) == 2
    assert "step-000000003" in notices[0]


def test_the_newest_and_best_checkpoint_are_copied(tmp_path: Path) -> None:
    """They replace the checkpoints in the target, which stay if the copy fails."""
    source, target = tmp_path / "source", tmp_path / "target"
    for step in (1, 2, 3):
        save(source, step, best=1)
    own, _ = save(target, 4)
    digest = checkpoints.copy_checkpoints(source, target)
    assert {p.name for p in target.iterdir()} == {"step-000000001", "step-000000003"}
    assert digest == checkpoints.verify(source / "step-000000003")
    assert digest == checkpoints.verify(target / "step-000000003")
    assert checkpoints.copy_checkpoints(source, target) == digest  # repeated after an interruption

    (source / "step-000000001" / "weights.safetensors").write_bytes(b"")
    shutil.rmtree(target)
    own, _ = save(target, 4)
    with pytest.raises(DamagedError, match="weights"):
        checkpoints.copy_checkpoints(source, target)
    checkpoints.verify(own)
    assert {p.name for p in tmp_path.iterdir()} == {"source", "target"}
    with pytest.raises(TesseraError, match="no intact checkpoint"):
        checkpoints.copy_checkpoints(tmp_path / "none", target)


def test_every_bit_flip_is_detected(tmp_path: Path) -> None:
    """300 single-bit flips over all files; `torch.load` accepted 297 of 300 such flips."""
    path, _ = save(tmp_path, 1)
    digest = checkpoints.verify(path)
    files = sorted(path.iterdir())
    choose = random.Random(0)
    seen = 0
    for _ in range(300):
        file = choose.choice(files)
        before = file.read_bytes()
        position, bit = choose.randrange(len(before)), choose.randrange(8)
        changed = bytearray(before)
        changed[position] ^= 1 << bit
        file.write_bytes(changed)
        try:
            checkpoints.check_digest(path, digest)
        except DamagedError:
            seen += 1
        file.write_bytes(before)
    assert seen == 300
    checkpoints.check_digest(path, digest)  # the control: with every bit back it is good


def test_a_crash_at_any_file_preserves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    real, calls = checkpoints._sync, 0
    for crash_at in range(1, 8):
        calls = 0

        def crash(path: Path, crash_at: int = crash_at) -> None:
            nonlocal calls
            calls += 1
            if calls == crash_at:
                raise KeyboardInterrupt
            real(path)

        monkeypatch.setattr(checkpoints, "_sync", crash)
        try:
            save(tmp_path, 2)
        except KeyboardInterrupt:
            state, _ = checkpoints.newest(tmp_path)
            assert state is not None
            assert state.progress.step == 1
        else:
            assert crash_at == calls + 1, "nothing crashed, though a file was to be written"
            break
    monkeypatch.setattr(checkpoints, "_sync", real)
    checkpoints.prune(tmp_path, keep=2, best_step=None)
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_reported_and_preserves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_sync", full)
    with pytest.raises(TesseraError, match="No space left"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


@pytest.mark.fault(38)
@pytest.mark.parametrize("left_bytes", [0, 4096, 12288, 40960])
def test_a_disk_that_is_really_full_is_one_line_and_nothing_is_left(
    tmp_path: Path, left_bytes: int
) -> None:
    """However much fits: the tensors, which another library writes, or only some of the JSON."""
    with small_disk(tmp_path / "disk", 256 << 10) as disk:
        save(disk, 1)
        filler = fill(disk, left_bytes=left_bytes)
        with pytest.raises(TesseraError) as caught:
            save(disk, 2, width=4000)
        assert caught.value.message.endswith("can't be written: No space left on device")
        assert "--resume" in caught.value.hint
        assert sorted(p.name for p in disk.iterdir()) == ["filler", "step-000000001"]
        assert checkpoints.load(disk / "step-000000001")
        filler.unlink()
        save(disk, 2)  # there is room again


@pytest.mark.control(38)
def test_safetensors_alone_reports_a_full_disk_with_an_error_of_its_own(tmp_path: Path) -> None:
    """Who only catches OSError misses it."""
    with (
        small_disk(tmp_path / "disk", 256 << 10) as disk,
        pytest.raises(SafetensorError) as caught,
    ):
        save_file({"weight": torch.zeros(100_000)}, disk / "weights.safetensors")
    assert not isinstance(caught.value, OSError)


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    checkpoints.prune(tmp_path, keep=2, best_step=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-000000001",
        "step-000000003",
        "step-000000004",
    ]


def test_a_model_directory_has_one_digest(tmp_path: Path) -> None:
    path, _ = save(tmp_path, 1)
    digest = checkpoints.write_model(path, tmp_path / "model")
    assert checkpoints.read_model(tmp_path / "model", digest).recipe.family == "cnn"
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    with (tmp_path / "other" / "recipe.json").open("a") as file:
        file.write(" ")
    with pytest.raises(DamagedError, match=r"recipe\.json"):
        checkpoints.read_model(tmp_path / "other", digest)
    checkpoints._seal(
        tmp_path / "other"
    )  # an attacker who can write the files can write the manifest
    with pytest.raises(DamagedError, match="not those that were registered"):
        checkpoints.read_model(tmp_path / "other", digest)
