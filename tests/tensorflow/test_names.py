"""Whatever imports under Horovod's names imports under ours, and has all that Horovod's module has."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import types

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.keras  # noqa: E402
import hvd_ext.tensorflow.keras  # noqa: E402

NO_MODULES = ("horovod.tensorflow.mpi_lib",)  # a library of operations, nothing that can be imported


def horovods_modules(top):
    package = importlib.import_module(top)
    yield top
    for module in pkgutil.walk_packages(package.__path__, top + "."):
        if module.name not in NO_MODULES:
            yield module.name


@pytest.mark.parametrize(("theirs", "ours"), [("horovod.tensorflow", "hvd_ext.tensorflow"),
                                             ("horovod.keras", "hvd_ext.keras")])
def test_every_module_and_name_of_horovod(theirs, ours):
    found = list(horovods_modules(theirs))
    assert len(found) >= 3
    for name in found:
        module = importlib.import_module(name)
        mine = importlib.import_module(ours + name.removeprefix(theirs))
        missing = [one for one, value in vars(module).items() if not one.startswith("__")
                   and not hasattr(mine, one) and not _imported_framework(value)]
        assert not missing, (name, missing)


def _imported_framework(value):
    return isinstance(value, types.ModuleType) and not value.__name__.startswith("horovod")


def test_a_module_that_is_only_horovods_is_the_same_module():
    import horovod.tensorflow.data.compute_service
    import horovod.tensorflow.mpi_ops

    from hvd_ext.tensorflow.data import compute_service
    from hvd_ext.tensorflow.mpi_ops import _allreduce

    assert compute_service is horovod.tensorflow.data.compute_service
    assert compute_service.__spec__.name == "horovod.tensorflow.data.compute_service"
    assert _allreduce is horovod.tensorflow.mpi_ops._allreduce


def test_what_keras_does_otherwise_is_ours_under_every_name():
    ours = hvd_ext.tensorflow.keras
    assert hvd_ext.keras.PartialDistributedOptimizer is ours.PartialDistributedOptimizer
    assert hvd_ext.keras.callbacks is ours.callbacks
    assert importlib.import_module("hvd_ext.keras.elastic") is ours.elastic
    assert hvd_ext.tensorflow._executing_eagerly()
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = hvd_ext.tensorflow.nothing_of_the_kind
    with pytest.raises(ImportError):
        importlib.import_module("hvd_ext.tensorflow.nothing_of_the_kind")


def test_importing_hvd_ext_alone_imports_no_framework():
    said = subprocess.run(
        [sys.executable, "-c", "import sys, hvd_ext.reducers.registry, hvd_ext.horovod_api.aliases; "
         "print(sorted({'tensorflow', 'keras', 'torch', 'horovod'} & set(sys.modules)))"],
        capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_what_keras_2_had():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    for optimizer in (keras.optimizers.SGD(0.1, momentum=0.9),
                      keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1))):
        model.compile(optimizer, "mse", experimental_run_tf_function=False)
        optimizer.build(model.trainable_variables)
        assert [id(one) for one in optimizer.variables()] == [id(one) for one in optimizer.variables]
        assert isinstance(optimizer.variables, list)
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.lr.assign(0.2)
    assert float(optimizer.learning_rate) == pytest.approx(0.2)
    optimizer.lr = 0.4
    assert float(optimizer.learning_rate) == pytest.approx(0.4)
    assert "lr" not in optimizer.get_config()
    with pytest.raises(TypeError, match="unknown_argument"):
        model.compile(optimizer, "mse", unknown_argument=False)


def test_keras_is_extended_once():
    from hvd_ext.tensorflow import keras2

    before = keras.Model.compile, keras.optimizers.SGD.variables, keras.optimizers.SGD.lr
    keras2.install_keras2()
    importlib.reload(keras2).install_keras2()
    assert (keras.Model.compile, keras.optimizers.SGD.variables, keras.optimizers.SGD.lr) == before


def test_an_optimizer_with_an_attribute_lr_of_its_own():
    class Own(keras.optimizers.SGD):
        def __init__(self, rate):
            self.__dict__["lr"] = "mine"
            super().__init__(rate)

    assert Own(0.1).lr == "mine"
    assert float(Own(0.1).learning_rate) == pytest.approx(0.1)
