"""The loaders that are compared, one function each, and the process that runs one of them.

In: the folder of an image set and the side of the crop. Out: for each turn that the parent
requests, the number of images, and the seconds of wall time and CPU time. Every loader decodes the
same JPEGs at full size, crops the centre, and yields uint8 batches of 128 to one consumer, from two
processes.

`data_loading.py` starts it with the interpreter that has the loader's library, so only the standard
library is imported before a loader is chosen.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

BATCH = 128
PROCESSES = 2
Counts = Iterator[int]
"""Yields the number of images of each batch, without end."""


# --- the raw limits
# --------------------------------------------------------------------------------


def raw(folder: Path, crop: int | None, source: str) -> Counts:
    """A bare loop: read, decode, crop, write into the batch. The processes are independent, and the
    batches are dropped."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    finished: Any = context.Queue(4)
    for seed in range(PROCESSES):
        arguments = (folder, crop, source, seed, finished)
        context.Process(target=_raw_loop, args=arguments, daemon=True).start()
    while True:
        yield finished.get()


def _raw_loop(folder: Path, crop: int | None, source: str, seed: int, finished: Any) -> None:
    import numpy as np
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    torch.set_num_threads(1)
    count, read = _from_files(folder) if source == "files" else _from_blob(folder)
    side = crop or 32
    # Decoders return (H, W, C) memory, which NumPy copies faster than torch.
    batch = torch.empty((BATCH, 3, side, side), dtype=torch.uint8).numpy()
    while True:
        for position, index in enumerate(np.random.default_rng(seed).permutation(count).tolist()):
            image = centre(decode_jpeg(read(index), ImageReadMode.RGB), crop)
            batch[position % BATCH] = image.numpy()
            if position % BATCH == BATCH - 1:
                finished.put(BATCH)


def _from_files(folder: Path) -> tuple[int, Callable[[int], Any]]:
    """One file per image, each opened, read and closed."""
    from torchvision.io import read_file

    files = sorted(map(str, (folder / "folder").rglob("*.jpg")))
    return len(files), lambda index: read_file(files[index])


def _from_blob(folder: Path) -> tuple[int, Callable[[int], Any]]:
    """All images in one open file."""
    import numpy as np
    import torch

    ends = np.load(folder / "blob.npy").tolist()
    file = os.open(folder / "blob.bin", os.O_RDONLY)

    def read(index: int) -> Any:
        data = bytearray(ends[index + 1] - ends[index])
        os.preadv(file, [data], ends[index])
        return torch.frombuffer(data, dtype=torch.uint8)

    return len(ends) - 1, read


def centre(image: Any, crop: int | None) -> Any:
    """The central square of an image (C, H, W), with `crop` as its side; None: the whole image."""
    if crop is None:
        return image
    top, left = (image.shape[1] - crop) // 2, (image.shape[2] - crop) // 2
    return image[:, top : top + crop, left : left + crop]


# --- ours
# ------------------------------------------------------------------------------------------


def ours(folder: Path, crop: int | None, **settings: Any) -> Counts:
    """`TrainLoader` with two loader workers."""
    from pipelines.data import card as cards
    from pipelines.data.loading.loaders import TrainLoader
    from pipelines.interfaces import World

    card = cards.read(folder / "shards")
    loader: Any = TrainLoader(
        folder / "shards",
        card,
        card.spec(crop, crop),
        batch_size=BATCH,
        seed=0,
        world=World(),
        fit="crop",
        loader_workers=PROCESSES,
        **settings,
    )
    epoch = 0
    while True:
        for step in loader.epoch(epoch):
            yield len(step.batch["image"])
        epoch += 1


def ours_cached(folder: Path, crop: int | None) -> Counts:
    """`TrainLoader` from its second epoch on, when all images are in memory."""
    counts = ours(folder, crop, cache="memory")
    remaining = json.loads((folder / "done.json").read_text())["images"]
    while remaining > 0:
        remaining -= next(counts)
    yield from counts


# --- a folder of images with PyTorch's DataLoader
# ---------------------------------------------------


