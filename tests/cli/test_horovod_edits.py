"""What the edits of Horovod's Python files change, seen on the Horovod that is installed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hvd_ext.cli.environment import unpatched_parts
from hvd_ext.cli.launch import detect_machine
from tests.conftest import LEFT_OUT
from tests.ranks import run_ranks

SPEC = importlib.util.find_spec("horovod")
HOME = Path(SPEC.origin).parent if SPEC and SPEC.origin else Path("/nowhere")


OTHERWISE = unpatched_parts(HOME)
pytestmark = pytest.mark.skipif(
    bool(OTHERWISE), reason=f"Horovod was built with other edits ({', '.join(OTHERWISE[:1])}): "
    "hvd-ext install-horovod")
# Gradients that are not reduced, scaled by the number of ranks: Horovod elastic asks for it in each step.
TAPE = """
import tensorflow as tf, horovod.tensorflow as hvd
hvd.init()
for dtype in (tf.float64, tf.float32, tf.float16):
    rows, row = tf.Variable(tf.ones((4, 2), dtype)), tf.Variable(tf.ones((3,), dtype))
    def gradients():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(rows, [0, 1])) + tf.reduce_sum(row * 2)
        tape = hvd.DistributedGradientTape(tape)
        tape.register_local_source(rows)
        tape.register_local_source(row)
        return tape.gradient(loss, [rows, row])
    for run in (gradients, tf.function(gradients)):
        sparse, dense = run()
        assert sparse.values.dtype == dense.dtype == dtype
        assert tf.reduce_all(sparse.values == 1) and tf.reduce_all(dense == 2)
print("the dtypes stay")
"""


def machine_mpi() -> dict[str, str]:
    """What one rank without a launcher needs where Open MPI is a wheel's."""
    machine = detect_machine()
    return {"OPAL_PREFIX": machine.prefix} if machine.wheel else {}


def test_newer_mpich_is_recognised_with_its_network_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    mpi_run = importlib.import_module("horovod.runner.mpi_run")
    ran: list[str] = []
    said = ("HYDRA build details:\n  Version: 4.1", 0)
    monkeypatch.setattr(mpi_run.tiny_shell_exec, "execute", lambda *_: said)
    monkeypatch.setattr(mpi_run.safe_shell_exec, "execute", lambda command, **_: ran.append(command) or 0)
    settings = SimpleNamespace(
        nics={"eth1"}, tcp_flag=None, ssh_port=None, ssh_identity_file=None, hosts="h1:1,h2:1", num_proc=2,
        prefix_output_with_timestamp=False, binding_args=None, extra_mpi_args=None, output_filename=None,
        run_func_mode=True, verbose=0)
    mpi_run.mpi_run(settings, {"eth1"}, {"PATH": "/usr/bin"}, ["python", "train.py"])
    assert "-hosts h1,h2" in ran[0]
    assert "-iface eth1" in ran[0]
    with pytest.raises(Exception, match="take one network interface, got: eth0, eth1"):
        mpi_run.mpi_run(settings, {"eth0", "eth1"}, {"PATH": "/usr/bin"}, ["python", "train.py"])


def test_horovodrun_needs_no_distutils() -> None:
    code = "import sys; sys.modules['distutils'] = None; import horovod.runner.launch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif("torch" in LEFT_OUT, reason="PyTorch is left out")
def test_a_tensor_on_a_gpu_is_refused_by_cpu_operations() -> None:
    mpi_ops = importlib.import_module("horovod.torch.mpi_ops")
    if mpi_ops.cuda_built():
        pytest.skip("this Horovod has GPU operations")
    tensor = SimpleNamespace(is_cuda=True, device="cuda:0", type=lambda: "torch.cuda.FloatTensor")
    with pytest.raises(ValueError, match=r"CPU operations only and got a tensor on cuda:0.*--gpu"):
        mpi_ops._check_function(mpi_ops._allreduce_function_factory, tensor)


@pytest.mark.distributed
@pytest.mark.skipif("tensorflow" in LEFT_OUT, reason="TensorFlow is left out")
def test_local_gradients_keep_their_dtype_under_elastic() -> None:
    environ = {**os.environ, "HOROVOD_ELASTIC": "1", "TF_CPP_MIN_LOG_LEVEL": "3", **machine_mpi()}
    done = subprocess.run([sys.executable, "-c", TAPE], env=environ, capture_output=True, text=True,
                          timeout=240)
    assert "the dtypes stay" in done.stdout, done.stderr[-3000:]


def submit_while_the_other_leaves() -> list[str]:
    """Rank 0 submits collectives, some before the other leaves and more until Horovod refuses one, and waits
    for all; how each of them ended."""
    import horovod.torch as hvd
    import torch

    if hvd.rank() == 1:
        hvd.allreduce(torch.zeros(1), name="together")
        hvd.shutdown()
        return []
    handles, said = [], []
    # The splits of an alltoall are freed by Horovod's thread, which takes the interpreter's lock for it.
    for number in range(20):
        splits = torch.tensor([2, 2], dtype=torch.int32)
        handles.append(hvd.alltoall_async(torch.zeros(4), splits, name=f"a{number}"))
    hvd.allreduce(torch.zeros(1), name="together")  # the other leaves from here on
    with contextlib.suppress(hvd.HorovodInternalError):
        while True:
            handles.append(hvd.allgather_async(torch.zeros(4), name=f"b{len(handles)}"))
    for handle in handles:
        try:
            hvd.synchronize(handle)
            said.append("done")
        except hvd.HorovodInternalError as error:
            said.append(str(error))
    return said


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
@pytest.mark.skipif("torch" in LEFT_OUT, reason="PyTorch is left out")
def test_a_shutdown_ends_what_is_submitted_meanwhile(launcher: str) -> None:
    said, _ = run_ranks(submit_while_the_other_leaves, launcher=launcher)
    assert len(said) >= 20
    assert all("Horovod has been shut down" in one for one in said), set(said)
