"""The asynchronous parameter server for PyTorch models: how a model becomes flat, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hvd_ext.async_ps.core import ParameterServer as Core
from hvd_ext.async_ps.model import HostBuffer


class TorchModel:
    """A module's trainable parameters; they travel as float64 if any is float64, else float32.

    Args:
        parameters: on one device or several.
        cuda_aware: MPI takes device memory; all parameters must then be on one CUDA device.

    Raises:
        TypeError: a parameter is not real floating point.
        ValueError: ``cuda_aware`` without all parameters on one CUDA device.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], *, cuda_aware: bool = False) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        for index, p in enumerate(self.parameters):
            if not p.is_floating_point():
                raise TypeError(f"parameter {index} must be real floating point, got {p.dtype}")
        devices = {p.device for p in self.parameters}
        self.cuda_aware = cuda_aware
        self.on_cuda = any(device.type == "cuda" for device in devices)
        if cuda_aware and (len(devices) != 1 or not self.on_cuda):
            raise ValueError(
                "cuda_aware=True needs all parameters on one CUDA device, got "
                f"{sorted(map(str, devices))}; leave it out to stage through host memory"
            )
        self.shapes: list[tuple[int, ...]] = [tuple(p.shape) for p in self.parameters]
        wide = any(p.dtype == torch.float64 for p in self.parameters)
        self.torch_dtype = torch.float64 if wide else torch.float32
        self.dtype: np.dtype[Any] = np.dtype(np.float64 if wide else np.float32)

    def new_buffer(self) -> TorchBuffer:
        """A flat buffer: in host memory, pinned if the model is on a GPU; on the GPU itself with
        CUDA-aware MPI."""
        return TorchBuffer(self)


class TorchBuffer(HostBuffer):
    """All parameters' entries in one flat tensor (numel,), with a view of it for each parameter."""

    def __init__(self, model: TorchModel) -> None:
        sizes = [p.numel() for p in model.parameters]
        self._model = model
        self._flat = torch.zeros(
            sum(sizes), dtype=model.torch_dtype,
            device=model.parameters[0].device if model.cuda_aware else "cpu",
            pin_memory=model.on_cuda and not model.cuda_aware,
        )
        self._views = [part.view(p.shape) for part, p in
                       zip(self._flat.split(sizes), model.parameters, strict=True)]
        self._leaving: list[torch.cuda.Event] = []  # copies out of it that the host has not waited for
        super().__init__(self._flat if model.cuda_aware else self._flat.numpy())

    @property
    def wire(self) -> Any:
        """What MPI sends and receives; nothing is being copied out of it any more."""
        self._finish_copies()
        return self._wire

    @wire.setter
    def wire(self, memory: Any) -> None:
        self._wire = memory

    def take_weights(self) -> None:
        """Copies the parameters into the buffer."""
        self._copy_from([p.detach() for p in self._model.parameters])

    def take_gradients(self) -> None:
        """Copies the gradients into the buffer; zeros where there is none."""
        self._copy_from([p.grad for p in self._model.parameters])

    def put_weights(self) -> None:
        """Copies the buffer into the parameters; a GPU waits for it, the host does not."""
        with torch.no_grad():
            for p, view in zip(self._model.parameters, self._views, strict=True):
                p.copy_(view, non_blocking=True)
        self._leaving += self._record_events()

    def max_magnitude(self) -> float:
        """The largest magnitude in the buffer; NaN if any entry is NaN."""
        low, high = torch.aminmax(self._flat)
        return float(torch.maximum(-low, high))

    def read_entries(self) -> Any:
        """The buffer's entries as a NumPy array; a copy with CUDA-aware MPI."""
        return self._flat.cpu().numpy()

    def write_entries(self, entries: Any) -> None:
        """Overwrites the buffer with a NumPy array."""
        self._finish_copies()
        self._flat.copy_(torch.from_numpy(entries))

    def _copy_from(self, tensors: Sequence[torch.Tensor | None]) -> None:
        self._finish_copies()
        with torch.no_grad():
            for view, tensor in zip(self._views, tensors, strict=True):
                if tensor is None:
                    view.zero_()
                else:
                    view.copy_(tensor.to_dense() if tensor.is_sparse else tensor,
                               non_blocking=True)
        for event in self._record_events():  # MPI must not overtake a copy from a GPU
            event.synchronize()

    def _record_events(self) -> list[torch.cuda.Event]:
        """Of the work queued on each GPU of the model so far."""
        devices = {p.device for p in self._model.parameters if p.is_cuda}
        return [torch.cuda.current_stream(device).record_event() for device in devices]

    def _finish_copies(self) -> None:
        while self._leaving:
            self._leaving.pop().synchronize()


class ParameterServer(Core):
    """Asynchronous SGD over MPI for a PyTorch model, in place of an optimizer.

    ::

        ps = hvd.ParameterServer(model, lr=0.1, rule="dc-asgd-a")
        if ps.is_server:
            ps.serve()
        else:
            for x, y in batches(ps.worker, ps.workers):
                model.zero_grad()
                loss(model(x), y).backward()
                ps.step()
            ps.finish()

    Buffers of the model (BatchNorm's running statistics) stay each worker's own.

    Args:
        model: a module, or a sequence of parameters; on the same ranks the same one.
        cuda_aware: hand device memory to MPI, which must have been built for it; by default GPU
            tensors are staged through pinned host memory.
        settings: as of :class:`hvd_ext.async_ps.core.ParameterServer`.

    Raises:
        As :class:`hvd_ext.async_ps.core.ParameterServer`.
    """

    def __init__(self, model: torch.nn.Module | Sequence[torch.Tensor], *, cuda_aware: bool = False,
                 **settings: Any) -> None:
        parameters = model.parameters() if isinstance(model, torch.nn.Module) else model
        super().__init__(TorchModel(list(parameters), cuda_aware=cuda_aware), **settings)
