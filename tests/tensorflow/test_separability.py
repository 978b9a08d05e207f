"""Which Keras optimizers may run on a part of their variables: tried at construction, right or refused."""

from __future__ import annotations

import keras
import pytest
import tensorflow as tf

import hvd_ext.tensorflow.keras as hvd
from hvd_ext.sharding import Server
from hvd_ext.tensorflow.sharding import separability
from hvd_ext.tensorflow.sharding.shards import is_elementwise
from tests.tensorflow import training

O = keras.optimizers  # noqa: E741


class NormClipped(O.SGD):
    """Clips by the norm of all gradients in its update, at 1."""

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        grads, _ = tf.clip_by_global_norm(grads, 1.0)
        super()._backend_update_step(grads, trainable_variables, learning_rate)


class NeedsMomentum(NormClipped):
    """Fails on a rank that keeps no momentum at all."""

    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)
        if not sum(int(tf.size(one.value)) for one in self.momentums):
            raise ValueError("no momentum")


class Prodigy(O.SGD):
    """A step size that is estimated over all variables, kept in one variable."""

    def build(self, variables):
        super().build(variables)
        self.distance = self.add_variable((), dtype="float64", name="distance", initializer="ones")

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self.distance.assign_add(sum(tf.cast(tf.reduce_sum(g * g), "float64") for g in grads))
        super()._backend_update_step(grads, trainable_variables, learning_rate)


class Lamb(O.SGD):
    """Each variable's own norm."""

    def update_step(self, gradient, variable, learning_rate):
        gradient = tf.cast(gradient, variable.dtype)
        self.assign_sub(variable, 0.1 * gradient * tf.norm(variable) / tf.norm(gradient))


class Sign(O.SGD):
    elementwise = True

    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, tf.cast(learning_rate, variable.dtype) * tf.sign(gradient))


class SaysElementwise(Lamb):
    elementwise = True


class SaysSeparable(NormClipped):
    separable = True


class Noisy(O.SGD):
    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient + tf.random.normal(variable.shape, dtype=variable.dtype), variable,
                            learning_rate)


class Failing(O.SGD):
    def update_step(self, gradient, variable, learning_rate):
        raise RuntimeError("on a GPU only")


def check(optimizer, where="sharded"):
    separability.check_separable(optimizer, Server(where), cut=is_elementwise(type(optimizer)))


@pytest.mark.parametrize("kind", [NormClipped, Prodigy])
def test_a_statistic_over_all_variables_is_refused(kind):
    with pytest.raises(ValueError, match=rf"server='sharded' cannot be used with {kind.__name__}: .*"
                                         r"server='replicated' or server='rank0'"):
        check(kind(0.1))
    check(kind(0.1), "rank0")


def test_a_refusal_recommends_servers_that_take_the_optimizer():
    with pytest.raises(ValueError, match=r"Use server='replicated'$"):
        check(NeedsMomentum(0.1, momentum=0.9))
    check(NeedsMomentum(0.1, momentum=0.9), "replicated")
    with pytest.raises(ValueError, match="fails where a rank keeps"):
        check(NeedsMomentum(0.1, momentum=0.9), "rank0")


@pytest.mark.parametrize("where", ["sharded", "rank0"])
def test_schedule_free_averages_are_refused(where):
    with pytest.raises(ValueError, match=rf"server='{where}' cannot be used with ScheduleFreeAdamW: it fails "
                                         r"where a rank keeps the state of some parameters only"):
        hvd.DistributedOptimizer(O.ScheduleFreeAdamW(0.01), server=where)
    hvd.DistributedOptimizer(O.ScheduleFreeAdamW(0.01), server="replicated")


@pytest.mark.parametrize("where", ["sharded", "rank0"])
def test_an_update_of_each_variable_by_itself_is_taken(where):
    for optimizer in (Lamb(0.1), Sign(0.1), SaysSeparable(0.1), Lamb(training.schedule(), use_ema=True),
                      Lamb(0.1, clipnorm=0.1, weight_decay=0.1, gradient_accumulation_steps=2)):
        check(optimizer, where)
        assert not optimizer.built
        assert int(optimizer.iterations) == 0


def test_a_wrong_word_of_the_class_is_refused():
    with pytest.raises(ValueError, match=r"SaysElementwise.*an element's update depends.*elementwise = True"):
        check(SaysElementwise(0.1))


def test_an_optimizer_that_cannot_be_tried_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"Failing could not be tried .*on a GPU only.*separable = True"):
        check(Failing(0.1))
    with pytest.raises(ValueError, match=r"Noisy could not be tried .*random numbers.*separable = True"):
        check(Noisy(0.1))


@pytest.mark.parametrize("kind", separability.KNOWN, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_what_is_known_passes_the_trial(kind):
    separability.Trial(kind(0.1), "sharded", cut=is_elementwise(kind)).compare_updates()
    separability.Trial(kind(0.1), "rank0", cut=False).compare_updates()


def test_what_keras_has_and_nobody_knows_of():
    """A new optimizer of Keras is tried like anybody's; this says when there is one."""
    kinds = {kind for kind in vars(O).values() if isinstance(kind, type) and issubclass(kind, O.Optimizer)}
    assert {kind.__name__ for kind in kinds - set(separability.KNOWN)} == {
        "Optimizer", "LossScaleOptimizer", "ScheduleFreeAdamW", "MultiOptimizer"}
