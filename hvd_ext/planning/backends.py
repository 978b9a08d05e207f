"""The collectives that are measured: Horovod's under PyTorch or TensorFlow, or MPI's."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

FRAMEWORKS = ("torch", "tensorflow")
TENSORS = 8  # of which a measured allreduce consists, as Horovod fuses them
FUSED = 2**16  # bytes from which it does


class Backend(Protocol):
    """Collectives that are waited for, and the framework whose kernels are to be timed ("" for none)."""

    framework: str
    rank: int
    size: int
    local_size: int

    def prepare_collective(self, collective: str, nbytes: int) -> Callable[[], Any]:
        """What runs a collective in which this rank hands over about so many bytes."""

    def gather_values(self, values: Sequence[float]) -> npt.NDArray[Any]:
        """All ranks' numbers, (M, numbers)."""

    def wait_for_all(self) -> None:
        """Wait for all ranks."""


class HorovodBackend:
    """Horovod under PyTorch or TensorFlow.

    Args:
        framework: the one.

    Raises:
        ImportError: there is no Horovod for it.
    """

    def __init__(self, framework: str) -> None:
        self.framework = framework
        self.horovod: Any = importlib.import_module(f"horovod.{framework}")
        if not self.horovod.is_initialized():
            self.horovod.init()
        self.rank, self.size = int(self.horovod.rank()), int(self.horovod.size())
        self.local_size = int(self.horovod.local_size())
        self._number = 0

    def _collective_name(self, what: str) -> str:
        self._number += 1
        return f"hvd_ext/measure/{what}{self._number}"

    def _make_tensor(self, numel: int, half: bool = False) -> Any:
        array = np.ones(max(1, numel), np.float16 if half else np.float32)
        library = importlib.import_module(self.framework)
        return library.from_numpy(array) if self.framework == "torch" else library.constant(array)

    def prepare_collective(self, collective: str, nbytes: int) -> Callable[[], Any]:
        """See :class:`Backend`. The name is the same each time: Horovod knows the collective by then."""
        name, hvd = self._collective_name(collective), self.horovod
        if collective.startswith("allreduce"):
            half = collective == "allreduce_half"
            count = TENSORS if nbytes >= FUSED else 1
            tensors = [self._make_tensor(nbytes // (2 if half else 4) // count, half) for _ in range(count)]
            return lambda: hvd.grouped_allreduce(tensors, name=name, op=hvd.Sum)
        tensor = self._make_tensor(nbytes // 4 // self.size * self.size)  # an alltoall cuts it evenly
        if collective == "alltoall":
            return lambda: hvd.alltoall(tensor, name=name)
        if collective == "broadcast":
            return lambda: hvd.broadcast(tensor, 0, name=name)
        return lambda: hvd.allgather(tensor, name=name)

    def gather_values(self, values: Sequence[float]) -> npt.NDArray[Any]:
        """See :class:`Backend`."""
        row = np.asarray(values, np.float64)[None]
        library = importlib.import_module(self.framework)
        mine = library.from_numpy(row) if self.framework == "torch" else library.constant(row)
        return np.asarray(self.horovod.allgather(mine, name=f"hvd_ext/measure/figures of {row.size}"))

    def wait_for_all(self) -> None:
        """See :class:`Backend`; not every front end has Horovod's own."""
        self.gather_values([0.0])


class MpiBackend:
    """MPI by mpi4py, where there is no Horovod.

    Raises:
        ImportError: there is no mpi4py.
    """

    framework = ""

    def __init__(self) -> None:
        self.mpi: Any = importlib.import_module("mpi4py.MPI")
        self.world = self.mpi.COMM_WORLD
        self.rank, self.size = int(self.world.Get_rank()), int(self.world.Get_size())
        self.local_size = int(self.world.Split_type(self.mpi.COMM_TYPE_SHARED).Get_size())

    def prepare_collective(self, collective: str, nbytes: int) -> Callable[[], Any]:
        """See :class:`Backend`; MPI adds up no half precision: float32 of as many bytes stands for it."""
        count = max(1, nbytes // 4 // self.size) * self.size
        mine = np.ones(max(1, nbytes // 4) if collective.startswith("allreduce") else count, np.float32)
        if collective == "broadcast":
            return lambda: self.world.Bcast(mine)
        result = np.empty(mine.size * (self.size if collective == "allgather" else 1), np.float32)
        call = {"allgather": self.world.Allgather, "alltoall": self.world.Alltoall}.get(
            collective, self.world.Allreduce)
        return lambda: call(mine, result)

    def gather_values(self, values: Sequence[float]) -> npt.NDArray[Any]:
        """See :class:`Backend`."""
        return np.array(self.world.allgather(list(values)), np.float64)

    def wait_for_all(self) -> None:
        """See :class:`Backend`."""
        self.world.Barrier()


def find_voice() -> Backend:
    """Horovod's, else MPI's.

    Raises:
        ImportError: neither is installed.
    """
    for framework in FRAMEWORKS:
        if importlib.util.find_spec(framework) and importlib.util.find_spec("horovod"):
            try:
                return HorovodBackend(framework)
            except ImportError:
                continue
    if importlib.util.find_spec("mpi4py"):
        return MpiBackend()
    raise ImportError("neither Horovod nor mpi4py is installed here")