def image_folder(folder: Path, crop: int | None) -> Counts:
    """torchvision's `ImageFolder` as its documentation shows it; it decodes with Pillow."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [*([transforms.CenterCrop(crop)] if crop else []), transforms.PILToTensor()]
    yield from _data_loader(ImageFolder(str(folder / "folder"), transforms.Compose(steps)))


class FolderSet:
    """A map-style data set over files that decodes with torchvision."""

    def __init__(self, folder: Path, crop: int | None) -> None:
        classes = sorted(path.name for path in folder.iterdir())
        self._files = [
            (str(path), label)
            for label, name in enumerate(classes)
            for path in sorted((folder / name).iterdir())
        ]
        self._crop = crop

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from torchvision.io import ImageReadMode, decode_jpeg, read_file

        path, label = self._files[index]
        return centre(decode_jpeg(read_file(path), ImageReadMode.RGB), self._crop), label


def folder_torchvision(folder: Path, crop: int | None) -> Counts:
    yield from _data_loader(FolderSet(folder / "folder", crop))


def _data_loader(data: Any, **settings: Any) -> Counts:
    from torch.utils.data import DataLoader

    options = {"batch_size": BATCH, "shuffle": True, **settings}
    loader: Any = DataLoader(data, num_workers=PROCESSES, persistent_workers=True, **options)
    while True:
        for images, _ in loader:
            yield len(images)


# --- stock webdataset
# ------------------------------------------------------------------------------


def webdataset(folder: Path, crop: int | None, decoder: str) -> Counts:
    """Our shards, shuffled by shard and in a buffer of 1,000 samples, batched in the workers, as
    its documentation recommends."""
    import webdataset as wds

    shards = sorted(map(str, (folder / "shards" / "train").glob("*.tar")))
    stream = wds.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(1000)
    if decoder == "pillow":
        from torchvision import transforms

        steps = [*([transforms.CenterCrop(crop)] if crop else []), transforms.PILToTensor()]
        image: Callable[..., Any] = transforms.Compose(steps)
        stream = stream.decode("pil").to_tuple("jpg", "cls").map_tuple(image, int)
    else:
        stream = stream.to_tuple("jpg", "cls").map_tuple(partial(_decode, crop=crop), int)
    stream = stream.batched(BATCH, collation_fn=_stack)
    yield from _data_loader(stream, batch_size=None, shuffle=False)


def _decode(data: bytes, crop: int | None) -> Any:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    # A bytearray, because torch warns about read-only memory.
    content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return centre(decode_jpeg(content, ImageReadMode.RGB), crop)


def _stack(samples: list[tuple[Any, int]]) -> tuple[Any, Any]:
    import torch

    images, labels = zip(*samples)
    return torch.stack(images), torch.tensor(labels)


# --- MosaicML streaming
# ----------------------------------------------------------------------------


def mosaicml(folder: Path, crop: int | None) -> Counts:
    """`StreamingDataset` over local MDS shards of unchanged JPEGs, with its default shuffling,
    decoded with torchvision (its own "jpeg" column decodes with Pillow, which is slower)."""
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    local = folder / "mds"
    if not local.exists():
        part = folder / "mds.part"
        shutil.rmtree(part, ignore_errors=True)
        with MDSWriter(out=str(part), columns={"image": "bytes", "label": "int"}) as out:
            files = FolderSet(folder / "folder", crop)._files
            for path, label in files:
                out.write({"image": Path(path).read_bytes(), "label": label})
        part.rename(local)

    class Decoded(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return _decode(sample["image"], crop), sample["label"]

    data = Decoded(local=str(local), shuffle=True, batch_size=BATCH)
    yield from _data_loader(data, shuffle=False)


# --- Ray Data
# --------------------------------------------------------------------------------------


def ray_data(folder: Path, crop: int | None) -> Counts:
    """`read_webdataset` without a decoder, then torchvision's decoder on blocks, then batches. The
    shards are listed 20 times, because starting an epoch takes seconds that shouldn't count."""
    import logging

    import ray

    # Kept between turns: a second `ray.init` ends the process.
    if not ray.is_initialized():
        ray.init(num_cpus=PROCESSES, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    shards = sorted(map(str, (folder / "shards" / "train").glob("*.tar")))
    stream = ray.data.read_webdataset(shards * 20, decoder=None, shuffle="files")
    stream = stream.map_batches(partial(_decode_block, crop=crop), batch_size=BATCH)
    while True:
        for batch in stream.iter_torch_batches(batch_size=BATCH):
            yield len(batch["image"])


def _decode_block(batch: dict[str, Any], crop: int | None) -> dict[str, Any]:
    import numpy as np

    images = np.stack([_decode(data, crop).numpy() for data in batch["jpg"]])
    return {"image": images, "label": np.array([int(text) for text in batch["cls"]])}


# --- the process of a contender
# -------------------------------------------------------------------------

CONTENDERS: dict[str, Callable[[Path, int | None], Counts]] = {
    "raw_files": partial(raw, source="files"),
    "raw_blob": partial(raw, source="blob"),
    "ours": partial(ours, cache="none"),
    "ours_cached": ours_cached,
    "folder_torchvision": folder_torchvision,
    "image_folder": image_folder,
    "webdataset_pillow": partial(webdataset, decoder="pillow"),
    "webdataset_torchvision": partial(webdataset, decoder="torchvision"),
    "mosaicml": mosaicml,
    "ray_data": ray_data,
}
RESTARTED = frozenset({"ray_data"})
"""Contenders that use the CPU between turns: they are restarted after each turn, with a longer
warm-up."""


def turn(counts: Counts, warm: float, seconds: float) -> dict[str, float]:
    """Images, wall seconds and CPU seconds, from the arrival of one batch to that of another.
    Prefetched batches are used up in the `warm` seconds before, which start at the first batch."""
    next(counts)
    began = time.perf_counter()
    while time.perf_counter() - began < warm:
        next(counts)
    cpu, began, images = cpu_seconds(), time.perf_counter(), 0
    while (wall := time.perf_counter() - began) < seconds:
        images += next(counts)
    return {"images": images, "wall": wall, "cpu": cpu_seconds() - cpu}


def cpu_seconds() -> float:
    """CPU seconds of this process and all its descendants, including those that have ended."""
    import psutil

    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def main() -> None:
    """Writes a line of JSON when it is ready, then one for each line that requests a turn."""
    name, folder, crop = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) or None
    # What libraries print to stdout goes to the log instead.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    counts = CONTENDERS[name](folder, crop)
    if name not in RESTARTED:
        next(counts)
    print(json.dumps({"ready": name}), file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        warm = request["warm"] * (4 if name in RESTARTED else 1)
        measured = turn(counts, warm, request["seconds"])
        if name in RESTARTED:
            counts.close()  # type: ignore[attr-defined]
            counts = CONTENDERS[name](folder, crop)
        print(json.dumps(measured), file=replies)


if __name__ == "__main__":
    main()
