"""Asynchronous device-to-host copies of small tensors.

``float(tensor)`` waits for all that was queued on the device before it, and what is queued after it
waits for the copy. Here the copy has a stream of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


class AsyncHostCopy:
    """A tensor's copy in host memory: begun now, whole once ``read()`` returns.

    Of a CUDA tensor the copy starts when the work queued so far is done. Nothing that is queued later waits
    for it, and ``read()`` waits for this copy alone. A CPU tensor is its own copy.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._host = tensor.detach()
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            stream = _STREAMS.get(tensor.device)
            if stream is None:
                stream = _STREAMS[tensor.device] = torch.cuda.Stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                self._host.copy_(tensor.detach(), non_blocking=True)
                self._copied = stream.record_event()
            tensor.record_stream(stream)  # its memory is not given to others before

    def read(self) -> torch.Tensor:
        """The copy, on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        return self._host


def is_host_readable(tensor: torch.Tensor) -> bool:
    """Whether the host may read it without waiting for a device."""
    return not tensor.is_cuda


def on_host(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors on the CPU; all copies are begun before the first is waited for."""
    return [copy.read() for copy in [AsyncHostCopy(tensor) for tensor in tensors]]
