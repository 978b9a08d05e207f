"""Trainings under Horovod elastic, one per extension; what its ranks saw goes into files of one folder.

``horovodrun ... python -m tests.tensorflow.elastic_program FOLDER loop`` trains with a loop of its own, every
model in a ``tf.function`` made once; ``fit`` in place of ``loop`` trains one in ``model.fit``.
``train_all()`` and ``fit()`` are the same without changes of ranks.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import hvd_ext.tensorflow.keras as hvd
from hvd_ext.tensorflow.elastic import TensorFlowState

STEPS, FIT_STEPS = 25, 16
TWO, THREE = "localhost:2\n", "localhost:2\n127.0.0.1:1\n"
# From this step on the discovery script names these hosts. The last host does not leave: it is killed.
HOSTS = {0: TWO, 4: THREE, 9: TWO, 14: THREE}
KILL = 19
FIT_HOSTS = {0: TWO, 5: THREE, 10: TWO}


def topk():
    return hvd.Compression.topk(0.25, min_size=0)


METHODS = {
    "plain": lambda model: {},
    "delay": lambda model: {"op": hvd.DelayCompensated(0.5)},
    "topk": lambda model: {"compression": topk()},
    "powersgd": lambda model: {"compression": hvd.Compression.powersgd(1, min_compression=1.0)},
    "seng": lambda model: {"preconditioner": hvd.SENG(model, damping=0.5, update_freq=3)},
    "rank0": lambda model: {"server": "rank0"},
    "sharded": lambda model: {"server": "sharded"},
    "topk_sharded": lambda model: {"server": hvd.Server("sharded", downlink=topk()), "compression": topk()},
    "topk_late": lambda model: {"overlap": hvd.DelayedUpdate(1.0), "compression": topk()},
}


def make(method):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(16, activation="tanh"),
                              keras.layers.Dense(3)])
    options = METHODS[method](model)
    if "server" in options or method == "plain":
        inner = keras.optimizers.Adam(0.02, name=method)
    else:
        inner = keras.optimizers.SGD(0.1, momentum=0.5, name=method)
    optimizer = hvd.DistributedOptimizer(inner, name=method, **options)
    optimizer.build(model.trainable_variables)
    return model, optimizer


def data(step, rank):
    rng = np.random.default_rng([1, step, rank])
    x = rng.standard_normal((64, 6)).astype("float32")
    teacher = np.random.default_rng(2).standard_normal((6, 3)).astype("float32")
    return x, np.sin(x @ teacher)


def loss_of(model):
    found = [np.mean((np.asarray(model(x)) - y) ** 2) for x, y in (data(10_000 + k, 0) for k in range(8))]
    return float(np.mean(found))


def whole(optimizer):
    """What must be the same whoever is there after a commit: all but what each rank keeps alone."""
    wrapper = optimizer._hvd_ext
    own = [*wrapper.reducer.local_state(), wrapper.reducer.stamp, wrapper.server_stamp]
    return [np.array(one) for one in optimizer.variables
            if not any(getattr(one, "value", one) is other for other in own)]


class Hosts:
    """Brings hosts and takes them away, at the steps that ``plan`` names, and waits until it is so."""

    def __init__(self, folder, plan):
        self.folder, self.plan = folder, plan

    def meet(self, state):
        if self.folder is None:
            return
        wanted = self.plan[max(step for step in self.plan if step <= state.step)]
        if hvd.rank() == 0 and state.step in self.plan:
            (self.folder / "hosts").write_text(wanted)
        while state.step in self.plan and hvd.size() != wanted.count("\n") + 1:
            time.sleep(0.1)
            state.check_host_updates()

    def saw(self, state, what):
        if self.folder is not None:
            with (self.folder / f"{what}.{os.environ['HOROVOD_HOSTNAME']}.{hvd.rank()}").open("a") as file:
                file.write(f"{state.step} {hvd.size()}\n")


def train_all(folder=None, methods=tuple(METHODS)):
    """Final loss and report by method."""
    made = {method: make(method) for method in methods}
    hosts = Hosts(folder, HOSTS)

    def step_of(model, optimizer):
        @tf.function
        def step(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            optimizer.apply_gradients(
                zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True))
            return loss
        return step

    steps = {method: step_of(*one) for method, one in made.items()}
    state = TensorFlowState([one for model, optimizer in made.values()
                             for one in (*model.variables, *optimizer.variables)], step=0)
    before = {}

    @hvd.elastic.run
    def train(state):
        for method, kept in before.items():  # a rank that has stayed: what it committed is there still
            for mine, now in zip(kept, whole(made[method][1]), strict=True):
                np.testing.assert_array_equal(mine, now, err_msg=method)
        while state.step < STEPS:
            hosts.meet(state)
            if folder is not None and state.step == KILL and os.environ["HOROVOD_HOSTNAME"] == "127.0.0.1":
                (folder / "hosts").write_text(TWO)
                os.kill(os.getpid(), signal.SIGKILL)
            x, y = data(state.step, hvd.rank())
            for method, (model, _) in made.items():
                steps[method](x, y)
                hvd.assert_replicas_equal(model)
            state.step += 1
            hosts.saw(state, "seen")
            state.save()
            before.update({method: whole(optimizer) for method, (_, optimizer) in made.items()})
            state.check_host_updates()

    train(state)
    return {method: {"loss": loss_of(model), "lost_residuals": optimizer.report().get("dropped_residuals")}
            for method, (model, optimizer) in made.items()}


class CountSteps(keras.callbacks.Callback):
    """After each batch: counts it in the state, and lets hosts come and go."""

    def __init__(self, state, hosts):
        super().__init__()
        self.state, self.hosts = state, hosts

    def on_train_batch_end(self, batch, logs=None):
        self.state.step += 1
        hvd.assert_replicas_equal(self.model)
        self.hosts.saw(self.state, "fitted")

    def on_train_batch_begin(self, batch, logs=None):
        self.hosts.meet(self.state)


def fit(folder=None):
    """The same with ``model.fit``, for TopK with a sharded server, and Horovod's callback that commits."""
    model, optimizer = make("topk_sharded")
    model.compile(optimizer, "mse")
    state = hvd.elastic.KerasState(model, step=0)
    hosts = Hosts(folder, FIT_HOSTS)

    @hvd.elastic.run
    def train(state):
        batches = [data(step, hvd.rank()) for step in range(state.step, FIT_STEPS)]
        x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        model.fit(x, y, batch_size=64, shuffle=False, epochs=1, verbose=0,
                  callbacks=[CountSteps(state, hosts), hvd.elastic.CommitStateCallback(state)])

    train(state)
    return {"loss": loss_of(model), "lost_residuals": optimizer.report()["dropped_residuals"]}


def main(folder, *methods):
    hvd.init()
    result = train_all(folder, methods) if methods else fit(folder)
    if hvd.rank() == 0:
        (folder / "result").write_text(repr(result))
    hvd.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
