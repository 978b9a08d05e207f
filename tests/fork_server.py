"""Ranks that start from a process which has imported the framework already.

Importing TensorFlow costs a rank four seconds of processor time, PyTorch one and a half; the tests
start hundreds. So a server imports it once and forks. The launcher starts a stub in the rank's
place, which hands its arguments, environment and open files to the server, waits for the rank and
ends as it ended; signals reach the rank, and a rank whose stub is gone is killed::

    python -I -S tests/fork_server.py ADDRESS MODULE ARGUMENTS    # instead of python -m MODULE ARGUMENTS

Even and odd ranks come from two servers with different seeds of ``hash``: what goes by the order
of a set still differs between ranks. After its imports a server has one thread, so that nothing is
lost by forking it. Where it has more, ranks are started as usual, with a warning.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import pickle
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK")
MODULES = {
    "torch": ("numpy", "pytest", "torch", "torch._dynamo", "hvd_ext.torch"),  # an optimizer imports dynamo
    "tensorflow": ("numpy", "pytest", "tensorflow", "keras", "hvd_ext.tensorflow.keras"),
}
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SERVERS = 2  # rank modulo this
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# What is read while a framework is imported; the rest of the environment may differ from the server's.
FIXED = ("PATH", "PYTHON", "LD_", "OMP_", "MKL_", "CUDA_", "NCCL_", "TORCH_", "PYTORCH_", "TF_ENABLE_",
         "XLA_", "KERAS_")


def stub(address: str, module: str, *arguments: str) -> None:
    """Have a rank forked, and end as it does."""
    rank = next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"{address}.{rank % SERVERS}")
    request = pickle.dumps((module, arguments, dict(os.environ), os.getcwd()))
    socket.send_fds(connection, [len(request).to_bytes(8, "little")], [0, 1, 2])
    connection.sendall(request)
    pid = int.from_bytes(_read(connection, 8), "little")
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: _signal(pid, number))
    status = int.from_bytes(_read(connection, 8), "little", signed=True)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("the process that forks ranks is gone")
        data += part
    return data


def serve(address: str, front_end: str) -> None:
    """Fork ranks until standard input ends; a rank returns from here with its request in place."""
    for name in MODULES[front_end]:
        importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) > 1 or threading.active_count() > 1:
        sys.exit("there are threads after the import, which would be missing in a forked rank")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.part")
    listener.listen(64)
    os.rename(f"{address}.part", address)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    ranks: dict[socket.socket, tuple[int, int]] = {}  # by the stub's connection: pid and its descriptor

    def forget(connection: socket.socket) -> None:
        _, descriptor = ranks.pop(connection)
        for one in (connection, descriptor):
            selector.unregister(one)
        os.close(descriptor)
        connection.close()

    while True:
        for key, _ in selector.select():
            source = key.fileobj
            if source == 0:
                for pid, _ in ranks.values():
                    _signal(pid, signal.SIGKILL)
                os._exit(0)
            if source is listener:
                connection, _ = listener.accept()
                size, files, _, _ = socket.recv_fds(connection, 8, 3)
                request = pickle.loads(_read(connection, int.from_bytes(size, "little")))
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    for one in (listener, connection, *ranks):
                        one.close()
                    for _, descriptor in ranks.values():
                        os.close(descriptor)
                    return _become(files, *request)
                for one in files:
                    os.close(one)
                descriptor = os.pidfd_open(pid)
                ranks[connection] = pid, descriptor
                selector.register(connection, selectors.EVENT_READ)
                selector.register(descriptor, selectors.EVENT_READ, connection)
                connection.sendall(pid.to_bytes(8, "little"))
            elif key.data is not None and key.data in ranks:  # a rank has ended
                pid, _ = ranks[key.data]
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):
                    key.data.sendall(status.to_bytes(8, "little", signed=True))
                forget(key.data)
            elif source in ranks:  # a stub has ended before its rank
                pid, _ = ranks[source]
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                forget(source)


def _become(files: list[int], module: str, arguments: tuple[str, ...], environment: dict[str, str],
            folder: str) -> None:
    """Make this process what ``python -m MODULE ARGUMENTS`` begins with."""
    os.setsid()
    for number, one in enumerate(files):
        os.dup2(one, number)
        os.close(one)
    for name in [name for name in os.environ if name not in environment]:
        del os.environ[name]
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv[:] = [module, *arguments]
    sys.path[0] = folder


class Servers:
    """Those of this session, started when they are first needed; they end with it."""

    def __init__(self) -> None:
        self.addresses: dict[str, str] = {}
        self.environment: dict[str, str] = {}
        self.processes: list[subprocess.Popen[bytes]] = []

    def command(self, front_end: str | None, module: str, *arguments: str,
                environment: Mapping[str, str]) -> list[str]:
        """The command of one rank, forked if it can be.

        Args:
            front_end: "torch", "tensorflow", or something else for a process of its own.
            module: what the rank runs, as ``python -m`` does.
            arguments: the module's.
            environment: the rank's. Where it differs from the servers' in what is read while a
                framework is imported, the rank gets a process of its own.
        """
        if front_end not in MODULES or not self._start(front_end, environment):
            return [sys.executable, "-m", module, *arguments]
        return [sys.executable, "-I", "-S", __file__, self.addresses[front_end], module, *arguments]

    def _start(self, front_end: str, environment: Mapping[str, str]) -> bool:
        if not self.environment:
            self.environment = dict(environment)
        if any(self.environment.get(name) != environment.get(name) and name.startswith(FIXED)
               for name in {*self.environment, *environment}):
            return False
        if front_end in self.addresses:
            return bool(self.addresses[front_end])
        folder = tempfile.mkdtemp(prefix="forks-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        address = self.addresses[front_end] = f"{folder}/{front_end}"
        started = []
        for number in range(SERVERS):
            started.append(subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", "--serve", f"{address}.{number}", front_end],
                env={**environment, "PYTHONHASHSEED": str(1 + number)}, stdin=subprocess.PIPE,
                cwd=ROOT, start_new_session=True))
        self.processes += started
        while not all(os.path.exists(f"{address}.{number}") for number in range(SERVERS)):
            if any(process.poll() is not None for process in started):
                warnings.warn(f"ranks of {front_end} cannot be forked here, and are started one by one",
                              stacklevel=3)
                self.addresses[front_end] = ""
                return False
            time.sleep(0.02)
        return True


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(*sys.argv[2:])
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        stub(*sys.argv[1:])
