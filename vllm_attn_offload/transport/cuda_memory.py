# SPDX-License-Identifier: Apache-2.0
"""A GPU that shares its memory with other processes. Has not run on one yet."""

from __future__ import annotations

import torch

from vllm_attn_offload.transport.cuda_driver import MappedMemory


class CudaMemory:
    """``DeviceMemory`` of a GPU.

    Args:
        memory: Owned from here on.
        device: The GPU that reads and writes it.
    """

    def __init__(self, memory: MappedMemory, device: torch.device) -> None:
        self._memory = memory
        self._device = device
        self.descriptor = memory.descriptor
        self.bytes = tensor_at(memory.address, memory.num_bytes, device)

    def close(self) -> None:
        """Wait for the GPU, and unmap."""
        if self.descriptor >= 0:
            self.descriptor = -1
            torch.cuda.synchronize(self._device)
            self._memory.close()


class CudaDevice:
    """``SharedDevice`` of a GPU.

    Args:
        device: The CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)  # initialises CUDA
        # A device without an index is the one that is current now.
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self.name = str(torch.cuda.get_device_properties(index).uuid)

    def allocate(self, num_bytes: int) -> CudaMemory:
        """New memory of the GPU."""
        memory = MappedMemory.allocate(num_bytes, self._device.index)
        return CudaMemory(memory, self._device)

    def map(self, descriptor: int, num_bytes: int) -> CudaMemory:
        """Memory that another process allocated with `allocate`."""
        memory = MappedMemory.map(descriptor, num_bytes, self._device.index)
        return CudaMemory(memory, self._device)


def tensor_at(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """Memory that the caller keeps, as uint8."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, num_bytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
