"""Run as a program, twice: one of two gloo ranks that train every family's tiny for three steps.

Arguments: rank, an empty file's path to meet at, a folder for the weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import examples  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import models  # noqa: E402
from pipelines import distributed  # noqa: E402
from pipelines.ports import World  # noqa: E402


def main(rank: int, meeting: str, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    world = World(rank, 2)
    for name in models.names():
        family = models.get(name)
        bare = family.parts(examples.tiny(family, seed=rank))  # DDP has to make them equal
        parts = {part: distributed.wrap(module, world) for part, module in bare.items()}
        optimizers = {p: torch.optim.SGD(m.parameters(), lr=0.05) for p, m in bare.items()}
        for step in range(3):
            batch = examples.train_batch(family, seed=10 * step + rank)
            for part, losses in family.updates(parts, batch):
                losses["loss"].backward()
                optimizers[part].step()
                for optimizer in optimizers.values():
                    optimizer.zero_grad()
        weights = {
            f"{part}.{key}": value.detach().contiguous()
            for part, module in bare.items()
            for key, value in module.named_parameters()
        }
        save_file(weights, folder / f"{name}-{rank}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
