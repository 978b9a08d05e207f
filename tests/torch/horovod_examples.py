"""Scripts that use the API as Horovod's PyTorch examples do, on made data; ``hvd`` is what they import."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from tests.torch.problems import bits

BATCH = 8


def digits(count=64, seed=0):
    """Small images of one bright row, whose number is the class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (count,), generator=generator)
    x = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    x[torch.arange(count), 0, 2 * y] += 1.0
    return TensorDataset(x, y)


def network(hvd, device="cpu"):
    torch.manual_seed(42 + hvd.rank())  # rank 0's weights are to be broadcast
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).to(device)


def mnist(hvd, extension, folder, *, use_adasum=False, fp16=False, mixed_precision=False):
    """``pytorch_mnist.py``."""
    hvd.init()
    torch.set_num_threads(1)
    lr_scaler = hvd.size() if not use_adasum else 1
    if use_adasum and hvd.nccl_built():
        lr_scaler = hvd.local_size()
    dataset = digits()
    sampler = DistributedSampler(dataset, num_replicas=hvd.size(), rank=hvd.rank(), shuffle=False)
    loader = DataLoader(dataset, batch_size=BATCH, sampler=sampler)
    test_loader = DataLoader(digits(32, 1), batch_size=BATCH, sampler=DistributedSampler(
        digits(32, 1), num_replicas=hvd.size(), rank=hvd.rank()))
    model = network(hvd)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * lr_scaler, momentum=0.5)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    options = extension(hvd, model)
    compression = hvd.Compression.fp16 if fp16 else hvd.Compression.none
    optimizer = hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(),
        **{"compression": compression, "op": hvd.Adasum if use_adasum else hvd.Average,
           **({} if options else {"gradient_predivide_factor": 1.0}), **options})
    scaler = torch.amp.GradScaler("cpu", enabled=mixed_precision)
    for epoch in range(2):
        model.train()
        sampler.set_epoch(epoch)
        for data, target in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(data), target)
            if mixed_precision:
                scaler.scale(loss).backward()
                optimizer.synchronize()
                scaler.unscale_(optimizer)
                with optimizer.skip_synchronize():
                    scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()

    def metric_average(value, name):
        return hvd.allreduce(torch.tensor(value), name=name).item()

    model.eval()
    accuracy = sum(float((model(x).argmax(1) == y).sum()) for x, y in test_loader) / 16
    return bits(model.parameters()), metric_average(accuracy, "avg_accuracy")


def synthetic_benchmark(hvd, extension, folder):
    """``pytorch_synthetic_benchmark.py``."""
    hvd.init()
    model = network(hvd)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01 * hvd.size())
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(),
                                         **{"compression": hvd.Compression.none, "op": hvd.Average,
                                            **extension(hvd, model)})
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    generator = torch.Generator().manual_seed(hvd.rank())
    data = torch.randn(BATCH, 1, 8, 8, generator=generator)
    target = torch.randint(0, 4, (BATCH,), generator=generator)
    for _ in range(6):
        optimizer.zero_grad()
        functional.cross_entropy(model(data), target).backward()
        optimizer.step()
    return bits(model.parameters()), 1.0


def imagenet(hvd, extension, folder):
    """``pytorch_imagenet_resnet50.py``: sub-batches, warm-up, checkpoints of rank 0, resuming."""
    hvd.init()
    batches_per_allreduce, epochs = 2, 2
    pattern = str(Path(folder) / "checkpoint-{epoch}.pt")

    class Metric:
        def __init__(self, name):
            self.name, self.sum, self.n = name, torch.tensor(0.0), torch.tensor(0.0)

        def update(self, value):
            self.sum += hvd.allreduce(value.detach().cpu(), name=self.name)
            self.n += 1

    resume_from_epoch = 0
    for try_epoch in range(epochs, 0, -1):
        if Path(pattern.format(epoch=try_epoch)).exists():
            resume_from_epoch = try_epoch
            break
    resume_from_epoch = hvd.broadcast(torch.tensor(resume_from_epoch), root_rank=0,
                                      name="resume_from_epoch").item()
    dataset = digits()
    sampler = DistributedSampler(dataset, num_replicas=hvd.size(), rank=hvd.rank())
    loader = DataLoader(dataset, batch_size=BATCH * batches_per_allreduce, sampler=sampler)
    model = network(hvd)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=5e-5,
                                lr=0.02 * batches_per_allreduce * hvd.size())
    options = extension(hvd, model)
    optimizer = hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(),
        backward_passes_per_step=batches_per_allreduce,
        **{"compression": hvd.Compression.none, "op": hvd.Average,
           **({} if options else {"gradient_predivide_factor": 2.0}), **options})
    if resume_from_epoch > 0 and hvd.rank() == 0:
        checkpoint = torch.load(pattern.format(epoch=resume_from_epoch), weights_only=False)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    accuracy = Metric("train_accuracy")
    for epoch in range(resume_from_epoch, epochs):
        model.train()
        sampler.set_epoch(epoch)
        for index, (data, target) in enumerate(loader):
            progress = epoch + float(index + 1) / len(loader)
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * batches_per_allreduce * (progress * (hvd.size() - 1) / epochs + 1)
            optimizer.zero_grad()
            for i in range(0, len(data), BATCH):
                out = model(data[i:i + BATCH])
                accuracy.update((out.argmax(1) == target[i:i + BATCH]).float().mean())
                loss = functional.cross_entropy(out, target[i:i + BATCH])
                loss.div_(math.ceil(float(len(data)) / BATCH))
                loss.backward()
            optimizer.step()
        if hvd.rank() == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()},
                       pattern.format(epoch=epoch + 1))
        hvd.barrier()
    return bits(model.parameters()), float(accuracy.sum / max(1.0, float(accuracy.n)))


def mnist_elastic(hvd, extension, folder):
    """``pytorch_mnist_elastic.py`` and ``pytorch_imagenet_resnet50_elastic.py``, nobody coming or going."""
    hvd.init()
    dataset = digits()
    sampler = hvd.elastic.ElasticSampler(dataset, shuffle=False)
    loader = DataLoader(dataset, batch_size=BATCH, sampler=sampler)
    model = network(hvd)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * hvd.size(), momentum=0.5)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(),
                                         **{"compression": hvd.Compression.none, **extension(hvd, model)})
    resets = []

    def on_state_reset():
        resets.append(hvd.size())

    @hvd.elastic.run
    def train(state):
        for state.epoch in range(state.epoch, 2):  # noqa: B020  (as the examples have it)
            state.train_sampler.set_epoch(state.epoch)
            for index, (data, target) in enumerate(loader):
                optimizer.zero_grad()
                functional.cross_entropy(model(data), target).backward()
                optimizer.step()
                state.train_sampler.record_batch(index, BATCH)
                if index % 2 == 0:
                    state.commit()
            state.batch = 0
            state.commit()
        return "done"

    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, train_sampler=sampler, epoch=0, batch=0)
    state.register_reset_callbacks([on_state_reset])
    assert train(state) == "done"
    return bits(model.parameters()), 1.0
