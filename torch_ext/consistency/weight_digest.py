"""A number for the bits of a tensor, computed where the tensor is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
CHUNK_NUMEL = 2**20  # elements; bounds the memory needed
ODD, MULTIPLIER = 0x1E3779B97F4A7C15, 6364136223846793005


@torch.no_grad()
def digest_tensors(tensors: Sequence[torch.Tensor]) -> list[int]:
    """A 64-bit number for each tensor, equal where the bits are; one wait for the device.

    The sum of its elements' bits, as integers, times a weight for each place, modulo 2^64.
    """
    places: dict[torch.device, torch.Tensor] = {}
    found = []
    for tensor in tensors:
        if tensor.device not in places:
            numbers = torch.arange(CHUNK_NUMEL, dtype=torch.int64, device=tensor.device)
            places[tensor.device] = numbers.mul_(2).add_(1).mul_(ODD)
        found.append(_digest_tensor(tensor.detach(), places[tensor.device]))
    by_device: dict[torch.device, list[int]] = {}
    for device in places:
        ours = [one for one in found if one.device == device]
        by_device[device] = torch.stack(ours).tolist()
    return [by_device[one.device].pop(0) for one in found]


def _digest_tensor(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    bits = tensor.contiguous().reshape(-1)
    bits = bits.view(INTEGERS[bits.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in bits.split(CHUNK_NUMEL):
        total = total.mul_(MULTIPLIER).add_((chunk.to(torch.int64) * places[: chunk.numel()]).sum())
    return total
