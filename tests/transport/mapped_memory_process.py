# SPDX-License-Identifier: Apache-2.0
"""Maps, fills and lets go of memory of the driver that stands in for CUDA's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from vllm_attn_offload.transport.cuda_memory import MappedMemory, tensor_at

GPU, PAGE = 3, 2 << 20


def refused(descriptor: int, num_bytes: int, gpu: int = GPU) -> str:
    """Why memory cannot be mapped."""
    try:
        MappedMemory.map(descriptor, num_bytes, gpu)
    except OSError as error:
        return str(error)
    return ""


def num_open() -> tuple[int, int]:
    """Descriptors, and mappings of the stand-in's memory."""
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("memfd:gpu")


def main() -> None:
    torch.set_num_threads(1)  # a team of threads would not survive the fork
    before = num_open()
    memory = MappedMemory.allocate(PAGE + 1, GPU)
    assert memory.num_bytes == 2 * PAGE
    ours = tensor_at(memory.address, memory.num_bytes, torch.device("cpu"))
    ours.fill_(7)
    child = os.fork()
    if not child:
        theirs = MappedMemory.map(os.dup(memory.descriptor), PAGE + 1, GPU)
        memory.close()
        rows = tensor_at(theirs.address, theirs.num_bytes, torch.device("cpu"))
        is_same = bool((rows == 7).all())
        rows[-1] = 9
        os._exit(0 if is_same else 1)
    assert os.waitpid(child, 0)[1] == 0
    # What the other process wrote is here, and stays although it has ended.
    assert int(ours[-1]) == 9
    same = MappedMemory.map(os.dup(memory.descriptor), PAGE + 1, GPU)
    memory.close()
    memory.close()
    assert int(tensor_at(same.address, 1, torch.device("cpu"))[0]) == 7
    assert "cuMemMap failed" in refused(os.dup(same.descriptor), 3 * PAGE)
    assert "Granularity failed" in refused(os.dup(same.descriptor), PAGE, gpu=2)
    assert "cuMemImport" in refused(os.pipe()[0], PAGE)
    same.close()
    try:
        MappedMemory.allocate(17 * PAGE, GPU)
    except OSError as error:
        assert "cuMemCreate failed with CUDA error 2" in str(error)  # noqa: PT017
    assert num_open() == (before[0] + 1, before[1])  # the pipe's other end
    sys.stdout.write("done\n")


if __name__ == "__main__":
    main()
