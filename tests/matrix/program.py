"""What a rank of the matrix does: a small training in which rank 1 does one thing otherwise.

``mpirun -np 2 python -m tests.matrix.program FRONT_END METHOD SERVER FAULT``
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import numpy as np

STEPS = 5
WHEN = 2  # the step at which something happens
OTHER_SERVER = {"none": "sharded", "replicated": "rank0", "rank0": "sharded", "sharded": "replicated"}


def say(rank: int, text: str) -> None:
    os.write(1, f"\nrank {rank} {text}\n".encode())  # at once: both ranks write to one place


def happen(fault: str, step: int) -> None:
    """What ends rank 1, or stops it, before its step."""
    if step != WHEN:
        return
    if fault == "raise":
        raise ZeroDivisionError("a bug of one rank")
    if fault == "exit":
        sys.exit(3)
    if fault in ("kill", "stop"):
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)


def extensions(hvd: Any, method: str, fault: str, model: Any) -> dict[str, Any]:
    """Arguments of DistributedOptimizer."""
    other = fault == "setting"
    if fault == "extension":
        method = "delay" if method in ("plain", "fp16", "seng") else "plain"
    if method == "fp16":
        return {"compression": hvd.Compression.none if other else hvd.Compression.fp16}
    if method == "delay":
        return {"op": hvd.DelayCompensated(lam=1.0 if other else 0.5)}
    if method == "topk":
        return {"compression": hvd.Compression.topk(0.5 if other else 0.25, min_size=0)}
    if method == "powersgd":
        return {"compression": hvd.Compression.powersgd(rank=2 if other else 1)}
    if method == "seng":
        return {"preconditioner": hvd.SENG(model, damping=0.2 if other else 0.1, update_freq=2)}
    return {"op": hvd.Sum} if other else {}


def batch(rank: int, step: int, fault: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([rank, step])
    x = rng.normal(size=(8, 6)).astype("float32")
    if fault == "nan" and step == WHEN:
        x[0, 0] = np.nan
    return x, rng.normal(size=(8, 3)).astype("float32")


def train_torch(rank: int, method: str, server: str, fault: str) -> None:
    import torch

    import hvd_ext.torch as hvd

    torch.manual_seed(0)
    hidden = 9 if fault == "shape" else 7
    model = torch.nn.Sequential(torch.nn.Linear(6, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 7),
                                torch.nn.Tanh(), torch.nn.Linear(7, 3, bias=fault != "missing_parameter"))
    dtype = torch.float64 if fault == "dtype" else torch.float32
    model.to(dtype)
    options = extensions(hvd, method, fault, model)
    if server != "none":
        options["server"] = OTHER_SERVER[server] if fault == "server" else server
    elif fault == "server":
        options["server"] = OTHER_SERVER[server]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05),
                                         named_parameters=model.named_parameters(), **options)

    def step(number: int) -> None:
        x, y = (torch.from_numpy(part).to(dtype) for part in batch(rank, number, fault))
        optimizer.zero_grad()
        out = model(x)
        if fault == "missing_gradient" and number == WHEN:
            out = model[4](model[2](x.new_zeros(8, hidden)))  # the first layer takes no part
        torch.nn.functional.mse_loss(out, y).backward()
        optimizer.step()

    for number in range(STEPS):
        if fault == "more_optimizers" and number == WHEN:
            extra = torch.nn.Linear(3, 2)
            more = hvd.DistributedOptimizer(torch.optim.SGD(extra.parameters(), lr=0.1),
                                            named_parameters=extra.named_parameters(),
                                            **extensions(hvd, method, "", extra))
            extra(torch.zeros(4, 3)).sum().backward()
            more.step()
        happen(fault, number)
        step(number)
    if fault == "more_steps":
        step(STEPS)


def train_tensorflow(rank: int, method: str, server: str, fault: str) -> None:
    import keras

    import hvd_ext.tensorflow.keras as hvd

    keras.utils.set_random_seed(0)
    dtype = "float64" if fault == "dtype" else "float32"

    def make() -> Any:
        return keras.Sequential([
            keras.Input((6,), dtype=dtype),
            keras.layers.Dense(9 if fault == "shape" else 7, activation="tanh", dtype=dtype),
            keras.layers.Dense(7, activation="tanh", dtype=dtype),
            keras.layers.Dense(3, use_bias=fault != "missing_parameter", dtype=dtype)])

    model = make()
    options = extensions(hvd, method, fault, model)
    if server != "none" or fault == "server":
        options["server"] = OTHER_SERVER[server] if fault == "server" else server
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.05), **options)
    model.compile(optimizer=optimizer, loss="mse")

    def step(number: int) -> None:
        import tensorflow as tf

        x, y = (part.astype(dtype) for part in batch(rank, number, fault))
        if fault == "missing_gradient" and number == WHEN and method != "seng":
            with tf.GradientTape() as tape:
                hidden = model.layers[1](tf.zeros((8, 7), dtype))
                loss = tf.reduce_mean((model.layers[2](hidden) - y) ** 2)
            gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
            if method in ("plain", "fp16"):  # Horovod reduces what is there; here all ranks must have it
                gradients = [tf.zeros(v.shape, v.dtype) if g is None else g
                             for g, v in zip(gradients, model.trainable_variables, strict=True)]
            optimizer.apply(gradients, model.trainable_variables)
        else:
            model.train_on_batch(x, y)

    for number in range(STEPS):
        if fault == "more_optimizers" and number == WHEN:
            extra = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
            extra.compile(optimizer=hvd.DistributedOptimizer(
                keras.optimizers.SGD(0.1), **extensions(hvd, method, "", extra)), loss="mse")
            extra.train_on_batch(np.zeros((4, 3), "float32"), np.zeros((4, 2), "float32"))
        happen(fault, number)
        step(number)
    if fault == "more_steps":
        step(STEPS)


def main(front_end: str, method: str, server: str, fault: str) -> None:
    if front_end == "torch":
        import hvd_ext.torch as hvd
    else:
        import hvd_ext.tensorflow.keras as hvd
    hvd.init()
    rank = hvd.rank()
    train = train_torch if front_end == "torch" else train_tensorflow
    try:
        train(rank, method, server, fault if rank == 1 else "")
    except Exception as error:
        say(rank, f"failed: {type(error).__name__}: {error}")
        raise
    say(rank, "finished")


if __name__ == "__main__":
    main(*sys.argv[1:])
