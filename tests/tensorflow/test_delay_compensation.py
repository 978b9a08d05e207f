"""``op=hvd.DelayCompensated`` under TensorFlow, against the float64 oracle and against PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")
pytest.importorskip("torch", reason="the shared problems and the cross-check need PyTorch")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.problems import UNEVEN  # noqa: E402
from tests.tensorflow import synthetic_steps, training  # noqa: E402

LR = 0.2


def torch_tests():
    """The PyTorch tests; Horovod serves one framework a process, so never on a TensorFlow rank."""
    from tests.torch import test_delay_compensation

    return test_delay_compensation


def microbatches(average):
    variables = synthetic_steps.make_variables(UNEVEN)
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(LR), op=hvd.DelayCompensated(virtual_workers="microbatch"),
        backward_passes_per_step=2, average_aggregated_gradients=average)
    scale = 1.0 if average else 0.5
    return synthetic_steps.run_steps(optimizer, variables, hvd.rank(), 3, compiled=True, passes=2,
                                     change=lambda step, gradients: [scale * g for g in gradients])


@pytest.mark.distributed
@pytest.mark.parametrize("average", [True, False])
def test_microbatches_are_workers(ranks, average):
    found = ranks(2, init="tensorflow").run(microbatches, average, timeout=150)
    for step, (_, landed) in enumerate(torch_tests().oracle_steps({}, 4, steps=3, lrs=(LR, LR))):
        for rank in found:
            np.testing.assert_allclose(rank[step], landed, rtol=2e-5, atol=2e-6)


def save_and_continue(folder):
    rank, size = hvd.rank(), hvd.size()
    op = hvd.DelayCompensated()
    model = training.fit(training.dense_model(),
                         hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), op=op),
                         rank, size, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0),
                                                hvd.callbacks.AssertReplicasEqualCallback(2)])
    path = f"{folder}/model{rank}.keras"
    model.save(path)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    stem = checkpoint.write(f"{folder}/checkpoint{rank}")
    again = hvd.load_model(path, op=op)
    restored = training.dense_model()
    restored.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), op=op),
                     "mse")
    restored.optimizer.build(restored.trainable_variables)
    tf.train.Checkpoint(model=restored, optimizer=restored.optimizer).read(
        stem).assert_existing_objects_matched()
    hvd.allreduce([0.0], name="saved")
    if rank == 1:
        with pytest.warns(UserWarning, match="saved by rank 0 of 2 and is loaded by rank 1 of 2"):
            hvd.load_model(f"{folder}/model0.keras", op=op)
    hvd.load_model(f"{folder}/model0.keras", op=op, reset_per_rank_state=True)
    for one in (model, again, restored):
        training.fit(one, one.optimizer, rank, size, epochs=1)
    return [training.weights(one) for one in (model, again, restored)]


@pytest.mark.distributed
def test_fit_save_load_continue(ranks, tmp_path):
    by_rank = ranks(2, init="tensorflow").run(save_and_continue, str(tmp_path), timeout=200)
    for rank in by_rank:
        for one in rank:
            for mine, first in zip(one, by_rank[0][0], strict=True):
                np.testing.assert_array_equal(mine, first)


def nan_on_one_rank(order):
    variables = synthetic_steps.make_variables([(5,), (3,)])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(LR), op=hvd.DelayCompensated(order=order),
                                         groups=2)
    kept = []

    def spoil(step, gradients):
        kept.append([ms.numpy() for ms in optimizer._hvd_ext.reducer.mean_square.values()])
        bad = step == 1 and hvd.rank() == 1
        return [tf.fill(g.shape, np.nan) if bad and number == 0 else g
                for number, g in enumerate(gradients)]

    seen = synthetic_steps.run_steps(optimizer, variables, hvd.rank(), 3, compiled=True, change=spoil)
    return seen, kept[1:], int(optimizer._hvd_ext.reducer.unusable_steps)


@pytest.mark.distributed
@pytest.mark.parametrize("order", ["norm", "rank"])
def test_nan_reaches_all_ranks_and_never_mean_square(ranks, order):
    found = ranks(2, init="tensorflow").run(nan_on_one_rank, order)
    for seen, (before, after), unusable in found:
        assert np.isnan(seen[1][:5]).all()
        assert np.isfinite(seen[2][5:]).all()
        np.testing.assert_array_equal(seen, found[0][0])
        for one, other in zip(before, after, strict=True):
            assert one.any()
            np.testing.assert_array_equal(one, other)
        assert unusable == 1


def ancestors(operation):
    """All that must have run before an operation of a graph."""
    found, left = set(), [operation]
    while left:
        one = left.pop()
        before = {*(tensor.op for tensor in one.inputs), *one.control_inputs} - found
        found |= before
        left += before
    return found


def what_goes_back_after_what(order):
    """By bucket, the collectives that the second half of its exchange waits for."""
    variables = synthetic_steps.make_variables([(5,), (3,), (4,)])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(LR), op=hvd.DelayCompensated(order=order),
                                         groups=3)
    optimizer.build(variables)
    reducer = optimizer._hvd_ext.reducer

    def reduce(*gradients):
        return reducer(gradients, variables, **reducer.step_inputs(optimizer))[0]

    traced = tf.function(reduce).get_concrete_function(*[tf.TensorSpec(v.shape) for v in variables])
    collectives = [op for op in traced.graph.get_operations() if op.type.startswith("Horovod")]
    assert len(collectives) == 3 + 3 + 1
    waits = {}
    for op in collectives:
        if op.name.endswith("reduced"):
            waits[op.name] = sorted(one.name for one in ancestors(op) if one in collectives)
    gradients = [{one.name for one in ancestors(tensor.op) if one in collectives}
                 for tensor in traced.outputs]
    return waits, [any("agree" in name for name in names) for names in gradients]


@pytest.mark.distributed
def test_by_rank_a_bucket_goes_back_when_it_has_arrived(ranks):
    pool = ranks(2, init="tensorflow")
    for waits, agreed in pool.run(what_goes_back_after_what, "rank"):
        assert len(waits) == 3
        for name, before in waits.items():
            assert len(before) == 1
            assert name.replace("reduced", "part0") == before[0]
        assert agreed == [True] * 3
    for waits, agreed in pool.run(what_goes_back_after_what, "norm"):
        assert all(any("agree" in name for name in before) for before in waits.values())
        assert agreed == [True] * 3


def rates_that_differ():
    """An error in the second step, which applies nothing though buckets have gone back; then on."""
    variables = synthetic_steps.make_variables([(5,), (3,)])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(LR), op=hvd.DelayCompensated(order="rank"))
    synthetic_steps.run_steps(optimizer, variables, hvd.rank(), 1, compiled=True)
    kept = optimizer._hvd_ext.reducer.mean_square[0]
    before = synthetic_steps.flat([*variables, kept])
    optimizer.learning_rate = LR * (1 + hvd.rank())
    with pytest.raises(tf.errors.InvalidArgumentError, match="learning rates differ at this step"):
        synthetic_steps.run_steps(optimizer, variables, hvd.rank(), 1, compiled=True, first=1)
    np.testing.assert_array_equal(synthetic_steps.flat([*variables, kept]), before)
    optimizer.learning_rate = LR
    synthetic_steps.run_steps(optimizer, variables, hvd.rank(), 2, compiled=True, first=1)
    return synthetic_steps.flat(variables), int(optimizer._hvd_ext.reducer.steps)


@pytest.mark.distributed
def test_rates_that_differ_end_the_step_on_all_ranks(ranks):
    found = ranks(2, init="tensorflow").run(rates_that_differ, timeout=100)
    for weights, steps in found:
        np.testing.assert_array_equal(weights, found[0][0])
        assert steps == 3


def test_bad_input():
    sgd = keras.optimizers.SGD
    op = hvd.DelayCompensated()
    with pytest.raises(ValueError, match="needs backward_passes_per_step above 1"):
        hvd.DistributedOptimizer(sgd(0.1), op=hvd.DelayCompensated(virtual_workers="microbatch"))
    with pytest.raises(ValueError, match="cannot be combined"):
        hvd.DistributedOptimizer(sgd(0.1), op=op, compression=hvd.Compression.topk(0.1))
    import hvd_ext.tensorflow as tensors

    with pytest.raises(ValueError, match="needs optimizer="):
        tensors.DistributedGradientTape(tf.GradientTape(), op=op)
