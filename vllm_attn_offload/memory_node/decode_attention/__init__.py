# SPDX-License-Identifier: Apache-2.0
"""Decode attention over paged KV blocks: one interface, one file per kernel.

Chooses the kernel of a node. A kernel's module, and torch or triton with it, is
imported only where it attends.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from vllm_attn_offload.memory_node.decode_attention.base import DecodeAttention
from vllm_attn_offload.memory_node.extras import (
    check_extra,
    install_command,
    missing_modules,
)

logger = logging.getLogger(__name__)

#: Names that ``--attention-kernel`` takes.
KERNELS = ("auto", "cpp", "torch", "triton")
_IN_BASE_INSTALL = "--attention-kernel auto and cpp, with --device cpu"


def create_decode_attention(kernel: str, device: str) -> DecodeAttention[Any, Any]:
    """Create the kernel that a node attends with.

    Args:
        kernel: One of ``KERNELS``; "auto" takes the fastest that works on the device.
        device: What holds the blocks, as ``--device`` takes it.

    Raises:
        ValueError: The kernel does not run on the device or is not installed.
    """
    if kernel == "triton" or device != "cpu":
        return _create_triton(kernel, device)
    if kernel == "torch":
        check_extra("torch", "--attention-kernel torch", _IN_BASE_INSTALL)
        return _create_torch()
    try:
        return _create_cpp()
    except ValueError as error:
        if kernel == "cpp":
            raise
        if missing_modules("torch"):
            raise ValueError(
                f"{error} Or attend with torch, which is slower and not installed "
                f"here: {install_command('torch')}"
            ) from error
        logger.warning("attending with torch, which is slower: %s", error)
        return _create_torch()


def _create_torch() -> DecodeAttention[Any, Any]:
    # Late, as torch everywhere on a node: importing it takes 1.5 to 4 s.
    import torch

    from vllm_attn_offload.memory_node.decode_attention.torch_attention import (
        TorchDecodeAttention,
    )

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return TorchDecodeAttention()


def _create_cpp() -> DecodeAttention[Any, Any]:
    from vllm_attn_offload.memory_node.decode_attention.cpp_attention import (
        CppDecodeAttention,
    )
    from vllm_attn_offload.native.attention import load_cpu_library

    try:
        library = load_cpu_library()
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the compiled CPU kernel cannot be loaded: {error}"
        ) from error
    if library is None:
        raise ValueError(
            "the compiled CPU kernel is missing: there was no C++17 compiler when this "
            "package was installed. Install the wheel for Linux on x86-64, or a "
            "compiler (Debian: apt install g++), and install the package again."
        )
    return CppDecodeAttention(library, sorted(os.sched_getaffinity(0)))


def _create_triton(kernel: str, device: str) -> DecodeAttention[Any, Any]:
    if kernel not in ("auto", "triton"):
        raise ValueError(
            f"--attention-kernel {kernel} does not run on {device}. Allowed there: "
            'auto and triton. Leave the option out, or use "--device cpu".'
        )
    given = "--attention-kernel triton" if device == "cpu" else f"--device {device}"
    check_extra("gpu-node", given, _IN_BASE_INSTALL)
    if device == "cpu":
        # Read when the kernels are defined, so before their first import.
        os.environ["TRITON_INTERPRET"] = "1"
        logger.warning(
            "Triton's kernels run in its interpreter on the CPU: right, but thousands "
            "of times slower than compiled. Use it for checks only."
        )
    import torch

    from vllm_attn_offload.memory_node.decode_attention.triton_attention import (
        TritonDecodeAttention,
    )
    from vllm_attn_offload.triton_kernels.tiles import architecture_of

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if device == "cpu":
        return TritonDecodeAttention(torch.device(device))
    from vllm_attn_offload.memory_node.decode_attention.cuda_attention import (
        CudaDecodeAttention,
    )

    architecture_of(torch.device(device))  # raises where the GPU is too old
    return CudaDecodeAttention(torch.device(device))
