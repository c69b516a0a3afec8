# SPDX-License-Identifier: Apache-2.0
"""GPU memory that two processes map, by CUDA's virtual memory management.

A mapping keeps the memory alive: unlike with ``cudaIpcOpenMemHandle``, a peer that is
killed takes nothing away from kernels that still run. The layouts are those of
``cuda.h``. Imports torch where a GPU is used and not before: nodes without one start
faster.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import byref, c_int, c_size_t, c_uint8, c_uint64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

_DESCRIPTOR = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_READ_AND_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE


class DeviceMemory(Protocol):
    """Memory of a device, for as long as one of its mappings is open.

    Attributes:
        descriptor: File descriptor that another process can map.
        bytes: uint8 ``[num_bytes]``, all of it.
    """

    descriptor: int
    bytes: torch.Tensor

    def clear(self) -> None:
        """Fill it with zeros, and wait until they are there."""

    def close(self) -> None:
        """Wait for what this process enqueued, and unmap. Safe to call twice."""


class SharedDevice(Protocol):
    """A device that shares its memory with other processes of the host.

    Attributes:
        name: Identifies the physical device, as long as the host runs.
    """

    name: str

    def allocate(self, num_bytes: int) -> DeviceMemory:
        """Allocate memory, which may hold data of others until it is cleared.

        Raises:
            OSError: There is none.
        """

    def map(self, descriptor: int, num_bytes: int) -> DeviceMemory:
        """Map memory of another process; the descriptor is owned from here on.

        Raises:
            OSError: It is no device memory of that size, or this device cannot reach
                it.
        """


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """Device that a memory node shares, and the bytes of a slot, each way."""

    device: SharedDevice
    request_bytes: int
    reply_bytes: int


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

    def clear(self) -> None:
        """Fill it with zeros, and wait for the GPU."""
        import torch

        self.bytes.zero_()
        torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Wait for the GPU, and unmap."""
        import torch

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
        import torch

        torch.cuda.synchronize(device)  # initialises CUDA
        # A device without an index is the one that is current now.
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self.name = str(torch.cuda.get_device_properties(index).uuid)

    def allocate(self, num_bytes: int) -> CudaMemory:
        """Allocate memory of the GPU, which may hold data of another process.

        Raises:
            OSError: There is none, or it cannot be shared.
        """
        mapped = MappedMemory.allocate(num_bytes, self._device.index)
        return CudaMemory(mapped, self._device)

    def map(self, descriptor: int, num_bytes: int) -> CudaMemory:
        """Map memory that another process allocated with `allocate`.

        Raises:
            OSError: It is no memory of that size, or out of the GPU's reach.
        """
        memory = MappedMemory.map(descriptor, num_bytes, self._device.index)
        return CudaMemory(memory, self._device)


class _Location(ctypes.Structure):
    """``CUmemLocation``."""

    _fields_ = [("type", c_int), ("id", c_int)]


class _Properties(ctypes.Structure):
    """``CUmemAllocationProp``."""

    _fields_ = [
        ("type", c_int),
        ("handle_types", c_int),
        ("location", _Location),
        ("win32", c_void_p),
        ("flags", c_uint8 * 8),
    ]


class _Access(ctypes.Structure):
    """``CUmemAccessDesc``."""

    _fields_ = [("location", _Location), ("flags", c_int)]


class MappedMemory:
    """Memory of a GPU in this process's address space; CUDA must be initialised.

    Attributes:
        descriptor: File descriptor that another process can map.
        address: First byte, as seen from this process and its kernels.
        num_bytes: Size in whole pages of the GPU.

    Args:
        handle: The driver's handle of the allocation; used up.
        descriptor: File descriptor of the allocation; owned from here on.
        num_bytes: Size of the allocation, in whole pages.
        gpu: Index of the GPU that reads and writes it.

    Raises:
        OSError: It is smaller, or out of the GPU's reach.
    """

    def __init__(
        self, handle: c_uint64, descriptor: int, num_bytes: int, gpu: int
    ) -> None:
        self.descriptor = descriptor
        self.num_bytes = num_bytes
        self._range = (c_uint64(0), c_size_t(num_bytes))
        self._is_mapped = False
        try:
            self._map(handle, gpu)
        except OSError:
            self.close()
            raise
        finally:
            # The mapping holds on to the memory.
            _driver().cuMemRelease(handle)
        self.address = self._range[0].value

    @classmethod
    def allocate(cls, num_bytes: int, gpu: int) -> MappedMemory:
        """Allocate memory.

        Raises:
            OSError: There is none, or it cannot be shared.
        """
        properties, size = _whole_pages(num_bytes, gpu)
        handle, descriptor, none = c_uint64(0), c_int(-1), c_uint64(0)
        _call("cuMemCreate", byref(handle), c_size_t(size), byref(properties), none)
        target = byref(descriptor)
        try:
            _call("cuMemExportToShareableHandle", target, handle, _DESCRIPTOR, none)
        except OSError:
            _driver().cuMemRelease(handle)
            raise
        os.set_inheritable(descriptor.value, False)
        return cls(handle, descriptor.value, size, gpu)

    @classmethod
    def map(cls, descriptor: int, num_bytes: int, gpu: int) -> MappedMemory:
        """Map what another process allocated with ``num_bytes``.

        Raises:
            OSError: It is no memory of that size, or out of the GPU's reach.
        """
        handle, source = c_uint64(0), c_void_p(descriptor)
        try:
            size = _whole_pages(num_bytes, gpu)[1]
            _call("cuMemImportFromShareableHandle", byref(handle), source, _DESCRIPTOR)
        except OSError:
            os.close(descriptor)
            raise
        return cls(handle, descriptor, size, gpu)

    def close(self) -> None:
        """Unmap; nothing may run that uses the memory. Safe to call twice."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor < 0:
            return
        os.close(descriptor)
        if self._is_mapped:
            _driver().cuMemUnmap(*self._range)
        if self._range[0]:
            _driver().cuMemAddressFree(*self._range)

    def _map(self, handle: c_uint64, gpu: int) -> None:
        address, size = self._range
        anywhere, none = c_size_t(0), c_uint64(0)
        _call("cuMemAddressReserve", byref(address), size, anywhere, none, none)
        _call("cuMemMap", address, size, c_size_t(0), handle, none)
        self._is_mapped = True
        access = _Access(_Location(1, gpu), _READ_AND_WRITE)
        _call("cuMemSetAccess", address, size, byref(access), c_size_t(1))


def tensor_at(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """View memory that the caller keeps.

    Returns:
        ``[num_bytes]`` uint8.
    """
    import torch

    storage = torch._C._construct_storage_from_data_pointer(address, device, num_bytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _whole_pages(num_bytes: int, gpu: int) -> tuple[_Properties, int]:
    """Return how memory is allocated, and its size; both sides round up alike."""
    properties = _Properties(
        type=1,  # pinned, the only one there is
        handle_types=_DESCRIPTOR,
        location=_Location(1, gpu),  # a device
    )
    page = c_size_t(0)
    _call("cuMemGetAllocationGranularity", byref(page), byref(properties), 0)
    return properties, -(-num_bytes // page.value) * page.value


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        raise OSError(f"{name} failed with CUDA error {status}")
