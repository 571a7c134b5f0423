"""A plain training loop, as a tutorial would write it, to compare Tessera's defaults with.

In: a folder with `train` and `test` folders of one folder for each class; size, epochs, seed. Out:
the accuracy on `test`. Network and weights are those of Tessera's `efficientnet`.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from models.core.family import DataSpec
from models.efficientnet import FAMILY, EfficientNetConfig


def plain_loop(folder: str, *, size: int, epochs: int, seed: int, batch_size: int = 32) -> float:
    torch.manual_seed(seed)
    finish = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.5] * 3),
    ]
    crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2)]
    train = ImageFolder(f"{folder}/train", v2.Compose([*crop, *finish]))
    middle = [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
    test = ImageFolder(f"{folder}/test", v2.Compose([*middle, *finish]))
    mean = (0.5,) * 3
    data = DataSpec("classification", 3, size, size, tuple(train.classes), mean, mean)
    config = EfficientNetConfig(weights="imagenet")
    net = FAMILY.build(config, data)
    FAMILY.warm_start(config, net)
    net = net.to(memory_format=torch.channels_last)
    batches = DataLoader(train, batch_size, shuffle=True, num_workers=1)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, epochs * len(batches), pct_start=0.1
    )
    net.train()
    for _ in range(epochs):
        for images, labels in batches:
            logits = net(images.to(memory_format=torch.channels_last))
            nn.functional.cross_entropy(logits, labels, label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    net.eval()
    with torch.no_grad():
        right = [net(i).argmax(1) == labels for i, labels in DataLoader(test, 64, num_workers=1)]
    return float(torch.cat(right).float().mean())
