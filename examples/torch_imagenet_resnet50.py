"""ResNet-50 on ImageNet with SENG: the recipe of the paper's section 6 and Table 7.

    horovodrun -np 4 python -m examples.torch_imagenet_resnet50 /data/imagenet
    python -m examples.torch_imagenet_resnet50 /data/imagenet --batch-size 64 --amp

The folder has ``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``. Learning rate, its decay, warm-up
and damping come from the recipe of the global batch size unless given. ``--preconditioner none``
trains with plain momentum SGD. With ``--checkpoint`` a checkpoint is written each epoch and the next
start goes on from the newest one, with the same curvature.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import hvd_ext.torch as hvd
from hvd_ext.seng import imagenet_recipe
from hvd_ext.torch.seng.schedules import recipe_lr

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Images(torch.utils.data.Dataset):
    """A folder of one folder a class. Training crops and mirrors at random, testing at the centre."""

    def __init__(self, folder: Path, size: int, *, training: bool) -> None:
        self.classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if not self.classes:
            raise FileNotFoundError(f"{folder} holds no folder of a class; give ImageNet's folder, "
                                    "with train/<class>/ and val/<class>/ in it")
        self.items = [(path, label) for label, name in enumerate(self.classes)
                      for path in sorted((folder / name).iterdir())]
        self.size, self.training = size, training

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.items[index]
        with Image.open(path) as image:
            image = image.convert("RGB")
            box = self._training_box(image.size) if self.training else self._centre(image.size)
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
            pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
        if self.training and torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
        return (pixels - MEAN) / DEVIATION, label

    def _training_box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        area = size[0] * size[1] * float(torch.empty(()).uniform_(0.08, 1.0))
        aspect = float(torch.empty(()).uniform_(np.log(3 / 4), np.log(4 / 3)).exp())
        width = min(size[0], (area * aspect) ** 0.5)
        height = min(size[1], (area / aspect) ** 0.5)
        left = float(torch.rand(())) * (size[0] - width)
        top = float(torch.rand(())) * (size[1] - height)
        return left, top, left + width, top + height

    def _centre(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        side = min(size) * 0.875
        left, top = (size[0] - side) / 2, (size[1] - side) / 2
        return left, top, left + side, top + side


def network(name: str, classes: int) -> torch.nn.Module:
    """torchvision's, where it is installed and fits this torch, else our own of the same shape."""
    try:
        from torchvision import models
    except (ImportError, RuntimeError):  # the latter: its operators are those of another build of torch
        from examples import resnet as models  # type: ignore[no-redef]
    return getattr(models, name)(**{"num_classes" if "torchvision" in models.__name__ else
                                    "classes": classes})


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preconditioner", choices=("seng", "none"), default="seng")
    parser.add_argument("--model", default="resnet50", choices=("resnet18", "resnet50"))
    parser.add_argument("--batch-size", type=int, default=64, help="a rank")
    parser.add_argument("--epochs", type=int, help="stop after so many of the recipe's epochs")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--damping", type=float)
    parser.add_argument("--update-freq", type=int, default=800)
    parser.add_argument("--coupling", choices=("block", "lagged", "full"), default="block")
    parser.add_argument("--subsample", type=int, help="samples of a batch for the curvature")
    parser.add_argument("--weight-decay", type=float, default=2e-4,
                        help="the paper takes the best of 5e-4, 3e-4, 2e-4, 1e-4")
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--amp", action="store_true", help="mixed precision, float16 on a GPU")
    parser.add_argument("--checkpoint", type=Path, help="folder of checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train; the last epoch's figures."""
    options = parse(arguments)
    hvd.init()
    torch.manual_seed(options.seed)
    device = torch.device("cuda", hvd.local_rank()) if torch.cuda.is_available() else \
        torch.device("cpu")
    training = Images(options.folder / "train", options.size, training=True)
    testing = Images(options.folder / "val", options.size, training=False)
    sampler = torch.utils.data.DistributedSampler(training, hvd.size(), hvd.rank(),
                                                  seed=options.seed)
    loader = torch.utils.data.DataLoader(training, options.batch_size, sampler=sampler,
                                         num_workers=options.workers)
    tests = torch.utils.data.DataLoader(
        torch.utils.data.Subset(testing, range(hvd.rank(), len(testing), hvd.size())),
        options.batch_size, num_workers=options.workers)
    recipe = imagenet_recipe(options.batch_size * hvd.size())
    model = network(options.model, len(training.classes)).to(device)
    sgd = torch.optim.SGD(model.parameters(), lr=options.lr or recipe.lr, momentum=0.9,
                          weight_decay=options.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp)
    seng = hvd.SENG(
        model, damping=options.damping or recipe.damping_at_step(len(loader)),
        update_freq=options.update_freq, coupling=options.coupling, subsample=options.subsample,
    ) if options.preconditioner == "seng" else None
    optimizer = hvd.DistributedOptimizer(
        sgd, named_parameters=model.named_parameters(), preconditioner=seng,
        **({"grad_scaler": scaler} if seng is not None else {}))
    schedule = recipe_lr(optimizer, recipe, steps_per_epoch=len(loader))
    first = 0
    loaded = None if options.checkpoint is None else hvd.load_checkpoint(
        options.checkpoint, model=model, optimizer=optimizer)
    if loaded is None:
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    else:
        first = loaded.step
        schedule.load_state_dict(loaded.more["schedule"])
        scaler.load_state_dict(loaded.more["scaler"])
    figures: dict[str, Any] = {}
    for epoch in range(first, options.epochs or int(recipe.max_epoch)):
        sampler.set_epoch(epoch)
        model.train()
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            with torch.autocast(device.type, enabled=options.amp,
                                dtype=torch.float16 if device.type == "cuda" else torch.bfloat16):
                loss = F.cross_entropy(model(images.to(device)), labels.to(device),
                                       label_smoothing=options.label_smoothing)
            scaler.scale(loss).backward()
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
            schedule.step()
            total += loss.item()
        figures = {"epoch": epoch + 1, "lr": schedule.get_last_lr()[0],
                   "loss": mean_over_ranks(total / len(loader)),
                   "top1": accuracy(model, tests, device), "started_at": first}
        if hvd.rank() == 0:
            print(" ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
        if options.checkpoint is not None:
            hvd.save_checkpoint(options.checkpoint, epoch + 1, model=model, optimizer=optimizer,
                                schedule=schedule.state_dict(), scaler=scaler.state_dict())
    if seng is not None and hvd.rank() == 0:
        print(seng.report())
    return figures


def mean_over_ranks(value: float) -> float:
    """The ranks' mean of a number."""
    return float(hvd.allreduce(torch.tensor(value), name="mean"))


@torch.no_grad()
def accuracy(model: torch.nn.Module, tests: Any, device: torch.device) -> float:
    """Top-1 over all ranks' parts of the test set."""
    model.eval()
    counts = torch.zeros(2)
    for images, labels in tests:
        hit = model(images.to(device)).argmax(1).cpu() == labels
        counts += torch.tensor([float(hit.sum()), float(len(labels))])
    counts = hvd.allreduce(counts, name="top1", op=hvd.Sum)
    return float(counts[0] / counts[1].clamp_min(1))


if __name__ == "__main__":
    main()
